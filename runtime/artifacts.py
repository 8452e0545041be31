"""What the pipeline hands on, FusedCheckpoint -> OnnxGraph -> Engine -> Report, and how files are written whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO


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
        source: What the graph was lowered from.
        precision: Number format of its products: "fp32" also where an engine is to choose another one itself.
    """

    file: Path
    files: Mapping[str, str]
    tokens: tuple[int, ...]
    gmacs: float
    source: FusedCheckpoint
    precision: str = "fp32"


@dataclass(frozen=True)
class Engine:
    """A file that an engine library loads and runs.

    Attributes:
        file: What `tocom.runtime.engines.base.open_engine` opens.
        backend: One of `tocom.runtime.engines.base.BACKENDS`.
        precision: "fp32", or what the graph was quantized or cast to.
        files: Relative name -> sha256 of every file the engine needs, itself included.
        source: The graph it was built from.
        native: Whether the backend removes tokens with an operator of its own instead of the function body.
        build: JSON-ready, what is known of a plan that was built; empty where the graph itself is opened.
        unrunnable: Why it cannot be run here, so that its graph is proven instead; None where it can.
    """

    file: Path
    backend: str
    precision: str
    files: Mapping[str, str]
    source: OnnxGraph
    native: bool = False
    build: Mapping[str, Any] = field(default_factory=dict)
    unrunnable: str | None = None


@dataclass(frozen=True)
class Report:
    """What checking an engine against the reference found; true when it passed.

    Attributes:
        engine: What was checked.
        passed: Whether every gate held.
        findings: JSON-ready measurements behind the verdict.
    """

    engine: Engine
    passed: bool
    findings: Mapping[str, Any]

    def __bool__(self) -> bool:
        return self.passed


def sha256_file(path: Path | str) -> str:
    """Hashes a file without reading it into memory.

    Returns:
        64 lower-case hexadecimal digits.

    Raises:
        OSError: The file cannot be read.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path | str, content: bytes | Callable[[BinaryIO], object]) -> Path:
    """Writes a file so that whoever looks, at any time and after any crash, finds the old content or the new, whole.

    Args:
        path: Where the file belongs; its folder exists. A file that is there is replaced.
        content: The bytes, or a function that writes them to the binary file it is handed.

    Returns:
        `path`.

    Raises:
        OSError: The file cannot be written. Whatever the failure, no temporary file is left and `path` is untouched.
    """
    path = Path(path)
    # In the same folder, because a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with Path(temporary).open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failed write does not say which file
        raise
    return path
