"""A campaign: cases one after the other, each outcome kept, and every file that brought a fault to light."""

from __future__ import annotations

import json
import multiprocessing
import re
import time
from pathlib import Path

from bench.fuzz.case import FINE, Case, Outcome
from bench.fuzz.given import Given, make
from bench.fuzz.page import faults_of
from bench.fuzz.registry import ENTRIES, cases
from bench.fuzz.supervisor import Supervisor
from bench.fuzz.worker import damaged
from bench.harness.run import Tell
from bench.harness.state import State


def prepare(work: Path) -> Given:
    """Makes the whole files, in a process of its own, so that this one stays small."""
    folder = work / "given"
    if not folder.is_dir():
        process = multiprocessing.get_context("spawn").Process(target=make, args=(folder,))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError("the whole files cannot be made")
    return Given(folder)


def run(work: Path, state: State, *, count: int, seconds: float, seed: int, only: str = "", tell: Tell) -> None:
    """Runs what is not done yet of the first cases."""
    given, began = prepare(work), time.monotonic()
    with Supervisor(given) as supervisor:
        for number, case in zip(range(count), cases(seed, only), strict=False):
            if time.monotonic() - began >= seconds:
                break
            if case.key not in state.results:
                outcome = supervisor.run(case)
                if outcome.verdict not in FINE:
                    _keep_file(work / "faults", given, case, outcome)
                state.keep(case.key, vars(outcome))
            tell(f"{faults_of(state.results)} faults", number + 1)


def _keep_file(folder: Path, given: Given, case: Case, outcome: Outcome) -> None:
    """Keeps the file of a fault, and beside it what it did and how it is made again."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (re.sub(r"[^a-z0-9]+", "-", case.key.lower()).strip("-") + f"-seed{case.seed}")
    file.write_bytes(damaged(ENTRIES[case.entry], given, case))
    file.with_suffix(".json").write_text(json.dumps({**vars(case), **vars(outcome)}, indent=1) + "\n")
