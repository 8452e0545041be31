"""Proves random models, one after the other or several at a time."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch

from bench.proof.case import check
from bench.proof.condition import own_errors
from bench.proof.judging import judged
from bench.proof.models import Drawn, draw
from bench.proof.state import Record, State


def run(
    state: State, *, models: int, seed: int, progress: Callable[[int, list[Record]], None], jobs: int = 1
) -> list[Record]:
    """Proves the models that are not proven yet.

    Args:
        state: Added to.
        models: How many in all.
        seed: Draws them.
        progress: Told (models done, alarms so far) after each.
        jobs: Processes that prove models.

    Returns:
        What all of them came to, in order.
    """
    left = [draw(number, seed) for number in range(models) if number not in state.records]
    with _workers(jobs) as proven:
        for record in proven(_checked, left):
            state.add(record)
            done = [judged(state.records[number]) for number in range(models) if number in state.records]
            progress(len(done), alarms(done))
    return [judged(state.records[number]) for number in range(models)]


@contextmanager
def _workers(jobs: int) -> Iterator[Callable[..., Iterable[Record]]]:
    """What maps a function over models, in whatever order they are finished."""
    if jobs == 1:
        yield map
        return
    # not forked: threads of the libraries that this process has loaded would be missing there
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=50) as pool:
        yield pool.imap_unordered


def alarms(records: Iterable[Record]) -> list[Record]:
    """Those that did not pass."""
    return [record for record in records if not record["passed"]]


def _checked(drawn: Drawn) -> Record:
    torch.set_num_threads(1)  # the models are tiny
    try:
        record = check(drawn)
        return record if record["passed"] else {**record, "own": own_errors(drawn)}
    except Exception as error:  # noqa: BLE001 - a healthy model that crashes is an alarm like others
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return {"drawn": asdict(drawn), "passed": False, "faults": [reason], "seconds": 0.0}
    finally:
        gc.collect()  # the exporter leaves cycles that hold weights
