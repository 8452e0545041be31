"""Reports of a family -> a folder: report.json for machines, report.md and report.html for people.

report.json (format 1):

    {"format": 1, "passed": true, "title": "...", "model": "...", "candidate": "...", "against": "...", "date": "...",
     "versions": {"torch": "..."}, "checkpoint_sha256": "...", "compensator_sha256": null, "command": "...",
     "degrees": {"8": {"passed": true, "backend": "...", "precision": "...", "faults": ["..."], "findings": {...},
                       "pictures": {"one": "...", "other": "...", "differing_patches": {"0": 5}}}}}

`findings` is what the manifest has as `validation`. JSON knows no infinities: a number that is not finite is the text
"inf", "-inf" or "nan", so that a missing one (null) stays another thing. `faults` is empty where `passed` is true.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tocom.export.artifacts import Report
from tocom.export.proof.report.about import About, Pictures
from tocom.export.proof.report.pictures import MergePicture, differing
from tocom.export.proof.report.tables import (
    WORDS,
    Table,
    beside_table,
    block_table,
    degree_table,
    faults_of,
    gate_table,
    verdict,
)
from tocom.runtime.files import write_atomically

FORMAT = 1


def write_report(
    folder: Path, reports: Mapping[int, Report], about: About, pictures: Pictures | None = None
) -> list[Path]:
    """Writes the three files, each whole or not at all; the folder is made.

    Args:
        folder: Where to.
        reports: Degree -> report.
        about: What they are about.
        pictures: Degree -> the candidate's picture of one image and the reference's, as
            `tocom.export.proof.report.pictures.merge_pictures` returns them.

    Returns:
        The files.

    Raises:
        InputError: If matplotlib, which draws the page, is not installed; the others are written then.
        OSError: If a file cannot be written.
    """
    pictures = pictures or {}
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(to_json(reports, about, pictures), indent=1, allow_nan=False)
    written = [
        write_atomically(folder / "report.json", f"{content}\n".encode()),
        write_atomically(folder / "report.md", to_markdown(reports, about).encode()),
    ]
    from tocom.export.proof.report.html import to_html  # needs matplotlib, which the others do not

    return [*written, write_atomically(folder / "report.html", to_html(reports, about, pictures).encode())]


def to_json(reports: Mapping[int, Report], about: About, pictures: Pictures) -> dict[str, Any]:
    """What report.json holds; see above."""
    degrees = {}
    for degree, report in reports.items():
        degrees[str(degree)] = {
            "passed": report.passed,
            "backend": report.engine.backend,
            "precision": report.findings.precision,
            "faults": [fault.text for fault in faults_of(report)],
            "findings": finite(report.findings.to_json()),
            "pictures": _differing_patches(pictures.get(degree, ())),
        }
    return {"format": FORMAT, "passed": verdict(reports)[0], **finite(asdict(about)), "degrees": degrees}


def finite(value: Any) -> Any:
    """The same with texts in place of numbers that JSON does not know.

    >>> finite({"margin": float("inf"), "parts": [1.5, float("nan")]})
    {'margin': 'inf', 'parts': [1.5, 'nan']}
    """
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _differing_patches(pictures: Sequence[MergePicture]) -> dict[str, Any] | None:
    if not pictures:
        return None
    one, other = pictures
    by_block = {block: differing(one, other, block) for block in other.groups}
    return {
        "one": one.name,
        "other": other.name,
        "differing_patches": {
            str(block): None if marked is None else int(marked.sum()) for block, marked in by_block.items()
        },
    }


def to_markdown(reports: Mapping[int, Report], about: About) -> str:
    """report.md: the verdict, what was compared, the tables, and what their words mean."""
    passed, sentence = verdict(reports)
    lines = [f"# {_text(about.title)}", "", f"**{'PASS' if passed else 'FAIL'}**: {sentence}"]
    for degree, report in reports.items():
        faults = faults_of(report)
        lines += ["", *(f"- **r={degree} FAILS**: {_text(fault.text)}" for fault in faults)] if faults else []
        if faults and (meaning := faults[0].meaning):
            lines.append(f"  - the first of them: {meaning}.")
    lines += ["", "## What was compared", "", *(f"- {name}: {value}" for name, value in facts(about).items())]
    lines += ["", "## Degrees", "", *_markdown(degree_table(reports)), ""]
    for degree, report in reports.items():
        findings = report.findings
        unit = f"Errors in unit roundoffs u of {findings.precision}; bold: beyond the gate."
        lines += [f"## r = {degree}, block by block", "", unit, ""]
        lines += [*_markdown(block_table(findings)), "", *_markdown(gate_table(findings)), ""]
        if (pair := beside_table(findings)) is not None:
            lines += [*_markdown(pair), ""]
    lines += ["## Words", "", *(f"- **{word}**: {meaning}" for word, meaning in WORDS.items()), ""]
    return "\n".join(lines)


def facts(about: About) -> dict[str, str]:
    """What was compared, name -> value in one line each, as Markdown."""
    texts = {
        "model": _text(about.model),
        "candidate": _text(about.candidate),
        "against": _text(about.against),
        "date": _text(about.date),
        "checkpoint": _code(about.checkpoint_sha256 or ""),
        "compensator": _code(about.compensator_sha256 or ""),
        "versions": _text(", ".join(f"{name} {version}" for name, version in about.versions.items())),
        "command": _code(about.command),
    }
    return {name: value for name, value in texts.items() if value}


def _code(text: str) -> str:
    line = " ".join(text.replace("`", "'").split())
    return f"`{line}`" if line else ""


def _text(text: str) -> str:
    """A text that stays one line and is no markup, whatever it holds."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{character}" if character in "\\`*[]|" else character for character in line)


def _markdown(table: Table) -> list[str]:
    rows = [[f"**{cell.text}**" if cell.failing else cell.text for cell in row] for row in table.rows]
    if table.gate is not None:
        rows.append([text if text == "-" else f"*{text}*" for text in table.gate])
    lines = [[_text(name) for name in table.header], ["---:"] * len(table.header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
