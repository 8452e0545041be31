"""A graph that a library fails on -> the smallest piece of it that still fails, by Polygraphy's `debug reduce`.

To fail is, for a library that builds plans, to refuse a graph or not to build it; for one that runs the graph, not to
load it or to put out other numbers than ONNX Runtime without optimizations. A piece is cut out of a copy that has a
fixed batch and no functions, and all that follows from this is a constant in it: so every value's shape is known, and
each piece can be fed what the whole graph computed there. Where the whole does not fail in that form, it is taken as
the library gets it, and cut at its outputs only.

A piece may fail for a reason of its own, such as an input of a type that a library does not take. So it has to fail in
words that the whole graph fails in. And it may crash its process or never end, which is why another process tries it,
with a time limit.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import onnx
import onnx.shape_inference
import onnxruntime
from pebble import ProcessExpired, ProcessPool

from tocom.export.proof.gates import GATES
from tocom.export.proof.polygraphy_tools import load_graph, plain_session, reduced
from tocom.runtime.backends import BACKENDS, engine_module, named
from tocom.runtime.errors import InputError, one_line

# What imports torch is imported where it is needed: the process that tries pieces has to start soon.
if TYPE_CHECKING:
    from tocom.export.engine.tensorrt.plan import PlanOptions

BATCH = 2  # more than one, so that mixing up images shows

_DEEP = 1024  # unit roundoffs that a whole network may be off by, at the least twenty times what healthy ones are
_LINEAR = 24  # nodes of which each is left out in turn, once bisecting gets no further
_SECONDS_TO_RUN, _SECONDS_TO_BUILD = 300, 1800  # for one piece; what takes longer counts as a hang
_KEY = "value of "  # before names in the file of values: NumPy takes some names for itself
_WORD = re.compile(r"(?<![\w./])[A-Za-z]+(?![\w./])")  # without numbers, names of values and files

Fails = Callable[[Path], "str | None"]
"""Why a library fails on a graph file; None where it does not."""


@dataclass(frozen=True)
class Piece:
    """A piece of a graph that fails like the whole.

    Attributes:
        content: The ONNX file, with its weights.
        operators: Operator -> how many nodes of it.
        nodes: Nodes of the graph that it was cut out of.
        reason: How it fails, in the library's words.
    """

    content: bytes
    operators: Counter[str]
    nodes: int
    reason: str

    def __str__(self) -> str:
        listed = ", ".join(f"{count} {name}" if count > 1 else name for name, count in self.operators.items())
        return f"{self.operators.total()} of {self.nodes} nodes still fail: {listed}"


@dataclass(frozen=True)
class Trial:
    """What a piece is tried with.

    Attributes:
        backend: One of `tocom.runtime.backends.BACKENDS`.
        precision: Number format that it computes in.
        plan: How plans are built, for backends that have them; else None.
        values: File with what a piece's inputs are fed, where it is run.
    """

    backend: str
    precision: str
    plan: PlanOptions | None
    values: Path | None


def smallest_failing_piece(
    graph: Path,
    backend: str,
    *,
    precision: str | None = None,
    plan: PlanOptions | None = None,
    notify: Callable[[str], None] = lambda _: None,
) -> Piece | None:
    """Reduces a graph that a library fails on.

    Args:
        graph: ONNX file; its weights lie beside it. Where the library runs it, its inputs are float32.
        backend: One of `tocom.runtime.backends.BACKENDS`.
        precision: Number format that the backend computes in; differences are measured by it. Default: the graph's.
        plan: How plans are built, for backends that have them.
        notify: Told of every piece that was tried.

    Returns:
        The smallest piece; None if the library does not fail on the graph.

    Raises:
        InputError: If the file is no graph, the library is not installed, or ONNX Runtime does not run the graph, so
            that there is nothing to compare with.
    """
    proto, known = load_graph(graph), named(backend).precisions
    engine_module(backend)  # refuses one that is not installed
    with _Worker(backend) as worker, tempfile.TemporaryDirectory() as folder:
        from tocom.export.graph.insert_qdq import format_of  # while the worker loads the library

        precision = precision or format_of(proto)
        if precision not in known:
            raise InputError(f"{backend} runs {', '.join(known)}, got precision {one_line(precision)}")
        for whole, options, fixed in _forms(proto, backend, plan, Path(folder)):
            notify("trying the whole graph" if fixed else "trying it with its batch open")
            trial = Trial(backend, precision, options, None if options else _recorded(whole, with_middle=fixed))
            reason = worker.failure(trial, whole)
            if reason is not None:
                values = (partial(_value, trial.values) if trial.values else _zeros(whole)) if fixed else None
                return _reduced(whole, reason, partial(worker.failure, trial), values, notify)
    return None


def _forms(
    proto: onnx.ModelProto, backend: str, plan: PlanOptions | None, folder: Path
) -> Iterator[tuple[Path, PlanOptions | None, bool]]:
    """The forms of a graph that are tried, one after the other.

    Yields:
        The graph's file, how a plan is built of it (None for libraries that run it), and whether its batch is fixed.
    """
    from tocom.export.engine.build import needs_inlining
    from tocom.export.engine.tensorrt.plan import PlanOptions, folded, require_buildable
    from tocom.export.graph.inline import inline

    if BACKENDS[backend].builds_plans:
        plan = replace(plan or PlanOptions(), stripped=False)
        require_buildable(backend, plan)
    else:
        plan = None
    fixed = _save(_with_fixed_batch(inline(proto)), folder / "fixed")
    yield folded(fixed, fixed.parent), plan and replace(plan, batch=(BATCH, BATCH, BATCH)), True
    yield _save(inline(proto) if needs_inlining(proto, backend) else proto, folder / "as_it_is"), plan, False


def _reduced(
    whole: Path,
    reason: str,
    fails: Fails,
    values: Callable[[str], np.ndarray] | None,
    notify: Callable[[str], None],
) -> Piece:
    """Bisects for as long as that makes the graph smaller, then leaves nodes out one by one."""
    nodes, words, tried = _size(whole), set(_WORD.findall(reason)), 0

    def alike(piece: Path) -> str | None:
        """Why a piece fails, if that is how the whole graph does."""
        nonlocal tried
        tried += 1
        notify(f"piece {tried}: {_size(piece)} of {nodes} nodes")
        try:
            failure = fails(piece)
        except InputError:  # ONNX Runtime does not run it, so nothing is known about it
            return None
        return failure if failure and words.issuperset(_WORD.findall(failure)) else None

    best, mode, runs = whole, "bisect", 0
    while _size(best) > 1:
        runs += 1
        smaller = best.with_name(f"smaller-{runs}.onnx")
        reduced(best, smaller, mode, lambda piece: alike(piece) is None, values)
        failure = alike(smaller) if _size(smaller) < _size(best) else None
        if failure is not None:
            best, reason = smaller, failure
        elif mode == "bisect" and _size(best) <= _LINEAR:
            mode = "linear"
        else:
            break
    proto = load_graph(best)
    return Piece(proto.SerializeToString(), Counter(node.op_type for node in proto.graph.node), nodes, reason)


def _size(graph: Path) -> int:
    return len(load_graph(graph, weights=False).graph.node)


def _save(proto: onnx.ModelProto, folder: Path) -> Path:
    folder.mkdir()
    onnx.save(proto, folder / "whole.onnx", save_as_external_data=True, location="whole.weights")
    return folder / "whole.onnx"


def _with_fixed_batch(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph, changed, with a batch of `BATCH` in place of every size that is open."""
    for value in proto.graph.input:
        for side in value.type.tensor_type.shape.dim:
            if not side.HasField("dim_value"):
                side.dim_value = BATCH
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    del proto.graph.value_info[:]
    return proto


