"""What is kept as golden values: numbers and structures that a new version of a library must not change unseen.

Weights and images are drawn from the raw bits of numpy's Philox, which numpy promises never to change, so that neither
torch's generator nor timm's initialization is part of what is kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from PIL import Image
from torch import Tensor, nn

from tests.conftest import FAMILIES
from tocom.checkpoint import load_model
from tocom.export.artifacts import FusedCheckpoint
from tocom.export.graph.lower import lower
from tocom.export.graph.weight_store import WeightStore
from tocom.export.proof.reference import in_format, replay
from tocom.pruning import Pruning
from tocom.reduction import MERGE, PRUNE, Reduction
from tocom.runtime.manifest import InputSpec
from tocom.runtime.preprocess import load_image, preprocess
from tocom.vit import ReducedViT, schedule_for

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("golden.json")
COMMAND = "python -m tests.golden"
LIBRARIES = ("numpy", "pillow", "timm", "torch", "onnx", "onnx-ir", "onnxscript")
TOLERANCE = 1e-9  # relative, of numbers beyond 1

# each of another structure; all of them are exported by other tests too
NETWORKS: dict[str, tuple[str, int, Reduction]] = {
    "deit": ("deit_tiny", 8, MERGE),
    "distilled": ("deit_distilled", 8, MERGE),
    "registers": ("reg4_dinov2", 4, MERGE),
    "gap": ("gap", 4, MERGE),
    "map": ("map", 16, MERGE),
    "prune": ("deit_tiny", 8, PRUNE),
}
_DEGREES, _SHEETS = (0, 8, 16), 4


Graphs = Callable[[str, int, Reduction], onnx.ModelProto]


@dataclass(frozen=True)
class Difference:
    """A golden value that is another one now.

    Attributes:
        where: Path to it.
        old: Golden; None where there was none.
        new: Now; None where there is none.
    """

    where: str
    old: Any
    new: Any

    @property
    def relative(self) -> float | None:
        """Of numbers: how far apart, as a share of the old one."""
        if not all(isinstance(each, int | float) for each in (self.old, self.new)):
            return None
        return abs(self.new - self.old) / abs(self.old) if self.old else math.inf


def bits(name: str, count: int) -> np.ndarray:
    """Numbers in -1..1 that belong to a name, float64 [count]."""
    raw = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1


def fill_(model: nn.Module) -> nn.Module:
    """Gives every number of a model's state the value that belongs to its name."""
    state = model.state_dict()
    for name in sorted(state):
        tensor = state[name]
        if not tensor.is_floating_point():
            continue
        values = torch.from_numpy(bits(name, tensor.numel())).reshape(tensor.shape)
        kind = name.rsplit(".", maxsplit=1)[-1]
        if kind == "weight" and tensor.ndim > 1:
            values = values * math.sqrt(3 / tensor[0].numel())
        elif kind in ("weight", "gamma"):
            values = 0.8 + 0.4 * values
        else:  # biases, tokens, positions
            values = 0.5 * values
        tensor.copy_(values)
    return model.eval().requires_grad_(False)


def compute(graphs: Graphs | None = None) -> dict[str, Any]:
    """All golden values as they are now.

    Args:
        graphs: Exports a family at a degree, with a reduction; None does so here.
    """
    return {
        "preprocessing": _preprocessing(),
        "example": {f"r={degree}": _answers(*_example(degree)) for degree in _DEGREES},
        "networks": {name: _answers(*_network(*which)) for name, which in NETWORKS.items()},
        "graphs": {name: _structure((graphs or _exported)(*which)) for name, which in NETWORKS.items()},
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """What is not the same: numbers to within `TOLERANCE`, all else exactly."""
    before, now = dict(_flat(old)), dict(_flat(new))
    pairs = [Difference(where, before.get(where), now.get(where)) for where in {**before, **now}]
    return [pair for pair in pairs if not _same(pair.old, pair.new)]


def read() -> dict[str, Any]:
    """The file: versions, and values."""
    return json.loads(FILE.read_text())


def write(values: Mapping[str, Any]) -> None:
    """Replaces the file."""
    text = json.dumps({"versions": versions(), "values": values}, indent=1)
    FILE.write_text(text + "\n")


def versions() -> dict[str, str | None]:
    """Of the libraries whose numbers and graphs these are; without what says for which device they were built."""
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = None
    return found


def changed_versions(old: Mapping[str, str | None]) -> list[str]:
    """The libraries that are of another version now, as "numpy 2.2.0 -> 2.3.0"."""
    now = versions()
    return [f"{name} {old.get(name)} -> {now[name]}" for name in LIBRARIES if old.get(name) != now[name]]


def _flat(values: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping):
        items = values.items()
    elif isinstance(values, list):
        items = enumerate(values)
    else:
        yield where, values
        return
    for key, value in items:
        yield from _flat(value, f"{where}/{key}" if where else str(key))


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, float) and isinstance(new, float):
        return abs(new - old) <= TOLERANCE * max(1.0, abs(old))
    return old == new and type(old) is type(new)


