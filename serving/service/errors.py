"""Why a server does not answer a request that was fine in itself."""

from __future__ import annotations


class ServingError(RuntimeError):
    """A valid request that is not answered; the message is one line.

    Attributes:
        status: HTTP status that says so.
        retry_after_s: Seconds after which it is worth trying again; None where that is not known.
    """

    status = 500
    retry_after_s: float | None = None


class BusyError(ServingError):
    """More requests wait than the server takes on: a client is told to come back, instead of waiting without an end."""

    status = 503

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineFailedError(ServingError):
    """An engine fails on a batch that fits it, or cannot be opened."""


class WorkerDiedError(ServingError):
    """The process that holds the engines died, and so did the one that replaced it."""

    status = 503
    retry_after_s = 1.0
