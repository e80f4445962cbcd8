"""Synthetic tasks: statements, and the model that learns them."""
