"""What a compile is asked for, and how quantized engines are to be made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tocom.calib.quantize.method import FORMATS, Method
from tocom.export.engine.tensorrt.plan_options import PlanOptions
from tocom.runtime.errors import InputError
from tocom.runtime.family_files import CALIBRATION_SUFFIX
from tocom.runtime.files import sha256_file

QUANTIZED = FORMATS  # precisions that are quantized ones


@dataclass(frozen=True)
class QuantizeOptions:
    """How quantized engines are made.

    Attributes:
        calibration: Folder of images to calibrate on, or a calibration file; None synthesizes images.
        method: What calibration does; its format is the compile's precision.
        max_drop: Points of top-1 that a degree may lose against float32; without labelled images, percent of images
            that may be classified otherwise. None takes `DEFAULT_MAX_DROP` where there are labels, else any drop.
        keep_float: Products that are left in float at every degree.

    Raises:
        InputError: If the drop is no number.
    """

    calibration: Path | None = None
    method: Method = field(default_factory=Method)
    max_drop: float | None = None
    keep_float: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise InputError(f"max-drop must be a number of points, 0 to 100, got {self.max_drop}.")

    @property
    def is_file(self) -> bool:
        """Whether a calibration is read instead of made."""
        return self.calibration is not None and self.calibration.suffix == CALIBRATION_SUFFIX

    def recipe(self) -> dict[str, Any]:
        """What decides a quantization, beside the network."""
        return {
            "calibration": fingerprint(self.calibration),
            "method": asdict(self.method),
            "max_drop": self.max_drop,
            "keep_float": sorted(self.keep_float),
        }


def fingerprint(calibration: Path | None) -> str:
    """Tells images, or a calibration file, from others."""
    if calibration is None:
        return "synthesized"
    if calibration.is_file():
        return sha256_file(calibration)
    files = sorted(path for path in calibration.rglob("*") if path.is_file())
    listed = "".join(f"{path.relative_to(calibration)}:{path.stat().st_size};" for path in files)
    return hashlib.sha256(listed.encode()).hexdigest()


@dataclass(frozen=True)
class CompileOptions:
    """What to compile.

    Attributes:
        model: timm model name, or a folder in timm's hub layout.
        out: The family's folder.
        degrees: Target degrees; 0 is added as the baseline.
        checkpoint: Weights; None takes the model folder's or timm's pretrained ones.
        compensator: Compensator file; None exports plain token merging.
        source_degree: Degree the checkpoint was fine-tuned at; must be given with a compensator.
        delta_scale: Weight of the compensator's change at every degree; None takes the choices in the folder's
            scales.json, and the compensator's training scale where there is none.
        precision: Number format of the engines.
        float_blocks: Blocks that stay float32 where the format of a graph is half precision.
        backend: Engine library; "auto" takes the fastest one that runs here.
        images: Folder of images to validate on; with one folder per class, top-1 is measured too.
        limit: At most this many labelled images, evenly spread.
        num_classes: Classes; None takes the checkpoint's.
        model_args: Further timm model arguments.
        schedule: Name of the schedule family: how a degree is spread over the blocks.
        reduction: Name of the token reduction.
        replace: Whether a family of another checkpoint in the folder may be overwritten.
        plan: How plans are built, for backends that have them.
        quantize: How quantized engines are made, for precisions that are such.
    """

    model: str
    out: Path
    degrees: tuple[int, ...]
    checkpoint: Path | None = None
    compensator: Path | None = None
    source_degree: int | None = None
    delta_scale: float | None = None
    precision: str = "fp32"
    float_blocks: tuple[int, ...] = ()
    backend: str = "onnxruntime"
    images: Path | None = None
    limit: int = 5000
    num_classes: int | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    schedule: str = "constant"
    reduction: str = "merge"
    replace: bool = False
    plan: PlanOptions = field(default_factory=PlanOptions)
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)
