"""NVIDIA Polygraphy on this project's graphs: what is in one, where it fails, and how far engines are apart on it.

Polygraphy is optional, so whoever uses this module imports it where it is needed. No other module imports Polygraphy.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from rich.markup import escape
from rich.table import Table

from tocom.export.artifacts import Engine
from tocom.runtime.backends import available
from tocom.runtime.engines.base import INPUT_NAME, EngineRunner, open_engine
from tocom.runtime.errors import InputError, one_line

try:
    import onnx_graphsurgeon
    from polygraphy.backend.base import BaseRunner
    from polygraphy.backend.onnx.util import str_from_onnx
    from polygraphy.backend.onnxrt import OnnxrtRunner
    from polygraphy.common import TensorMetadata
    from polygraphy.comparator import Comparator, IterationResult, RunResults, SimpleCompareFunc
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER
    from polygraphy.tools.args import OnnxInferShapesArgs
    from polygraphy.tools.debug.subtool.iterative_debug_args import CheckCmdArgs
    from polygraphy.tools.debug.subtool.reduce import Reduce
except ImportError as missing:
    raise InputError(
        f"Polygraphy does not load here ({one_line(missing)}): pip install 'tocom[polygraphy]'"
    ) from missing

SHOWN = ("layers", "attrs", "weights")
REFERENCE = "reference"

_SILENT, _FATAL = G_LOGGER.CRITICAL + 1, 4


@dataclass(frozen=True)
class Difference:
    """How far two runners are apart in one output.

    Attributes:
        one: Name of a runner.
        other: Name of the other one.
        output: Name of the output.
        largest: Largest difference of a number, over all images; NaN where one of them is none, or their shapes differ.
        mean: Mean difference.
    """

    one: str
    other: str
    output: str
    largest: float
    mean: float


@dataclass(frozen=True)
class Comparison:
    """One graph on every runner that there is.

    Attributes:
        differences: Of every pair, in the order in which they ran.
        absent: Runner -> why it did not run the graph.
    """

    differences: tuple[Difference, ...]
    absent: Mapping[str, str]


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Polygraphy and its helpers from printing; its errors are raised all the same, here as `InputError`.

    Raises:
        InputError: If Polygraphy refuses something.
    """
    helper = onnx_graphsurgeon.logger.G_LOGGER
    before, helper.severity = helper.severity, _SILENT
    onnxruntime.set_default_logger_severity(_FATAL)
    try:
        with G_LOGGER.verbosity(_SILENT):
            yield
    except PolygraphyException as error:
        raise InputError(f"Polygraphy: {one_line(error)}") from error
    finally:
        helper.severity = before


def load_graph(file: Path, *, weights: bool = True) -> onnx.ModelProto:
    """Reads an ONNX file.

    Args:
        file: The graph.
        weights: Whether to read those that lie outside too.

    Raises:
        InputError: If it is none, or its weights are not there.
    """
    try:
        proto = onnx.load(file, load_external_data=weights)
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        raise InputError(f"{one_line(file)} is not an ONNX graph that can be read: {one_line(error)}") from error
    if not proto.graph.node:
        raise InputError(f"{one_line(file)} must be an ONNX graph with nodes, got none in it")
    return proto


