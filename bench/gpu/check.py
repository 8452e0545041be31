"""The GPU check: first everything is compared, then everybody is timed; what is finished is kept at once."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch

from bench.gpu import machine
from bench.gpu.compare import FAILED, PASSED, planned, run_check
from bench.gpu.contenders import Field
from bench.gpu.page import write_page
from bench.gpu.reasons import without_folders
from bench.gpu.speed import run_group
from bench.gpu.subject import DTYPES, Subject
from bench.gpu.timing import matmul_rate
from bench.harness.page import read_results, write_results
from bench.harness.run import Places, Tell, progress
from bench.harness.state import State
from tocom.runtime.errors import GateError

_LARGE_PRODUCT = (8192, 8192, 8192)


@dataclass(frozen=True)
class Options:
    """What is to be compared and timed."""

    models: tuple[str, ...]  # timm names
    batches: tuple[int, ...]  # images per call
    degrees: tuple[int, ...]  # tokens removed per block; 0 first
    precision: str  # what everybody computes in, one of `DTYPES`
    only: tuple[str, ...]  # contenders with one of these in their names; none for all
    without: tuple[str, ...]  # not those with one of these, nor comparisons
    seconds: float  # how long to measure each group, in seconds
    minutes: float | None  # how long to begin anything new; None for as long as it takes
    anyway: bool  # whether to time what did not pass
    command: str  # as it was given


def check_gpu(options: Options, places: Callable[[str], Places], *, fresh: bool = False) -> None:
    """Does what is not finished yet, and writes the page after every step."""
    # a few digits less would flip decisions; what asks cuBLAS itself is told by NVIDIA_TF32_OVERRIDE
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found = machine.describe()
    place = places(machine.slug(found["GPU"]))
    with progress(None) as tell:
        run = _Run(options, State.load(place.state, found, fresh=fresh), place, tell)
        failed = run.compare()
        told = f"{len(failed)} comparisons failed, see {place.page.name}: {', '.join(failed)}."
        if failed and not options.anyway:
            raise GateError(f"{told} Nothing was timed; --anyway does.")
        run.time()
        for line in (*run.to_do(), f"wrote {place.page}"):
            tell(line)
    if failed:
        raise GateError(told)


class _Run:
    """One run of the command."""

    def __init__(self, options: Options, state: State, place: Places, tell: Tell) -> None:
        self._options, self._state, self._place, self._tell = options, state, place, tell
        self._subject = functools.cache(lambda name: Subject(name, place.work))
        self._deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
        self._longest = 0.0

    def compare(self) -> list[str]:
        """Compares what has not passed yet; what failed."""
        failed = []
        for key, model, degree, what in self._comparisons():
            known = self._state.results.get(key, {}).get("verdict")
            if known != PASSED:
                if self._is_late():
                    continue
                self._state.keep(key, asdict(run_check(self._subject(model), degree, what)))
            check = self._state.results[key]
            why = f" ({check['why']})" if check["why"] else ""
            self._tell(f"{model}, r = {degree}, {what}: {check['verdict']}{why}")
            if check["verdict"] == FAILED:
                failed.append(f"{what} ({model}, r = {degree})")
            self._write()
        return failed

    def time(self) -> None:
        """Times what is not timed yet, as long as there is time for a group like the longest one so far."""
        rate = f"matmul|{self._options.precision}"
        if not self._is_late():
            dtype = DTYPES[self._options.precision]
            self._state.once(rate, lambda: matmul_rate([_LARGE_PRODUCT], dtype))
        for key, model, batch in self._groups():
            began = time.monotonic()
            if key not in self._state.results and self._is_late(self._longest):
                continue
            group = self._state.once(key, functools.partial(self._measured, model, batch))
            self._longest = max(self._longest, time.monotonic() - began)
            self._tell(f"{model}, batch {batch}: {len(group['rows'])} rows, {time.monotonic() - began:.0f} s")
            self._write()

    def to_do(self) -> list[str]:
        """What was asked for and there was no time for."""
        known, precision = self._state.results, self._options.precision
        lines = [f"{model}, r = {degree}: {what} was not compared"
                 for key, model, degree, what in self._comparisons() if key not in known]  # fmt: skip
        lines += [f"{model}, batch {batch}, {precision}, all degrees: not timed"
                  for key, model, batch in self._groups() if key not in known]  # fmt: skip
        return [f"{line}; the same command goes on there" for line in lines]

    def _comparisons(self) -> Iterator[tuple[str, str, int, str]]:
        options = self._options
        for model in options.models:
            for degree in dict.fromkeys((options.degrees[0], options.degrees[-1])):
                for what in planned(degree, options.precision):
                    if not any(text.lower() in what.lower() for text in options.without):
                        yield f"check|{model}|{degree}|{what}", model, degree, what

    def _groups(self) -> Iterator[tuple[str, str, int]]:
        options = self._options
        for model in options.models:
            for batch in options.batches:
                degrees = ",".join(map(str, options.degrees))
                yield "|".join(("group", model, str(batch), options.precision, degrees, *options.only)), model, batch

    def _measured(self, model: str, batch: int) -> dict[str, Any]:
        options = self._options
        field = Field(self._subject(model), batch, options.precision, options.only, options.without)
        return run_group(field, options.degrees, options.seconds, _today())

    def _is_late(self, needed: float = 0.0) -> bool:
        return self._deadline is not None and time.monotonic() + needed > self._deadline

    def _write(self) -> None:
        found = self._state.results
        setup = {"command": without_folders(self._options.command), "date": _today()}
        write_results(self._place.results, {
            "setup": setup, "machine": self._state.settings, "to_do": self.to_do(),
            "matmul": {key.split("|")[1]: rate for key, rate in found.items() if key.startswith("matmul|")},
            "checks": [each for key, each in found.items() if key.startswith("check|")],
            "groups": [each for key, each in found.items() if key.startswith("group|")],
        })  # fmt: skip
        write_page(read_results(self._place.results), self._place.page)


def _today() -> str:
    return pd.Timestamp.now().date().isoformat()
