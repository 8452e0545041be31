"""docs/experiment.md and its pictures, from the results alone: no number in it is typed by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bench.experiment.protocol import METHODS
from bench.experiment.statistics import Gain, at_equal_latency, chosen, gain_over_checkpoints
from bench.experiment.tasks import TASKS
from bench.harness.page import figure, render

Results = Mapping[str, Any]
Curves = Mapping[str, Sequence[tuple[float, float, float]]]
"""Method -> (ms, top-1 plain, top-1 compensated) for each degree."""

_PLAIN, _COMPENSATED = {"color": "#b5651d", "marker": "o"}, {"color": "#1f5fa8", "marker": "s"}
_SHOWN = (8, 12, 16)  # degrees of tables that are short
_COSTS = {"backbone": "pre-training the backbone", "compensator": "distilling the {} compensator",
          "transfer": "carrying gaps over", "latency": "compiling and timing two families"}  # fmt: skip


def write_report(results: Results, page: Path) -> None:
    """Writes the page, and its pictures into a folder of its name beside it."""
    protocol, pictures = results["protocol"], page.with_suffix("")
    down = {source: gains(results, protocol["tasks"], source) for source in protocol["sources"]}
    _draw_degrees({f"fine-tuned at r = {source}": each for source, each in down.items()}, pictures / "degrees.png")
    transfer = _transfer(results["transfer"])
    if transfer is not None:
        _draw_transfer(transfer, pictures / "transfer.png")
    names = {"none": "nothing added", "own": f"fine-tuned at {max(protocol['sources'])}"}
    render(
        "experiment/page.md.j2", page, **results, tasks=TASKS, pictures=pictures.name, verdicts=_verdicts(results),
        strided=METHODS["strided"].schedule, frontier=_frontier(results, pictures), per_task=_per_task(results),
        pretraining={"matched": _matched(gains(results, ["ink"], 0)), "rows": _gain_rows(gains(results, ["ink"], 0))},
        downstream={source: {"matched": _matched(each), "rows": _gain_rows(each, source)}
                    for source, each in down.items()},
        checkpoints=next(iter(down[0].values())).count, methods=_methods(results), cost=_cost(results["seconds"]),
        gaps=None if transfer is None else transfer.map("{:.1f}".format).rename(
            columns=lambda gap: names.get(gap, f"gap of {gap}")).rename_axis("added on").reset_index(),
    )  # fmt: skip


def gains(results: Results, tasks: Iterable[str], source: int, method: str = "constant") -> dict[int, Gain]:
    """Target degree -> gain over the checkpoints of some tasks at a source degree."""
    assessed = chosen(results["outcomes"], tasks, source, method)
    targets = results["protocol"]["targets"]
    return {target: gain_over_checkpoints(assessed, source, target) for target in targets} if assessed else {}


def _signed(gain: Gain) -> str:
    return f"{gain.gain:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]"


def _share(gain: Gain) -> str:
    return "-" if gain.recovered is None else f"{gain.recovered:.0%}"


def _both(gain: Gain) -> str:
    return f"{gain.plain:.1f} -> {gain.compensated:.1f}"


def _matched(found: Mapping[int, Gain]) -> str:
    return f"{next(iter(found.values())).matched:.1f}"


def _verdicts(results: Results) -> list[dict[str, str]]:
    protocol = results["protocol"]
    top = max(protocol["targets"])
    ink, down = gains(results, ["ink"], 0)[top], gains(results, protocol["tasks"], 0)
    back = gains(results, protocol["tasks"], top)[0]
    rows = [
        (f"pre-training task, 0 -> {top}: loses at least 3 points", f"{ink.loss:.1f}", ink.loss >= 3),
        ("... and gets at least 30% of them back", _share(ink), (ink.recovered or 0) >= 0.3),
        (f"downstream mean, 0 -> {top}: loses at least 3", f"{down[top].loss:.1f}", down[top].loss >= 3),
        ("... and gets at least 15% of them back", _share(down[top]), (down[top].recovered or 0) >= 0.15),
        _above_zero(results, "source degree 0", (0,)),
        _above_zero(results, "the other source degrees", [each for each in protocol["sources"] if each]),
        (f"mismatched source {top} -> 0 is helped as well", _signed(back), back.low > 0),
    ]
    return [{"expected": what, "measured": told, "holds": "yes" if holds else "**no**"} for what, told, holds in rows]


def _above_zero(results: Results, named: str, sources: Iterable[int]) -> tuple[str, str, bool]:
    """Whether the compensator helps at every mismatched degree from 8 up."""
    gain_of = {
        f"{source} -> {target}": gain
        for source in sources
        for target, gain in gains(results, results["protocol"]["tasks"], source).items()
        if target >= 8 and target != source
    }
    weak = [degrees for degrees, gain in gain_of.items() if gain.low <= 0]
    told = f"{len(gain_of) - len(weak)} of {len(gain_of)}" + (f"; not {', '.join(weak)}" if weak else "")
    return f"{named}: gain above zero (95%) at every mismatched degree from 8 up", told, not weak


def _gain_rows(found: Mapping[int, Gain], source: int = 0) -> list[dict[str, Any]]:
    return [{"target degree": target, "as it is, %": f"{gain.plain:.1f}", "with ToCom, %": f"{gain.compensated:.1f}",
             "gain [95%]": _signed(gain), "lost without": f"{gain.loss:.1f}", "given back": _share(gain)}
            for target, gain in found.items() if target != source]  # fmt: skip


def _per_task(results: Results) -> list[dict[str, Any]]:
    protocol, rows = results["protocol"], []
    for task in protocol["tasks"]:
        for source in protocol["sources"]:
            each = gains(results, [task], source)
            cells = {f"r = {target}": _both(each[target]) if target != source and target in each else "own"
                     for target in (0, *_SHOWN)}  # fmt: skip
            rows.append({"task": task, "source": source, "at its own degree": f"{each[source].plain:.1f}", **cells})
    return rows


def _methods(results: Results) -> list[dict[str, Any]]:
    protocol = results["protocol"]
    found = {(method, label): gains(results, tasks, 0, method) for method in protocol["methods"]
             for label, tasks in (("ink", ["ink"]), ("downstream", protocol["tasks"]))}  # fmt: skip
    return [{"method": method, "task": label, **{f"r = {target}": f"{_both(each[target])}, {_share(each[target])}"
                                                 for target in _SHOWN if target in each}}
            for (method, label), each in found.items()] if len(protocol["methods"]) > 1 else []  # fmt: skip


def _frontier(results: Results, pictures: Path) -> list[dict[str, Any]]:
    """For every batch size the strided family against the constant one, with a picture and a sentence."""
    protocol, sections = results["protocol"], []
    if not results.get("latency") or "strided" not in protocol["methods"]:
        return []
    accuracy = {method: gains(results, protocol["tasks"], 0, method) for method in ("constant", "strided")}
    for batch, times in results["latency"].items():
        curves = {method: [(times[f"{method} {target}"]["p50"], gain.plain, gain.compensated)
                           for target, gain in found.items()] for method, found in accuracy.items()}  # fmt: skip
        picture = f"frontier-{batch}.png"
        _draw_frontier(curves, f"batch {batch}", pictures / picture)
        rows, told = _versus(curves, list(accuracy["strided"]))
        sections.append({"batch": batch, "picture": picture, "rows": rows, "told": told})
    return sections


def _versus(curves: Curves, targets: Sequence[int]) -> tuple[list[dict[str, Any]], str]:
    """The strided engines against the constant family at the same time, and from which degree on they win."""
    times, plain, compensated = zip(*curves["constant"], strict=True)
    strided = [point[0] for point in curves["strided"]]
    others = [at_equal_latency(times, shares, strided) for shares in (plain, compensated)]

    def versus(value: float, other: float | None) -> str:
        return "faster than any constant" if other is None else f"{value - other:+.1f}"

    rows, better, faster = [], [], []
    for place, target in enumerate(targets):
        time, *shares = curves["strided"][place]
        other_plain, other = (each[place] for each in others)
        if not target:
            continue
        rows.append({
            "r": target, "constant ms": f"{times[place]:.2f}", "speed-up": f"{times[0] / times[place]:.2f}x",
            "plain / ToCom": f"{plain[place]:.1f} / {compensated[place]:.1f}", "strided ms": f"{time:.2f}",
            "its speed-up": f"{times[0] / time:.2f}x", "its plain / ToCom": f"{shares[0]:.1f} / {shares[1]:.1f}",
            "strided at equal ms, plain": versus(shares[0], other_plain), "with ToCom": versus(shares[1], other),
        })  # fmt: skip
        if other is None:
            faster.append(target)
        elif shares[1] > other:
            better.append(target)
    told = (f"more accurate than constant in the same time at r = {', '.join(map(str, better))}" if better else
            "nowhere more accurate than constant in the same time")  # fmt: skip
    told = f"With compensators, strided is {told}."
    if faster:
        told += f" At r = {', '.join(map(str, faster))} it is faster than constant gets at any degree."
    return rows, told


def _transfer(tables: Sequence[Mapping[str, Mapping[str, float]]]) -> pd.DataFrame | None:
    """Task -> top-1 by the gap that was added, mean over seeds."""
    return sum(pd.DataFrame(each).T for each in tables) / len(tables) if tables else None


def _cost(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    groups: dict[str, list[float]] = {}
    for name, time in seconds.items():
        stem, _, kind = name.rpartition(".")
        first, _, method = stem.partition("-")
        other = "fine-tuning a checkpoint" if kind == "safetensors" else "assessing a checkpoint with one method"
        groups.setdefault(_COSTS.get(first, other).format(method), []).append(time)
    return [{"stage": stage, "times": len(times), "seconds each": f"{sum(times) / len(times):.0f}",
             "minutes in all": f"{sum(times) / 60:.1f}"} for stage, times in groups.items()]  # fmt: skip


def _draw_degrees(panels: Mapping[str, Mapping[int, Gain]], file: Path) -> None:
    """A panel for each source degree: top-1 against the target degree, the band is the gain's 95% interval."""
    with figure(file, 1, len(panels), figsize=(3.1 * len(panels), 3), sharey=True, squeeze=False) as (_, axes):
        for axis, (title, found) in zip(axes[0], panels.items(), strict=True):
            degrees = sorted(found)
            axis.plot(degrees, [found[degree].plain for degree in degrees], label="as fine-tuned", **_PLAIN)
            axis.plot(degrees, [found[degree].compensated for degree in degrees], label="with ToCom", **_COMPENSATED)
            low, high = ([found[degree].plain + getattr(found[degree], end) for degree in degrees]
                         for end in ("low", "high"))  # fmt: skip
            axis.fill_between(degrees, low, high, color=_COMPENSATED["color"], alpha=0.15, linewidth=0)
            axis.set(title=title, xlabel="target degree r", xticks=degrees[::2])
        axes[0][0].set_ylabel("top-1, %")
        axes[0][0].legend(loc="lower left")


