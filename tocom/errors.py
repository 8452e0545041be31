"""The one exception type with which this room refuses what a user gave it."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line: the rule, the value received, where it was found, the way out. The command line prints it
    and exits with status 2; anything else that escapes is a bug.
    """


def brief(error: Exception) -> str:
    """A library's message in one line: its first line, without the advice and the full stop behind it."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")[:200]
