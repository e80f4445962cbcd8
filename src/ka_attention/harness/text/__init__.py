"""From files of text to sequences of tokens."""
