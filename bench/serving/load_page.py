"""The load test in numbers, whether what is claimed of it was seen, and its page with two pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from bench.harness.page import figure, render
from bench.serving.load import ADAPTIVE, FACTORS, MAX_QUEUE, TRICKLE, LoadOptions, contenders, holds, idle_again_s

_KEPT = ("offered", "answered", "p50_ms", "p99_ms", "p99_of_all_ms", "refused", "top1", "degrees")
_BAD = ("answered wrong", "lost", "refused unclearly")
_COLORS = ("#b5651d", "#4a8f4a", "#1f5fa8")
_GOAL = 1.5


def summary(measured: Mapping[str, Any], options: LoadOptions, last: int) -> dict[str, Any]:
    """All that the page tells, of what the load test keeps in its state; `last` is the most compressed degree."""
    step = measured["step"]
    every = [found for name, found in measured.items() if name != "sustained"]
    rows = [{"load": factor, "server": name, **{key: measured[f"{factor:g}x {name}"][key] for key in _KEPT}}
            for factor in FACTORS for name in contenders(last, options.objective_ms)]  # fmt: skip
    return {
        "options": {**asdict(options), "own_cores": options.own_cores},
        "sustained": measured["sustained"],
        "rows": rows,
        "sent": sum(each["counts"]["sent"] for each in every),
        "bad": sum(each["counts"][name] for each in every for name in _BAD),
        "lag_ms": [max(each["lag_ms"][which] for each in every) for which in (0, 1)],
        "step": {"phases": step["phases"], "idle_again_s": idle_again_s(step), "timeline": step["timeline"]},
    }


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """Whether what is claimed was seen: one line each."""
    objective_ms = results["options"]["objective_ms"]
    adaptive = {each["load"]: each for each in results["rows"] if each["server"] == ADAPTIVE}
    held = [factor for factor, found in adaptive.items() if holds(found, objective_ms)]
    upto = max((factor for factor in held if all(each in held for each in adaptive if each <= factor)), default=0.0)
    at_goal = adaptive[_GOAL]
    if upto >= _GOAL:
        first = (f"PASS: adaptive holds the objective of {objective_ms:g} ms up to {upto:g}x the load that r=0 holds "
                 f"(at {_GOAL:g}x 99% of all requests within {at_goal['p99_of_all_ms']:.1f} ms, "
                 f"{100 * at_goal['refused']:.2f}% refused)")  # fmt: skip
    else:
        p99_ms = at_goal["p99_ms"] or 0.0
        first = (f"SHORT: adaptive holds the objective of {objective_ms:g} ms up to {upto:g}x; at {_GOAL:g}x its p99 "
                 f"is {p99_ms:.1f} ms ({100 * (p99_ms / objective_ms - 1):+.0f}%), {100 * at_goal['refused']:.1f}% "
                 "refused")  # fmt: skip
    back = results["step"]["idle_again_s"]
    second = ("SHORT: it does not fall back to r=0 when the load ends" if back is None else
              f"PASS: it falls back to r=0 {back:.0f} s after the load ends")  # fmt: skip
    third = (f"{'SHORT' if results['bad'] else 'PASS'}: of {results['sent']} requests {results['bad']} were answered "
             "wrong, refused unclearly, or lost")  # fmt: skip
    return [first, second, third]


def write_load_page(results: Mapping[str, Any], out: Path) -> None:
    """Writes the page, and its pictures beside it; the step's is left as it is where its timeline was not kept."""
    options, step = results["options"], results["step"]
    load, over_time = (out.with_name(f"{out.stem}-{name}.png") for name in ("load", "step"))
    _draw_load(pd.DataFrame(results["rows"]), options["objective_ms"], load)
    if step["timeline"]:
        _draw_step(step["timeline"], step["phases"], options["objective_ms"], over_time)
    rows = [{
        "load": f"{each['load']:g}x", "server": each["server"], "offered images/s": f"{each['offered']:.0f}",
        "answered images/s": f"{each['answered']:.0f}", "p50 ms": _ms(each["p50_ms"]), "p99 ms": _ms(each["p99_ms"]),
        "p99 of all ms": _ms(each["p99_of_all_ms"]), "refused %": f"{100 * each['refused']:.2f}",
        "top-1 %": "" if each["top1"] is None else f"{100 * each['top1']:.1f}",
        "degrees of the answers": ", ".join(f"{degree}: {share:.0%}" for degree, share in each["degrees"].items()),
        "holds": "yes" if holds(each, options["objective_ms"]) else "no",
    } for each in results["rows"]]  # fmt: skip
    trials = [{"requests/s": f"{each['rate']:.1f}", "seconds": f"{each['seconds']:.0f}", "p99 ms": _ms(each["p99_ms"]),
               "p99 of all ms": _ms(each["p99_of_all_ms"]), "refused %": f"{100 * each['refused']:.2f}"}
              for each in results["sustained"]["trials"]]  # fmt: skip
    shares = zip((0.5, 2, TRICKLE), step["phases"], strict=True)
    phases = ", then ".join(f"{share:g}x for {seconds:.0f} s" for share, (_, seconds) in shares)
    render("serving/load.md.j2", out, **{**results, "rows": rows}, trials=trials, phases=phases, max_queue=MAX_QUEUE,
           verdicts=verdicts(results), load=load.name, over_time=over_time.name)  # fmt: skip


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _draw_load(rows: pd.DataFrame, objective_ms: float, file: Path) -> None:
    """p99 against offered load, and below it the share refused."""
    with figure(file, 2, 1, figsize=(6, 4.6), sharex=True, height_ratios=(2, 1)) as (_, (upper, lower)):
        for (name, found), color in zip(rows.groupby("server", sort=False), _COLORS, strict=False):
            upper.plot(found["load"], found["p99_ms"], "o-", color=color, label=name, markersize=4)
            lower.plot(found["load"], 100 * found["refused"], "o-", color=color, markersize=4)
        upper.axhline(objective_ms, color="#888888", linestyle="--", linewidth=1, label="objective")
        upper.set(ylabel="p99 of what is answered, ms", ylim=(0, None))
        lower.set(ylabel="refused, %", xlabel="offered load, times what r=0 sustains", ylim=(0, None))
        upper.legend()


def _draw_step(timeline: Sequence[Mapping[str, Any]], phases: Sequence[Sequence[float]], objective_ms: float,
               file: Path) -> None:  # fmt: skip
    """Latency and degree over time, through a step of load."""
    found = pd.DataFrame(timeline).set_index("at_s").astype(float)
    with figure(file, 2, 1, figsize=(6, 4.6), sharex=True) as (_, (upper, lower)):
        for key, style in (("p50_ms", "-"), ("p99_ms", ":")):
            upper.plot(found.index, found[key], style, color=_COLORS[2], label=key[:3])
        upper.axhline(objective_ms, color="#888888", linestyle="--", linewidth=1, label="objective")
        upper.set(ylabel="latency, ms", ylim=(0, None))
        upper.legend()
        lower.step(found.index, found["degree"], where="post", color=_COLORS[2])
        lower.set(ylabel="degree r, mean of a second", xlabel="seconds", ylim=(-0.5, None))
        start = 0.0
        for rate, length in phases:
            for axis in (upper, lower):
                axis.axvline(start, color="#bbbbbb", linewidth=0.8)
            lower.text(start + 0.3, lower.get_ylim()[1], f"{rate:.0f}/s", va="top")
            start += length