def _draw_frontier(curves: Curves, title: str, file: Path) -> None:
    with figure(file, figsize=(5, 3.4)) as (_, axis):
        for (method, points), line in zip(curves.items(), ("-", "--"), strict=False):
            times, plain, compensated = zip(*sorted(points), strict=True)
            axis.plot(times, plain, line, label=f"{method}, as fine-tuned", **_PLAIN, markersize=4)
            axis.plot(times, compensated, line, label=f"{method}, with ToCom", **_COMPENSATED, markersize=4)
        axis.set(title=title, xlabel="ms", ylabel="top-1, %")
        axis.legend()


def _draw_transfer(table: pd.DataFrame, file: Path) -> None:
    """A square for each pair of tasks: points gained on one task by the gap measured on another."""
    tasks = list(table.index)
    points = table[tasks].sub(table["none"], axis=0)
    with figure(file, figsize=(4.2, 3.4)) as (drawn, axis):
        limit = float(points.abs().to_numpy().max()) or 1
        image = axis.imshow(points, cmap="RdBu", vmin=-limit, vmax=limit)
        for row, onto in enumerate(tasks):
            for column, origin in enumerate(tasks):
                axis.text(column, row, f"{points[origin][onto]:+.1f}", ha="center", va="center")
        axis.grid(visible=False)
        axis.set(xticks=range(len(tasks)), yticks=range(len(tasks)), xticklabels=tasks, yticklabels=tasks,
                 xlabel="gap measured on", ylabel="added on")  # fmt: skip
        drawn.colorbar(image, label="points of top-1")
