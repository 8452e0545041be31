"""What validation found, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from export.proof.gates import GATES
from export.proof.parts import PARTS
from runtime.artifacts import Report


def verdict_table(reports: Mapping[int, Report], title: str) -> Table:
    """One row per degree.

    Args:
        reports: Degree -> report.
        title: Of the table.
    """
    table = Table(title=title)
    for name in ("degree", "verdict", "images", "agreement", "explained", "unexplained", "worst part / u",
                 "logit error / u", "top-1 equal", "cosine", "KL", "first fault"):  # fmt: skip
        table.add_column(name, justify="left" if name == "first fault" else "right")
    for degree, report in reports.items():
        found, free = report.findings, report.findings["free"]
        unit = GATES[found["precision"]].unit_roundoff
        parts = [error for block in found["blocks"].values() for error in block["parts"].values()]
        table.add_row(
            str(degree), "[green]pass[/]" if report else "[red]FAIL[/]", str(found["images"]),
            f"{found['agreement']:.2%}", str(found["explained"]), str(found["unexplained"]),
            f"{max(parts) / unit:.1f}" if parts else "-", f"{found['typical_logit_error'] / unit:.1f}",
            f"{free['top1_agreement']:.0%}", f"{free['cosine']:.6f}", f"{free['kl']:.1e}",
            found["faults"][0] if found["faults"] else "-",
        )  # fmt: skip
    table.caption = (
        "u: unit roundoff of the number format. Worst part: each part of each block by itself, on the engine's own "
        "input.\nLogit error: of the image in the middle, with the engine's decisions replayed in the reference. "
        "Top-1, cosine, KL: against\nthe reference that decides by itself."
    )
    table.caption_justify = "left"
    return table


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
        unit = GATES[report.findings["precision"]].unit_roundoff

        def in_units(error: float | None, unit: float = unit) -> str:
            return "-" if error is None else f"{error / unit:.1f}"

        for block, found in report.findings["blocks"].items():
            decisions, parts = found["decisions"], found["parts"]
            table.add_row(
                str(degree), block, f"{found['equal'] / decisions:.2%}" if decisions else "-",
                str(found["explained"]), str(found["unexplained"]),
                in_units(found["margin"]) if decisions else "-",
                *(in_units(parts.get(part)) for part in measured), in_units(found["output_error"]),
            )  # fmt: skip
    table.caption = (
        "explained, unexplained: images that decide otherwise; margin: how much worse than the best the worst "
        "decision is;\nthen each part by itself, on the engine's own input; output: the tokens that leave the block, "
        "decisions replayed."
    )
    table.caption_justify = "left"
    return table
