"""Reproduces the shipped example from nothing: backbone, compensator, downstream checkpoint, held-out sheets.

    python examples/train_digits.py --out examples/digits      # under 30 minutes on 2 cores

Finished stages are kept in --work and not repeated. The backbone learns white-on-black sheets; the compensator is
distilled on those same training sheets only; the downstream checkpoint is the backbone fine-tuned, without merging, on
coloured chalk on an unevenly lit board. Everything that is reported is measured on handwriting never trained on.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch
import typer
from PIL import Image
from rich.progress import MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.sheets import MEAN, STD, Handwriting, Rendering, Sheets, Split, normalize
from examples.supervised import fit
from tocom.calib.distill import DistillOptions, distill
from tocom.checkpoint import hash_tensors
from tocom.compensator import Compensator
from tocom.vit import ReducedViT

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3}
BATCH = 64


def build() -> nn.Module:
    """The untrained network: width 96, 6 blocks, 65 tokens."""
    return timm.create_model(ARCHITECTURE, num_classes=10, **MODEL_ARGS)


def images(rendering: Rendering, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless normalized training batches."""
    sheets = Sheets("train", rendering, seed)
    while True:
        pixels, classes = sheets.batch(BATCH)
        yield normalize(pixels), classes


class InkPairs:
    """The backbone's training sheets for distillation: every batch follows from its place in the run."""

    def __init__(self) -> None:
        self._handwriting = Handwriting.of("train")

    def batch(self, first_pair: int, pairs: int) -> Tensor:
        """Pairs of sheets, normalized, [2 * pairs, 3, 32, 32]."""
        pixels, _ = Sheets("train", "ink", 20_000_000 + first_pair, self._handwriting).batch(2 * pairs)
        return normalize(pixels)


def tell(progress: Progress, task: TaskID, done: int, text: str) -> None:
    """Moves the bar; where there is no terminal, prints a line now and then."""
    progress.update(task, completed=done, description=text)
    if not progress.console.is_terminal and done % 100 == 0:
        progress.console.print(f"{text}, {done} steps, {progress.get_time():.0f} s")


def train(
    model: nn.Module, rendering: Rendering, steps: int, lr: float, seed: int, progress: Progress, name: str
) -> None:
    """Plain supervised training without merging, with a bar."""
    task = progress.add_task(name, total=steps)
    fit(model, images(rendering, seed), steps=steps, lr=lr,
        on_step=lambda step, loss: tell(progress, task, step, f"{name}, loss {loss:.3f}"))  # fmt: skip


