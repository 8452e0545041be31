"""The page and its picture: how well any tolerance tells healthy engines from faulty ones, and the proof beside it."""

from __future__ import annotations

import math
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from bench.markdown import table
from bench.peer_comparison.faults import FAULTS

Case = Mapping[str, Any]
HEALTHY = "healthy"
STATISTICS = {"max": "largest error", "mean": "mean error", "median": "median error", "quantile": "99% quantile",
              "cosine": "1 - cosine"}  # fmt: skip
_MOST = 1e9  # what the picture shows of more than that


def rank_share(healthy: Sequence[float], faulty: Sequence[float]) -> float:
    """How often a faulty case has the larger number of a pair with a healthy one: the area under the ROC curve.

    >>> rank_share([1, 2], [2, 3])
    0.875
    """
    pairs = [(one, other) for one in healthy for other in faulty]
    return sum((other > one) + 0.5 * (other == one) for one, other in pairs) / len(pairs)


def fewest_errors(healthy: Sequence[float], faulty: Sequence[float]) -> tuple[int, int]:
    """False alarms and missed faults at the tolerance at which there are fewest in all.

    >>> fewest_errors([1, 2, 9], [3, 4])
    (1, 0)
    """
    errors = [(sum(each > limit for each in healthy), sum(each <= limit for each in faulty))
              for limit in (-math.inf, *healthy, *faulty)]  # fmt: skip
    return min(errors, key=sum)


def split(cases: Iterable[Case], engine: str) -> tuple[list[Case], list[Case]]:
    """The healthy cases of an engine, and those with a fault."""
    own = [case for case in cases if case["engine"] == engine]
    return [case for case in own if case["fault"] == HEALTHY], [case for case in own if case["fault"] != HEALTHY]


def engines_of(cases: Iterable[Case]) -> list[str]:
    """In the order in which they were measured."""
    return list(dict.fromkeys(case["engine"] for case in cases))


def hidden(cases: Sequence[Case], engine: str) -> list[str]:
    """Faults of which a case is within what healthy cases come to in every statistic."""
    healthy, faulty = split(cases, engine)
    most = {name: max(case["theirs"][name] for case in healthy) for name in STATISTICS}
    found = [case["fault"] for case in faulty if all(case["theirs"][name] <= most[name] for name in STATISTICS)]
    return list(dict.fromkeys(found))


def draw(cases: Sequence[Case], file: Path) -> None:
    """Largest logit error of every case, and how far the proof finds its worst part off."""
    engines = engines_of(cases)
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with pyplot.rc_context(style):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True)
        for row, engine in enumerate(engines):
            for index, (own, color, mark) in enumerate(
                zip(split(cases, engine), ("#1f5fa8", "#b5301d"), ("o", "x"), strict=True)
            ):
                label = None if row else (HEALTHY, "with a fault")[index]
                height = [row + 0.13 - 0.26 * index] * len(own)
                left.scatter([case["theirs"]["max"] for case in own], height, s=24, c=color, marker=mark, label=label)
                gates = [min(case["ours"]["gate"], _MOST) for case in own]
                right.scatter(gates, height, s=24, c=color, marker=mark, label=label)
        right.axvline(1, color="0.4", linestyle="--", linewidth=1)
        left.set(xscale="log", xlabel="largest difference of a logit", title="Polygraphy, outputs",
                 yticks=range(len(engines)), yticklabels=engines)  # fmt: skip
        right.set(xscale="log", xlabel="worst part or decision, as a multiple of its gate", title="part by part")
        left.invert_yaxis()
        left.legend(loc="upper left", fontsize=7)
        figure.tight_layout()
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=110)
        pyplot.close(figure)


