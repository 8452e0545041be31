"""How long the engines of a family take on this machine: from the manifest, from the user's cache, or measured once."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backends import describe
from ..checked_json import Json, read
from ..engines.base import open_engine
from ..errors import InputError, one_line
from ..files import user_cache, write_atomically
from ..manifest import EngineEntry, Family
from .latency import Latency, measure

FORMAT = 1
_SECONDS, _ROUNDS = 2.0, 10
_TOGETHER = 4  # degrees that are open beside the lowest one: all of a large family would fill the memory
_PATIENCE_S = 120.0  # how long another process that measures is waited for
_measuring = threading.Lock()  # two measurements at a time would disturb each other
_warned: set[Path] = set()

Tell = Callable[[str], object]


@dataclass(frozen=True)
class Times:
    """Of one call.

    Attributes:
        p50_ms: Median, in ms.
        p99_ms: 99th percentile, in ms.
    """

    p50_ms: float
    p99_ms: float


def this_machine() -> str:
    """What latencies depend on, in words: the processor, how many cores this process may use, and GPUs."""
    cores = _cores()
    return ", ".join([_processor(), f"{cores} core{'' if cores == 1 else 's'}", *_gpus()])


def local_latencies(
    folder: Path | str,
    family: Family,
    batch: int = 1,
    *,
    fixed: bool = True,
    cache: Path | None = None,
    tell: Tell | None = None,
) -> dict[int, Times]:
    """Times of every engine of a family on this machine.

    They are the manifest's where it was written on this machine and has the batch. Otherwise they are measured, which
    takes some seconds, and kept for the next time; a cache that is damaged is measured again.

    Args:
        folder: Of the family.
        family: Its manifest.
        batch: Images per call.
        fixed: Whether engines are opened for exactly this batch, as where every call has so many images; else for any
            number, which takes longer with libraries that prepare for one (OpenVINO), and is not in the manifest.
        cache: Folder for what was measured; by default tocom/latency in the user's cache folder, $XDG_CACHE_HOME or
            ~/.cache.
        tell: Given a line when something is measured, and once when it cannot be kept.

    Raises:
        InputError: The batch is below 1, the family has no engine, or one cannot run here.
    """
    if batch < 1:
        raise InputError(f"batch must be 1 or more, got {batch}")
    if not family.engines:
        raise InputError(f"{one_line(folder)} has no finished engine: compile one with `tocom compile`")
    tell = tell or (lambda _line: None)
    machine = this_machine()
    known = {entry.degree: _from_manifest(entry, machine, batch) for entry in family.engines}
    if fixed and None not in known.values():
        return known
    circumstances = _circumstances(family, machine, batch, fixed)
    file = _cache_file(cache, circumstances)
    with _measuring:
        if (times := _cached(file, family)) is not None:
            return times
        with _alone(file):
            if (times := _cached(file, family)) is not None:
                return times
            count = len(family.engines)
            tell(f"measuring {count} engine{'' if count == 1 else 's'} at batch {batch} on this machine, once")
            times = _measure(Path(folder), family, batch, fixed)
            _keep(file, circumstances, times, tell)
            return times


def _from_manifest(entry: EngineEntry, machine: str, batch: int) -> Times | None:
    figures = entry.latency_ms.get(str(batch), {})
    if entry.machine != machine or not {"p50", "p99"} <= figures.keys():
        return None
    return Times(figures["p50"], figures["p99"])


def _circumstances(family: Family, machine: str, batch: int, fixed: bool) -> dict[str, Any]:
    """Everything that times depend on: they are known by it."""
    engines = [
        {
            "degree": entry.degree,
            "backend": entry.backend,
            "precision": entry.precision,
            "engine": entry.engine,
            "sha256": dict(sorted(entry.sha256.items())),
        }
        for entry in family.engines
    ]
    libraries = {backend: describe(backend) for backend in sorted({entry.backend for entry in family.engines})}
    return {"format": FORMAT, "machine": machine, "batch": batch, "fixed": fixed, "libraries": libraries,
            "engines": engines}  # fmt: skip


def _cache_file(cache: Path | None, circumstances: dict[str, Any]) -> Path | None:
    key = hashlib.sha256(json.dumps(circumstances, sort_keys=True).encode()).hexdigest()[:32]
    if cache is None and (users := user_cache()) is not None:
        cache = users / "latency"
    return None if cache is None else cache / f"{key}.json"


def _cached(file: Path | None, family: Family) -> dict[int, Times] | None:
    """What was kept; None where there is nothing that can be used."""
    if file is None:
        return None
    try:
        times = read(file, _times)
    except InputError:
        return None
    degrees = {str(entry.degree): entry.degree for entry in family.engines}
    usable = times.keys() == degrees.keys() and all(0 < known.p50_ms <= known.p99_ms for known in times.values())
    return {degree: times[name] for name, degree in degrees.items()} if usable else None


def _times(value: Any) -> dict[str, Times]:
    node = Json(value, "")
    if node.key("format").integer() != FORMAT:
        node.key("format").refuse(str(FORMAT))
    return node.key("times").mapping(lambda times: Times(times.key("p50").number(), times.key("p99").number()))


def _keep(file: Path | None, circumstances: dict[str, Any], times: dict[int, Times], tell: Tell) -> None:
    entries = {str(degree): {"p50": known.p50_ms, "p99": known.p99_ms} for degree, known in times.items()}
    about = {name: circumstances[name] for name in ("format", "machine", "batch", "fixed", "libraries")}
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, (json.dumps({**about, "times": entries}, indent=1) + "\n").encode())
    except OSError as error:
        if file.parent not in _warned:
            _warned.add(file.parent)
            tell(f"{one_line(file.parent)} cannot be written ({one_line(error.strerror or error)}): latencies are "
                 "measured again next time")  # fmt: skip


@contextmanager
def _alone(file: Path | None) -> Iterator[None]:
    """Waits, with patience that ends, until no other process measures for this cache: it would disturb the times."""
    with ExitStack() as held:
        with suppress(OSError, ImportError):  # no fcntl on this system, or a folder that cannot be written
            import fcntl

            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                lock = held.enter_context(Path(file.parent / ".lock").open("w"))
                until = time.monotonic() + _PATIENCE_S
                while not _taken(lambda: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)):
                    if time.monotonic() > until:
                        break
                    time.sleep(0.05)
        yield


def _taken(take: Callable[[], object]) -> bool:
    try:
        take()
    except BlockingIOError:
        return False
    return True


def _measure(folder: Path, family: Family, batch: int, fixed: bool) -> dict[int, Times]:
    """In groups beside the lowest degree; each group is scaled to the same time of that one."""
    base, *others = family.engines
    groups = [others[start : start + _TOGETHER] for start in range(0, len(others), _TOGETHER)] or [[]]
    runs = [_together(folder, [base, *group], batch, fixed) for group in groups]
    typical = statistics.median(run[base.degree].p50 for run in runs)
    times: dict[int, Times] = {}
    for run in runs:
        scale = typical / run[base.degree].p50
        for degree, latency in run.items():
            times.setdefault(degree, Times(round(latency.p50 * scale, 4), round(latency.p99 * scale, 4)))
    return times


def _together(folder: Path, entries: list[EngineEntry], batch: int, fixed: bool) -> dict[int, Latency]:
    with ExitStack() as stack:
        runners = {}
        for entry in entries:
            settings = {"precision": entry.precision, "batch": batch if fixed else None}
            opened = open_engine(folder / entry.engine, entry.backend, **settings)
            runners[str(entry.degree)] = stack.enter_context(opened)
        times = measure(runners, batch=batch, seconds=_SECONDS, min_rounds=_ROUNDS)
    return {int(name): latency for name, latency in times.items()}


def _processor() -> str:
    """Name and stepping; virtual machines share names, and ARM's processors have none but their numbers."""
    listed: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            listed.setdefault(key.strip(), value.strip())
    parts = ("cpu family", "model", "stepping", "CPU implementer", "CPU part")
    numbers = [listed[key] for key in parts if key in listed]
    name = listed.get("model name") or platform.processor() or platform.machine() or "unknown processor"
    return one_line(" ".join([name, *([f"({'.'.join(numbers)})"] if numbers else [])]))


def _cores() -> int:
    """Cores this process may use: those it is bound to, and no more than the container's share of time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError, ZeroDivisionError):  # no limit is "max 100000"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def _gpus() -> list[str]:
    """Names of NVIDIA's GPUs, as their driver lists them."""
    names = []
    with suppress(OSError):
        for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
            model = re.search(r"^Model:\s*(.+)$", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
            names += [one_line(model.group(1).strip())] if model else []
    return sorted(names)
