"""Times everybody at one batch size, and what follows from their times."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.gpu.contenders import COMPILE, Contender, Field
from bench.gpu.reasons import reason
from bench.gpu.subject import DTYPES, ensure_usable
from bench.gpu.timing import interleaved, matmul_rate, warm_up
from tocom.runtime.degrees.latency import Latency

Quartiles = tuple[float, float, float]


@dataclass(frozen=True)
class Row:
    """One contender of a group at one degree, as measured.

    Attributes:
        contender: Who.
        degree: Tokens removed in every block.
        clock: How it was timed.
        ms: Median of one call.
        low: 25th percentile.
        high: 75th percentile.
        rounds: Turns that were measured.
        speed_up: Over its own degree 0; None where that is missing.
        ideal: Speed-up by multiplications of the whole network.
        tax: Time beyond its slice bound, as a share of it, 25th, 50th and 75th percentile; None without a bound.
        over_compile: The time of torch.compile of the same network, merged plainly, over this one's, likewise.
        tflops: Multiplications and additions that it does, in 1e12 per second.
    """

    contender: str
    degree: int
    clock: str
    ms: float
    low: float
    high: float
    rounds: int
    speed_up: float | None
    ideal: float
    tax: Quartiles | None
    over_compile: Quartiles | None
    tflops: float


@dataclass(frozen=True)
class Missing:
    """A contender that has no row.

    Attributes:
        contender: Who; its slice bound is named as such.
        degree: At which degree.
        why: One line.
    """

    contender: str
    degree: int
    why: str


@dataclass(frozen=True)
class Group:
    """What was measured of one model at one batch size.

    Attributes:
        model: timm's name.
        batch: Images per call.
        precision: What all computed in.
        degrees: Tokens removed per block, 0 first.
        rows: Who ran.
        missing: Who did not.
        block_tflops: What the GPU reaches in the products of one of its blocks, in TFLOP/s.
        date: When.
    """

    model: str
    batch: int
    precision: str
    degrees: tuple[int, ...]
    rows: tuple[Row, ...]
    missing: tuple[Missing, ...]
    block_tflops: float
    date: str

    def to_json(self) -> dict[str, Any]:
        """For the file of finished groups."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Group:
        """What `to_json` gave."""
        rows = tuple(Row(**{**row, **{name: row[name] and tuple(row[name]) for name in ("tax", "over_compile")}})
                     for row in value["rows"])  # fmt: skip
        missing = tuple(Missing(**each) for each in value["missing"])
        return cls(**{**value, "degrees": tuple(value["degrees"]), "rows": rows, "missing": missing})


def run_group(field: Field, degrees: Sequence[int], seconds: float, date: str) -> Group:
    """Times everybody at one batch size, in turn.

    Args:
        field: Who takes part.
        degrees: 0 first.
        seconds: How long to measure; making everybody ready comes on top.
        date: Today.

    Raises:
        GateError: A contender left the GPU unusable, so that nothing more can be measured in this process.
    """
    missing: list[Missing] = []
    ready: dict[tuple[str, int, bool], Contender] = {}
    absent: dict[str, str] = {}
    everybody = list(field.contenders(degrees))
    with ExitStack() as stack, torch._dynamo.config.patch(recompile_limit=4 * len(everybody)):
        timed, calls = {}, {}
        for each in everybody:
            why = absent.get(each.name)
            if why is None:
                try:
                    timed[each.key] = each.open(stack)
                    calls[each.key] = warm_up(timed[each.key])
                    ready[each.key] = each
                    continue
                except Exception as error:  # noqa: BLE001 - one contender's failure must not end the run
                    timed.pop(each.key, None)
                    why = reason(error)
                _release()
                ensure_usable(_named(each), why)
                if not each.degree:
                    absent[each.name] = why
            if not (each.bound and each.name in absent):
                missing.append(_missing(each, why))
        times, failures = interleaved(timed, calls, seconds)
        timed.clear()
        for key, error in failures.items():
            missing.append(_missing(ready[key], reason(error)))
            ensure_usable(_named(ready[key]), reason(error))
        dtype = DTYPES[field.precision]
        rate = matmul_rate(field.subject.block_products(field.batch), dtype, field.subject.device)
    torch.compiler.reset()
    _release()
    whole = {degree: field.subject.gmacs(degree) for degree in degrees}
    rows = rows_of(times, ready, whole, field.batch, f"{COMPILE} {field.precision}")
    return Group(
        field.subject.name, field.batch, field.precision, tuple(degrees), rows, tuple(missing), rate, date
    )  # fmt: skip


def rows_of(
    times: Mapping[tuple[str, int, bool], Latency],
    who: Mapping[tuple[str, int, bool], Contender],
    gmacs: Mapping[int, float],
    batch: int,
    compiled: str,
) -> tuple[Row, ...]:
    """What follows from the times of one group; ratios are taken round by round.

    Args:
        times: By contender, degree, and whether it is the slice bound.
        who: The contenders, likewise.
        gmacs: Multiply-accumulates of the whole network at each degree, in units of 1e9.
        batch: Images per call.
        compiled: The contender that all others are compared with.
    """
    rows = []
    for (name, degree, bound), each in times.items():
        if bound:
            continue
        contender = who[name, degree, False]
        base, floor = times.get((name, 0, False)), times.get((name, degree, True))
        peer = None if name == compiled else times.get((compiled, degree, False))
        low, middle, high = (0.0, 0.0, 0.0) if floor is None else each.ratio_to(floor)
        rows.append(Row(
            name, degree, contender.clock, each.p50, each.p25, each.p75, each.rounds,
            None if base is None else base.ratio_to(each)[1],
            gmacs[0] / gmacs[degree],
            None if floor is None else (low - 1, middle - 1, high - 1),
            None if peer is None else peer.ratio_to(each),
            2 * contender.gmacs * batch / each.p50,  # 1e9 per ms are 1e12 per s
        ))  # fmt: skip
    return tuple(rows)


def _missing(who: Contender, why: str) -> Missing:
    return Missing(f"{who.name}, its slice bound" if who.bound else who.name, who.degree, why)


def _named(who: Contender) -> str:
    return f"{who.name} at r = {who.degree}"


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
