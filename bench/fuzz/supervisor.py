"""The process that watches a worker: how long a case takes, how much memory, and whether the worker lives."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from bench.fuzz.case import Case
from bench.fuzz.given import Given
from bench.fuzz.outcome import CRASH, HANG, LIBRARY_CRASH, MEMORY, Outcome
from bench.fuzz.registry import ENTRIES
from bench.fuzz.worker import damaged, work

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["tocom.export.family.compile", "bench.fuzz.registry"]
)  # workers share one import of torch
_START = 180.0  # seconds for a worker to begin
_PATIENCE = 10  # times the processor time that a case may take by the clock
_LEAVE = 5.0  # seconds for one to end by itself


class Supervisor:
    """Runs cases in a worker, and starts another one when it dies; a context manager.

    Args:
        given: The whole files.
        seconds: Of processor time that a case may take; of the clock's, ten times as many, since others may be busy.
        mebibytes: That a case may add to resident memory.
    """

    def __init__(self, given: Given, *, seconds: float = 30.0, mebibytes: float = 2048.0) -> None:
        self._given, self._seconds, self._mebibytes = given, seconds, mebibytes
        self._process: Any = None
        self._connection: Connection | None = None
        self._scratch = tempfile.TemporaryDirectory(prefix=".cases-", dir=given.folder.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._connection.close()  # a worker that waits ends then
            self._process.join(_LEAVE)
        self._end()
        self._scratch.cleanup()

    def run(self, case: Case) -> Outcome:
        """Runs a case; one that kills the worker is run again in a new one, to know that it was that case's doing."""
        outcome = self._run(case)
        if outcome.verdict in (CRASH, HANG, MEMORY):
            again = self._run(case)
            if again.verdict != outcome.verdict:
                return Outcome(outcome.verdict, f"{outcome.message}; not again when it was repeated alone "
                               f"({again.verdict})", outcome.mebibytes, outcome.seconds)  # fmt: skip
        if outcome.verdict == CRASH and ENTRIES[case.entry].forged:
            return Outcome(LIBRARY_CRASH, outcome.message, outcome.mebibytes, outcome.seconds)
        return outcome

    def _run(self, case: Case) -> Outcome:
        return self.run_file(case, damaged(ENTRIES[case.entry], self._given, case))

    def run_file(self, case: Case, content: bytes) -> Outcome:
        """Runs a case's entry point on another file than the case's."""
        if self._process is None:
            self._begin()
        began, start, spent = time.monotonic(), self._resident(), self._processor()
        self._connection.send((case, content))
        peak = start
        while not self._connection.poll(0.05):
            taken, peak = time.monotonic() - began, max(peak, self._resident())
            if not self._process.is_alive() and not self._connection.poll(0):
                return self._dead(peak - start, taken)
            if taken > _PATIENCE * self._seconds or self._processor() - spent > self._seconds:
                self._end()
                return Outcome(HANG, f"not done after {self._seconds:.0f} s", peak - start, taken)
            if peak - start > self._mebibytes:
                self._end()
                return Outcome(MEMORY, f"{peak - start:.0f} MiB and more", peak - start, taken)
        try:
            outcome = self._connection.recv()
        except (EOFError, OSError):
            return self._dead(peak - start, time.monotonic() - began)
        if outcome.mebibytes > self._mebibytes:
            return Outcome(MEMORY, f"{outcome.mebibytes:.0f} MiB", outcome.mebibytes, outcome.seconds)
        return outcome

    def _dead(self, mebibytes: float, seconds: float) -> Outcome:
        self._process.join(10)
        status = self._process.exitcode or 0
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        self._end()
        return Outcome(CRASH, f"the process died: {name}", mebibytes, seconds)

    def _begin(self) -> None:
        self._connection, theirs = _processes.Pipe()
        self._process = _processes.Process(
            target=work, args=(theirs, self._given.folder, Path(self._scratch.name)), daemon=True
        )
        self._process.start()
        theirs.close()
        if not self._connection.poll(_START) or self._connection.recv() != "ready":
            raise RuntimeError("the worker does not begin")

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
        self._process = self._connection = None

    def _processor(self) -> float:
        """Seconds of processor time that the worker has spent."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _resident(self) -> float:
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0.0
        return pages * resource.getpagesize() / 2**20
