"""The names of all files in a family's folder.

    family.json                     the manifest
    compile.toml                    what it was made from and how: `tocom compile --config` repeats it
    scales.json, cascade.json       what was chosen for the family
    rNN-HASH.onnx                   graph of a degree; HASH is of its recipe
    rNN-HASH.inlined.onnx           the same without model-local functions
    weights-HASH.bin                weights that graphs refer to; HASH is of their contents
    rNN-HASH.HASH.plan              TensorRT plan of a graph; the second HASH is of how it was built
    PLAN.log, PLAN.layers.json      what was said while it was built, and its layers
    PLAN.GPU.cache                  what TensorRT for RTX compiled of it for a GPU
    BACKEND.timing                  times of kernels, measured by TensorRT
    calibration-HASH.safetensors    a calibration; HASH is of its recipe
    .lock                           held by the one command that writes

Graphs, plans and weights are named after what they were made from, and never rewritten. Names that begin with a dot are
of files that pass: copies of a graph that are run once, and files that are not whole yet.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePath
from typing import Any

MANIFEST = "family.json"
RECORD = "compile.toml"
SCALES = "scales.json"
CASCADE = "cascade.json"
LOCK = ".lock"
GRAPH_SUFFIX, PLAN_SUFFIX, CALIBRATION_SUFFIX = ".onnx", ".plan", ".safetensors"

_GRAPH = r"r\d+-[0-9a-f]{12}"
_PLAN = rf"{_GRAPH}\.[0-9a-f]{{8}}\.plan"
_BESIDE_PLAN = r"\.log|\.layers\.json|\.[a-z0-9-]+\.cache"
_KEPT = rf"{_GRAPH}(\.inlined)?\.onnx|weights-[0-9a-f]{{16}}\.bin|{_PLAN}({_BESIDE_PLAN})?"
_VARIANT = rf"\.{_GRAPH}(\.inlined)?(\.[a-z0-9_]{{8}})?\.(debug|slice|plan)(\.plan)?\.(onnx|plan)"
_UNFINISHED = rf"\.({_KEPT}|{re.escape(MANIFEST)})\.\d+\.tmp"
_GENERATED = re.compile(rf"{_KEPT}|{_VARIANT}|{_UNFINISHED}")
_OF_PLAN = re.compile(rf"({_PLAN})({_BESIDE_PLAN})")


def graph_name(degree: int, recipe: str) -> str:
    """Of a degree's graph.

    Args:
        degree: Degree r.
        recipe: Hash of everything that decides what the graph is, in hexadecimal digits.

    >>> graph_name(8, "0123456789abcdef")
    'r08-0123456789ab.onnx'
    """
    return f"r{degree:02d}-{recipe[:12]}{GRAPH_SUFFIX}"


def inlined(graph: Path) -> Path:
    """The copy of a graph without model-local functions."""
    return graph.with_suffix(f".inlined{GRAPH_SUFFIX}")


def weights_name(digest: str) -> str:
    """Of a file of weights, by the hash of its contents."""
    return f"weights-{digest[:16]}.bin"


def calibration_name(recipe: str) -> str:
    """Of a calibration, by the hash of its recipe."""
    return f"calibration-{recipe[:16]}{CALIBRATION_SUFFIX}"


def plan_of(graph: Path, recipe: Mapping[str, Any]) -> Path:
    """The plan that is built from a graph in one way.

    Args:
        graph: Its file.
        recipe: What decides the plan beside the graph, JSON-ready.
    """
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return graph.with_name(f"{graph.stem}.{digest[:8]}{PLAN_SUFFIX}")


def log_of(plan: Path) -> Path:
    """What was said while a plan was built."""
    return plan.with_name(f"{plan.name}.log")


def layers_of(plan: Path) -> Path:
    """The layers of a plan."""
    return plan.with_name(f"{plan.name}.layers.json")


def kernels_of(plan: Path, gpu: str) -> Path:
    """What TensorRT for RTX compiled of a plan for a GPU.

    Args:
        plan: Its file.
        gpu: Name of the GPU, as its driver has it.

    >>> kernels_of(Path("r08.plan"), "NVIDIA RTX A2000").name
    'r08.plan.nvidia-rtx-a2000.cache'
    """
    return plan.with_name(f"{plan.name}.{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.cache")


def timing_of(graph: Path, backend: str) -> Path:
    """Times of kernels that a backend measures while it builds plans, beside a graph."""
    return graph.with_name(f"{backend}.timing")


def slice_bound_of(graph: Path) -> Path:
    """The copy of a graph that drops tokens without looking at them; removed after it was run."""
    return graph.with_name(f".{graph.stem}.slice{GRAPH_SUFFIX}")


def debug_affixes(graph: Path) -> tuple[str, str]:
    """What the name of a copy of a graph that puts out more begins and ends with; removed after it was run."""
    return f".{graph.stem}.", f".debug{GRAPH_SUFFIX}"


def flat_of(graph: Path) -> Path:
    """The copy of a graph that a plan is built of, without functions; removed after that."""
    return graph.with_name(f".{graph.stem.lstrip('.')}.plan{GRAPH_SUFFIX}")


def passing_plan_of(variant: Path) -> Path:
    """The plan of a copy of a graph; removed after it was run."""
    return variant.with_suffix(PLAN_SUFFIX)


def is_data(name: str) -> bool:
    """Whether a listed file is what a graph refers to, such as weights: neither a graph nor a plan."""
    return PurePath(name).suffix not in (GRAPH_SUFFIX, PLAN_SUFFIX)


def may_be_deleted(name: str, listed: Collection[str]) -> bool:
    """Whether a clean-up may delete a file: it was generated here, and no engine needs it.

    Args:
        name: Of a file in the folder.
        listed: Names of the files that the manifest lists.

    >>> may_be_deleted("r08-0123456789ab.onnx", []), may_be_deleted("scales.json", [])
    (True, False)
    """
    beside = _OF_PLAN.fullmatch(name)
    needed = name in listed or (beside is not None and beside[1] in listed)
    return not needed and _GENERATED.fullmatch(name) is not None
