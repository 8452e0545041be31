"""How plans are to be built: the choices there are, in a file that needs no TensorRT, torch or onnx."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tocom.runtime.errors import InputError, one_line

DEFAULT_TARGETS = ("sm80", "sm86", "sm89", "sm120")  # of TensorRT for RTX; TensorRT builds for the GPU it runs on
CURRENT = "current"  # the GPU of the machine that builds
_TARGET = re.compile(rf"sm\d+|{CURRENT}")


@dataclass(frozen=True)
class PlanOptions:
    """How plans are built.

    Attributes:
        batch: Smallest, most frequent and largest batch.
        targets: GPU architectures that a plan of TensorRT for RTX is for, like "sm89", or `CURRENT`; none takes
            `DEFAULT_TARGETS`, of a graph with 8-bit floats those of them that have such products.
        hardware_compatible: Whether TensorRT's plan also runs on later GPUs than the one it is built on, sm80 at least.
        version_compatible: Whether it also runs in later versions of the same major version of TensorRT.
        stripped: Whether it leaves out the weights, which a refit with the graph's files puts in.
        own_kernels: Whether merging is our Triton kernels (`.plugin`) instead of the operator's body.

    Raises:
        InputError: If a value is not one of these.
    """

    batch: tuple[int, int, int] = (1, 8, 32)
    targets: tuple[str, ...] = ()
    hardware_compatible: bool = False
    version_compatible: bool = False
    stripped: bool = False
    own_kernels: bool = False

    def __post_init__(self) -> None:
        smallest, best, largest = self.batch
        if not 1 <= smallest <= best <= largest:
            raise InputError(f"batch must be MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX, like 1:8:32, got "
                             f"{':'.join(map(str, self.batch))}.")  # fmt: skip
        for target in self.targets:
            if not _TARGET.fullmatch(target):
                raise InputError(f"a target must be a GPU architecture like sm89, got {one_line(target)}.")

    def to_json(self) -> dict[str, Any]:
        """For recipes and the manifest."""
        return {**asdict(self), "batch": list(self.batch), "targets": list(self.targets)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PlanOptions:
        """What `to_json` gave."""
        return cls(**{**value, "batch": tuple(value["batch"]), "targets": tuple(value["targets"])})
