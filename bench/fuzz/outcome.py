"""What can become of one damaged file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SAME = "same answer"  # the damage does not matter, or was undone
DIFFERENT = "another answer"  # still a valid file, which says something else
REFUSED = "refused"  # one clear line, status 2
FINE = (SAME, DIFFERENT, REFUSED)

ESCAPED = "exception"  # anything but this project's own errors, or a message that is no single line
CRASH = "crash"  # the process died
HANG = "hang"  # it took longer than the limit
MEMORY = "memory"  # it took more memory than the limit
WRONG = "wrong answer"  # accepted where a check should have refused it
LEFTOVER = "leftover"  # something half-written stayed behind
FAULTS = (ESCAPED, CRASH, HANG, MEMORY, WRONG, LEFTOVER)

# A crash inside an engine library, on a graph whose hashes were forged together with it: counted apart.
LIBRARY_CRASH = "library's crash"


@dataclass(frozen=True)
class Outcome:
    """Of one case."""

    verdict: str  # one of `FINE`, of `FAULTS`, or `LIBRARY_CRASH`
    message: str = ""  # the line that was told, or what went wrong
    mebibytes: float = 0.0  # how far resident memory rose meanwhile, at its peak
    seconds: float = 0.0  # how long it took

    def to_json(self) -> dict[str, Any]:
        """The arguments that make an equal outcome."""
        return asdict(self)


class FaultError(Exception):
    """What an entry point did that it must not.

    Attributes:
        verdict: One of `FAULTS`.
    """

    def __init__(self, verdict: str, message: str) -> None:
        super().__init__(message)
        self.verdict = verdict


class RefusedError(Exception):
    """An entry point refused a file in one clear line, which is the message."""