def _numbers(values: Tensor | np.ndarray) -> list[Any]:
    """To ten significant digits."""
    rounded = np.vectorize(lambda value: float(f"{value:.9e}"))(np.asarray(values, np.float64))
    return rounded.tolist()


def _example(degree: int) -> tuple[ReducedViT, Tensor]:
    folder = ROOT / "examples" / "digits"
    model = load_model(str(folder)).model
    sheets = sorted((folder / "sheets").rglob("*.png"))[:: 1000 // _SHEETS][:_SHEETS]
    spec = InputSpec(size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0,
                     crop_mode="center")  # fmt: skip
    pixels = np.stack([preprocess(load_image(sheet), spec) for sheet in sheets])
    return ReducedViT(model, degree), torch.from_numpy(pixels)


def _network(family: str, degree: int, reduction: Reduction) -> tuple[ReducedViT, Tensor]:
    model = fill_(FAMILIES[family]())
    size = (2, 3, *model.patch_embed.img_size)
    pixels = torch.from_numpy(bits("pixels", math.prod(size)).reshape(size))
    return ReducedViT(model, degree, reduction=reduction), pixels


def _answers(reference: ReducedViT, pixels: Tensor) -> dict[str, Any]:
    found = replay(in_format(reference, "fp64"), pixels, {})
    decisions = {f"block {block}": _hash(decision) for block, decision in found.natural.items()}
    return {"logits": _numbers(found.logits), "decisions": decisions}


def _hash(decision: Any) -> str:
    """Of the positions, as little-endian int64."""
    positions = (decision.kept, decision.dropped) if isinstance(decision, Pruning) else astuple(decision)[:3]
    content = b"".join(each.numpy().astype("<i8").tobytes() for each in positions)
    return hashlib.sha256(content).hexdigest()[:16]


def _structure(proto: onnx.ModelProto) -> dict[str, Any]:
    """Operators by type, the names that engines are looked into by, and opsets."""
    counts = Counter(node.op_type for node in proto.graph.node)
    inside = Counter(node.op_type for function in proto.functions for node in function.node)
    names = {name for node in proto.graph.node for name in (*node.input, *node.output) if name.startswith("block.")}
    return {
        "operators": dict(sorted(counts.items())),
        "operators of functions": dict(sorted(inside.items())),
        "values": " ".join(sorted(names)),
        "opsets": {each.domain or "ai.onnx": each.version for each in proto.opset_import},
    }


def _exported(family: str, degree: int, reduction: Reduction) -> onnx.ModelProto:
    model = FAMILIES[family]()
    fused = FusedCheckpoint(model.state_dict(), family, degree, 0, None, "", None)
    with tempfile.TemporaryDirectory() as folder:
        graph = lower(model, schedule_for(model, degree), fused, WeightStore(Path(folder)), "model.onnx", reduction)
        return onnx.load(graph.file, load_external_data=False)


def _preprocessing() -> dict[str, Any]:
    """One generated image of 61x47 pixels by every interpolation and way to crop."""
    shape = (47, 61, 3)
    smooth = np.cumsum(bits("image", math.prod(shape)).reshape(shape), axis=1)
    pixels = np.uint8(np.clip(128 + 24 * smooth, 0, 255))
    found = {}
    for interpolation, crop_mode in (("bicubic", "center"), ("bilinear", "squash"), ("bicubic", "border")):
        spec = InputSpec(
            size=(3, 32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation=interpolation,
            crop_pct=0.9, crop_mode=crop_mode,
        )  # fmt: skip
        image = preprocess(Image.fromarray(pixels), spec).astype(np.float64)
        some = [image[0, 0, 0], image[1, 7, 19], image[2, 16, 16], image[0, 31, 3], image[2, 30, 31]]
        found[f"{interpolation}, {crop_mode}"] = {
            "mean, least, most": _numbers([image.mean(), image.min(), image.max()]),
            "pixels": _numbers(some),
        }
    return found
