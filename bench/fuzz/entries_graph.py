"""Graphs and weights whose hashes were forged too, so that the engine libraries meet them; and `tocom inspect`."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.fuzz.case import Entry, Mutate
from bench.fuzz.commands import judge, refusing, run_tocom
from bench.fuzz.entries_family import agree, copy_family, expected, predictions
from bench.fuzz.given import DEGREE, Given
from bench.fuzz.mutate_bytes import BYTES
from bench.fuzz.mutate_onnx import GRAPHS
from tocom.runtime.engines.base import open_engine

_CLOSE = 1e-4


@functools.cache
def _engine(family: Path) -> dict[str, Any]:
    engines = json.loads((family / "family.json").read_text())["engines"]
    return next(each for each in engines if each["degree"] == DEGREE)


def _graph_of(backend: str) -> Callable[[Given, random.Random], bytes]:
    def whole(given: Given, _: random.Random) -> bytes:
        family = given.family(backend)
        return (family / _engine(family)["engine"]).read_bytes()

    return whole


def _weights(given: Given, _: random.Random) -> bytes:
    family = given.family("onnxruntime")
    return (family / next(name for name in _engine(family)["sha256"] if name.endswith(".bin"))).read_bytes()


def _forge(given: Given, folder: Path, backend: str, name: str, content: bytes) -> None:
    """Puts a file into a copy of the family, and its hash into the manifest."""
    family = copy_family(given, folder, backend, without=name)
    (family / name).write_bytes(content)
    manifest = json.loads((family / "family.json").read_text())
    for engine in manifest["engines"]:
        if name in engine["sha256"]:
            engine["sha256"][name] = hashlib.sha256(content).hexdigest()
    (family / "family.json").write_text(json.dumps(manifest))


def _place_graph(backend: str) -> Callable[[Given, Path, bytes], None]:
    def place(given: Given, folder: Path, content: bytes) -> None:
        _forge(given, folder, backend, _engine(given.family(backend))["engine"], content)

    return place


def _place_weights(given: Given, folder: Path, content: bytes) -> None:
    name = next(name for name in _engine(given.family("onnxruntime"))["sha256"] if name.endswith(".bin"))
    _forge(given, folder, "onnxruntime", name, content)


def _infer_with(backend: str) -> Callable[[Given, Path], bool]:
    def run(given: Given, folder: Path) -> bool:
        return agree(predictions(given, folder / "family"), expected(given.folder, backend))

    return run


@refusing
def _open_sharing(given: Given, folder: Path) -> bool:
    """As a service does that runs several degrees in one process."""
    engine = _engine(given.family("onnxruntime"))["engine"]
    with open_engine(folder / "family" / engine, "onnxruntime", share_weights=True, threads=1) as runner:
        if runner.input_size != given.pixels.shape[1:]:
            return False
        logits = runner.infer(given.pixels)
    return logits.shape == given.logits.shape and bool(np.abs(logits - given.logits).max() < _CLOSE)


def _place_alone(given: Given, folder: Path, content: bytes) -> None:
    copy_family(given, folder)
    (folder / "family" / "graph.onnx").write_bytes(content)


def _inspect_graph(_: Given, folder: Path) -> bool:
    judge(run_tocom("inspect", folder / "family" / "graph.onnx"))
    judge(run_tocom("inspect", folder / "family" / "graph.onnx", "--show", "layers,attrs,weights"))
    return True


_ALL: dict[str, Mutate] = GRAPHS | BYTES

ENTRIES = (
    Entry("forged graph -> infer, ONNX Runtime", _ALL, _graph_of("onnxruntime"), _place_graph("onnxruntime"),
          _infer_with("onnxruntime"), 3, forged=True),
    Entry("forged graph -> infer, OpenVINO", _ALL, _graph_of("openvino"), _place_graph("openvino"),
          _infer_with("openvino"), 3, forged=True),
    Entry("forged graph -> shared weights", _ALL, _graph_of("onnxruntime"), _place_graph("onnxruntime"), _open_sharing,
          1, forged=True),
    Entry("forged weights -> infer, ONNX Runtime", BYTES, _weights, _place_weights, _infer_with("onnxruntime"), 0.5,
          forged=True),
    Entry("graph -> tocom inspect", _ALL, _graph_of("onnxruntime"), _place_alone, _inspect_graph, 1.5),
)  # fmt: skip
