"""Offered load from half to four times what degree 0 sustains: fixed degree 0, the most compressed, and adaptive.

The offer is open-loop: a Poisson process whose times are drawn beforehand, and latency counts from when a request was
to be sent. Contenders take turns within a load, each measurement on a server of its own.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.harness.run import Tell
from bench.harness.state import State
from bench.serving.accounts import Judged, over_time, summary
from bench.serving.clients import GrpcClient, read_grpc
from bench.serving.offer import lag_ms, offer, order, poisson
from bench.serving.server import Server
from bench.serving.subject import Body, Subject

FACTORS = (0.5, 1.0, 1.5, 2.0, 4.0)
FIXED, COMPRESSED, ADAPTIVE = "fixed r=0", "fixed r={}", "adaptive"
MAX_QUEUE = 96  # images that may wait, in every server
TRICKLE = 0.1  # of what degree 0 sustains: the idle phase
_WARM_S = 3.0  # offered before what counts
_CLOSE = 1.06  # where the search stops: highest rate that failed over highest that held
_TRIALS, _CONFIRMS, _EASE = 8, 4, 0.94
_CORES = sorted(os.sched_getaffinity(0))


@dataclass(frozen=True)
class LoadOptions:
    """How the load test runs."""

    objective_ms: float = 100.0  # of the 99th percentile
    images: int = 16  # in a request
    seconds: float = 60.0  # for each measurement
    trial_s: float = 15.0  # for each step of the search
    server_cores: tuple[int, ...] = (_CORES[0],)  # the generator has the others, or shares them where there are none
    seed: int = 0  # of arrivals

    @property
    def own_cores(self) -> tuple[int, ...]:
        """Of the generator."""
        return tuple(core for core in _CORES if core not in self.server_cores) or tuple(_CORES)


class LoadTest:
    """The measurements, in the order they are made; what is in the state is not measured again."""

    def __init__(self, subject: Subject, options: LoadOptions, state: State, work: Path, tell: Tell) -> None:
        self._subject, self._options, self._state, self._work, self._tell = subject, options, state, work, tell
        self._bodies: list[Body] = [subject.body(each, "grpc") for each in subject.batches(options.images)]
        self._contenders = contenders(max(subject.expected), options.objective_ms)

    def run(self) -> None:
        """Measures everything that is missing."""
        os.sched_setaffinity(0, self._options.own_cores)
        rate = self._state.once("sustained", self._search)["rate"]
        for factor in FACTORS:
            for name in self._contenders:
                self._tell(f"{factor:g}x {name}: {factor * rate:.1f} requests/s")
                phases = [(factor * rate, self._options.seconds)]
                self._state.once(f"{factor:g}x {name}", partial(self._measure, name, phases))
        self._tell("a step of load")
        third = self._options.seconds / 2
        phases = [(0.5 * rate, third / 2), (2 * rate, third), (TRICKLE * rate, third)]
        self._state.once("step", lambda: self._measure(ADAPTIVE, phases) | {"phases": phases})

    def _serve(self, name: str) -> Server:
        options = self._options
        arguments = ["--threads", 1, "--workers", 1, "--max-queue", MAX_QUEUE]
        log = self._work / f"{name.replace(' ', '-')}.log"
        # every contender goes by the same measured latencies, of this run
        environment = {"XDG_CACHE_HOME": str(self._work / "cache")}
        return Server(self._subject.folder, log, [*arguments, *self._contenders[name]],
                      cores=options.server_cores, environment=environment)  # fmt: skip

    def _search(self) -> dict[str, Any]:
        """The highest rate at which degree 0 keeps to the objective and refuses nothing, then confirmed at length."""
        options = self._options
        with Server(self._subject.folder, self._work / "first.log", ["--threads", 1], cores=options.server_cores,
                    environment={"XDG_CACHE_HOME": str(self._work / "cache")}):  # fmt: skip
            pass  # latencies are measured and kept
        trials: list[dict[str, Any]] = []
        with self._serve(FIXED) as server:
            low, high = 0.0, 0.0
            rate = self._first_guess(server)
            while len(trials) < _TRIALS and not (low and high and high / low < _CLOSE):
                held = self._holds(server, rate, options.trial_s, trials)
                low, high = (max(low, rate), high) if held else (low, min(high or rate, rate))
                rate = (low + high) / 2 if low and high else rate * (1.3 if held else 0.6)
            rate = low or rate
            for _ in range(_CONFIRMS):
                if self._holds(server, rate, options.seconds, trials):
                    break
                rate *= _EASE
        return {"rate": rate, "trials": trials}

    def _first_guess(self, server: Server) -> float:
        """Three quarters of the rate at which requests are answered one after the other."""

        async def one_by_one() -> float:
            client = GrpcClient(server.grpc, 60)
            clock = asyncio.get_running_loop().time
            began, count = clock(), 0
            while clock() - began < 3:
                await client.send(self._bodies[count % len(self._bodies)].content)
                count += 1
            await client.close()
            return count / (clock() - began)

        return 0.75 * asyncio.run(one_by_one())

    def _holds(self, server: Server, rate: float, seconds: float, trials: list[dict[str, Any]]) -> bool:
        self._tell(f"what r=0 sustains: {rate:.1f} requests/s for {seconds:.0f} s")
        judged, _ = self._offer(server, [(rate, seconds)])
        found = summary(judged, seconds)
        kept = ("p99_ms", "p99_of_all_ms", "refused")
        trials.append({"rate": rate, "seconds": seconds} | {name: found[name] for name in kept})
        return holds(found, self._options.objective_ms)

    def _measure(self, name: str, phases: Sequence[tuple[float, float]]) -> dict[str, Any]:
        with self._serve(name) as server:
            self._offer(server, [(min(phases[0][0], 0.5 * self._rate), _WARM_S)])
            judged, lag = self._offer(server, phases)
            status = server.stop()
            faults = server.faults()
        seconds = sum(length for _, length in phases)
        timeline = over_time(judged, seconds)
        return {**summary(judged, seconds), "timeline": timeline, "lag_ms": lag, "exit": status, "faults": faults}

    @property
    def _rate(self) -> float:
        return self._state.results["sustained"]["rate"]

    def _offer(self, server: Server, phases: Sequence[tuple[float, float]]) -> tuple[list[Judged], tuple[float, float]]:
        times, start = [], 0.0
        for number, (rate, seconds) in enumerate(phases):
            times += (start + poisson(rate, seconds, self._options.seed + number)).tolist()
            start += seconds
        bodies = order(len(self._bodies), len(times), self._options.seed)

        async def whole() -> list[Any]:
            client = GrpcClient(server.grpc, 60)
            try:
                return await offer(times, bodies, lambda body: client.send(self._bodies[body].content))
            finally:
                await client.close()

        records = asyncio.run(whole())
        judged = [self._subject.judge(each, self._bodies[each.body], read_grpc(each.reply)) for each in records]
        return judged, lag_ms(records)


def contenders(last: int, objective_ms: float) -> dict[str, list[object]]:
    """Name -> arguments of the server; `last` is the most compressed degree."""
    return {
        FIXED: ["--degree", 0],
        COMPRESSED.format(last): ["--degree", last],
        ADAPTIVE: ["--objective-ms", objective_ms],
    }


def holds(found: dict[str, Any], objective_ms: float) -> bool:
    """Whether a phase kept to the objective: 99 of 100 requests answered in time; one that is refused was not."""
    p99_ms = found["p99_of_all_ms"]
    return p99_ms is not None and p99_ms <= objective_ms


def idle_again_s(step: dict[str, Any]) -> float | None:
    """Seconds from the end of the load until every answer is of degree 0 for good; None where it never is."""
    began = sum(seconds for _, seconds in step["phases"][:-1])
    tail = [each for each in step["timeline"] if each["at_s"] >= began and each["requests"]]
    if not tail or tail[-1]["highest"] != 0:
        return None
    late = [each["at_s"] + 1 for each in tail if each["highest"] not in (0, None)]
    return max(late, default=began) - began
