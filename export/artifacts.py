"""What the pipeline hands on: FusedCheckpoint -> OnnxGraph -> Engine -> Report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tocom.export.proof.findings import Findings

Notify = Callable[[int | None, str], None]
"""(degree, stage) as work goes on; degree is None for work on the whole family."""


@dataclass(frozen=True)
class FusedCheckpoint:
    """A checkpoint with the compensator folded in for one target degree.

    Attributes:
        weights: Parameter name -> tensor, laid out as in the plain model.
        model: timm's name of the model.
        degree: Target degree r the weights are folded for, in tokens per block.
        source_degree: Degree the checkpoint was fine-tuned at.
        delta_scale: Factor on the compensator's delta; None when nothing was folded in.
        checkpoint_sha256: Hash of the checkpoint file.
        compensator_sha256: Hash of the compensator file; None without one.
        compensation: The change that was folded in, for a graph that keeps it as factors; None when nothing was.
    """

    weights: Mapping[str, Any]
    model: str
    degree: int
    source_degree: int
    delta_scale: float | None
    checkpoint_sha256: str
    compensator_sha256: str | None
    compensation: Any = None


@dataclass(frozen=True)
class OnnxGraph:
    """An ONNX file that runs one degree.

    Attributes:
        file: The graph.
        files: Relative name -> sha256 of every file the graph needs, itself included.
        tokens: Tokens entering each block, then tokens leaving the last one; L + 1 numbers.
        gmacs: Multiply-accumulates of one image, in units of 1e9.
        fused: What the graph was lowered from.
        precision: Number format of its products: "fp32" also where an engine is to choose another one itself.
    """

    file: Path
    files: Mapping[str, str]
    tokens: tuple[int, ...]
    gmacs: float
    fused: FusedCheckpoint
    precision: str = "fp32"


@dataclass(frozen=True)
class Engine:
    """A file that an engine library loads and runs.

    Attributes:
        file: What `runtime.engines.base.open_engine` opens.
        backend: One of `tocom.runtime.backends.BACKENDS`.
        precision: "fp32", or what the graph was quantized or cast to.
        files: Relative name -> sha256 of every file the engine needs, itself included.
        graph: What it was built from.
        native: Whether the backend removes tokens with an operator of its own instead of the function body.
        build: JSON-ready, what is known of a plan that was built; empty where the graph itself is opened.
        unrunnable: Why it cannot be run here, so that its graph is validated instead; None where it can.
    """

    file: Path
    backend: str
    precision: str
    files: Mapping[str, str]
    graph: OnnxGraph
    native: bool = False
    build: Mapping[str, Any] = field(default_factory=dict)
    unrunnable: str | None = None


@dataclass(frozen=True)
class Report:
    """What checking an engine against the reference found; true when it passed.

    Attributes:
        engine: What was checked.
        passed: Whether every gate held.
        findings: The measurements behind the verdict.
    """

    engine: Engine
    passed: bool
    findings: Findings

    def __bool__(self) -> bool:
        return self.passed
