"""Times everybody at one batch size, and what follows from their times."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from bench.gpu.contenders import COMPILE, Contender, Field
from bench.gpu.reasons import reason
from bench.gpu.subject import DTYPES, ensure_usable
from bench.gpu.timing import interleaved, matmul_rate, warm_up
from tocom.runtime.degrees.latency import Latency


def run_group(field: Field, degrees: Sequence[int], seconds: float, date: str) -> dict[str, Any]:
    """Times everybody at one batch size, in turn.

    Returns:
        `model`, `batch`, `precision`, `degrees` and `date`; `rows`, see `rows_of`; `missing`, `contender`, `degree` and
        `why` of each that did not run; `block_tflops`, what the GPU reaches in the products of one of its blocks.
    """
    missing: list[dict[str, Any]] = []
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
    return {"model": field.subject.name, "batch": field.batch, "precision": field.precision, "degrees": list(degrees),
            "rows": rows, "missing": missing, "block_tflops": rate, "date": date}  # fmt: skip


def rows_of(
    times: Mapping[tuple[str, int, bool], Latency],
    who: Mapping[tuple[str, int, bool], Contender],
    gmacs: Mapping[int, float],
    batch: int,
    compiled: str,
) -> list[dict[str, Any]]:
    """What follows from the times of one group; ratios are taken round by round.

    Args:
        times: By contender, degree, and whether it is the slice bound.
        who: The contenders, likewise.
        gmacs: Multiply-accumulates of the whole network at each degree, in units of 1e9.
        batch: Images per call.
        compiled: The contender that all others are compared with.

    Returns:
        For each contender and degree `ms`, the median of a call, with quartiles `low` and `high`, after so many
        `rounds`; `speed_up` over its own degree 0, None where that is missing; `ideal`, by multiplications; quartiles
        of `tax`, the time beyond its slice bound as a share of it, and of `over_compile`, torch.compile's time over
        this one's, None where the other is missing; `tflops`, the work that it does itself in 1e12 per second.
    """
    rows = []
    for (name, degree, bound), each in times.items():
        if bound:
            continue
        contender = who[name, degree, False]
        base, floor = times.get((name, 0, False)), times.get((name, degree, True))
        peer = None if name == compiled else times.get((compiled, degree, False))
        rows.append({
            "contender": name, "degree": degree, "clock": contender.clock, "ms": each.p50, "low": each.p25,
            "high": each.p75, "rounds": each.rounds, "speed_up": None if base is None else base.ratio_to(each)[1],
            "ideal": gmacs[0] / gmacs[degree],
            "tax": None if floor is None else [ratio - 1 for ratio in each.ratio_to(floor)],
            "over_compile": None if peer is None else list(peer.ratio_to(each)),
            "tflops": 2 * contender.gmacs * batch / each.p50,  # 1e9 per ms are 1e12 per s
        })  # fmt: skip
    return rows


def _missing(who: Contender, why: str) -> dict[str, Any]:
    name = f"{who.name}, its slice bound" if who.bound else who.name
    return {"contender": name, "degree": who.degree, "why": why}


def _named(who: Contender) -> str:
    return f"{who.name} at r = {who.degree}"


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
