"""What validation found, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from tocom.export.artifacts import Report
from tocom.export.proof.gates import GATES
from tocom.export.proof.parts import PARTS

_FREE = {"top1_agreement": "{:.0%}", "cosine": "{:.6f}", "kl": "{:.1e}"}


def verdict_table(reports: Mapping[int, Report], title: str) -> Table:
    """One row per degree.

    Args:
        reports: Degree -> report.
        title: Of the table.
    """
    table = Table(title=title)
    for name in ("degree", "verdict", "images", "agreement", "explained", "unexplained", "worst part / u",
                 "logit error / u", "top-1 equal", "cosine", "KL"):  # fmt: skip
        table.add_column(name, justify="right")
    for degree, report in reports.items():
        findings, free = report.findings, report.findings.free
        unit = GATES[findings.precision].unit_roundoff
        parts = [error for block in findings.blocks.values() for error in block.parts.values()]
        table.add_row(
            str(degree), "[green]pass[/]" if report else "[red]FAIL[/]", str(findings.images),
            f"{findings.agreement:.2%}", str(findings.explained), str(findings.unexplained),
            f"{max(parts) / unit:.1f}" if parts else "-", f"{findings.typical_logit_error / unit:.1f}",
            *(_free(getattr(free, name), form) for name, form in _FREE.items()),
        )  # fmt: skip
    table.caption = (
        "u: unit roundoff of the number format. Worst part: each part of each block by itself, on the engine's own "
        "input.\nLogit error: of the image in the middle, with the engine's decisions replayed in the reference. "
        "Top-1, cosine, KL: against\nthe reference that decides by itself."
    )
    table.caption_justify = "left"
    return table


def _free(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def fault_lines(reports: Mapping[int, Report], most: int = 3) -> list[str]:
    """What is wrong, in words: the first faults of every degree that fails.

    Args:
        reports: Degree -> report.
        most: Faults of each.
    """
    lines = []
    for degree, report in reports.items():
        faults = list(report.findings.faults)
        if report.findings.against is not None:
            faults += [f"against: {fault}" for fault in report.findings.against.faults]
        left = len(faults) - most
        lines += [f"r={degree} FAILS: {fault}" for fault in faults[:most]]
        lines += [f"r={degree}: and {left} more behind it"] if left > 0 else []
    return lines


def block_table(reports: Mapping[int, Report]) -> Table:
    """What validation found in every block.

    Args:
        reports: Degree -> report.
    """
    table = Table(title="block by block, errors in unit roundoffs")
    measured = [part for part in PARTS if part != "decision"]
    for name in ("degree", "block", "agreement", "explained", "unexplained", "margin", *measured, "output"):
        table.add_column(name, justify="right")
    for degree, report in reports.items():
        unit = GATES[report.findings.precision].unit_roundoff

        def in_units(error: float | None, unit: float = unit) -> str:
            return "-" if error is None else f"{error / unit:.1f}"

        for index, block in report.findings.blocks.items():
            decisions, parts = block.decisions, block.parts
            table.add_row(
                str(degree), str(index), f"{block.equal / decisions:.2%}" if decisions else "-",
                str(block.explained), str(block.unexplained),
                in_units(block.margin) if decisions else "-",
                *(in_units(parts.get(part)) for part in measured), in_units(block.output_error),
            )  # fmt: skip
    table.caption = (
        "explained, unexplained: images that decide otherwise; margin: how much worse than the best the worst "
        "decision is;\nthen each part by itself, on the engine's own input; output: the tokens that leave the block, "
        "decisions replayed."
    )
    table.caption_justify = "left"
    return table


def pair_table(reports: Mapping[int, Report]) -> Table:
    """What two sides differ in, one row per degree; both are validated apart from that.

    Args:
        reports: Degree -> report, of a comparison with another engine.
    """
    table = Table(title="beside each other")
    for name in ("degree", "candidate", "against", "verdict of that", "images alike", "agreement", "logits, alike",
                 "logits, otherwise", "top-1 equal", "cosine", "KL"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("candidate", "against") else "right")
    for degree, report in reports.items():
        pair, beside = report.findings.pair, report.findings.against
        errors = (pair.logit_error_alike, pair.logit_error_otherwise)
        table.add_row(
            str(degree), pair.one, pair.other, "[green]pass[/]" if beside.passed else "[red]FAIL[/]",
            f"{pair.images_alike} of {pair.images}", f"{pair.agreement:.2%}",
            *("-" if error is None else f"{error:.1e}" for error in errors),
            f"{pair.top1_agreement:.0%}", f"{pair.cosine:.6f}", f"{pair.kl:.1e}",
        )  # fmt: skip
    table.caption = (
        "Images alike: in which all is decided alike; logits: the largest difference, as a share of the largest logit, "
        "of images\ndecided alike and otherwise. Behind a first difference positions stand for other tokens, so that "
        "agreement falls."
    )
    table.caption_justify = "left"
    return table
