"""The page of the load test, written from its state."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.markdown import table
from bench.serving.load import ADAPTIVE, FACTORS, TRICKLE, LoadOptions, contenders, holds, idle_again_s
from bench.serving.pictures import draw_load, draw_step
from tocom.runtime.files import write_atomically

_COLUMNS = ("load", "server", "offered images/s", "answered images/s", "p50 ms", "p99 ms", "p99 of all ms", "refused %",
            "top-1 %", "degrees of the answers", "holds")  # fmt: skip
_LIBRARIES = ("mlserver", "openvino", "onnxruntime-gpu", "grpcio", "numpy")
_GOAL = 1.5


def write_load_page(file: Path, results: Mapping[str, Any], options: LoadOptions, last: int, command: str) -> None:
    """Writes the page and its pictures.

    Args:
        file: A page in Markdown.
        results: Of the state.
        options: They were measured with.
        last: The most compressed degree.
        command: That measured them.
    """
    names = list(contenders(last, options.objective_ms))
    curves = {
        name: [(factor, found["p99_ms"], found["refused"]) for factor, found in _of(results, name) if found["p99_ms"]]
        for name in names
    }
    draw_load(curves, options.objective_ms, file.with_name("serving-load.png"))
    step = results["step"]
    draw_step(step["timeline"], step["phases"], options.objective_ms, file.with_name("serving-step.png"))
    text = "\n\n".join((
        "# Serving under load",
        f"Written by `{command}` ([bench/serving](../serving)), {datetime.now(UTC):%Y-%m-%d}: {machine()}; "
        f"{_versions()}.",
        *(f"**{line}**" for line in verdicts(results, options)),
        _how(results, options),
        "![p99 against offered load](serving-load.png)",
        table(_COLUMNS, (_row(factor, name, results[f"{factor:g}x {name}"], options.objective_ms)
                         for factor in FACTORS for name in names),
              ("server", "degrees of the answers", "holds")),
        "## A step of load",
        f"One adaptive server: {_phases(step)}. {_idle(step)}",
        "![degree and latency over time](serving-step.png)",
        "## What r=0 sustains",
        "Highest rate at which it holds the objective; then confirmed for as long as a measurement takes.",
        table(("requests/s", "seconds", "p99 ms", "p99 of all ms", "refused %"),
              ((f"{each['rate']:.1f}", f"{each['seconds']:.0f}", _ms(each["p99_ms"]), _ms(each["p99_of_all_ms"]),
                f"{100 * each['refused']:.2f}")
               for each in results["sustained"]["trials"])),
    ))  # fmt: skip
    write_atomically(file, (text + "\n").encode())


def verdicts(results: Mapping[str, Any], options: LoadOptions) -> list[str]:
    """Whether what is claimed was seen: one line each.

    Args:
        results: Of the state.
        options: They were measured with.
    """
    held = [factor for factor, found in _of(results, ADAPTIVE) if holds(found, options.objective_ms)]
    upto = max((factor for factor in held if all(each in held for each in FACTORS if each <= factor)), default=0.0)
    at_goal = results[f"{_GOAL:g}x {ADAPTIVE}"]
    if upto >= _GOAL:
        first = (f"PASS: adaptive holds the objective of {options.objective_ms:g} ms up to {upto:g}x the load that r=0 "
                 f"holds (at {_GOAL:g}x 99% of all requests within {_ms(at_goal['p99_of_all_ms'])} ms, "
                 f"{100 * at_goal['refused']:.2f}% refused)")  # fmt: skip
    else:
        over = (at_goal["p99_ms"] or 0.0) / options.objective_ms - 1
        first = (f"SHORT: adaptive holds the objective of {options.objective_ms:g} ms up to {upto:g}x; at {_GOAL:g}x "
                 f"its p99 is {_ms(at_goal['p99_ms'])} ms ({100 * over:+.0f}%), {100 * at_goal['refused']:.1f}% "
                 "refused")  # fmt: skip
    back = idle_again_s(results["step"])
    second = ("SHORT: it does not fall back to r=0 when the load ends" if back is None else
              f"PASS: it falls back to r=0 {back:.0f} s after the load ends")  # fmt: skip
    wrong = sum(each["counts"]["answered wrong"] + each["counts"]["lost"] + each["counts"]["refused unclearly"]
                for each in _measured(results))  # fmt: skip
    sent = sum(each["counts"]["sent"] for each in _measured(results))
    third = (f"{'PASS' if not wrong else 'SHORT'}: of {sent} requests {wrong} were answered wrong, refused unclearly, "
             "or lost")  # fmt: skip
    return [first, second, third]


def _how(results: Mapping[str, Any], options: LoadOptions) -> str:
    rate = results["sustained"]["rate"]
    usual, most = (max(each["lag_ms"][which] for each in _measured(results)) for which in (0, 1))
    cores = ", ".join(map(str, options.server_cores))
    return (
        f"Open loop: requests of {options.images} PNG sheets (32x32, examples/digits) each over gRPC, Poisson arrivals "
        f"(seed {options.seed}), {options.seconds:.0f} s per measurement; latency counts from when a request was to be "
        f"sent. The server with its engine process has core {cores}, the generator core "
        f"{', '.join(map(str, options.own_cores))}; what it sent late itself counts as latency too: 99% of "
        f"a measurement's requests were at most {usual:.1f} ms late, all at most {most:.1f} ms. Every server has "
        f"{options.workers} worker{'' if options.workers == 1 else 's'} of one thread and a queue of "
        f"{options.max_queue} images; 1x is {rate:.1f} requests/s, {rate * options.images:.0f} images/s. Contenders "
        "take turns within a load. Every answer is compared with the local engine's logits, bit for bit. Holds: 99 "
        'of 100 requests are answered within the objective, and a refused one was not: that is "p99 of all", which '
        'does not exist where more than 1% was refused. "p99" is that of what the queue let in.'
    )


def _row(factor: float, name: str, found: Mapping[str, Any], objective_ms: float) -> list[str]:
    shares = ", ".join(f"{degree}: {100 * share:.0f}%" for degree, share in found["degrees"].items())
    top1 = "" if found["top1"] is None else f"{100 * found['top1']:.1f}"
    return [f"{factor:g}x", name, f"{found['offered']:.0f}", f"{found['answered']:.0f}", _ms(found["p50_ms"]),
            _ms(found["p99_ms"]), _ms(found["p99_of_all_ms"]), f"{100 * found['refused']:.2f}", top1, shares,
            "yes" if holds(dict(found), objective_ms) else "no"]  # fmt: skip


def _of(results: Mapping[str, Any], name: str) -> list[tuple[float, Any]]:
    return [(factor, results[f"{factor:g}x {name}"]) for factor in FACTORS]


def _measured(results: Mapping[str, Any]) -> list[Any]:
    return [found for name, found in results.items() if name != "sustained"]


def _phases(step: Mapping[str, Any]) -> str:
    shares = (0.5, 2, TRICKLE)
    return ", then ".join(f"{share:g}x for {length:.0f} s" for share, (_, length) in
                          zip(shares, step["phases"], strict=True))  # fmt: skip


def _idle(step: Mapping[str, Any]) -> str:
    back = idle_again_s(dict(step))
    return "It did not come back to r=0." if back is None else f"It answers at r=0 again after {back:.0f} s."


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def machine() -> str:
    """What it ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
                     platform.processor())  # fmt: skip
    return f"{processor}, {os.cpu_count()} cores"


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in _LIBRARIES) + f", Python {platform.python_version()}"