def _recorded(whole: Path, *, with_middle: bool) -> Path:
    """Noise for the inputs of a graph and, if asked for, what ONNX Runtime computes in it: a file for `_value`.

    Raises:
        InputError: If an input is not float32, or ONNX Runtime does not run the graph.
    """
    proto = load_graph(whole, weights=False)
    draw = np.random.default_rng(0)
    values = {}
    for value in proto.graph.input:
        kind = value.type.tensor_type
        if kind.elem_type != onnx.TensorProto.FLOAT:
            raise InputError(f"input {one_line(value.name)} must be float32, so that noise can be fed to it")
        values[value.name] = draw.standard_normal([side.dim_value or BATCH for side in kind.shape.dim], np.float32)
    if with_middle:
        outputs = {value.name for value in proto.graph.output}
        between = [name for node in proto.graph.node for name in node.output if name and name not in outputs]
        proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in between)
        recording = whole.with_name("recording.onnx")  # the weights are found beside it
        recording.write_bytes(proto.SerializeToString())
        values |= _run_session(plain_session(recording), dict(values))
    file = whole.with_name("values.npz")
    np.savez(file, **{_KEY + name: array for name, array in values.items()})
    return file


def _value(file: Path, name: str) -> np.ndarray:
    """What `_recorded` put into its file."""
    with np.load(file) as arrays:
        return arrays[_KEY + name]


