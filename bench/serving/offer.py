"""Open-loop load: requests go out when a schedule that was drawn beforehand says so, whatever became of others.

So a server that is slow cannot slow down what is asked of it.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from bench.serving.accounts import Record, percentile

Send = Callable[[int], Awaitable[object]]
"""Sends a body, by its number; what came back. Never raises, and ends by itself."""


async def offer(
    times: Sequence[float], bodies: Sequence[int], send: Send, stopped: Callable[[], bool] = lambda: False
) -> list[Record]:
    """Sends every body at its time, in seconds from now, and waits for all answers; tells of what was sent.

    `stopped` is asked at least twice a second whether to send nothing any more.
    """
    records = [Record(float(at), int(body)) for at, body in zip(times, bodies, strict=True)]
    running: set[asyncio.Task[None]] = set()
    start = time.perf_counter() + 0.05

    async def one(record: Record) -> None:
        record.sent_s = time.perf_counter() - start
        record.reply = await send(record.body)
        record.done_s = time.perf_counter() - start

    gc.collect()
    gc.disable()  # a pause here would count as the server's
    try:
        for sent, record in enumerate(records):
            while (left := start + record.at_s - time.perf_counter()) > 0 and not stopped():
                await asyncio.sleep(min(left, 0.5))
            if stopped():
                del records[sent:]
                break
            task = asyncio.create_task(one(record))
            running.add(task)
            task.add_done_callback(running.discard)
        while running:
            await asyncio.wait(set(running))
    finally:
        gc.enable()
    return records


def lag_ms(records: Sequence[Record]) -> tuple[float, float]:
    """By how much requests were sent too late, in ms, 99th percentile and most: what the generator itself adds."""
    late = np.array([1e3 * (record.sent_s - record.at_s) for record in records])
    return percentile(late, 99) or 0.0, float(late.max(initial=0.0))


def poisson(rate: float, seconds: float, seed: int) -> np.ndarray:
    """Times of arrivals of a Poisson process with `rate` arrivals a second, rising, in seconds from its start."""
    draw = np.random.default_rng(seed)
    times, last = [], 0.0
    while last < seconds:
        gaps = draw.exponential(1 / rate, max(int(1.2 * rate * seconds), 16))
        times.append(last + np.cumsum(gaps))
        last = float(times[-1][-1])
    found = np.concatenate(times)
    return found[found < seconds]


def order(count: int, length: int, seed: int) -> np.ndarray:
    """Which of `count` bodies each of `length` requests has: all of them equally often, shuffled anew every round."""
    draw = np.random.default_rng(seed)
    rounds = [draw.permutation(count) for _ in range(length // count + 1)]
    return np.concatenate(rounds)[:length]