def page(
    cases: Sequence[Case],
    layers: Sequence[Sequence[Any]],
    drawn: Mapping[str, Any],
    degree: int,
    sets: int,
    sheets: int,
    picture: str,
) -> str:
    """The page.

    Args:
        cases: What was measured.
        layers: Of every value: case, sheet or none, and block and operator of the first that differs too much.
        drawn: How the sets were chosen.
        degree: Tokens merged in every block.
        sets: How many were drawn.
        sheets: How many in each.
        picture: Its file name.
    """
    engines = engines_of(cases)
    healthy = len(split(cases, engines[0])[0])
    return "\n\n".join([
        "# Flips and faults: a plain export compared by Polygraphy, beside the proof",
        f"Written by `python -m bench.peer_comparison --degree {degree}` ([source](../peer_comparison)), "
        f"{date.today()}: {os.cpu_count()} cores ({platform.machine()}), polygraphy {version('polygraphy')}, "
        f"onnxruntime {version('onnxruntime-gpu')}, openvino {version('openvino').partition('-')[0]}.",
        _summary(cases),
        f"![largest difference of a logit, and the worst part by the proof]({picture})",
        "## What was compared",
        f"The shipped example at degree {degree}. Left: [a straightforward ToMe](../plain_tome.py) by "
        "`torch.onnx.export`, whose logits Polygraphy (`Comparator.run`, `compare_accuracy`) compares with those of "
        "ONNX Runtime on the healthy export in float32. Right: our graph, the same fault planted in it, the same "
        "library and number format, judged by `validate` against the healthy reference in float64. A case is one "
        f"engine on {sheets} sheets of test handwriting, all in one comparison, so that Polygraphy's statistics are "
        f"over all of them. Of {sets * sheets:,} sheets drawn, {len(drawn['flipped'])} are such that the healthy "
        f"export decides otherwise in OpenVINO float32 than in ONNX Runtime; the {healthy} sets are those with these "
        "sheets, and as many others; faulty engines run on every second of them. Polygraphy's default tolerance is "
        "1e-5, absolute or relative, of every logit. *Tight*: the lowest limit of the largest error that passes all "
        "healthy cases of the engine. *Loose*: the highest that fails all of its faulty ones. Shown is how many sets "
        "fail, and numbers from the least to the most of all sets.",
        "## Side by side",
        _cases(cases),
        "Decided otherwise: images and blocks in which our engine decides otherwise than the reference after the same "
        "decisions, in all sets; rounding explains it unless the first fault is a decision. Worst part, u: its error "
        "in unit roundoffs of the format. Native operators tell no tokens between attention and merging, so both are "
        "one part there, named reduction.",
        "## Any tolerance",
        "Every statistic that Polygraphy compares, with the tolerance chosen afterwards, for each engine by itself, to "
        "fit these very cases best. AUC: how often a faulty case has the larger number of a pair with a healthy one.",
        _tolerances(cases),
        *_unseen(cases),
        "## Every value an output",
        "Polygraphy can mark every value of the plain graph as an output. Float32, ONNX Runtime against OpenVINO, 64 "
        "sheets at a time; a value may differ by ten times what it does on 64 sheets about which both decide alike. "
        "Shown is the first in the graph that differs more.",
        _layers(layers),
        *_gone(layers),
        "A flip and a fault look the same there: the first value beyond its tolerance is in the block where they "
        "happen. A person who looks at the block may see which it is; a comparison that passes or fails does not.",
    ]) + "\n"  # fmt: skip


def _summary(cases: Sequence[Case]) -> str:
    lines = []
    for engine in engines_of(cases):
        healthy, faulty = split(cases, engine)
        high, low = (end(case["theirs"]["max"] for case in own) for end, own in ((max, healthy), (min, faulty)))
        alarms, missed = fewest_errors(*([case["theirs"]["max"] for case in own] for own in (healthy, faulty)))
        ours = sum(not case["ours"]["passed"] for case in healthy), sum(case["ours"]["passed"] for case in faulty)
        lines.append(
            f"- {engine}: healthy engines differ by up to {high:.2g} in a logit, faulty ones by as little as "
            f"{low:.2g}. At its best limit the largest error fails {alarms} of {len(healthy)} healthy cases and passes "
            f"{missed} of {len(faulty)} faulty ones; the proof fails {ours[0]} and passes {ours[1]}."
        )
    return "\n".join(["A flip, a decision at a tie that rounding turns, moves logits as much as a fault does.", *lines])


