"""Times everybody at one batch size and degree, in turn; ratios are taken round by round."""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import Any

import torch

from bench.cpu.subject import Subject, peers
from tocom.export.engine.build import build, graph_precision
from tocom.export.graph.lower import count_gmacs
from tocom.export.graph.slice_bound import slice_bound
from tocom.runtime.degrees.latency import Latency, measure
from tocom.runtime.engines.base import open_engine

STRIDED = "strided:3"
OURS = (("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("openvino", "fp32"), ("openvino", "bf16"),
        ("openvino", "int8"))  # fmt: skip
_NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_COMPARED = {"over_half": "ours, OpenVINO bf16", "over_float": "ours, ONNX Runtime fp32"}
Key = tuple[str, str]
"""Contender, and its schedule: "-" without merging, "... bound" for its slice bound."""


def run_group(subject: Subject, batch: int, degree: int, seconds: float, only: str = "") -> list[dict[str, Any]]:
    """Times the contenders whose names match, each also without merging.

    Returns:
        A record for each contender and schedule: `ms` of a call, the median, and its quartiles `low` and `high`;
        `speed_up` over the same contender without merging; `of_ideal`, that over the speed-up by multiplications;
        quartiles of `tax`, the time beyond its slice bound as a share of it; of `gain`, the plain export's time on the
        same library in the same precision over this one's; and likewise of `over_half` and `over_float`, for ours.
    """
    with ExitStack() as stack:
        runners = _open(stack, subject, batch, degree, only)
        names = {"|".join(key): key for key in runners}
        times = measure({name: runners[key] for name, key in names.items()}, batch, seconds=seconds, min_rounds=15)
    torch.compiler.reset()
    found = {names[name]: each for name, each in times.items()}
    macs = {"-": count_gmacs(subject.reduced(0))}
    macs |= {schedule: count_gmacs(subject.reduced(degree, schedule)) for schedule in ("constant", STRIDED)}
    place = {"model": subject.name, "batch": batch, "degree": degree}
    return [place | _record(found, *key, macs["-"] / macs[key[1]]) for key in found if not key[1].endswith("bound")]


def _open(stack: ExitStack, subject: Subject, batch: int, degree: int, only: str) -> dict[Key, Any]:
    runners = {}
    for backend, precision in OURS:
        name = f"ours, {_NAMES[backend]} {precision}"
        planned = {"-": 0, "constant": degree, **({} if precision == "int8" else {STRIDED: degree})}
        for schedule, at in planned.items() if re.search(only, name) else ():
            form = graph_precision(backend, precision)
            graph = subject.graph(at, "constant" if schedule == "-" else schedule, form)
            engine, how = build(graph, backend=backend, precision=precision), {"precision": precision, "batch": batch}
            runners[name, schedule] = stack.enter_context(open_engine(engine.file, backend, **how))
            if schedule != "-":
                with slice_bound(graph.file) as file:
                    runners[name, f"{schedule} bound"] = stack.enter_context(open_engine(file, backend, **how))
    for schedule, at in (("-", 0), ("constant", degree)):
        for name, opened in peers(subject, batch, at).items():
            if re.search(only, name):
                runners[name, schedule] = stack.enter_context(opened())
    return runners


def _record(found: dict[Key, Latency], contender: str, schedule: str, ideal: float) -> dict[str, Any]:
    own, bound = found[contender, schedule], found.get((contender, f"{schedule} bound"))
    record = {"contender": contender, "schedule": schedule, "rounds": own.rounds, "ms": own.p50, "low": own.p25,
              "high": own.p75}  # fmt: skip
    if schedule != "-":
        speed_up = found[contender, "-"].ratio_to(own)[1]
        record |= {"speed_up": speed_up, "of_ideal": speed_up / ideal}
    if bound is not None:
        record["tax"] = [ratio - 1 for ratio in own.ratio_to(bound)]
    peer = (contender.replace("ours", "plain export"), "-" if schedule == "-" else "constant")
    others = {"gain": peer} | {ratio: (name, schedule) for ratio, name in _COMPARED.items()}
    for ratio, other in others.items():
        if other in found and other[0] != contender:
            record[ratio] = list(found[other].ratio_to(own))
    return record
