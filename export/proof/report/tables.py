"""What validation found, in words and tables, for report.md and report.html alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tocom.export.artifacts import Report
from tocom.export.proof.findings import Fault, Findings, NetworkGate
from tocom.export.proof.gates import GATES
from tocom.export.proof.parts import PARTS

MEASURED = tuple(part for part in PARTS if part != "decision")


class Cell(NamedTuple):
    """A cell of a table, and whether it breaks a gate."""

    text: str
    failing: bool = False


@dataclass(frozen=True)
class Table:
    """A table for people.

    Attributes:
        header: Names of the columns.
        rows: Cells.
        gate: What each column may be at most, in the same units; None where nothing has a gate.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    gate: tuple[str, ...] | None = None


WORDS = {
    "degree r": "tokens that every block removes; 0 removes none.",
    "u": "unit roundoff, the largest relative error of rounding one number to the candidate's format. Errors, margins "
    "and gates are multiples of it.",
    "part": "a piece of a block. The reference gets what the candidate itself put into the part, so that errors do not "
    "add up and the part at fault is named. Where the candidate does not put out the tokens between two parts, both "
    "are under the later one's name.",
    "agreement": "share of decisions (which token merges into which, which is dropped) equal to the reference's, with "
    "the candidate's decisions forced on all blocks before.",
    "explained": "images of which a block decides otherwise, and as well as the best to within rounding.",
    "unexplained": "images of which it decides worse than rounding explains; none may be.",
    "margin": "how much worse than the best decision the candidate's is, in float64: a cosine for merging, a share of "
    "the range of the logarithms of attention for pruning.",
    "output": "error of the tokens that leave a block with all decisions replayed; it adds up from block to block and "
    "has no gate.",
    "logit error": "of the image in the middle, with the candidate's decisions replayed in the reference.",
    "top-1, cosine, KL": "the candidate's logits beside those of the reference that decides by itself: what a user "
    "sees. They have no gate.",
}

_MEANINGS: dict[str, str] = {
    "embedding": "the tokens that enter block 0 are not what the reference makes of the image (patches, positions or "
    "prefix tokens)",
    "attention": "the tokens behind attention are not what the reference makes of the block's input (query, key and "
    "value weights, the compensator's change, softmax or the sizes of tokens)",
    "signal": "what decisions are made on (the mean of the keys, or the class token's attention) is not as the"
    " reference has it",
    "decision": "images are decided otherwise, and worse than rounding explains",
    "reduction": "the tokens or sizes that remain are not what the block's input and its decisions make them (with the "
    "attention before it, where the candidate does not put out the tokens between)",
    "mlp": "the tokens behind the MLP are not what the reference makes of its input",
    "head": "the logits are not what the reference makes of the last block's tokens (norm, pooling or classifier)",
    NetworkGate.DEBUG_COPY: "the copy that puts out what goes on inside answers otherwise than the shipped engine, so "
    "that what it puts out cannot be relied on",
    **dict.fromkeys(
        (NetworkGate.WORST_LOGITS, NetworkGate.MEDIAN_LOGITS),
        "logits are further from the reference's than rounding explains, although its decisions were replayed",
    ),
}


class FaultInWords(NamedTuple):
    """A gate that does not hold: which, and what that says about the candidate (empty where nothing is known)."""

    text: str
    meaning: str = ""


def faults_of(report: Report) -> list[FaultInWords]:
    """Every gate that does not hold; of what it was compared with too, where that is an engine."""
    findings = report.findings
    faults = [FaultInWords(str(fault), meaning_of(fault)) for fault in findings.faults]
    if findings.against is not None:
        other = findings.against.candidate or "what it is compared with"
        faults += [FaultInWords(f"{other}, {fault}", meaning_of(fault)) for fault in findings.against.faults]
    return faults if faults or report else [FaultInWords("a gate that is not among these findings")]


def meaning_of(fault: Fault) -> str:
    """What a fault says about the candidate; empty for an unknown one."""
    return _MEANINGS.get(fault.part, "")


def verdict(reports: Mapping[int, Report]) -> tuple[bool, str]:
    """Whether everything holds, and that in a sentence."""
    names = ", ".join(f"r={degree}" for degree in reports)
    failing = [f"r={degree}" for degree, report in reports.items() if not report]
    if not reports:
        return False, "Nothing was validated."
    if failing:
        fail = "fails" if len(failing) == 1 else "fail"
        return False, f"{len(failing)} of {len(reports)} degrees {fail}: {', '.join(failing)}."
    whole = f"All {len(reports)} degrees hold every gate ({names})."
    return True, whole if len(reports) > 1 else f"{names} holds every gate."


_FREE = {"top1_agreement": "{:.1%}", "cosine": "{:.6f}", "kl": "{:.1e}"}


