"""The page, from the results alone: no number in it is typed by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.budgets.tables import Cascades, Gain, by_task, cascades
from bench.experiment.tasks import TASKS
from bench.harness.page import render
from tocom.calib.cascade import CAUTION
from tocom.export.cli.frontier_plot import Mark, Panel, draw

_ERRORS = 2  # standard errors that a difference must exceed to be one
_KINDS = {"single": "the best single degree of equal or lower cost", "mixture": "lots drawn between two single degrees"}
Results = Mapping[str, Any]
Row = dict[str, Any]


def write_page(results: Results, out: Path) -> None:
    """Writes the page, and its picture beside it; what is missing is left out."""
    picture = out.with_name(f"{out.stem}-gmacs.png")
    draw([_panel(task, results) for task in by_task(results, "gmacs")], picture)
    timed = [each for found in by_task(results, "times").values() for each in found]
    batches = {batch: [_row(each, _full_ms(each), 3) for each in cascades(results, "times") if each.batch == batch]
               for batch in dict.fromkeys(each.batch for each in cascades(results, "times"))}  # fmt: skip
    render(
        "budgets/page.md.j2", out, **results, picture=picture.name, caution=CAUTION, batches=batches,
        asked=[(task, TASKS[task].asks) for task in by_task(results, "gmacs") if task in TASKS],
        found=[_found_equal(results), *_found(results, "gmacs"), *_found(results, "times")],
        equal=_equal(results), gmacs=[_row(each, _full_gmacs(results, each), 4) for each in cascades(results, "gmacs")],
        machines=sorted({each["machine"] for each in timed}), loads=[each["load"] for each in timed],
        singles=_singles(results), promises=_promises(results),
    )  # fmt: skip


def _named(task: str) -> str:
    return "example" if task == "example" else f"`{task}`"


def _full_gmacs(results: Results, each: Cascades) -> float:
    return float(np.mean([found["0"]["gmacs"] for found in by_task(results, "singles")[each.task]]))


def _full_ms(each: Cascades) -> float:
    return float(np.mean([row["measured"]["0"] for row in (*each.rows, *each.others) if "measured" in row]))


def _equal_rows(results: Results) -> list[tuple[str, Sequence[Mapping[str, Any]], Gain]]:
    """Task, what was found of its checkpoints, and the gain, for every degree."""
    return [(task, each, Gain.of([(row["gain"], row["gain_error"]) for row in each]))
            for task, found in by_task(results, "equal").items() for each in zip(*found, strict=True)]  # fmt: skip


def _equal(results: Results) -> list[Row]:
    rows = []
    for task, each, gain in _equal_rows(results):
        cascade = Cascades(task, 0.0, None, tuple(each))
        rows.append({
            "task": _named(task), "degree": each[0]["degree"], "its GMACs": f"{cascade.mean('its_cost'):.4f}",
            "its top-1, %": f"{cascade.mean('its_accuracy'):.2f}", "cascade": cascade.chains,
            "sent on": f"{cascade.sent_on:.0%}", "GMACs": f"{cascade.mean('cost'):.4f}",
            "top-1, %": f"{cascade.mean('accuracy'):.2f}", "better by": str(gain),
            "the least of the checkpoints": f"{gain.worst:+.2f} ±{gain.worst_error:.2f}",
            "better than lots by": str(cascade.gain_on("mixture")),
        })  # fmt: skip
    return rows


def _row(each: Cascades, full: float, digits: int) -> Row:
    """A row of cascades that keep a stated accuracy; costs in GMACs, or in ms per image."""

    def told(costs: Sequence[float]) -> list[str]:
        return [f"{np.mean(costs):.{digits}f}", f"{np.mean(costs) / full:.0%}"] if costs else ["", ""]

    unit = "GMACs" if each.batch is None else "ms per image"
    shown, pays = each.rows or each.others, bool(each.rows)
    cost = told([row["cost"] for row in shown if row["cascade"]])
    gains = [each.gain_on(kind) for kind in _KINDS] if pays else []
    better, than_lots = ["cheaper than all" if gain is None else str(gain) for gain in gains] or ["", ""]
    return {
        "task": _named(each.task), "may lose": f"{each.drop:g}",
        "pays": f"{len(each.rows)} of {len(each.rows) + len(each.others)}", "degrees": each.chains if pays else "none",
        "sent on": f"{each.sent_on:.0%}" if pays else "", unit: cost[0], "of degree 0's": cost[1],
        "single degree": ", ".join(map(str, sorted({row["single"] for row in shown}))),
        "its " + unit.split(" ")[0]: told([row["single_cost"] for row in shown if "single_cost" in row])[0],
        "top-1, %": f"{each.mean('accuracy'):.2f}" if pays else "", "loses": str(each.lost) if pays else "",
        "better than the best single degree by": better, "than lots by": than_lots,
    }  # fmt: skip


def _panel(task: str, results: Results) -> Panel:
    found = by_task(results, "singles")[task]
    marks = []
    for degree in found[0]:
        accuracy, cost = (float(np.mean([each[degree][name] for each in found])) for name in ("accuracy", "gmacs"))
        error = Gain.of([(0.0, each[degree]["error"]) for each in found]).error
        marks.append(Mark(cost, accuracy, error, f"r={degree}"))
    for each in cascades(results, "gmacs"):
        if each.task == task and each.rows:
            error = Gain.of([(0.0, row["error"]) for row in each.rows]).error
            marks.append(Mark(each.mean("cost"), each.mean("accuracy"), error, f"-{each.drop:g}", cascade=True))
    return Panel(task, "GMACs per image", tuple(marks))


def _singles(results: Results) -> list[Row]:
    rows = []
    for task, found in by_task(results, "singles").items():
        for degree in found[0]:
            own = [each[degree] for each in found]
            before, after = np.mean([each["calibration_error"] for each in own], axis=0)
            scales = sorted({f"{each['scale']:g}" for each in own}) if degree != "0" else ["-"]
            rows.append({
                "task": _named(task), "degree": degree, "scale": ", ".join(scales), "GMACs": f"{own[0]['gmacs']:.4f}",
                "top-1, %": f"{np.mean([each['accuracy'] for each in own]):.2f}",
                "temperature": f"{np.mean([each['temperature'] for each in own]):.2f}",
                "calibration error before": f"{before:.1f}", "after": f"{after:.1f}",
            })  # fmt: skip
    return rows


def _promises(results: Results) -> list[Row]:
    rows = []
    for task, found in by_task(results, "promises").items():
        for place, first in enumerate(found[0]):
            row = {"task": _named(task), "may lose": f"{first['drop']:g}"}
            alike, test = (np.concatenate([each[place][kind] for each in found]) for kind in ("alike", "test"))
            row["found"] = f"{len(alike)} of {sum(each[place]['draws'] for each in found)}"
            for lost, title, more in ((alike, "lost, sheets alike", "more than allowed"),
                                      (test, "lost, other hands", "more than it may")):  # fmt: skip
                row[title] = f"{np.mean(lost):.2f}" if len(lost) else "-"
                row[more] = f"{np.mean(lost > first['drop']):.0%}" if len(lost) else "-"
            rows.append(row)
    return rows


def _found_equal(results: Results) -> str:
    gains = [(task, each[0]["degree"], gain) for task, each, gain in _equal_rows(results)]
    ahead = [gain for _, _, gain in gains if gain.mean >= 0]
    task, degree, least = min(gains, key=lambda each: each[2].mean)
    text = (f"At the multiply-accumulates of a single degree, cascades are at least as accurate as the degree in "
            f"{len(ahead)} of {len(gains)} rows (tasks x degrees), by "
            f"{np.mean([gain.mean for _, _, gain in gains]):+.2f} points on average; the least is {least} "
            f"({_named(task)}, degree {degree})")  # fmt: skip
    behind = [f"{_named(task)} at degree {degree}" for task, degree, gain in gains if gain.mean < -_ERRORS * gain.error]
    if behind:
        text += f"; behind by more than {_ERRORS} standard errors: {', '.join(behind)}"
    return f"{text}. Of single checkpoints, the least is {min(gain.worst for _, _, gain in gains):+.2f}."


def _found(results: Results, stage: str) -> list[str]:
    """In how many cases cascades pay, and how they compare in those; a sentence for each batch size."""
    sentences = []
    for batch in dict.fromkeys(each.batch for each in cascades(results, stage)):
        chosen = [each for each in cascades(results, stage) if each.batch == batch]
        paying, others = (sum(len(getattr(each, name)) for each in chosen) for name in ("rows", "others"))
        by = "multiply-accumulates" if batch is None else f"time at batch {batch}"
        text = f"At a stated accuracy, by {by}: cascades pay in {paying} of {paying + others} cases."
        for kind, named in _KINDS.items():
            gains = [gain for each in chosen if each.rows and (gain := each.gain_on(kind)) is not None]
            if gains:
                ahead, behind = (sum(holds(gain) for gain in gains) for holds in (
                    lambda gain: gain.mean >= 0, lambda gain: gain.mean < -_ERRORS * gain.error))  # fmt: skip
                text += (f" Against {named}, those are at least as accurate in {ahead} of {len(gains)} rows, by "
                         f"{np.mean([gain.mean for gain in gains]):+.2f} points on average, and behind by more than "
                         f"{_ERRORS} standard errors in {behind}; the least is {min(gains, key=lambda g: g.mean)}."
                         )  # fmt: skip
        sentences.append(text)
    return sentences