@torch.inference_mode()
def accuracy(model: nn.Module, split: Split, rendering: Rendering, sheets: int = 2048, seed: int = 1) -> float:
    """Top-1 in percent on freshly drawn sheets of a split."""
    stream = Sheets(split, rendering, seed)
    right = 0
    for _ in range(sheets // 256):
        pixels, classes = stream.batch(256)
        right += int((model(normalize(pixels)).argmax(1) == classes).sum())
    return 100 * right / (sheets // 256 * 256)


def compensated(model: nn.Module, compensator: Compensator, degree: int, scale: float) -> nn.Module:
    """The downstream model at another degree, with the compensator beside it."""
    return ReducedViT(model, degree, compensator.between(0, degree, scale))


def measure(
    model: nn.Module, compensator: Compensator, rendering: Rendering, split: Split
) -> dict[str, dict[str, float]]:
    """Top-1 at every degree, without and with the compensator."""
    degrees = (0, 4, 8, 12, 16)
    return {
        str(degree): {
            "without": accuracy(ReducedViT(model, degree), split, rendering),
            "with": accuracy(compensated(model, compensator, degree, 0.1), split, rendering),
        }
        for degree in degrees
    }


def write_model_folder(model: nn.Module, out: Path) -> None:
    """Timm's hub layout: config.json beside model.safetensors."""
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": 10,
        "num_features": MODEL_ARGS["embed_dim"],
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": MEAN,
            "std": STD,
            "num_classes": 10,
            "label_names": [str(digit) for digit in range(10)],
        },
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(model.state_dict(), out / "model.safetensors", {"format": "pt"})


def write_sheets(out: Path, count: int, seed: int = 2) -> None:
    """Held-out downstream sheets as PNG files, one folder per class."""
    pixels, classes = Sheets("test", "board", seed).batch(count)
    for index, (sheet, label) in enumerate(zip(pixels, classes.tolist(), strict=True)):
        folder = out / "sheets" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(folder / f"{index:04d}.png", optimize=True)


def write_calibration(out: Path, count: int, seed: int = 5) -> None:
    """Downstream sheets made of training scans as PNG files, to calibrate quantized engines on."""
    folder = out.with_name(f"{out.name}-calibration")
    folder.mkdir(parents=True, exist_ok=True)
    for index, sheet in enumerate(Sheets("train", "board", seed).batch(count)[0]):
        Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(folder / f"{index:04d}.png", optimize=True)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the example.")] = Path("examples/digits"),
    work: Annotated[Path, typer.Option(help="Folder for finished stages.")] = Path("build/digits"),
    backbone_steps: Annotated[int, typer.Option(help="Pre-training steps of 64 sheets.")] = 3000,
    distill_steps: Annotated[int, typer.Option(help="Distillation steps of 64 sheets.")] = 3000,
    finetune_steps: Annotated[int, typer.Option(help="Fine-tuning steps of 64 sheets.")] = 700,
    sheets: Annotated[int, typer.Option(help="Held-out sheets to write.")] = 1000,
    calibration: Annotated[int, typer.Option(help="Training sheets to write, for calibration.")] = 128,
) -> None:
    """Trains the example from nothing and writes it to a folder."""
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    torch.manual_seed(0)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    backbone, downstream = build(), build()
    with Progress(*columns) as progress:
        kept = work / "backbone.safetensors"
        if not kept.exists():
            train(backbone, "ink", backbone_steps, 1e-3, 10, progress, "backbone")
            save_file(backbone.state_dict(), kept)
        backbone.load_state_dict(load_file(kept))
        backbone.eval()

        kept = work / "compensator.safetensors"
        if not kept.exists():
            task = progress.add_task("compensator", total=distill_steps)
            compensator = distill(
                backbone,
                InkPairs(),
                backbone=ARCHITECTURE,
                backbone_sha256=hash_tensors(backbone.state_dict()),
                options=DistillOptions(steps=distill_steps, batch=BATCH, lr=0.04),
                state_folder=work / "compensator.training",
                on_step=lambda step, loss: tell(progress, task, step, f"compensator, KL {loss:.3f}"),
            )
            kept.write_bytes(compensator.to_safetensors())
        compensator = Compensator.load(kept)

        kept = work / "downstream.safetensors"
        if not kept.exists():
            downstream.load_state_dict(load_file(work / "backbone.safetensors"))
            downstream.requires_grad_(True)
            train(downstream, "board", finetune_steps, 2e-4, 30, progress, "downstream")
            save_file(downstream.state_dict(), kept)
        downstream.load_state_dict(load_file(kept))
        downstream.eval()

    report = {
        "backbone, validation sheets": measure(backbone, compensator, "ink", "val"),
        "downstream, validation sheets": measure(downstream, compensator, "board", "val"),
        "downstream, test sheets": measure(downstream, compensator, "board", "test"),
    }
    write_model_folder(downstream, out)
    (out / "compensator.safetensors").write_bytes(compensator.to_safetensors())
    write_sheets(out, sheets)
    write_calibration(out, calibration)
    (out / "training.json").write_text(json.dumps({"top1_percent": report}, indent=2) + "\n")
    for name, table in report.items():
        print(name)
        for degree, row in table.items():
            print(f"  r={degree:>2}  without {row['without']:5.1f}%  with {row['with']:5.1f}%")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    typer.run(main)
