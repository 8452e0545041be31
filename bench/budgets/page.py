"""The page, from the results alone: no number in it is typed by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.budgets.tables import Cascades, Gain, by_task, cascades
from bench.experiment.tasks import TASKS
from bench.markdown import table
from tocom.calib.cascade import CAUTION
from tocom.export.cli.frontier_plot import Mark, Panel, draw
from tocom.runtime.files import write_atomically

_ERRORS = 2  # standard errors that a difference must exceed to be one
_KINDS = {"single": "the best single degree of equal or lower cost", "mixture": "lots drawn between two single degrees"}


def write_page(results: Mapping[str, Any], out: Path) -> None:
    """Writes the page, and its pictures beside it.

    Args:
        results: As `bench.budgets.__main__` gathers them; what is missing is left out.
        out: Markdown file.
    """
    sections = [("At the cost of a single degree", _equal(results)), ("At a stated accuracy", _gmacs(results, out))]
    if by_task(results, "times"):
        sections.append(("By time on this machine", _times(results)))
    sections += [("Single degrees", _singles(results)), ("What is promised, and what is kept", _promises(results))]
    found = "\n".join(
        f"- {each}" for each in [_found_equal(results), *_found(results, "gmacs"), *_found(results, "times")]
    )
    parts = [_setup(results, out), f"## What was found\n\n{found}"]
    parts += [f"## {title}\n\n{body}" for title, body in sections]
    write_atomically(out, ("\n\n".join(parts) + "\n").encode())


def _setup(results: Mapping[str, Any], out: Path) -> str:
    setup = results["setup"]
    tasks = [task for task in by_task(results, "gmacs") if task in TASKS]
    asked = "\n".join(f"  - `{name}`: {TASKS[name].asks}" for name in tasks)
    quick = "\n\n**A quick trial on a few sheets: it shows that the study runs, and nothing else.**"
    unfinished = f"\n\nNot finished yet, so not in it: {', '.join(setup['unfinished'])}." if setup["unfinished"] else ""
    return f"""# Budgets: frontiers and cascades

Written by `python -m bench.budgets` ([bench/budgets](../budgets)), {setup["date"]}; OpenVINO {setup["openvino"]}. Every
number is in [{out.stem}.json]({out.stem}.json).{quick if setup["effort"] == "quick" else ""}{unfinished}

- **Families**: ViTs of width 96, 6 blocks, 65 tokens, fine-tuned without merging, compiled with their compensator at
  degrees {_listed(setup["degrees"])}: the example's checkpoint, and the experiment's, fine-tunings
  {_listed(setup["seeds"])} of each task, at scales that were chosen on validation sheets of their own.
{asked}
- **Cascades** are found on {setup["val_sheets"]} validation sheets. They may lose {_listed(setup["drops"])} points
  against degree 0. Everything is reported on {setup["test_sheets"]} test sheets, which are by other hands.
- **Equal cost**: a cascade is held against *the best single degree* of equal or lower mean cost, and against *lots*:
  the best pair of degrees between which images are drawn at random, so that the mean cost is exactly the cascade's.
  Both are picked on the very test sheets that they are reported on, which favours them.
