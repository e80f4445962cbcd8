"""The commands that are no studies: adapt, convert, generate, inspect."""
