"""The error type for mistakes of a user of the command: it prints the single line and exits with 2."""


class UserError(ValueError):
    """A mistake in what the user gave: the message names the argument, what came and what is allowed, in one line."""
