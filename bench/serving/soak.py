"""A soak: valid and malformed requests, reloads and killed workers, while memory, files and threads are watched."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench.serving.case import RATE, Bench
from bench.serving.fault_clients import BadStorm
from bench.serving.server import Server
from bench.serving.traffic import Traffic, mixed_bodies

WATCHED = {"rss_mib": "memory of all processes, MiB,", "files": "open files", "threads": "threads"}
_EVERY_S = 20.0  # between a reload and a kill
_QUIET_S = 4.0  # behind either: what starts or ends is not the level
_BAD_AT_ONCE, _BAD_PAUSE_S = 2, 0.1
_BLOCKS = 12  # of which the second half is made: means of blocks are nearly independent, single seconds are not
_T95 = 2.228  # Student's t at 97.5% for _BLOCKS - 2 degrees of freedom
_SHARE = 0.03  # of its level that something may grow over the second half


@dataclass(frozen=True)
class Slope:
    """Growth over the second half of a run."""

    level: float  # mean of the second half
    most: float  # of the whole run
    growth: float  # over the second half, by the line through it
    low: float  # of its 95% interval
    high: float  # likewise

    @property
    def flat(self) -> bool:
        """Whether no growth is seen, or one that is small against the level."""
        return self.low <= 0 or self.growth <= _SHARE * self.level


def slope(values: Sequence[float]) -> Slope:
    """The line through the second half of values, one a second, at least 24."""
    half = np.asarray(values[len(values) // 2 :], np.float64)
    means = np.array([block.mean() for block in np.array_split(half, _BLOCKS)])
    at = np.linspace(0.5 / _BLOCKS, 1 - 0.5 / _BLOCKS, _BLOCKS)  # as a share of the half
    middle = at - at.mean()
    growth = float((middle * means).sum() / (middle**2).sum())
    rest = means - means.mean() - growth * middle
    error = float(np.sqrt((rest**2).sum() / (_BLOCKS - 2) / (middle**2).sum()))
    return Slope(float(half.mean()), float(np.max(values)), growth, growth - _T95 * error, growth + _T95 * error)


def soak(bench: Bench) -> None:
    """For minutes valid and malformed requests, reloads and killed workers: memory, files and threads stay flat."""
    seconds, seed = 60 * bench.options.minutes, bench.options.seed
    bodies = mixed_bodies(bench.subject, wants=({}, {}, {"degree": 8}, {"degree": 0}, {"min_degree": 8}))
    with bench.serve() as server:
        traffic = Traffic(bench.subject, bodies, server, RATE, seconds, seed)
        storm = BadStorm(server, bench.subject.sheets, seed)
        storming = threading.Thread(target=asyncio.run, args=(_storm(storm, seconds),), daemon=True)
        storming.start()
        watch = _Watch(bench, server)
        watch.run(seconds)
        bench.check_traffic(traffic)
        storming.join()
        faults, status = server.faults(), server.stop()
    slopes = {}
    for name, title in WATCHED.items():
        values = [each[name] for each in watch.samples if each["quiet"]]
        fitted = slope(values) if len(values) >= 24 else None
        bench.check(f"{title} stay flat", fitted is not None and fitted.flat, fitted or "the run was too short to tell")
        slopes[title] = fitted and {**asdict(fitted), "flat": fitted.flat}
    bench.check("every reload worked", not watch.said, watch.said)
    bench.check("no traceback in its log", not faults, faults[:2])
    bench.check("exit status 0", status == 0, status)
    bench.notes |= {"bad": dict(storm.verdicts), "slopes": slopes, "reloads": watch.reloads, "kills": watch.kills,
                    "minutes": bench.options.minutes}  # fmt: skip


async def _storm(storm: BadStorm, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await storm.run(range(1 << 30), _BAD_AT_ONCE, _BAD_PAUSE_S)


class _Watch:
    """Samples every second, and every so often a reload or a kill."""

    def __init__(self, bench: Bench, server: Server) -> None:
        self._bench, self._server = bench, server
        self._whole = (bench.family / "family.json").read_text()
        self.samples: list[dict[str, Any]] = []
        self.reloads, self.kills = 0, 0
        self.said: list[str] = []

    def run(self, seconds: float) -> None:
        began = time.monotonic()
        acted, number = began, 0
        while (now := time.monotonic()) - began < seconds and self._server.alive:
            if now - acted > _EVERY_S:
                self._act(number)
                acted, number = time.monotonic(), number + 1
            sample = self._server.sample()
            quiet = time.monotonic() - acted > _QUIET_S
            self.samples.append({"quiet": quiet, **sample})
            time.sleep(max(1.0 - (time.monotonic() - now), 0.0))

    def _act(self, number: int) -> None:
        if number % 2:
            for pid in self._server.workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    self.kills += 1
            return
        manifest = json.loads(self._whole)
        if number % 4 == 0:  # degree 4 is pinned by nobody here
            manifest["engines"] = [each for each in manifest["engines"] if each["degree"] != 4]
        (self._bench.family / "family.json").write_text(json.dumps(manifest))
        status, said = self._bench.reload(self._server)
        self.reloads += 1
        if status != 200:
            self.said.append(f"reload: {status} {said}")