- **Errors**: ± is one standard error, of paired differences over the test sheets; over fine-tunings they are combined
  as if independent."""


def _listed(values: Sequence[float]) -> str:
    *head, last = (f"{value:g}" for value in values)
    return f"{', '.join(head)} and {last}" if head else last


def _named(task: str) -> str:
    return "example" if task == "example" else f"`{task}`"


def _equal_rows(results: Mapping[str, Any]) -> list[tuple[str, Sequence[Mapping[str, Any]], Gain]]:
    """Task, what was found of its checkpoints, and the gain, for every degree."""
    rows = []
    for task, found in by_task(results, "equal").items():
        for each in zip(*found, strict=True):
            rows.append((task, each, Gain.of([(row["gain"], row["gain_error"]) for row in each])))
    return rows


def _equal(results: Mapping[str, Any]) -> str:
    rows = []
    for task, each, gain in _equal_rows(results):
        cascade = Cascades(task, 0.0, None, tuple(each))
        sent = [row["shares"][1] if len(row["shares"]) > 1 else 0.0 for row in each]
        mixture = cascade.gain_on("mixture")
        rows.append([_named(task), str(each[0]["degree"]), f"{cascade.mean('its_cost'):.4f}",
                     f"{cascade.mean('its_accuracy'):.2f}", cascade.chains, f"{np.mean(sent):.0%}",
                     f"{cascade.mean('cost'):.4f}", f"{cascade.mean('accuracy'):.2f}", str(gain),
                     f"{gain.worst:+.2f} ±{gain.worst_error:.2f}", str(mixture)])  # fmt: skip
    columns = ("task", "degree", "its GMACs", "its top-1, %", "cascade", "sent on", "GMACs", "top-1, %", "better by",
               "the least of the checkpoints", "better than lots by")  # fmt: skip
    return ("For every degree but the lowest and the highest, the cascade that is right most often on the validation "
            "sheets and costs no more multiply-accumulates than the degree; a single degree counts as a cascade of one "
            f"stage. Both on the test sheets.\n\n{table(columns, rows, text=(columns[0], columns[4]))}")  # fmt: skip


def _found_equal(results: Mapping[str, Any]) -> str:
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


def _gmacs(results: Mapping[str, Any], out: Path) -> str:
    rows = []
    for each in cascades(results, "gmacs"):
        full = float(np.mean([found["0"]["gmacs"] for found in by_task(results, "singles")[each.task]]))
        rows.append(_row(each, full, 4))
    columns = ("task", "may lose", "pays", "degrees", "sent on", "GMACs", "of degree 0's", "single degree", "its GMACs",
               "top-1, %", "loses", "better than the best single degree by", "than lots by")  # fmt: skip
    picture = out.with_name(f"{out.stem}-gmacs.png")
    draw([_panel(task, results, list(cascades(results, "gmacs"))) for task in by_task(results, "gmacs")], picture)
    return ("The cascade of the least mean multiply-accumulates that keeps what is asked for, beside the cheapest "
            "single degree that does. It pays for so many checkpoints as the column says; for the others, where the "
            "single degree costs less, `tocom cascade` says so and writes none. Means are over those that pay; where "
            "none does, the cost is of those that do not.\n\n"
            f"{table(columns, rows, text=(columns[0], columns[3]))}\n\n"
            f"![accuracy against multiply-accumulates]({picture.name})\n\nMean over fine-tunings; a star is a cascade "
            "that pays, beside it the points that it may lose.")  # fmt: skip


def _row(each: Cascades, full: float, digits: int) -> list[str]:
    def told(costs: Sequence[float]) -> list[str]:
        return [f"{np.mean(costs):.{digits}f}", f"{np.mean(costs) / full:.0%}"] if costs else ["", ""]

    shown = each.rows or each.others
    singles = sorted({row["single"] for row in shown})
    needed, _ = told([row["single_cost"] for row in shown if "single_cost" in row])
    head = [_named(each.task), f"{each.drop:g}", f"{len(each.rows)} of {len(each.rows) + len(each.others)}"]
    single = [", ".join(map(str, singles)), needed]
    if not each.rows:
        return [*head, "none", "", *told([row["cost"] for row in shown if row["cascade"]]), *single, *[""] * 4]
    gains = [each.gain_on(kind) for kind in _KINDS]
    return [*head, each.chains, f"{each.sent_on:.0%}", *told([row["cost"] for row in shown]), *single,
            f"{each.mean('accuracy'):.2f}", str(each.lost),
            *("cheaper than all" if gain is None else str(gain) for gain in gains)]  # fmt: skip


def _panel(task: str, results: Mapping[str, Any], listed: Sequence[Cascades]) -> Panel:
    found = by_task(results, "singles")[task]
    marks = []
    for degree in found[0]:
        accuracy, cost = (float(np.mean([each[degree][name] for each in found])) for name in ("accuracy", "gmacs"))
        error = Gain.of([(0.0, each[degree]["error"]) for each in found]).error
        marks.append(Mark(cost, accuracy, error, f"r={degree}"))
    for each in listed:
        if each.task == task and each.rows:
            error = Gain.of([(0.0, row["error"]) for row in each.rows]).error
            marks.append(Mark(each.mean("cost"), each.mean("accuracy"), error, f"-{each.drop:g}", cascade=True))
    return Panel(task, "GMACs per image", tuple(marks))


def _times(results: Mapping[str, Any]) -> str:
    found = [each for listed in by_task(results, "times").values() for each in listed]
    machines, loads = sorted({each["machine"] for each in found}), [each["load"] for each in found]
    parts = [
        f"{', '.join(machines)}; one fine-tuning of each task. Every batch runs through the cascade and through "
        "every single degree in turns, twice, and the faster one counts; the time of a cascade is its mean. Load "
        f"average while this ran: {min(loads):.1f} to {max(loads):.1f}. Images of a batch that go on are run "
        "together, which for networks as small as these is dear: a call costs a good part of what its images do. "
        "A cascade pays where it saves 2% or more, both by what was expected and as measured."
    ]
    listed = list(cascades(results, "times"))
    for batch in sorted({each.batch for each in listed}):
        rows = []
        for each in (each for each in listed if each.batch == batch):
            full = float(np.mean([row["measured"]["0"] for row in (*each.rows, *each.others) if "measured" in row]))
            rows.append(_row(each, full, 3))
        columns = ("task", "may lose", "pays", "degrees", "sent on", "ms per image", "of degree 0's", "single degree",
                   "its ms", "top-1, %", "loses", "better than the best single degree by", "than lots by")  # fmt: skip
        parts.append(f"Batch {batch}:\n\n{table(columns, rows, text=(columns[0], columns[3]))}")
    return "\n\n".join(parts)


def _singles(results: Mapping[str, Any]) -> str:
    rows = []
    for task, found in by_task(results, "singles").items():
        for degree in found[0]:
            of_degree = [each[degree] for each in found]
            errors = np.mean([each["calibration_error"] for each in of_degree], axis=0)
            scales = sorted({f"{each['scale']:g}" for each in of_degree}) if degree != "0" else ["-"]
            rows.append([_named(task), degree, ", ".join(scales), f"{of_degree[0]['gmacs']:.4f}",
                         f"{np.mean([each['accuracy'] for each in of_degree]):.2f}",
                         f"{np.mean([each['temperature'] for each in of_degree]):.2f}",
                         f"{errors[0]:.1f}", f"{errors[1]:.1f}"])  # fmt: skip
    columns = ("task", "degree", "scale", "GMACs", "top-1, %", "temperature", "calibration error before", "after")
    return (
        "The calibration error is how far confidence and accuracy lie apart on the test sheets, in points, over 15 "
        f"bins; the temperature is fitted on the validation sheets.\n\n{table(columns, rows, text=columns[:1])}"
    )


def _promises(results: Mapping[str, Any]) -> str:
    setup = results["setup"]
    rows = []
    for task, found in by_task(results, "promises").items():
        for place, first in enumerate(found[0]):
            drop = first["drop"]
            alike, test = (np.concatenate([each[place][kind] for each in found]) for kind in ("alike", "test"))
            cells = [f"{len(alike)} of {sum(each[place]['draws'] for each in found)}"]
            for lost in (alike, test):
                cells += [f"{np.mean(lost):.2f}", f"{np.mean(lost > drop):.0%}"] if len(lost) else ["-", "-"]
            rows.append([_named(task), f"{drop:g}", *cells])
    columns = ("task", "may lose", "found", "lost, sheets alike", "more than allowed", "lost, other hands",
               "more than it may")  # fmt: skip
    return (f"A cascade must keep what is asked for with a margin of {CAUTION:g} standard errors. Here it is found "
            f"again and again on {setup['draw_sheets']} of the validation sheets, and judged on those that were not "
            "drawn, which are like them, and on the test sheets, which are by other hands: no margin covers "
            f"that images change.\n\n{table(columns, rows, text=columns[:1])}")  # fmt: skip


def _found(results: Mapping[str, Any], stage: str) -> list[str]:
    listed = list(cascades(results, stage))
    sentences = []
    for batch in sorted({each.batch for each in listed}, key=str):
        chosen = [each for each in listed if each.batch == batch]
        by = "multiply-accumulates" if batch is None else f"time at batch {batch}"
        paying, count = (sum(map(len, kept)) for kept in (
            [each.rows for each in chosen], [each.rows + each.others for each in chosen]))  # fmt: skip
        never = [task for task in dict.fromkeys(each.task for each in chosen)
                 if not any(each.rows for each in chosen if each.task == task)]  # fmt: skip
        text = f"At a stated accuracy, by {by}: cascades pay in {paying} of {count} cases (checkpoints x drops)"
        text += f", on {', '.join(map(_named, never))} in none." if never else "."
        sentences.append(" ".join([text, *(_sentence(kind, chosen) for kind in _KINDS if paying)]))
    return sentences


def _sentence(kind: str, listed: Sequence[Cascades]) -> str:
    gains = [(each, gain) for each in listed if each.rows and (gain := each.gain_on(kind)) is not None]
    if not gains:
        return "Those are cheaper than all single degrees."
    ahead = [gain for _, gain in gains if gain.mean >= 0]
    behind = [(each, gain) for each, gain in gains if gain.mean < -_ERRORS * gain.error]
    row, least = min(gains, key=lambda pair: pair[1].mean)
    text = (f"Against {_KINDS[kind]}, those are at least as accurate in {len(ahead)} of {len(gains)} rows, by "
            f"{np.mean([gain.mean for _, gain in gains]):+.2f} points on average; the least is {least} "
            f"({_named(row.task)}, may lose {row.drop:g})")  # fmt: skip
    if behind:
        where = ", ".join(f"{_named(each.task)} at {each.drop:g}" for each, _ in behind)
        text += f"; they are behind by more than {_ERRORS} standard errors in {len(behind)}: {where}"
    worst = [gain.worst for _, gain in gains]
    return f"{text}. Of single checkpoints, the least is {min(worst):+.2f}."