def _zeros(whole: Path) -> Callable[[str], np.ndarray] | None:
    """Zeros for every value of a graph that is built, not run; None if not all their shapes are known."""
    proto = onnx.shape_inference.infer_shapes(load_graph(whole, weights=False))
    zeros = {}
    for value in (*proto.graph.input, *proto.graph.value_info, *proto.graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(side.HasField("dim_value") for side in kind.shape.dim):
            shape = [side.dim_value for side in kind.shape.dim]
            zeros[value.name] = np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    needed = {name for node in proto.graph.node for name in node.output if name}
    return zeros.__getitem__ if needed <= zeros.keys() else None


def _run_session(session: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [node.name for node in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, feeds), strict=True))
    except Exception as error:  # ONNX Runtime's have no common base class below Exception
        raise InputError(f"ONNX Runtime does not run the graph: {one_line(error)}") from error


class _Worker:
    """A process that tries pieces; another one takes over where a piece crashes it or never ends.

    Args:
        backend: The library that it loads.
        seconds: How long a piece may take; None for what building or running one may take.
    """

    def __init__(self, backend: str, seconds: float | None = None) -> None:
        self._backend, self._seconds = backend, seconds
        # not forked: threads of the libraries that this process has loaded would be missing there
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPool(max_workers=1, context=context, initializer=_keep_silent)

    def __enter__(self) -> Self:
        self._pool.schedule(_load_library, args=(self._backend,))  # meanwhile the graph is prepared here
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.stop()
        self._pool.join()

    def failure(self, trial: Trial, piece: Path) -> str | None:
        """See `_failure`; a crash and a piece that takes too long are failures too."""
        seconds = self._seconds or (_SECONDS_TO_BUILD if trial.values is None else _SECONDS_TO_RUN)
        try:
            return self._pool.schedule(_failure, args=(trial, piece), timeout=seconds).result()
        except TimeoutError:
            return f"{trial.backend} is not done with it after {seconds:g} seconds"
        except ProcessExpired:
            return f"{trial.backend} takes its process down"


def _keep_silent() -> None:
    """Lets nothing that a library prints reach the terminal."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def _load_library(backend: str) -> None:
    row = BACKENDS[backend]
    importlib.import_module("tocom.export.engine.tensorrt.plan" if row.builds_plans else row.module)


def _failure(trial: Trial, piece: Path) -> str | None:
    """Why a library fails on a graph; None where it does not.

    Raises:
        InputError: If ONNX Runtime does not run it, so that there is nothing to compare with.
    """
    if trial.values is None:
        return _build_failure(trial, piece)
    names = [value.name for value in load_graph(piece, weights=False).graph.input]
    feeds = {name: _value(trial.values, name) for name in names}
    expected = _run_session(plain_session(piece), feeds)
    run = _run_openvino if trial.backend == "openvino" else _run_onnxruntime
    try:
        outputs = run(piece, feeds, trial.precision)
    except Exception as error:  # noqa: BLE001  # anything that a library throws is what bisecting looks for
        return f"{trial.backend} does not run it: {' '.join(str(error).split()).replace(str(piece), 'it')}"
    tolerance = _DEEP * GATES[trial.precision].unit_roundoff
    error = max(_error(outputs[name], expected[name]) for name in expected)
    if error <= tolerance:
        return None
    return (f"{trial.backend} differs from ONNX Runtime without optimizations by {error:.1e} of the largest number, "
            f"more than {tolerance:g}")  # fmt: skip


def _build_failure(trial: Trial, piece: Path) -> str | None:
    from tocom.export.engine.tensorrt.plan import build_plan

    if not load_graph(piece, weights=False).graph.input:
        return None  # a plan without inputs is none, whatever is in it
    try:
        build_plan(piece, trial.backend, trial.plan)
    except InputError as error:
        return str(error).replace(piece.name, "it")
    return None


def _run_onnxruntime(piece: Path, feeds: dict[str, np.ndarray], _precision: str) -> dict[str, np.ndarray]:
    return _run_session(onnxruntime.InferenceSession(str(piece), providers=["CPUExecutionProvider"]), feeds)


def _run_openvino(piece: Path, feeds: dict[str, np.ndarray], precision: str) -> dict[str, np.ndarray]:
    """As `tocom.runtime.engines.openvino_engine` does, but with whatever inputs and outputs a piece has."""
    import openvino

    from tocom.runtime.engines.openvino_engine import precision_hint
    from tocom.runtime.engines.openvino_fusion import fuse
    from tocom.runtime.native import library

    core = openvino.Core()
    if (native := library()) is not None:
        core.add_extension(str(native))
    model = core.read_model(piece)
    fuse(model, half=precision_hint(precision) == "bf16")
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision_hint(precision)})
    return {name: array for port, array in compiled(feeds).items() for name in port.get_names()}


def _error(output: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference as a share of the largest number, or of 1 if that is larger; infinite where none can be."""
    if output.shape != expected.shape:
        return float("inf")
    one, other = output.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.where((one == other) | (np.isnan(one) & np.isnan(other)), 0, np.abs(one - other))
    largest = np.abs(other[np.isfinite(other)]).max(initial=1)
    return float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(initial=0)) / float(largest)
