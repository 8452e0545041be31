"""The page of results."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from bench.markdown import table
from bench.proof.picture import draw
from bench.proof.state import Record
from bench.proof.tables import MIDDLE, WORST, by_engine, per_block, quantities, spread_of, total
from tocom.runtime.files import write_atomically

_LIBRARIES = ("torch", "timm", "onnx", "onnxruntime-gpu", "openvino")

_WHAT = """\
Every model is a random network: an architecture of one of timm's families with random depth (1 to 6), heads, width,
patches, image size (odd and not square too), prefix tokens, norms and pooling; random weights, with a random gain of
0.5 to 2 on every matrix; a random degree, schedule and reduction; and for two in five a random compensator, folded in.
It is compiled as users compile and proven on 12 images of its own, and it is healthy: a gate that does not hold is a
false alarm. High gains make attention sharp and networks badly conditioned, worse than trained ones are; they belong to
the campaign because that is where gates fail first."""

_UNITS = """\
Each quantity is the worst of a model, in unit roundoffs u of the engine's number format; errors of logits are divided
by the root of the depth besides. A cell is the median over the models, what 99% of them stay below, and the largest. In
brackets is the gate ([export/proof/gates.py](../../export/proof/gates.py)); in the last three rows, where it depends on
the network, the largest share of it. Native operators do not tell what goes in and out of a block's attention apart;
margins are of decisions that differ only."""

_CONDITION = """\
What PyTorch's own float32 is off from float64 on the same model, in the same units (u of float32), tells whether the
network is at fault: what float32 gets wrong by many roundings, no engine gets right."""


def write_page(file: Path, records: Sequence[Record], *, command: str) -> list[Record]:
    """Writes what a campaign found, and the picture beside it.

    Args:
        file: A page in Markdown.
        records: One per model.
        command: That ran it.

    Returns:
        The models that did not pass.
    """
    alarms = [record for record in records if not record["passed"]]
    ratios = per_block(records) or [0.0]
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = file.with_suffix(".png")
    draw(records, picture)
    lines = [
        "# Healthy models and the gates",
        f"Written by `{command}` ([bench/proof](../proof)), {datetime.now(UTC):%Y-%m-%d}:\n{_machine()}; "
        f"{_versions()}.",
        _WHAT,
        f"**{len(records)} models, {len(alarms)} false alarms.** Of float32 engines the middle image's logits are off "
        f"by {median(ratios):.2f} u times the depth (the median model), and by {max(ratios):.1f} (the largest).",
        "## By engine",
        _counts(records),
        "## How much room there is",
        _UNITS,
        _room(records),
        f"![Worst error of every part]({picture.name})",
        "Every point is a model's worst error of one kind of part; the line is the gate, red are models with an alarm.",
    ]
    if alarms:
        lines += ["## The alarms", _CONDITION, _alarms(alarms)]
    write_atomically(file, ("\n\n".join(lines) + "\n").encode())
    return alarms


def _counts(records: Sequence[Record]) -> str:
    columns = ("engine", "models", "false alarms", "images", "blocks", "decisions", "that differ",
               "images x blocks explained", "not explained")  # fmt: skip
    rows = [_count(" ".join(engine), of_it) for engine, of_it in by_engine(records).items()]
    return table(columns, [*rows, _count("**all**", records)], ("engine",))


def _count(name: str, records: Sequence[Record]) -> list[str]:
    numbers = [len(records), sum(not record["passed"] for record in records)]
    numbers += [total(records, each) for each in ("images", "depth", "decisions", "different", "explained",
                                                  "unexplained")]  # fmt: skip
    return [name, *(f"{number:,}" for number in numbers)]


def _room(records: Sequence[Record]) -> str:
    engines = by_engine(records)
    rows = []
    for quantity in quantities():
        spreads = [spread_of(of_it, quantity) for of_it in engines.values()]
        rows.append([quantity, *("" if spread is None else str(spread) for spread in spreads)])
    return table(("", *(" ".join(engine) for engine in engines)), rows, ("",))


def _alarms(alarms: Sequence[Record]) -> str:
    rows = [[str(record["drawn"]["number"]), _described(record["drawn"]), "; ".join(record["faults"]), _own(record)]
            for record in alarms]  # fmt: skip
    return table(("model", "what", "alarm", "float32's own"), rows, ("what", "alarm", "float32's own"))


def _described(drawn: dict[str, Any]) -> str:
    given = drawn["arguments"]
    height, width = given["img_size"]
    return (f"{drawn['backend']} {drawn['precision']}: {drawn['kind']}, {given['depth']} blocks, width "
            f"{given['embed_dim']}, {given['num_heads']} heads, {height}x{width} by {given['patch_size']}, "
            f"{drawn['reduction']} {drawn['degree']} {drawn['schedule']}, gain {drawn['gain']:.2f}")  # fmt: skip


def _own(record: Record) -> str:
    own = record.get("own", {})
    shown = {"attention": "attention", "signal": "signal", MIDDLE: "middle image", WORST: "worst image"}
    return ", ".join(f"{text} {own[name]:.0f}" for name, text in shown.items() if name in own)


def _machine() -> str:
    processor = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                      if line.startswith("model name")), platform.processor())  # fmt: skip
    return f"{processor}, {os.cpu_count()} cores"


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in _LIBRARIES) + f", Python {platform.python_version()}"
