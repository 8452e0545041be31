"""The page of results."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from bench.fuzz.outcome import FAULTS, LIBRARY_CRASH, REFUSED, Outcome
from bench.fuzz.tables import COLUMNS, by_entry, by_kind, messages, total
from bench.markdown import table
from tocom.runtime.files import write_atomically

_LIBRARIES = ("torch", "timm", "onnx", "onnxruntime-gpu", "openvino", "polygraphy", "pillow", "safetensors")
_MOST = 40  # messages that are listed

_FORGED = """\
"Forged" entry points get a graph or weights whose hash was written into `family.json` too: who can do that can have any
graph run, and files that do not match their hashes never get there. They are tried because what a library does with a
damaged graph is worth knowing; where the library kills the process, that is counted as the library's crash and not as a
fault of this project."""


def write_page(
    file: Path, outcomes: Mapping[str, Outcome], *, command: str, seconds: float, seed: int, limits: str
) -> None:
    """Writes what a campaign found.

    Args:
        file: A page in Markdown.
        outcomes: By key of the case.
        command: That ran it.
        seconds: That it took.
        seed: Of the campaign.
        limits: What a case may take.
    """
    all_of_them = total(outcomes)
    text = "\n\n".join((
        "# Damaged files at every entry point",
        f"Written by `{command}` ([bench/fuzz](../fuzz)), {datetime.now(UTC):%Y-%m-%d}: {_machine()}; {_versions()}.",
        f"{all_of_them.cases} cases of seed {seed} in {seconds / 60:.0f} minutes; each in a process that may die of "
        f"it. Limits: {limits}. Refused means one clear line and status 2; another answer, that the damaged file is "
        "a valid one that says something else. The rest are faults.",
        f"**{_verdict(outcomes)}**",
        _FORGED,
        "## By entry point",
        _by_entry(outcomes),
        *_crashes(outcomes),
        *_faults(outcomes),
        "## What users were told",
        f"The most frequent of {len(messages(outcomes, (REFUSED,)))} messages, without what differs from file to file.",
        table(("message", "times"), ([_cell(text), str(count)] for text, count in
                                     messages(outcomes, (REFUSED,)).most_common(_MOST)), ("message",)),
        "## By kind of damage",
        _by_kind(outcomes),
    ))  # fmt: skip
    write_atomically(file, (text + "\n").encode())


def _verdict(outcomes: Mapping[str, Outcome]) -> str:
    found = total(outcomes)
    counts = ", ".join(f"{found.verdicts[name]} {name}" for name in (*FAULTS, LIBRARY_CRASH) if found.verdicts[name])
    return f"{found.faults or 'No'} faults" + (f" ({counts})." if counts else ": no crash, no hang, nothing unclear.")


def _by_entry(outcomes: Mapping[str, Outcome]) -> str:
    rows = by_entry(outcomes)
    cells = [[name, *row.cells(), f"{row.mebibytes:.0f}", f"{row.seconds:.1f}"] for name, row in sorted(rows.items())]
    everything = total(outcomes)
    cells.append(["**all**", *everything.cells(), f"{everything.mebibytes:.0f}", f"{everything.seconds:.1f}"])
    return table(("entry point", "cases", *COLUMNS, "MiB at most", "s at most"), cells, ("entry point",))


def _by_kind(outcomes: Mapping[str, Outcome]) -> str:
    cells = [[entry, kind, *row.cells()] for (entry, kind), row in sorted(by_kind(outcomes).items())]
    return table(("entry point", "damage", "cases", *COLUMNS), cells, ("entry point", "damage"))


def _crashes(outcomes: Mapping[str, Outcome]) -> list[str]:
    found = {key: each for key, each in outcomes.items() if each.verdict == LIBRARY_CRASH}
    if not found:
        return []
    rows = [[*key.split("|"), _cell(each.message)] for key, each in sorted(found.items())]
    return ["## Crashes inside engine libraries", table(("entry point", "damage", "number", "how"), rows,
                                                        ("entry point", "damage", "how"))]  # fmt: skip


def _faults(outcomes: Mapping[str, Outcome]) -> list[str]:
    found = {key: each for key, each in outcomes.items() if each.verdict in FAULTS}
    if not found:
        return []
    rows = [[*key.split("|"), each.verdict, _cell(each.message)] for key, each in sorted(found.items())]
    return ["## Faults", table(("entry point", "damage", "number", "fault", "what"), rows,
                               ("entry point", "damage", "fault", "what"))]  # fmt: skip


def _cell(text: str) -> str:
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[:200])
    return "`` " + shown.replace("|", "\\|").replace("`", "'") + " ``" if shown else ""


def _machine() -> str:
    processor = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                      if line.startswith("model name")), platform.processor())  # fmt: skip
    return f"{processor}, {os.cpu_count()} cores"


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in _LIBRARIES) + f", Python {platform.python_version()}"