def degree_table(reports: Mapping[int, Report]) -> Table:
    """One row per degree; with top-1 on labelled images, where that was measured."""
    labelled = any(report.findings.accuracy for report in reports.values())
    rows = []
    for degree, report in reports.items():
        findings, free, unit = report.findings, report.findings.free, unit_of(report.findings)
        parts = [error for block in findings.blocks.values() for error in block.parts.values()]
        worst = max(parts, key=lambda error: math.inf if math.isnan(error) else error, default=None)
        typical = findings.gates[NetworkGate.MEDIAN_LOGITS].allowed if findings.gates else math.inf
        rows.append((
            Cell(str(degree)), Cell("pass" if report else "FAIL", not report), Cell(str(findings.images)),
            Cell(percent(findings.agreement, findings.decisions)), Cell(str(findings.explained)),
            Cell(str(findings.unexplained), findings.unexplained > 0),
            Cell(in_units(worst, unit), worst is not None and not worst <= findings.part_allowed),
            Cell(in_units(findings.typical_logit_error, unit), not findings.typical_logit_error <= typical),
            *(_free(getattr(free, name), form) for name, form in _FREE.items()),
            *([_top1(findings, "top1"), _top1(findings, "reference_top1")] if labelled else []),
        ))  # fmt: skip
    header = ("degree r", "verdict", "images", "agreement", "explained", "unexplained", "worst part, u",
              "logit error, u", "top-1 equal", "lowest cosine", "KL, nats")  # fmt: skip
    return Table((*header, *(("top-1", "reference's top-1") if labelled else ())), tuple(rows))


def _top1(findings: Findings, name: str) -> Cell:
    return Cell("-" if findings.accuracy is None else f"{getattr(findings.accuracy, name):.1%}")


def _free(value: float | None, form: str) -> Cell:
    return Cell("-" if value is None else form.format(value))


def block_table(findings: Findings) -> Table:
    """One row per block of one degree: errors in unit roundoffs, and the gates below."""
    unit, part, margin = unit_of(findings), findings.part_allowed, findings.margin_allowed
    rows = []
    for index, block in findings.blocks.items():
        deciding = block.decisions or block.unexplained
        rows.append((
            Cell(str(index)), Cell(percent(block.equal / max(1, block.decisions), deciding)),
            Cell(str(block.explained) if deciding else "-"),
            Cell(str(block.unexplained) if deciding else "-", block.unexplained > 0),
            Cell(in_units(block.margin, unit) if deciding else "-", bool(block.unexplained)),
            *(Cell(in_units(error, unit), error is not None and not error <= part)
              for error in map(block.parts.get, MEASURED)),
            Cell(in_units(block.output_error, unit)),
        ))  # fmt: skip
    gate = ("gate", "-", "-", "0", in_units(margin, unit), *[in_units(part, unit)] * len(MEASURED), "-")
    return Table(
        ("block", "agreement", "explained", "unexplained", "margin, u", *MEASURED, "output"), tuple(rows), gate
    )


def gate_table(findings: Findings) -> Table:
    """What is measured of the network as a whole."""
    unit = unit_of(findings)
    rows = tuple(
        (
            Cell(name),
            Cell(in_units(gate.found, unit), not gate.found <= gate.allowed),
            Cell(in_units(gate.allowed, unit)),
        )
        for name, gate in findings.gates.items()
    )
    return Table(("of the network", "found, u", "gate, u"), rows)


def beside_table(findings: Findings) -> Table | None:
    """The candidate beside another engine, each deciding by itself; None where the reference is all there is."""
    if (pair := findings.pair) is None:
        return None
    rows = [
        ("images", str(pair.images)),
        ("of which all is decided alike", str(pair.images_alike)),
        ("decisions equal", f"{pair.agreement:.2%}"),
        ("logit error where alike", _share(pair.logit_error_alike)),
        ("logit error elsewhere", _share(pair.logit_error_otherwise)),
        ("top-1 equal", f"{pair.top1_agreement:.1%}"),
        ("lowest cosine", f"{pair.cosine:.6f}"),
        ("KL, nats", f"{pair.kl:.1e}"),
    ]
    return Table((f"{pair.one} beside", pair.other), tuple((Cell(name), Cell(value)) for name, value in rows))


def unit_of(findings: Findings) -> float:
    """The unit roundoff of the findings' number format."""
    return GATES[findings.precision].unit_roundoff


def in_units(value: float | None, unit: float) -> str:
    """A number as a multiple of u, for people.

    >>> in_units(0.25, 2**-8), in_units(None, 1), in_units(float("inf"), 1), in_units(1e6, 1)
    ('64.0', '-', 'inf', '1.0e+06')
    """
    if value is None:
        return "-"
    shown = value / unit
    return f"{shown:.1f}" if not math.isfinite(shown) or shown < 1e5 else f"{shown:.1e}"


def percent(share: float, decisions: int) -> str:
    """A share of decisions; one short of all never reads as all.

    >>> percent(0.99999, 100000), percent(1.0, 3), percent(1.0, 0)
    ('99.99%', '100.00%', '-')
    """
    if not decisions:
        return "-"
    shown = f"{share:.2%}"
    return "99.99%" if share < 1 and shown == "100.00%" else shown


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
