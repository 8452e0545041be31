"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tocom.runtime.errors import InputError

if TYPE_CHECKING:
    from tocom.export.engine.tensorrt.plan import PlanOptions

Model = Annotated[str, typer.Option(help="timm model name, or a folder in timm's hub layout (config.json, weights).")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="Fine-tuned weights, .safetensors or .pth (bare, or under model or state_dict). Default: the model "
        "folder's, or timm's pretrained ones."
    ),
]
CompensatorFile = Annotated[Path | None, typer.Option(help="Compensator, .safetensors or the original .pth.")]
SourceDegree = Annotated[
    int | None, typer.Option(help="Degree the checkpoint was fine-tuned at; needed with a compensator.")
]
NumClasses = Annotated[int | None, typer.Option(help="Classes. Default: as many as the checkpoint's classifier has.")]
ModelArgs = Annotated[
    list[str] | None,
    typer.Option("--model-arg", metavar="NAME=VALUE", help="timm model argument, e.g. img_size=384; repeatable."),
]
Schedule = Annotated[
    str,
    typer.Option(
        help="How a degree r is spread over the blocks: constant (r in each), decreasing (2r down to 0), strided:K "
        "(K*r in every K-th block), or one number per block, each times r, like 0,3,0,0,3,0."
    ),
]
ReductionName = Annotated[
    str, typer.Option("--reduction", help="How tokens go: merge (ToMe) or prune (EViT, by class-token attention).")
]
FamilyFolder = Annotated[Path, typer.Option("--engines", help="Folder of the family.")]
Picture = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Draw accuracy against latency there, .png or .svg.")
]
Images = Annotated[
    Path | None,
    typer.Option(help="Folder of images to validate on; with one folder per class, top-1 is measured too."),
]
PlanBatch = Annotated[
    str, typer.Option("--batch", metavar="MIN:OPT:MAX", help="Batch sizes that a TensorRT plan takes and is best at.")
]
PlanTarget = Annotated[
    str,
    typer.Option(
        "--target",
        metavar="SM,...",
        help="GPUs that tensorrt-rtx builds for; current: this one. Default: sm80,sm86,sm89,sm120.",
    ),
]
PlanOption = Annotated[
    list[str] | None,
    typer.Option(
        "--plan-option",
        help="For tensorrt: hardware-compatible (also later GPUs), version-compatible (also later minor versions), "
        "stripped (without weights), plugin (merge by our kernels); repeatable.",
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FOLDER|FILE",
        help="For quantized precisions: images to calibrate on, or a calibration-*.safetensors of an earlier run. "
        "Default: images made from the network itself.",
    ),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        "--max-drop",
        metavar="POINTS",
        help="For quantized precisions: how much top-1 a degree may lose against float32; products return to float "
        "until it holds. Default: 1.0 where there are labelled images.",
    ),
]
FloatBlocks = Annotated[
    str | None,
    typer.Option(
        "--float-blocks",
        metavar="N,...",
        help="Blocks that stay float32 in an fp16 or bf16 graph (onnxruntime, tensorrt), e.g. where activations are "
        "too large for fp16. `tocom validate --bisect` finds them.",
    ),
]
Compare = Annotated[
    bool,
    typer.Option("--compare", help="Also compare each degree across all engine libraries that run here (Polygraphy)."),
]
BisectFolder = Annotated[
    Path | None,
    typer.Option(
        "--bisect",
        metavar="DIR",
        help="For each degree that fails, say which operator of which block is the first to be wrong, and which blocks "
        "kept in float32 bring it back; and write the smallest piece of its graph that its engine library fails on to "
        "DIR/rNN.onnx (Polygraphy).",
    ),
]
Show = Annotated[
    str, typer.Option(help="Of a graph, also show any of layers,attrs,weights, parted by commas (Polygraphy).")
]
BisectGraph = Annotated[
    str | None,
    typer.Option(
        "--bisect",
        metavar="BACKEND",
        help="Find the smallest piece of a graph that a backend refuses, cannot build, or computes wrongly "
        "(Polygraphy). For a bare graph, because one that is refused gets into no family; for a family, see validate.",
    ),
]
PieceFile = Annotated[Path | None, typer.Option("--out", help="Where --bisect writes the piece.")]
Limit = Annotated[int, typer.Option(min=1, help="Measure top-1 on at most this many images, evenly spread.")]


def read_degrees(text: str) -> tuple[int, ...]:
    """Reads degrees parted by commas.

    Raises:
        InputError: If one is not a whole number of 0 or more.

    >>> read_degrees("8,16")
    (8, 16)
    """
    degrees = []
    for part in text.split(","):
        try:
            degrees.append(int(part))
        except ValueError:
            raise InputError(
                f"degrees must be whole numbers parted by commas, like 8,16, got {part.strip()!r} in {text!r}."
            ) from None
        if degrees[-1] < 0:
            raise InputError(f"degree r must be 0 or more tokens per block, got {degrees[-1]}. "
                                            "Use 0 to export without merging.")  # fmt: skip
    return tuple(degrees)


def read_blocks(text: str | None) -> tuple[int, ...]:
    """Reads numbers of blocks parted by commas.

    Raises:
        InputError: If one is not a whole number of 0 or more.

    >>> read_blocks("3,11")
    (3, 11)
    """
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isascii() and part.isdigit() and len(part) < 5 for part in parts):
        raise InputError(f"blocks must be whole numbers parted by commas, like 3,11, got {text!r}.")
    return tuple(dict.fromkeys(map(int, parts)))


def read_plan_options(batch: str, target: str, names: Sequence[str]) -> PlanOptions:
    """Reads how plans are to be built.

    Raises:
        InputError: If a text cannot be read.

    >>> read_plan_options("1:4:8", "sm80,sm89", ["stripped"]).targets
    ('sm80', 'sm89')
    """
    from tocom.export.engine.tensorrt.plan import PlanOptions

    parts = batch.split(":")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
        raise InputError(f"batch must be MIN:OPT:MAX, like 1:8:32, got {batch!r}.")
    known = {"hardware-compatible", "version-compatible", "stripped", "plugin"}
    if unknown := sorted(set(names) - known):
        raise InputError(f"a plan option must be one of {', '.join(sorted(known))}, got {unknown[0]!r}.")
    chosen = {("own_kernels" if name == "plugin" else name.replace("-", "_")): True for name in names}
    targets = tuple(part.strip().lower() for part in target.split(",")) if target else ()
    return PlanOptions(batch=tuple(map(int, parts)), targets=targets, **chosen)


def read_model_args(pairs: list[str] | None) -> dict[str, object]:
    """Reads NAME=VALUE pairs; a value that is no Python literal is taken as text.

    Raises:
        InputError: If one is not a pair.

    >>> read_model_args(["img_size=384", "global_pool=avg"])
    {'img_size': 384, 'global_pool': 'avg'}
    """
    arguments: dict[str, object] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"a model argument must be NAME=VALUE, like img_size=384, got {pair!r}.")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
    return arguments
