"""Tiny stand-ins shared by the runtime's tests: an ONNX graph whose classes are the colours, and a family around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from tocom.runtime.files import sha256_file
from tocom.runtime.manifest import EngineEntry, Family, InputSpec

COLOURS = ("red", "green", "blue")


def save_colour_graph(file: Path, side: int = 8, gain: float = 4.0, debug: bool = False, **names: str) -> Path:
    """Writes a graph whose logits are `gain` times the mean of each channel."""
    image, logits = names.get("image", "pixel_values"), names.get("logits", "logits")
    weight = numpy_helper.from_array(gain * np.eye(3, dtype=np.float32), "weight")
    nodes = [
        helper.make_node("GlobalAveragePool", [image], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("Gemm", ["features", "weight"], [logits]),
    ]
    outputs = [helper.make_tensor_value_info(logits, TensorProto.FLOAT, ["batch", 3])]
    if debug:
        outputs.append(helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 3]))
    inputs = [helper.make_tensor_value_info(image, TensorProto.FLOAT, ["batch", 3, side, side])]
    graph = helper.make_graph(nodes, "colours", inputs, outputs, [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(model.SerializeToString())
    return file


def make_entry(folder: Path, degree: int, **changes: object) -> EngineEntry:
    """An entry for the graph that lies at rNN/model.onnx."""
    name = f"r{degree:02}/model.onnx"
    fields = {
        "degree": degree,
        "scale": 0.1,
        "schedule": (degree, degree),
        "tokens": (65, 65 - degree, 65 - 2 * degree),
        "gmacs": 0.5,
        "backend": "onnxruntime",
        "precision": "fp32",
        "onnx": name,
        "engine": name,
        "sha256": {name: sha256_file(folder / name)},
        "recipe": "made by a test",
        "validation": {"max_abs": 1e-6, "passed": True, "notes": ["fine", None]},
        "latency_ms": {"1": {"p50": 1.5, "p99": 2}},
        "accuracy": {"top1": 0.75, "top1_without_compensator": None, "images": 4},
    }
    return EngineEntry(**(fields | changes))


@pytest.fixture
def colour_graph() -> Callable[..., Path]:
    """`save_colour_graph`, for tests that need graphs of their own."""
    return save_colour_graph


@pytest.fixture
def entry_of() -> Callable[..., EngineEntry]:
    """`make_entry`, for tests that need entries of their own."""
    return make_entry


@pytest.fixture
def spec() -> InputSpec:
    """The input of the colour graph; normalization that leaves 0..1 alone."""
    return InputSpec((3, 8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic", 1.0, "center")


@pytest.fixture
def family_folder(tmp_path: Path, spec: InputSpec) -> Path:
    """A written family with degrees 2 and 8; degree 8 is less sure of itself."""
    folder = tmp_path / "family"
    save_colour_graph(folder / "r02/model.onnx", gain=4.0)
    save_colour_graph(folder / "r08/model.onnx", gain=1.0)
    entries = (make_entry(folder, 8), make_entry(folder, 2))
    Family("tiny", 3, spec, 0, "a" * 64, None, COLOURS, entries).write(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with two images of each colour, each in a folder named like its class."""
    folder = tmp_path / "photos"
    for channel, name in enumerate(COLOURS):
        (folder / name).mkdir(parents=True)
        pixels = np.zeros((12, 10, 3), np.uint8)
        pixels[..., channel] = 255
        for number in range(2):
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder
