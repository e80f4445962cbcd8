"""The error type for mistakes of a user of the command, and the machine's own faults in one line."""

import os


class UserError(ValueError):
    """A mistake in what the user gave: the message names the argument, what came and what is allowed, in one line."""


def machine_fault(error: BaseException) -> str | None:
    """One line for what a machine could not do, such as to write on a full disk or to find the memory; None for others.

    Libraries report the same fault in types of their own, which only the text tells from a mistake in a program.
    """
    text = " ".join(str(error).split())
    kind = type(error).__name__
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'writing'}: {error.strerror}"
    if kind == "SafetensorError" and "I/O error" in text:
        number = text.partition("os error ")[2].rstrip(") ")
        return f"writing: {os.strerror(int(number)) if number.isdigit() else text}"
    if "inline_container.cc" in text and "Reader" not in text:  # PyTorch writes a file, and does not say which
        return "writing: a file could not be written to its end; is the disk full?"
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in text:
        return "there is not enough memory; take a smaller model, shorter sequences or smaller batches"
    return None
