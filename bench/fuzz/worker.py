"""The process that meets the damaged files: it has the libraries loaded, and may die of a case."""

from __future__ import annotations

import gc
import resource
import shutil
import signal
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from bench.fuzz.case import DIFFERENT, ESCAPED, REFUSED, SAME, Case, Entry, FaultError, Outcome, RefusedError
from bench.fuzz.given import Given

_BETWEEN_COLLECTIONS = 25  # cases; each would cost more than most of them
_ADDRESSES = 16 << 30  # bytes that a worker may map beyond what it starts with


@dataclass
class _Place:
    """What this process works with, once `begin` has run."""

    given: Given
    scratch: Path
    cases: int = 0


_place: list[_Place] = []


def begin(folder: Path, scratch: Path) -> None:
    """Loads what no case's memory is to be; the whole files lie in a folder, damaged ones are put into scratch."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which is for the supervisor
    torch.set_num_threads(1)
    given = Given(folder)
    _ = given.source, given.logits
    _limit_addresses()
    gc.freeze()  # collecting what a case leaves is quick then
    _place.append(_Place(given, scratch))


def run_case(case: Case, content: bytes) -> Outcome:
    """Runs a case's entry point on a file."""
    from bench.fuzz.registry import ENTRIES

    (place,) = _place
    place.cases += 1
    if place.cases % _BETWEEN_COLLECTIONS == 0:
        gc.collect()
    return run(ENTRIES[case.entry], place.given, content, place.scratch)


def damaged(entry: Entry, given: Given, case: Case) -> bytes:
    """The file of a case; the same bytes whenever it is asked for."""
    draw = case.random()
    return entry.kinds[case.kind](draw, entry.whole(given, draw))


def run(entry: Entry, given: Given, content: bytes, scratch: Path) -> Outcome:
    """Puts the file of a case where it belongs, runs the entry point on it, and says what came of it."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    try:
        entry.place(given, folder, content)
        before, _ = _resident()
        began = time.perf_counter()
        verdict, message = _verdict(entry, given, folder)
        seconds, (_, peak) = time.perf_counter() - began, _resident()
        return Outcome(verdict, message.replace(str(folder), "..."), max(0.0, peak - before), seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _verdict(entry: Entry, given: Given, folder: Path) -> tuple[str, str]:
    try:
        return (SAME if entry.run(given, folder) else DIFFERENT), ""
    except RefusedError as refused:
        return REFUSED, str(refused)
    except FaultError as fault:
        return fault.verdict, str(fault)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is what this looks for
        frames = traceback.extract_tb(error.__traceback__)
        where = next((frame for frame in reversed(frames) if "site-packages" not in frame.filename), frames[-1])
        place = f"{Path(where.filename).name}:{where.lineno} in {where.name}"
        return ESCAPED, f"{type(error).__name__}: {str(error)[:300]} ({place})"


def _limit_addresses() -> None:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _ADDRESSES, mapped + _ADDRESSES))


def _resident() -> tuple[float, float]:
    """Resident memory now, and its peak since this was asked last, in MiB."""
    status = Path("/proc/self/status").read_text()
    now, peak = (
        int(next(line for line in status.splitlines() if line.startswith(name)).split()[1]) / 1024
        for name in ("VmRSS", "VmHWM")
    )
    Path("/proc/self/clear_refs").write_text("5")
    return now, peak
