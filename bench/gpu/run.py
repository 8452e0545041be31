"""The GPU check: first everything is compared, then everybody is timed; what is finished is kept at once."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from bench.gpu import machine
from bench.gpu.checks import FAILED, Check, planned, run_check
from bench.gpu.contenders import Field
from bench.gpu.page import page
from bench.gpu.reasons import without_folders
from bench.gpu.speed import Group, run_group
from bench.gpu.state import State
from bench.gpu.subject import DTYPES, Subject
from bench.gpu.timing import matmul_rate
from tocom.runtime.errors import GateError
from tocom.runtime.files import write_atomically

ROOT = Path(__file__).parents[2]
_LARGE_PRODUCT = (8192, 8192, 8192)


@dataclass(frozen=True)
class Options:
    """What is to be compared and timed.

    Attributes:
        models: timm names.
        batches: Images per call.
        degrees: Tokens removed per block; 0 first.
        precision: What everybody computes in, one of `DTYPES`.
        only: Contenders with one of these in their names; none for all.
        without: Not those with one of these, nor comparisons.
        seconds: How long to measure each group, in seconds.
        minutes: How long to begin anything new; None for as long as it takes.
        out: The page; None for bench/results/gpu-NAME.md.
        work: Folder of graphs and plans.
        anyway: Whether to time what did not pass.
        command: As it was given.
    """

    models: tuple[str, ...]
    batches: tuple[int, ...]
    degrees: tuple[int, ...]
    precision: str
    only: tuple[str, ...]
    without: tuple[str, ...]
    seconds: float
    minutes: float | None
    out: Path | None
    work: Path
    anyway: bool
    command: str


def run(options: Options) -> None:
    """Does what is not finished yet, and writes the page after every step.

    Raises:
        InputError: Something given cannot be used.
        GateError: A comparison failed, or something left the GPU unusable.
    """
    # a few digits less would flip decisions; what asks cuBLAS itself is told by NVIDIA_TF32_OVERRIDE
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found = machine.describe()
    out = options.out or ROOT / "bench" / "results" / f"gpu-{machine.slug(found['GPU'])}.md"
    run_ = _Run(options, State.load(out.with_suffix(".json"), found), out)
    failed = run_.compare()
    if failed and not options.anyway:
        raise GateError(f"{len(failed)} comparisons failed, see {out.name}: {', '.join(failed)}. Nothing was timed; "
                        "--anyway does.")  # fmt: skip
    run_.time()
    for line in run_.to_do():
        _tell(line)
    _tell(f"wrote {out}")
    if failed:
        raise GateError(f"{len(failed)} comparisons failed, see {out.name}: {', '.join(failed)}.")


class _Run:
    """One run of the command."""

    def __init__(self, options: Options, state: State, out: Path) -> None:
        self._options, self._state, self._out = options, state, out
        self._subject = functools.cache(lambda name: Subject(name, options.work))
        self._deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
        self._longest = 0.0
        self._compared: list[Check] = []
        self._timed: list[Group | None] = []

    def compare(self) -> list[str]:
        """Compares what is not compared yet.

        Returns:
            What failed.
        """
        for model, degree, what in self._comparisons():
            if self._is_late():
                continue
            check = self._state.check(
                model, degree, what, lambda: run_check(self._subject(model), degree, what)  # noqa: B023 - called here
            )  # fmt: skip
            _tell(f"{model}, r = {degree}, {what}: {check.verdict}{check.why and f' ({check.why})'}")
            self._compared.append(check)
            self._write()
        return [f"{each.what} ({each.model}, r = {each.degree})" for each in self._compared if each.verdict == FAILED]

    def time(self) -> None:
        """Times what is not timed yet, as long as there is time for a group like the longest one so far."""
        options, state = self._options, self._state
        if options.precision not in state.matmul and not self._is_late():
            state.matmul[options.precision] = matmul_rate([_LARGE_PRODUCT], DTYPES[options.precision])
            state.save()
        for model, batch in self._groups():
            late = self._is_late(self._longest)
            began = time.monotonic()
            group = state.group(
                model, batch, options.precision, options.degrees, options.only,
                None if late else lambda: self._measured(model, batch),  # noqa: B023 - called here
            )  # fmt: skip
            if group is not None:
                self._longest = max(self._longest, time.monotonic() - began)
                _tell(f"{model}, batch {batch}: {len(group.rows)} rows, {time.monotonic() - began:.0f} s")
            self._timed.append(group)
            self._write()

    def to_do(self) -> list[str]:
        """What was asked for and there was no time for."""
        options = self._options
        lines = [f"{model}, r = {degree}: {what} was not compared" for model, degree, what in self._comparisons()
                 if not any((each.model, each.degree, each.what) == (model, degree, what)
                            for each in self._compared)]  # fmt: skip
        groups = {(each.model, each.batch) for each in self._timed if each is not None}
        lines += [f"{model}, batch {batch}, {options.precision}, all degrees: not timed"
                  for model, batch in self._groups() if (model, batch) not in groups]  # fmt: skip
        return [f"{line}; the same command goes on there" for line in lines]

    def _comparisons(self) -> Iterator[tuple[str, int, str]]:
        options = self._options
        for model in options.models:
            for degree in dict.fromkeys((options.degrees[0], options.degrees[-1])):
                for what in planned(degree, options.precision):
                    if not any(text.lower() in what.lower() for text in options.without):
                        yield model, degree, what

    def _groups(self) -> Iterator[tuple[str, int]]:
        return ((model, batch) for model in self._options.models for batch in self._options.batches)

    def _measured(self, model: str, batch: int) -> Group:
        options = self._options
        field = Field(self._subject(model), batch, options.precision, options.only, options.without)
        return run_group(field, options.degrees, options.seconds, date.today().isoformat())

    def _is_late(self, needed: float = 0.0) -> bool:
        return self._deadline is not None and time.monotonic() + needed > self._deadline

    def _write(self) -> None:
        state = self._state
        text = page(
            state.machine, without_folders(self._options.command), date.today().isoformat(),
            state.checks.values(), state.matmul, state.groups.values(), self.to_do(),
        )  # fmt: skip
        self._out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._out, text.encode())


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def ordered(degrees: Sequence[int]) -> tuple[int, ...]:
    """Degrees with 0, which all are compared with, first."""
    return tuple(sorted({0, *degrees}))
