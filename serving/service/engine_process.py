"""Engines in a process of their own, so that one that crashes or hangs takes nothing else with it.

The process is restarted when it dies, and the batch that it died on is run once more: a batch has no side effects. A
second death on the same batch is the batch's answer.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from tocom.runtime.errors import InputError
from tocom.runtime.predictor import LoadedFamily, load
from tocom.serving.service.arenas import limit_arenas
from tocom.serving.service.errors import EngineFailedError, WorkerDiedError

_LOG = logging.getLogger("tocom.serving")
_TRIES = 2
_STARTS_WITHIN_S = 60.0  # at least: importing and opening take longer than a batch, however short its limit

_family: LoadedFamily  # of the worker process


class EngineProcess:
    """One process that holds every engine of a family and runs one batch at a time."""

    def __init__(self, folder: Path, *, threads: int | None = None, timeout_s: float = 60.0) -> None:
        """Starts the process and waits until its engines have run once.

        Args:
            folder: Of the family; its files stay as they are while the process lives.
            threads: CPU threads for one call; the engine's choice by default.
            timeout_s: After so long a batch counts as hung, and the process is killed.

        Raises:
            InputError: The family cannot be opened.
            WorkerDiedError: The process died on it.
        """
        self._folder, self._threads, self._timeout_s = folder, threads, timeout_s
        self._lock = threading.Lock()
        self._closed = False
        self.restarts = 0
        self.pid = 0
        self._pool = self._start()

    def infer(self, pixel_values: np.ndarray, degree: int) -> np.ndarray:
        """Runs a batch; see `LoadedFamily.infer`.

        Args:
            pixel_values: As there.
            degree: As there.

        Raises:
            EngineFailedError: The engine fails on a batch that fits it.
            WorkerDiedError: The process died on this batch, and so did the one that replaced it; or none starts.
        """
        with self._lock:
            for _ in range(_TRIES):
                if self._closed:
                    raise WorkerDiedError("the engines were closed")
                try:
                    if self._pool is None:
                        self._pool = self._start()
                        self.restarts += 1
                    return self._pool.submit(_infer, pixel_values, degree).result(self._timeout_s)
                except InputError as error:
                    raise EngineFailedError(str(error)) from error
                except (BrokenProcessPool, TimeoutError) as death:
                    _LOG.warning("the engine process %s %s; it is started again", self.pid,
                                 "hung" if isinstance(death, TimeoutError) else "died")  # fmt: skip
                    self._kill()
        raise WorkerDiedError(f"the engine process died on a batch of {len(pixel_values)} at degree {degree}, twice")

    def _start(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of this process's threads
        pool = ProcessPoolExecutor(1, context, initializer=_belong_to_server)
        try:
            within_s = max(self._timeout_s, _STARTS_WITHIN_S)
            self.pid = pool.submit(_open, self._folder, self._threads).result(within_s)
        except BaseException as error:
            _end(pool)
            if isinstance(error, (BrokenProcessPool, TimeoutError)):
                raise WorkerDiedError("a process for the engines does not start") from error
            raise
        return pool

    def _kill(self) -> None:
        if self._pool is not None:
            _end(self._pool)
            self._pool = None

    def close(self) -> None:
        """Ends the process, after the batch that runs."""
        with self._lock:
            self._closed = True
            self._kill()


def _end(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):  # there is no public way to reach a process that hangs
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    pool.shutdown(wait=True, cancel_futures=True)


def _belong_to_server() -> None:
    """Leaves the end of this process to the server: Ctrl-C and SIGTERM may reach the whole group of processes.

    A server that is killed cannot end its workers, so each one watches for that itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_server, name="tocom-watch", daemon=True).start()


def _end_with_server() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _open(folder: Path, threads: int | None) -> int:
    global _family
    limit_arenas()
    _family = load(folder, threads=threads)
    _family.warm()
    return os.getpid()


def _infer(pixel_values: np.ndarray, degree: int) -> np.ndarray:
    return _family.infer(pixel_values, degree)