def plain_session(file: Path) -> onnxruntime.InferenceSession:
    """What libraries are compared with: ONNX Runtime on the CPU, every node carried out as it stands in the graph.

    Raises:
        InputError: If it does not load the graph.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = _FATAL
    onnxruntime.set_default_logger_severity(_FATAL)
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base class below Exception
        raise InputError(f"ONNX Runtime does not load {one_line(file.name)}: {one_line(error)}") from error


def describe(file: Path, show: Sequence[str] = ()) -> str:
    """Says what is in a graph, as `polygraphy inspect model` does: inputs, outputs, and what else is to be shown.

    Args:
        file: The graph.
        show: Any of `SHOWN`: nodes, their attributes, weights.

    Returns:
        Printable lines.

    Raises:
        InputError: If the file is not a graph, or something else is to be shown.
    """
    for name in show:
        if name not in SHOWN:
            raise InputError(f"what to show must be among {', '.join(SHOWN)}, got {one_line(name)}")
    proto = load_graph(file, weights="weights" in show)
    with quiet():
        text = str_from_onnx(proto, **{f"show_{name}": name in show for name in SHOWN})
    return "\n".join(map(one_line, text.splitlines()))


def reduced(
    graph: Path, smaller: Path, mode: str, passes: Callable[[Path], bool], values: Callable[[str], np.ndarray] | None
) -> None:
    """Cuts a piece that fails out of a graph that fails, as `polygraphy debug reduce` does.

    Polygraphy's command asks a program of its own about every piece, which would load all libraries anew each time. Its
    class is used instead.

    Args:
        graph: What fails.
        smaller: Where the piece is put; it may be all of the graph. Other files come and go temporary_graph it.
        mode: "bisect", or "linear" to leave out node by node.
        passes: Whether a file does not fail.
        values: By a name, what stands in a piece for a value that it needs but that is cut off; None cuts a graph at
            its outputs only, which takes none.

    Raises:
        InputError: If Polygraphy cannot do it.
    """
    tool = Reduce()
    parser = tool.setup_parser()
    command = [str(graph), "--output", str(smaller), "--mode", mode]
    command += ["--iter-artifact", str(smaller.with_name("piece.onnx"))]
    command += ["--save-debug-replay", str(smaller.with_name("replay.json"))]
    command += ["--no-reduce-inputs"] if values is None else []
    arguments = parser.parse_args([*command, "--check", "in this process"])

    def known(_graph: onnx.ModelProto, outputs: Sequence[str]) -> tuple[IterationResult, TensorMetadata]:
        arrays = {name: values(name) for name in outputs}
        return IterationResult(arrays), TensorMetadata.from_feed_dict(arrays)

    with quiet():
        tool.parse(arguments)
        tool.arg_groups[CheckCmdArgs].run_check = lambda piece: passes(Path(piece))
        if values is not None:  # else it would run the graph, which may be one that ONNX Runtime does not run
            tool.arg_groups[OnnxInferShapesArgs].fallback_inference = known
        tool.run(arguments)


class _EngineLibrary(BaseRunner):
    """Polygraphy's view of one of this project's runners, which is opened only while it is active."""

    def __init__(self, name: str, opens: Callable[[ExitStack], EngineRunner]) -> None:
        super().__init__(name=name)
        self._opens = opens

    def activate_impl(self) -> None:
        with ExitStack() as stack:
            self._runner = self._opens(stack)
            self._open = stack.pop_all()

    def get_input_metadata_impl(self) -> TensorMetadata:
        return TensorMetadata().add(INPUT_NAME, np.float32, (None, *self._runner.input_size))

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        began = time.perf_counter()
        outputs = self._runner.infer_all(feed_dict[INPUT_NAME])
        self.inference_time = time.perf_counter() - began
        return outputs

    def deactivate_impl(self) -> None:
        self._open.close()
        del self._runner, self._open


def compare(engine: Engine, notify: Callable[[str], None] = lambda _: None) -> Comparison:
    """Runs an engine and its graph, by every library usable here, and compares all of them pair by pair.

    The images are noise and smooth patterns. The first runner is the graph in ONNX Runtime, computed in float32 and
    without optimizations, with every rounding that stands in the graph.

    Args:
        engine: As it is listed; its own file is one of those that run.
        notify: Told which runner is at work.

    Raises:
        InputError: If the graph is unusable.
    """
    from tocom.export.source.images import default_images

    proto = load_graph(engine.source.file, weights=False)
    size = tuple(side.dim_value for side in proto.graph.input[0].type.tensor_type.shape.dim)[1:]
    batches = [{INPUT_NAME: batch} for batch in default_images(size)]
    results, absent = RunResults(), {}
    for runner in _runners(engine, proto):
        notify(f"running {runner.name}")
        try:
            with quiet():
                results.extend(Comparator.run([runner], data_loader=batches))
        except InputError as error:
            absent[runner.name] = str(error)
    with quiet():
        pairs = list(itertools.combinations(range(len(results)), 2))
        judge = SimpleCompareFunc(check_error_stat="max")
        found = Comparator.compare_accuracy(results, comparisons=pairs, compare_func=judge)
    images = [len(batch[INPUT_NAME]) for batch in batches]
    differences = [
        Difference(*pair, output, *_over_all([each[output] for each in iterations], images))
        for pair, iterations in (found[0] if pairs else {}).items()
        for output in iterations[0]
    ]
    return Comparison(tuple(differences), absent)


def comparison_table(comparisons: Mapping[int, Comparison]) -> Table:
    """One row per degree and pair of runners.

    Args:
        comparisons: Degree -> what was compared.
    """
    table = Table(title="runners against each other")
    for name in ("degree", "runner", "against", "output", "largest error", "mean error"):
        table.add_column(name, justify="right" if name in ("degree", "largest error", "mean error") else "left")
    for degree, comparison in comparisons.items():
        for each in comparison.differences:
            names = map(escape, (each.one, each.other, each.output))
            table.add_row(str(degree), *names, f"{each.largest:.1e}", f"{each.mean:.1e}")
    notes = [
        f"{REFERENCE}: the graph in ONNX Runtime, in float32, without optimizations. An image that a runner decides "
        "otherwise at a tie differs at once: the table of decisions tells whether that is all."
    ]
    absent = {name: why for each in comparisons.values() for name, why in each.absent.items()}
    notes += [f"{name} did not run: {why}" for name, why in absent.items()]
    table.caption, table.caption_justify = escape("\n".join(notes)), "left"
    return table


def _runners(engine: Engine, proto: onnx.ModelProto) -> Iterator[BaseRunner]:
    """The reference, the engine itself, and its graph in every library.

    Yields:
        Runners that load nothing until they are active, and then leave nothing behind.
    """
    graph, precision = engine.source.file, engine.source.precision
    yield OnnxrtRunner(lambda: _reference_session(graph, proto, precision), name=REFERENCE)
    own = engine.backend, engine.precision
    if engine.unrunnable is None:
        opens = partial(open_engine, engine.file, engine.backend, precision=engine.precision)
        yield _EngineLibrary(" ".join((*own, "(listed)")), lambda stack: stack.enter_context(opens()))
    for backend in [status.name for status in available() if status.usable]:
        if (backend, precision) != own:
            yield _EngineLibrary(f"{backend} {precision}", partial(_opened, engine, proto, backend))


def _reference_session(graph: Path, proto: onnx.ModelProto, precision: str) -> onnxruntime.InferenceSession:
    if precision == "fp32":
        return plain_session(graph)
    from tocom.export.graph.emulate_half import emulate_half
    from tocom.export.proof.debug_copy import temporary_graph

    with temporary_graph(graph, emulate_half(proto)) as file:
        return plain_session(file)


def _opened(engine: Engine, proto: onnx.ModelProto, backend: str, stack: ExitStack) -> EngineRunner:
    """The engine's graph in another library than its own; what is made for that goes with the stack."""
    from tocom.export.engine.build import as_engine, needs_inlining
    from tocom.export.engine.tensorrt.plan import PlanOptions
    from tocom.export.graph.inline import inline
    from tocom.export.proof.debug_copy import temporary_graph

    variant = inline(proto) if needs_inlining(proto, backend) else proto
    file = stack.enter_context(temporary_graph(engine.source.file, variant))
    plan = stack.enter_context(as_engine(file, backend, {"options": PlanOptions().to_json()}))
    return stack.enter_context(open_engine(plan, backend, precision=engine.source.precision))


def _over_all(iterations: Sequence[Any], images: Sequence[int]) -> tuple[float, float]:
    """Largest and mean difference over batches, the mean by their images; Polygraphy says nothing of unlike shapes."""
    found = np.array(
        [(getattr(each, "max_absdiff", np.nan), getattr(each, "mean_absdiff", np.nan)) for each in iterations]
    )
    return float(found[:, 0].max()), float(np.average(found[:, 1], weights=images))
