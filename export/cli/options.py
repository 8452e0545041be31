"""The options that commands share, each defined once, in the panels that --help shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from tocom import names
from tocom.calib.quantize.method import CHOICES, FORMATS, RANGES, ROUNDINGS
from tocom.export.cli.reading import (
    PLAN_OPTIONS,
    one_token,
    read_blocks,
    read_degrees,
    read_existing,
    read_family,
    read_model,
    read_model_args,
    read_number,
    read_plan_batch,
    read_schedule,
    read_targets,
)
from tocom.runtime.backends import AUTO, BACKENDS, PRECISIONS, precisions_in_words, require

if TYPE_CHECKING:
    from tocom.export.source.options import CompileOptions

MAIN = Group("Options", sort_key=0)
NETWORK = Group("Network", sort_key=1)
REDUCTION = Group("Token reduction", sort_key=2)
ENGINES = Group("Engines", sort_key=3)
QUANTIZATION = Group("Quantized precisions", sort_key=4)
PLANS = Group("TensorRT plans", sort_key=5)
MEASURING = Group("Images to validate on", sort_key=6)


def option(text: str, *, panel: Group = MAIN, read: Callable[[str], object] | None = None, **more: Any) -> Parameter:
    """An option.

    Args:
        text: What --help says.
        panel: Where it says so.
        read: Reads the text that is given; None leaves that to the type.
        **more: Further parts of a `cyclopts.Parameter`.
    """
    if read is not None:
        more |= {"converter": one_token(read), "n_tokens": 1}
    return Parameter(help=text, group=panel, **more)


def whole(text: str, least: int | None = None, most: int | None = None, **more: Any) -> Parameter:
    """An option that is a whole number of a range."""
    return option(text, read=partial(read_number, least=least, most=most), **{"metavar": "N", **more})


def number(text: str, least: float | None = None, most: float | None = None, **more: Any) -> Parameter:
    """An option that is a number of a range."""
    return option(text, read=partial(read_number, kind=float, least=least, most=most), **{"metavar": "X", **more})


def flag(text: str, *, panel: Group = MAIN) -> Parameter:
    """An option without a value."""
    return option(text, panel=panel, show_default=False)


def choice(text: str, *, panel: Group = MAIN, **more: Any) -> Parameter:
    """An option of which the values are known; --help and completion name them."""
    return option(text, panel=panel, **more)


def existing(text: str, *, panel: Group = MAIN, metavar: str = "FILE", **more: Any) -> Parameter:
    """A file or folder that is there."""
    return option(text, panel=panel, read=read_existing, metavar=metavar, **more)


FamilyFolder = Annotated[
    Path,
    Parameter(help="Folder of the family, which `tocom compile` wrote.", group=MAIN, converter=one_token(read_family)),
]
Degrees = Annotated[
    tuple[int, ...],
    option("Degrees, e.g. 8,16. Default: all.", read=read_degrees, metavar="R,R", show_default=False),
]
Model = Annotated[
    str,
    option(
        "timm model name, or a folder in timm's hub layout (config.json beside the weights).",
        panel=NETWORK, read=read_model, metavar="NAME|FOLDER",
    ),
]  # fmt: skip
Checkpoint = Annotated[
    Path | None,
    existing(
        "Fine-tuned weights, .safetensors or .pth (bare, or under model or state_dict). Default: the model folder's, "
        "or timm's pretrained ones.",
        panel=NETWORK,
    ),
]
NumClasses = Annotated[
    int | None, whole("Classes. Default: as many as the checkpoint's classifier has.", 1, panel=NETWORK)
]
ModelArgs = Annotated[
    tuple[str, ...],
    option("timm model argument, e.g. img_size=384; repeatable.", panel=NETWORK, metavar="NAME=VALUE",
           show_default=False),
]  # fmt: skip
CompensatorFile = Annotated[Path, existing("Compensator, .safetensors or the original .pth.", panel=NETWORK)]
SourceDegree = Annotated[
    int, whole("Degree the checkpoint was fine-tuned at; needed with a compensator.", 0, panel=NETWORK, metavar="R")
]
Limit = Annotated[int, whole("Measure top-1 on at most this many images, evenly spread.", 1, panel=MEASURING)]
ConfigFile = Annotated[
    Path | None,
    existing(
        "Take options from a TOML file, such as the compile.toml that every compile writes into its family's folder. "
        "Options on the command line win."
    ),
]
Batch = Annotated[int, whole("Images per call.", 1)]
Replace = Annotated[bool, flag("Overwrite what the folder holds of another network.")]
Precision = Literal[PRECISIONS]
Quantized = Literal[FORMATS]
BackendName = Literal[AUTO, *BACKENDS]
_PRECISION = f"Number format: {precisions_in_words()}."


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Network:
    """A network that must be named, and how timm builds it."""

    model: Model
    checkpoint: Checkpoint = None
    num_classes: NumClasses = None
    model_arg: ModelArgs = ()

    @property
    def model_args(self) -> dict[str, object]:
        """The further arguments of the timm model."""
        return read_model_args(self.model_arg)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TokenReduction:
    """How tokens are removed."""

    schedule: Annotated[
        str,
        option(
            "How a degree r is spread over the blocks: constant (r in each), decreasing (2r down to 0), strided:K "
            "(K times r in every K-th block), or one number per block, each times r, like 0,3,0,0,3,0.",
            panel=REDUCTION, read=read_schedule, metavar="NAME",
        ),
    ] = "constant"  # fmt: skip
    reduction: Annotated[
        Literal[names.REDUCTIONS],
        choice("How tokens go: merge (ToMe) or prune (EViT, by class-token attention).", panel=REDUCTION),
    ] = names.MERGE


AS_IN_THE_PAPER = TokenReduction()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How quantized engines are made."""

    calibration: Annotated[
        Path | None,
        existing(
            "Images to calibrate on, or a calibration-....safetensors of an earlier run. Default: images made from "
            "the network itself.",
            panel=QUANTIZATION, metavar="FOLDER|FILE",
        ),
    ] = None  # fmt: skip
    calibration_images: Annotated[
        int, whole("How many images of the folder to calibrate on.", 1, panel=QUANTIZATION)
    ] = 128
    choose: Annotated[
        Literal[CHOICES],
        choice(
            "Which images of the folder: spread (evenly) or diverse (by density and diversity, EDA-DM).",
            panel=QUANTIZATION,
        ),
    ] = "spread"
    range: Annotated[
        Literal[RANGES], choice("Which range of a product's input its grid covers.", panel=QUANTIZATION)
    ] = "minmax"
    smooth: Annotated[
        bool, flag("Move range from inputs into weights, alpha searched (SmoothQuant).", panel=QUANTIZATION)
    ] = False
    widen: Annotated[bool, flag("Widen unsaturated channels of weights (DilateQuant).", panel=QUANTIZATION)] = False
    reparameterize: Annotated[bool, flag("Give norms one range for all channels (RepQuant).", panel=QUANTIZATION)] = (
        False
    )
    rounding: Annotated[Literal[ROUNDINGS], choice("How weights are rounded.", panel=QUANTIZATION)] = "nearest"
    reconstruct: Annotated[
        bool, flag("Learn the rounding of weights block by block (MGRQ); slow.", panel=QUANTIZATION)
    ] = False
    per_degree: Annotated[
        bool, flag("Calibrate every degree by itself instead of all at once.", panel=QUANTIZATION)
    ] = False
    keep_float: Annotated[
        tuple[str, ...],
        option(
            "Leave a product in float, e.g. blocks.0.mlp.fc2; repeatable.",
            panel=QUANTIZATION,
            metavar="PRODUCT",
            show_default=False,
        ),
    ] = ()
    max_drop: Annotated[
        float | None,
        number(
            "How much top-1 a degree may lose against float32; products return to float until it holds. Default: 1.0 "
            "where there are labelled images.",
            0, 100, panel=QUANTIZATION, metavar="POINTS",
        ),
    ] = None  # fmt: skip


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Plans:
    """How plans are built."""

    plan_batch: Annotated[
        tuple[int, int, int],
        option("Smallest, most frequent and largest batch of a plan.", panel=PLANS, read=read_plan_batch,
               metavar="MIN:OPT:MAX", show_default="1:8:32"),
    ] = (1, 8, 32)  # fmt: skip
    plan_target: Annotated[
        tuple[str, ...],
        option("GPUs that tensorrt-rtx builds for; current: this one. Default: sm80,sm86,sm89,sm120.", panel=PLANS,
               read=read_targets, metavar="SM,...", show_default=False),
    ] = ()  # fmt: skip
    plan_option: Annotated[
        tuple[Literal[PLAN_OPTIONS], ...],
        option(
            "For tensorrt: hardware-compatible (also later GPUs), version-compatible (also later minor versions), "
            "stripped (without weights, see `tocom refit`), plugin (merge by our kernels); repeatable.",
            panel=PLANS, metavar="WHAT", show_default=False,
        ),
    ] = ()  # fmt: skip


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CompileArgs(TokenReduction, Quantization, Plans):
    """Everything that a family can be compiled with."""

    out: Annotated[Path, option("Folder of the family.", metavar="FOLDER")]
    degrees: Annotated[
        tuple[int, ...],
        option("Degrees to compile, e.g. 8,16. 0 is always added, to compare with.", read=read_degrees, metavar="R,R"),
    ]
    config: ConfigFile = None
    replace: Replace = False
    model: Model
    checkpoint: Checkpoint = None
    compensator: CompensatorFile | None = None
    source_degree: SourceDegree | None = None
    scale: Annotated[
        float | None,
        number(
            "Weight of the compensator's change, at every degree. Default: each degree's choice by `tocom "
            "choose-scale`, else the scale the compensator was trained with.",
            panel=NETWORK,
        ),
    ] = None
    num_classes: NumClasses = None
    model_arg: ModelArgs = ()
    precision: Annotated[Precision, choice(_PRECISION, panel=ENGINES, show_choices=False)] = "fp32"
    backend: Annotated[
        BackendName,
        choice(
            "Engine library; auto takes the fastest one that runs here. The plans of tensorrt-rtx (TensorRT for RTX) "
            "are also built without a GPU.",
            panel=ENGINES, env_var="TOCOM_BACKEND",
        ),
    ] = AUTO  # fmt: skip
    float_blocks: Annotated[
        tuple[int, ...],
        option(
            "Blocks that stay float32 in an fp16 or bf16 graph (onnxruntime, tensorrt), e.g. where activations are "
            "too large for fp16. `tocom validate --bisect` finds them.",
            panel=ENGINES, read=read_blocks, metavar="N,...", show_default=False,
        ),
    ] = ()  # fmt: skip
    images: Annotated[
        Path | None,
        existing("Folder of images; with one folder per class, top-1 is measured too.", panel=MEASURING,
                 metavar="FOLDER"),
    ] = None  # fmt: skip
    limit: Limit = 5000

    def options(self) -> CompileOptions:
        """The same for the compiler; what can be checked without torch is checked.

        Raises:
            InputError: If an option cannot be used.
        """
        from tocom.calib.quantize.method import Method
        from tocom.export.engine.tensorrt.plan_options import PlanOptions
        from tocom.export.source.options import CompileOptions, QuantizeOptions

        require(self.backend, self.precision)
        method = Method(
            format=self.precision if self.precision in FORMATS else Method.format, images=self.calibration_images,
            choice=self.choose, range=self.range, smooth=self.smooth, widen=self.widen,
            reparameterize=self.reparameterize, rounding=self.rounding, reconstruct=self.reconstruct,
            shared=not self.per_degree,
        )  # fmt: skip
        flags = {("own_kernels" if name == "plugin" else name.replace("-", "_")): True for name in self.plan_option}
        return CompileOptions(
            model=self.model, out=self.out, degrees=self.degrees, checkpoint=self.checkpoint,
            compensator=self.compensator, source_degree=self.source_degree, delta_scale=self.scale,
            precision=self.precision, backend=self.backend, images=self.images, limit=self.limit,
            num_classes=self.num_classes, model_args=read_model_args(self.model_arg), schedule=self.schedule,
            reduction=self.reduction, replace=self.replace, float_blocks=self.float_blocks,
            plan=PlanOptions(batch=self.plan_batch, targets=self.plan_target, **flags),
            quantize=QuantizeOptions(self.calibration, method, self.max_drop, self.keep_float),
        )  # fmt: skip


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class QuantizeArgs(CompileArgs):
    """The same, for precisions that are quantized ones."""

    precision: Annotated[
        Quantized,
        choice(
            "int8 (weights and inputs of products), fp8 (likewise, tensorrt), int8-weights, int4-weights (tensorrt).",
            panel=ENGINES, show_choices=False,
        ),
    ] = "int8"  # fmt: skip
