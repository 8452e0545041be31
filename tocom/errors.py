"""The one exception type with which this room refuses what a user gave it."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line: the rule, the value received, where it was found, the way out. The command line prints it
    and exits with status 2; anything else that escapes is a bug.
    """