def _cases(cases: Sequence[Case]) -> str:
    rows = []
    for engine in engines_of(cases):
        healthy, faulty = split(cases, engine)
        tight = max(case["theirs"]["max"] for case in healthy)
        loose = min(case["theirs"]["max"] for case in faulty)
        for name in dict.fromkeys(case["fault"] for case in (*healthy, *faulty)):
            own = [case for case in (*healthy, *faulty) if case["fault"] == name]
            verdicts = (
                [not case["theirs"]["default"] for case in own],
                [case["theirs"]["max"] > tight for case in own],
                [case["theirs"]["max"] >= loose for case in own],
                [not case["ours"]["passed"] for case in own],
            )
            rows.append([
                engine, FAULTS[name].title if name in FAULTS else f"**{name}**",
                _range(case["theirs"]["max"] for case in own), _range(case["theirs"]["median"] for case in own),
                *(f"{sum(each)} of {len(own)}" for each in verdicts), str(sum(case["ours"]["flips"] for case in own)),
                _range(case["ours"]["part_u"] for case in own), _first(own),
            ])  # fmt: skip
    columns = ["engine", "case", "largest error", "median error", "default", "tight", "loose", "proof",
               "decided otherwise", "worst part, u", "first fault"]  # fmt: skip
    return table(columns, rows, {"engine", "case", "first fault"})


def _range(numbers: Iterable[float]) -> str:
    """Least to most."""
    least, *_, most = sorted(numbers) * 2
    return f"{least:.2g} to {most:.2g}"


def _first(cases: Iterable[Case]) -> str:
    """What is named as the first fault, most often first."""
    found = Counter(
        first[1] if first[0] is None else f"block {first[0]}, {first[1]}"
        for case in cases
        if (first := case["ours"]["first"]) is not None
    )
    return "; ".join(place for place, _ in found.most_common())


def _tolerances(cases: Sequence[Case]) -> str:
    rows = []
    for engine in engines_of(cases):
        healthy, faulty = split(cases, engine)
        for name, title in STATISTICS.items():
            right, wrong = ([case["theirs"][name] for case in own] for own in (healthy, faulty))
            alarms, missed = fewest_errors(right, wrong)
            rows.append([engine, title, f"{rank_share(right, wrong):.2f}",
                         f"{sum(each <= max(right) for each in wrong)} of {len(wrong)}",
                         f"{sum(each >= min(wrong) for each in right)} of {len(right)}",
                         f"{alarms} + {missed}"])  # fmt: skip
        alarms = sum(not case["ours"]["passed"] for case in healthy)
        missed = sum(case["ours"]["passed"] for case in faulty)
        right, wrong = ([case["ours"]["gate"] for case in own] for own in (healthy, faulty))
        rows.append([engine, "**proof**, gates as they are", f"{rank_share(right, wrong):.2f}",
                     f"{missed} of {len(faulty)}", f"{alarms} of {len(healthy)}", f"{alarms} + {missed}"])  # fmt: skip
    columns = ["engine", "statistic", "AUC", "faults missed where all healthy pass",
               "false alarms where all faults fail", "fewest: false alarms + missed"]  # fmt: skip
    return table(columns, rows, {"engine", "statistic"})


def _unseen(cases: Sequence[Case]) -> list[str]:
    """What no statistic tells, and what the proof does not."""
    lines = []
    for engine in engines_of(cases):
        none = [FAULTS[name].title for name in hidden(cases, engine)]
        missed = dict.fromkeys(
            FAULTS[case["fault"]].title for case in split(cases, engine)[1] if case["ours"]["passed"]
        )
        lines.append(
            f"- {engine}: on some set within what healthy cases come to in every statistic at once: "
            f"{'; '.join(none) or 'none'}. Not seen by the proof on some set: {'; '.join(missed) or 'none'}."
        )
    note = (
        "In float32, where flips are rare, the median over images tells a fault that is in every image; one that is in "
        "few images looks as flips do. In half precision rounding moves every logit. What the proof does not see "
        "changes its part by less than the gate leaves to the format's rounding. Tolerances chosen afterwards flatter "
        "the statistics: the gates were fixed before."
    )
    return ["\n".join(lines), note]


def _gone(layers: Sequence[Sequence[Any]]) -> list[str]:
    """What marking does to flips."""
    flips = [first for _, sheet, first in layers if sheet is not None]
    gone = sum(first is None for first in flips)
    said = f"Marking every value makes libraries fuse otherwise: {gone} of {len(flips)} flips does not happen there."
    return [said] if gone else []


def _layers(layers: Sequence[Sequence[Any]]) -> str:
    rows = []
    for name, sheet, first in layers:
        title = (
            FAULTS[name].title if name in FAULTS else HEALTHY + ("" if sheet is None else f", a flip (sheet {sheet})")
        )
        rows.append([title, "none: passes" if first is None else f"block {first[0]}, {first[1]}"])
    return table(["case", "first value that differs too much"], rows, {"case", "first value that differs too much"})
