"""How a command ends with a status of its own."""

from __future__ import annotations


class Exit(Exception):  # noqa: N818 - no error: what was to be said is said
    """Ends the command.

    Args:
        status: What the shell sees.
    """

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status
