"""One image and a degree -> which input patches are one token behind every block; as the served engine decides.

Every token behind the prefix stands for a set of input patches. What an engine decided says where each token goes among
those that leave the block, so patches are followed by positions alone. Engines with a native operator tell what they
decide. For others a copy of the graph with the decisions among its outputs is carried out by ONNX Runtime; it lives in
memory, since a family that is served may be read-only.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..backends import native_operators
from ..errors import InputError, one_line
from ..manifest import EngineEntry, Family
from .base import EngineRunner, open_engine

if TYPE_CHECKING:
    from .graph_file import Removal

_RECORDER = threading.Lock()  # a process has one record of what native operators decide


@dataclass(frozen=True)
class MergeTrace:
    """Which patches of one image are one token behind each block that removes tokens.

    Attributes:
        degree: Degree r.
        reduction: "merge" or "prune".
        grid: Patches of the image, (down, across).
        tokens: Tokens entering each block, then tokens leaving the last; L + 1 numbers, as in the manifest.
        groups: Block -> the position, among the tokens that leave it, of the token that each patch is part of, int64
            of the grid's shape. Blocks that reduce nothing are missing; at degree 0 all are: every patch is its own.
        decided_by: "engine" where the served engine told it, "graph" where a copy of its graph did, whose decisions
            may differ at ties.
    """

    degree: int
    reduction: str
    grid: tuple[int, int]
    tokens: tuple[int, ...]
    groups: Mapping[int, np.ndarray]
    decided_by: str

    def to_json(self) -> dict[str, Any]:
        """What the server answers: groups numbered from 0 on, row by row."""
        return {
            "degree": self.degree,
            "grid": list(self.grid),
            "tokens": list(self.tokens),
            "reduction": self.reduction,
            "decided_by": self.decided_by,
            "blocks": [
                {"block": block, "groups": np.unique(groups, return_inverse=True)[1].reshape(self.grid).tolist()}
                for block, groups in self.groups.items()
            ],
        }


@dataclass(frozen=True)
class _Teller:
    """What tells the decisions of a degree; `engine` only where it has native operators."""

    removals: tuple[Removal, ...]
    graph: bytes
    engine: EngineRunner | None


class MergeTracer:
    """Traces images through the engines of a family. Safe to use from several threads, one at a time runs."""

    def __init__(self, folder: Path | str, family: Family, *, threads: int | None = None, keep: int = 2) -> None:
        """Opens nothing yet.

        Args:
            folder: Of the family.
            family: Its manifest.
            threads: CPU threads for one image; the engine's choice by default.
            keep: Degrees whose engines stay open, those that were used last.
        """
        self._folder, self._family, self._threads, self._keep = Path(folder), family, threads, keep
        self._lock = threading.Lock()
        self._tellers: OrderedDict[int, _Teller] = OrderedDict()
        self._copies: dict[int, EngineRunner] = {}
        self._prefix: int | None = None
        self._closed = False

    def trace(self, pixel_values: np.ndarray, degree: int) -> MergeTrace:
        """Follows the patches of one image.

        Args:
            pixel_values: Prepared, float32 [1, 3, H, W].
            degree: Degree r.

        Raises:
            InputError: There is no such degree, the image does not fit, a file has changed, or no engine can tell.
        """
        entry = self._family.entry(degree)
        if len(pixel_values) != 1:
            raise InputError(f"patches are followed through one image at a time, got {len(pixel_values)}")
        with self._lock:
            if self._closed:
                raise InputError("the tracer must be open, got a closed one: make another")
            teller = self._teller(entry)
            prefix = self._protected(teller)
            height, width = self._family.input.size[1:]
            grid, prefix = patch_grid(height, width, entry.tokens[0], prefix)
            decisions, decided_by = self._decisions(entry, teller, pixel_values)
        position = prefix + np.arange(grid[0] * grid[1])
        groups = {}
        for removal in teller.removals:
            position = moved(removal, decisions)[position]
            groups[removal.block] = position.reshape(grid)
        return MergeTrace(degree, self._family.reduction, grid, entry.tokens, groups, decided_by)

    def close(self) -> None:
        """Frees the engines; a second call does nothing."""
        with self._lock:
            self._closed = True
            for degree in list(self._tellers):
                self._forget(degree)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _teller(self, entry: EngineEntry) -> _Teller:
        if entry.degree not in self._tellers:
            while len(self._tellers) >= self._keep:
                self._forget(next(iter(self._tellers)))
            graph = self._graph(entry)
            removed = _removals(graph, entry.onnx)
            tells = bool(removed) and entry.native and bool(native_operators(entry.backend))
            engine = self._open(entry) if tells else None
            self._tellers[entry.degree] = _Teller(removed, graph, engine)
        self._tellers.move_to_end(entry.degree)
        return self._tellers[entry.degree]

    def _forget(self, degree: int) -> None:
        opened = [self._tellers.pop(degree).engine, self._copies.pop(degree, None)]
        for runner in opened:
            if runner is not None:
                runner.close()

    def _open(self, entry: EngineEntry) -> EngineRunner:
        file = self._folder / entry.engine
        return open_engine(file, entry.backend, precision=entry.precision, threads=self._threads)

    def _graph(self, entry: EngineEntry) -> bytes:
        file = self._folder / entry.onnx
        try:
            content = file.read_bytes()
        except OSError as error:
            raise InputError(f"{one_line(file)} cannot be read: {one_line(error.strerror or error)}") from error
        if hashlib.sha256(content).hexdigest() != entry.sha256[entry.onnx]:
            raise InputError(f"{one_line(file)} has changed: compile degree {entry.degree} again")
        return content

    def _protected(self, teller: _Teller) -> int | None:
        """Prefix tokens; a degree that removes nothing does not say, and another one of the family does."""
        if teller.removals:
            self._prefix = teller.removals[0].protected
        elif self._prefix is None and (other := max(self._family.engines, key=lambda entry: entry.degree)).degree:
            removed = _removals(self._graph(other), other.onnx)
            self._prefix = removed[0].protected if removed else None
        return self._prefix

    def _decisions(
        self, entry: EngineEntry, teller: _Teller, pixel_values: np.ndarray
    ) -> tuple[dict[str, np.ndarray], str]:
        """Name -> positions [count], and who decided."""
        names = [name for removal in teller.removals for name in removal.decisions]
        if not names:
            return {}, "engine"
        outputs, decided_by = None, "engine"
        if teller.engine is not None:
            outputs = _recorded(teller.engine, pixel_values)
        if outputs is None or not set(names) <= outputs.keys():
            outputs, decided_by = self._copy(entry, teller, names).infer_all(pixel_values), "graph"
        return {name: outputs[name].reshape(-1) for name in names}, decided_by

    def _copy(self, entry: EngineEntry, teller: _Teller, names: list[str]) -> EngineRunner:
        if entry.degree not in self._copies:
            try:
                from .graph_file import telling
                from .onnxruntime_engine import OrtRunner
            except ImportError as error:
                raise InputError(f"this engine does not tell what it merges, and a copy that does needs ONNX Runtime: "
                                 f"{one_line(error)}; pip install onnxruntime") from error  # fmt: skip
            file, content = self._folder / entry.onnx, telling(teller.graph, names)
            self._copies[entry.degree] = OrtRunner(file, threads=self._threads, content=content)
        return self._copies[entry.degree]


def moved(removal: Removal, decisions: Mapping[str, np.ndarray]) -> np.ndarray:
    """Where every token that enters a block is among those that leave it, int64 [N].

    Args:
        removal: What removes tokens there.
        decisions: Name -> positions [count] among the tokens that enter; see docs/formats.md, "The graph".

    Raises:
        InputError: They are no decision about so many tokens.
    """
    protected, tokens = removal.protected, removal.tokens
    chosen = {name.rpartition(".")[2]: decisions[name] for name in removal.decisions}
    to = np.full(tokens, -1)
    to[:protected] = np.arange(protected)
    merges = "src" in chosen
    # a-tokens stand at even, b-tokens at odd positions behind the prefix
    sources = np.arange(protected + protected % 2, tokens, 2)
    destinations = np.arange(protected + 1 - protected % 2, tokens, 2)
    if merges:
        named, expected = np.concatenate([chosen["src"], chosen["unm"]]), sources
    else:
        named, expected = np.concatenate([chosen["kept"], chosen["dropped"]]), np.arange(protected, tokens)
    if not np.array_equal(np.sort(named), expected) or (merges and not np.isin(chosen["dst"], destinations).all()):
        raise InputError(f"block {removal.block} must decide on each of its tokens once, and does not: "
                         "compile the degree again")  # fmt: skip
    if merges:
        unmerged = len(chosen["unm"])
        to[chosen["unm"]] = protected + np.arange(unmerged)
        to[destinations] = protected + unmerged + np.arange(len(destinations))
        to[chosen["src"]] = to[chosen["dst"]]
    else:
        to[chosen["kept"]] = protected + np.arange(len(chosen["kept"]))
        to[chosen["dropped"]] = protected + len(chosen["kept"])
    return to


def patch_grid(height: int, width: int, tokens: int, prefix: int | None) -> tuple[tuple[int, int], int]:
    """How many patches an image has down and across, and how many tokens stand before theirs.

    Args:
        height: Of the network's input, in pixels.
        width: Likewise.
        tokens: That enter the first block.
        prefix: How many of them stand for no patch; None where that is not known: the fewest that leave a grid.

    Raises:
        InputError: Square patches cannot give so many tokens.

    >>> patch_grid(224, 224, 197, None), patch_grid(56, 72, 64, 1)
    (((14, 14), 1), ((7, 9), 1))
    """
    # the larger the patches, the fewer there are down and across: of one number there is one grid at most
    grids = [(height // side, width // side) for side in range(1, min(height, width) + 1)]
    for first in range(tokens) if prefix is None else (prefix,):
        for grid in grids:
            if grid[0] * grid[1] == tokens - first:
                return grid, first
    raise InputError(f"{tokens} tokens are no grid of square patches of an image of {height} x {width} pixels")


def _removals(graph: bytes, name: str) -> tuple[Removal, ...]:
    try:
        from .graph_file import removals
    except ImportError as error:
        raise InputError(f"to follow patches takes protobuf: {one_line(error)}; pip install protobuf") from error
    try:
        return removals(graph)
    except Exception as error:  # protobuf's DecodeError, which has no name where protobuf is missing, and ValueError
        raise InputError(f"{one_line(name)} is not a graph of this project: {one_line(error)}") from error


def _recorded(engine: EngineRunner, pixel_values: np.ndarray) -> dict[str, np.ndarray] | None:
    """All that an engine with native operators tells; None where another one of the process merged meanwhile."""
    with _RECORDER:
        try:
            return engine.infer_all(pixel_values)
        except InputError:  # the copy of the graph then tells, or fails with its own reason
            return None
