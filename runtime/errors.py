"""How this project tells a user that something given to it cannot be used."""

import re

_LONGEST = 1500  # characters of a message
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line: the rule, the value received, where, and the way out. A command prints it on stderr and
    exits with status 2; it is never a traceback.
    """


class GateError(RuntimeError):
    """A check that must hold did not, though everything given could be used.

    The message is one line: what was checked, what was found, and the way out. A command prints it on stderr and exits
    with status 1.
    """


def one_line(text: object) -> str:
    r"""Writes control characters as escapes, so that a hostile file name can neither break a line nor steer a terminal.

    >>> one_line("a\nb")
    'a\\nb'
    """
    return _CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), str(text))


def readable(message: object) -> str:
    """A message in one line that somebody can read: of a very long one, the beginning and the end.

    >>> readable("a file named " + "x" * 100_000 + " is missing")[-20:]
    'xxxxxxxxx is missing'
    """
    line = one_line(message)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 300]} ... {line[-295:]}"


def brief(error: Exception) -> str:
    """A library's message in one line: its first line, without the advice and the full stop behind it."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")[:200]
