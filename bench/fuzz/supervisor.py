"""Runs cases in a worker process, which is replaced when it dies of one or does not end."""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
from concurrent.futures import TimeoutError
from pathlib import Path
from typing import Self

from pebble import ProcessExpired, ProcessPool

from bench.fuzz.case import CRASH, HANG, LIBRARY_CRASH, MEMORY, Case, Outcome
from bench.fuzz.given import Given
from bench.fuzz.registry import ENTRIES
from bench.fuzz.worker import begin, damaged, run_case

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tocom.export.family.compile", "bench.fuzz.registry"])  # one import of torch for all


class Supervisor:
    """Runs cases, of which each may take so many seconds by the clock and add so much to resident memory."""

    def __init__(self, given: Given, *, seconds: float = 120.0, mebibytes: float = 2048.0) -> None:
        self._given, self._seconds, self._mebibytes = given, seconds, mebibytes
        self._scratch = tempfile.TemporaryDirectory(prefix=".cases-", dir=given.folder.parent)
        start = {"initializer": begin, "initargs": (given.folder, Path(self._scratch.name))}
        self._pool = ProcessPool(max_workers=1, context=_processes, **start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.stop()
        self._pool.join()
        self._scratch.cleanup()

    def run(self, case: Case) -> Outcome:
        """Runs a case; one that kills the worker is run again in a new one, to know that it was that case's doing."""
        content = damaged(ENTRIES[case.entry], self._given, case)
        outcome = self.run_file(case, content)
        if outcome.verdict in (CRASH, HANG, MEMORY):
            again = self.run_file(case, content)
            if again.verdict != outcome.verdict:
                return Outcome(outcome.verdict, f"{outcome.message}; not again when it was repeated alone "
                               f"({again.verdict})", outcome.mebibytes, outcome.seconds)  # fmt: skip
        if outcome.verdict == CRASH and ENTRIES[case.entry].forged:
            return Outcome(LIBRARY_CRASH, outcome.message, outcome.mebibytes, outcome.seconds)
        return outcome

    def run_file(self, case: Case, content: bytes) -> Outcome:
        """Runs a case's entry point on another file than the case's."""
        try:
            outcome = self._pool.schedule(run_case, args=(case, content), timeout=self._seconds).result()
        except TimeoutError:
            return Outcome(HANG, f"not done after {self._seconds:.0f} s", 0.0, self._seconds)
        except ProcessExpired as died:
            name = signal.Signals(-died.exitcode).name if died.exitcode < 0 else f"exit status {died.exitcode}"
            return Outcome(CRASH, f"the process died: {name}")
        if outcome.mebibytes > self._mebibytes:
            return Outcome(MEMORY, f"{outcome.mebibytes:.0f} MiB", outcome.mebibytes, outcome.seconds)
        return outcome
