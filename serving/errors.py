"""How serving refuses what it cannot take on now."""

from __future__ import annotations


class BusyError(RuntimeError):
    """More requests wait than the server takes on: a client is told to come back, instead of waiting without an end.

    Attributes:
        retry_after_s: Seconds after which it is worth trying again.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
