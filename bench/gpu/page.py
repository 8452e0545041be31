"""The result page: what machine, what was compared, how fast everybody is, and what was not run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.gpu.compare import NOT_RUN
from bench.harness.page import render, spread


def write_page(results: Mapping[str, Any], out: Path) -> None:
    """Writes the page, from what `bench.gpu.check` keeps."""
    checks, groups = results["checks"], results["groups"]
    lines = list(results["to_do"])
    lines += [f"compared, {line}" for line in _gathered(
        (f"{each['what']}, {each['model']}", each["degree"], each["why"])
        for each in checks if each["verdict"] == NOT_RUN
    )]  # fmt: skip
    for group in groups:
        missing = ((each["contender"], each["degree"], each["why"]) for each in group["missing"])
        lines += [f"{_title(group)}: {line}" for line in _gathered(missing)]
    render(
        "gpu/page.md.j2", out, **results, not_run=lines,
        compared=[_check(each) for each in checks if each["verdict"] != NOT_RUN],
        timed=[group | {"title": _title(group), "table": _speed(group, results["matmul"].get(group["precision"]))}
               for group in groups],
        facts=", ".join(f"{name} {value}" for name, value in results["machine"].items() if name != "GPU"),
        rates=", ".join(f"{rate:.0f} TFLOP/s in {precision}" for precision, rate in results["matmul"].items()),
    )  # fmt: skip


def _title(group: Mapping[str, Any]) -> str:
    return f"{group['model']}, batch {group['batch']}, {group['precision']}"


def _check(each: Mapping[str, Any]) -> dict[str, Any]:
    agreement, error, allowed = each["agreement"], each["error"], each["allowed"]
    return {"model": each["model"], "r": each["degree"], "what": each["what"], "verdict": each["verdict"],
            "decisions equal": "" if agreement is None else f"{agreement:.2%}", "explained": each["explained"],
            "unexplained": each["unexplained"], "error": "" if error is None else f"{error:.1e}",
            "allowed": "" if allowed is None else f"{allowed:.1e}", "": each["why"]}  # fmt: skip


def _speed(group: Mapping[str, Any], rate: float | None) -> list[dict[str, Any]]:
    rows = []
    for row in sorted(group["rows"], key=lambda row: (row["degree"], row["ms"])):
        ratio = row["speed_up"] if row["degree"] else None
        rows.append({
            "r": row["degree"], "contender": row["contender"], "clock": row["clock"], "rounds": row["rounds"],
            "ms": f"{row['ms']:.3f}", "quartiles": f"{row['low']:.3f} - {row['high']:.3f}",
            "images/s": f"{1000 * group['batch'] / row['ms']:.0f}",
            "speed-up": "" if ratio is None else f"{ratio:.2f}x",
            "of ideal": "" if ratio is None else f"{ratio / row['ideal']:.0%}",
            "tax": spread(row["tax"], "{:+.1%}"), "over torch.compile": spread(row["over_compile"], "{:.2f}x"),
            "TFLOP/s": f"{row['tflops']:.1f}", "of the GPU": "" if rate is None else f"{row['tflops'] / rate:.0%}",
        })  # fmt: skip
    return rows


def _gathered(found: Iterable[tuple[str, int, str]]) -> list[str]:
    """(who, degree, why), gathered over the degrees."""
    degrees: dict[tuple[str, str], list[str]] = {}
    for who, degree, why in found:
        degrees.setdefault((who, why), []).append(str(degree))
    return [f"{who}, r = {', '.join(some)}: {why}" for (who, why), some in degrees.items()]
