"""Steady valid traffic over every route, every answer checked, while something is done to the server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.serving.accounts import Judged, latencies, percentile, tallied
from bench.serving.clients import GrpcClient, exchange, read_grpc, read_http
from bench.serving.offer import offer, order, poisson
from bench.serving.server import Server
from bench.serving.subject import Body, Subject

_WANTS: tuple[dict[str, int], ...] = ({}, {}, {}, {"degree": 8}, {"degree": 16}, {"min_degree": 4}, {"max_degree": 8})
_TIMEOUT_S = 100.0  # longer than any time limit of the server: what is not answered by then is lost


def mixed_bodies(subject: Subject, *, wants: Sequence[dict[str, int]] = _WANTS, seed: int = 1) -> list[Body]:
    """Requests of 1 to 8 images over both protocols and the page, some of which say what degree they want."""
    draw = np.random.default_rng(seed)
    bodies = []
    for number in range(240):
        route = ("grpc", "http", "page")[number % 3]
        count = 1 if route == "page" else int(draw.integers(1, 9))
        sheets = draw.choice(len(subject.sheets), count, replace=False).tolist()
        bodies.append(subject.body(sheets, route, wants[int(draw.integers(len(wants)))]))
    return bodies


class Traffic:
    """Traffic on a thread of its own, so that whatever is done to the server does not hold it up.

    Attributes:
        judged: All requests, once `join` returns.
        began: When the schedule began, at the latest, by `time.monotonic`.
    """

    def __init__(self, subject: Subject, bodies: Sequence[Body], server: Server, rate: float, seconds: float,
                 seed: int = 0) -> None:  # fmt: skip
        self._subject, self._bodies, self._server = subject, bodies, server
        self._times, self._seed = poisson(rate, seconds, seed), seed
        self.judged: list[Judged] = []
        self._stopped = False
        self.began = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Sends nothing any more; what was sent is still waited for."""
        self._stopped = True

    def join(self) -> list[Judged]:
        """Waits until everything is answered."""
        self._thread.join()
        return self.judged

    def _run(self) -> None:
        asyncio.run(self._offer())

    async def _offer(self) -> None:
        client = GrpcClient(self._server.grpc, _TIMEOUT_S)

        async def send(number: int) -> object:
            body = self._bodies[number]
            if body.route == "grpc":
                return await client.send(body.content)
            return await exchange(self._server.http, body.content, _TIMEOUT_S)

        bodies = order(len(self._bodies), len(self._times), self._seed)
        self.began = time.monotonic() + 0.05  # see `offer`
        records = await offer(self._times, bodies, send, lambda: self._stopped)
        await client.close()
        for record in records:
            body = self._bodies[record.body]
            reply = read_grpc(record.reply) if body.route == "grpc" else read_http(record.reply)
            self.judged.append(self._subject.judge(record, body, reply))


def account(judged: Sequence[Judged]) -> dict[str, Any]:
    """Counts of a phase and its latency, JSON-ready."""
    taken = latencies(judged)
    return {**tallied(judged), "p50_ms": percentile(taken, 50), "p99_ms": percentile(taken, 99)}


def sound(found: dict[str, Any]) -> bool:
    """Whether every valid request got a right answer or a clear refusal."""
    counts = found["counts"]
    return counts["sent"] > 0 and counts["answered right"] + counts["refused clearly"] == counts["sent"]
