"""Polygraphy with every value of a plain export marked as an output: which is the first that differs too much."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from polygraphy import constants
from polygraphy.backend.onnx import ModifyOutputs
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.comparator import Comparator, RunResults, SimpleCompareFunc

from bench.peer_comparison.cases import OpenVinoRunner, run, session
from tocom.export.proof.polygraphy_tools import quiet

SLACK = 10.0  # a value may differ by so many times what it does where nothing is decided otherwise


@dataclass(frozen=True)
class Marked:
    """A plain export that puts out every value.

    Attributes:
        file: The graph.
        places: Value -> block and operator that it comes from, in the graph's order.
    """

    file: Path
    places: Mapping[str, tuple[int, str]]


def marked(plain: Path) -> Marked:
    """Marks every value; a block begins with its first layer norm."""
    graph = onnx.load(plain)
    places, norms = {}, -1
    for node in graph.graph.node:
        norms += node.op_type == "LayerNormalization"
        places |= {name: (norms // 2, node.op_type) for name in node.output if name}
    file = plain.with_suffix(".marked.onnx")
    with quiet():
        onnx.save(ModifyOutputs(graph, outputs=constants.MARK_ALL)(), file)
    return Marked(file, places)


def differences(reference: Marked, candidate: Path, images: np.ndarray) -> dict[str, float]:
    """Largest difference of every value between ONNX Runtime on the reference, and OpenVINO on a candidate."""
    right = run(OnnxrtRunner(functools.partial(session, reference.file), name="reference"), [images])
    found = RunResults()
    found.extend(run(OpenVinoRunner(candidate, "fp32"), [images]))
    found.extend(right)

    def same(name: str, _index: int, results: Mapping[str, np.ndarray], *_: object) -> list[str]:
        return [name] if name in results else []

    judge = SimpleCompareFunc(check_error_stat="max", find_output_func=same)
    with quiet():
        (iterations,) = Comparator.compare_accuracy(found, comparisons=[(0, 1)], compare_func=judge)[0].values()
    told = {name: getattr(each, "max_absdiff", np.inf) for name, each in iterations[0].items()}
    return {name: float(told[name]) for name in reference.places if name in told}


def first_beyond(found: Mapping[str, float], usual: Mapping[str, float], reference: Marked) -> tuple[int, str] | None:
    """Block and operator of the first value in the graph that differs more than it may; None for none."""
    for name, largest in found.items():
        if name in usual and not largest <= SLACK * usual[name]:
            return reference.places[name]
    return None
