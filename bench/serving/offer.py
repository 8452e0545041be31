"""Open-loop load: requests go out when the schedule says so, whatever became of those before them."""

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
    """Sends every request at its time, and waits for all answers; tells of what was sent.

    Args:
        times: When, rising, in seconds from now.
        bodies: Which body, for every time.
        send: See `Send`.
        stopped: Asked at least twice a second whether to send nothing any more.
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
