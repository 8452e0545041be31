"""Validates random models, one after the other or several at a time."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch

from bench.harness.run import Tell
from bench.harness.state import State
from bench.proof.case import check
from bench.proof.models import Drawn, draw
from bench.proof.summary import Record, alarms, judged


def run(state: State, *, models: int, seed: int, tell: Tell, jobs: int = 1) -> list[Record]:
    """Validates the models that are not in the state yet, by some processes; what all of them came to, in order."""
    left = [draw(number, seed) for number in range(models) if str(number) not in state.results]
    with _workers(jobs) as mapped:
        for record in mapped(_checked, left):
            state.keep(str(record["drawn"]["number"]), record)
            done = [judged(each) for each in state.results.values()]
            tell(f"{len(alarms(done))} alarms", len(done))
    return [judged(state.results[str(number)]) for number in range(models)]


@contextmanager
def _workers(jobs: int) -> Iterator[Callable[..., Iterable[Record]]]:
    """What maps a function over models, in whatever order they are finished."""
    if jobs == 1:
        yield map
        return
    # not forked: threads of the libraries that this process has loaded would be missing there
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=50) as pool:
        yield pool.imap_unordered


def _checked(drawn: Drawn) -> Record:
    torch.set_num_threads(1)  # the models are tiny
    try:
        return check(drawn)
    except Exception as error:  # noqa: BLE001 - a healthy model that crashes is an alarm like others
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return {"drawn": asdict(drawn), "passed": False, "faults": [reason], "seconds": 0.0}
    finally:
        gc.collect()  # the exporter leaves cycles that hold weights
