"""The page, from the results alone: no number in it is typed by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.experiment.tasks import TASKS
from bench.quantize import accuracy_page, insight_page
from bench.quantize.protocol import CALIBRATION_IMAGES, POOL
from bench.quantize.selection import listed, records_of, values
from tocom.calib.quantize.calibrate import OBSERVED
from tocom.runtime.files import write_atomically

SECTIONS = {
    "default": accuracy_page.default,
    "methods": accuracy_page.methods,
    "degrees": accuracy_page.degrees,
    "ranges": insight_page.ranges,
    "products": insight_page.products,
    "decisions": insight_page.decisions,
    "data": accuracy_page.data,
}


def write_page(results: Mapping[str, Any], out: Path) -> None:
    """Writes the page, and its plots beside it.

    Args:
        results: As `bench.quantize.__main__` gathers them; sections whose stage is missing are left out.
        out: Markdown file.
    """
    sections = [write(results, out) for stage, write in SECTIONS.items() if stage in results["stages"]]
    found = [f"### {section.title}\n\n" + "\n".join(f"- {each}" for each in section.found)
             for section in sections if section.found]  # fmt: skip
    parts = [_setup(results, out), "## What was found", *found]
    parts += [f"## {section.title}\n\n{section.body}" for section in sections]
    write_atomically(out, ("\n\n".join(parts) + "\n").encode())


def _setup(results: Mapping[str, Any], out: Path) -> str:
    setup = results["setup"]
    tasks = [name for name in TASKS if any(each.startswith(f"{name}-") for each in _networks(results))]
    asked = "\n".join(f"  - `{name}`: {TASKS[name].asks}" for name in tasks)
    seeds, observed = listed([str(seed) for seed in setup["seeds"]]), listed([str(degree) for degree in OBSERVED])
    quick = "\n\n**A quick trial on a few sheets: it shows that the study runs, and nothing else.**"
    counts = Counter(each.partition("-")[0] for each in setup["unfinished"])
    missing = [f"{stage} ({count} network{'s' if count > 1 else ''})" for stage, count in counts.items()]
    unfinished = f"\n\nNot finished yet, so not in it: {listed(missing)}." if missing else ""
    return f"""# Low precision under token merging: accuracy

Written by `python -m bench.quantize` ([bench/quantize](../quantize)), {setup["date"]}; torch {setup["torch"]}, timm
{setup["timm"]}, Python {setup["python"]}. Every number is in [{out.stem}.json]({out.stem}.json), and every sentence is
made from them.{quick if setup["effort"] == "quick" else ""}{unfinished}

- **Networks**: ViTs of width 96, 6 blocks, 65 tokens, fine-tuned without merging: the example's checkpoint, and the
  experiment's, seeds {seeds}. At every degree but 0 the compensator is fused into the weights before anything is
  calibrated, at the scale that was chosen on validation sheets; schedules are constant. The experiment's tasks:
{asked}
- **Quantized** are the products of the blocks: weights per output channel, inputs per tensor, both symmetric. Computed
  by the quantized network in PyTorch, to which `tocom quantize` proves its engines equal.
- **Calibration**: {CALIBRATION_IMAGES} of {POOL} sheets drawn from the training split, ranges at degrees {observed}
  together, the default rule, unless told otherwise. Test sheets are drawn from the test split; float32 and quantized
  networks see the same ones.
- **Errors**: ± is one standard error, of paired differences over the test sheets; over networks they are combined as if
  independent. "Within the error" is less than two of them; among many rows one in twenty lies outside by chance.
- **Divergence** is KL(float32 || quantized) of the class probabilities, mean over sheets: it tells apart what top-1
  does not."""


def _networks(results: Mapping[str, Any]) -> list[str]:
    return [name for stage in results["stages"] for name in values(records_of(results, stage), "network")]
