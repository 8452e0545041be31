"""What is to be proven, looked at from inside: its logits, what it decides, and the tokens between its parts.

Whatever can be asked for these is an observer, and any two of them can be compared: an engine in any library and number
format, or the PyTorch reference in another number format than it is written in.
"""

from __future__ import annotations

import copy
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from tocom.export.artifacts import Engine
from tocom.export.engine.build import as_engine, needs_inlining
from tocom.export.graph.emulate_half import emulate_half
from tocom.export.graph.inline import inline
from tocom.export.graph.operators import DOMAIN, POINTS, operator_of, point_name
from tocom.export.graph.trace import OUTPUT
from tocom.export.proof.decisions import AnyDecision, decisions_of
from tocom.export.proof.gates import judged_as
from tocom.runtime.backends import BACKENDS
from tocom.runtime.engines.base import EngineRunner, open_engine
from tocom.runtime.family_files import debug_affixes
from tocom.vit import ReducedViT

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_POINT = re.compile(rf"block\.\d+\.({'|'.join(POINTS)})")
_INSIDE_NATIVE = ("attended", "signal")  # never stand outside a native operator: asking for them would undo it


@dataclass(frozen=True)
class Observed:
    """What one batch came to.

    Attributes:
        logits: As shipped, [B, classes].
        decisions: Block -> what was decided.
        told: The same of what also tells the tokens between, a debug copy. More outputs may make it round elsewhere,
            and decide otherwise at a tie; itself where the engine's decisions are known by the copy's alone.
        values: Name in the graph (`operators.point_name`) -> tokens [B, N, C], sizes [B, N, 1] or a signal
            there, of the copy; what it does not tell is missing.
    """

    logits: Tensor
    decisions: Mapping[int, AnyDecision]
    values: Mapping[str, Tensor]
    told: Observed | None = None

    @property
    def copy(self) -> Observed:
        """The debug copy, which the values are of."""
        return self.told or self


class Observer(ABC):
    """Something that classifies images and can be looked into.

    Attributes:
        name: For people.
        precision: Row of `tocom.export.proof.gates.GATES` that rounding is judged by.
    """

    name: str
    precision: str

    @abstractmethod
    def observe(self, pixel_values: np.ndarray) -> Observed:
        """Runs a batch, float32 [B, 3, H, W]."""


class RunnerObserver(Observer):
    """An engine that runs, and one that also tells what goes on in it: a debug copy, or itself.

    Args:
        shipped: The engine.
        telling: See above.
        reference: Of the same degree, for what decisions look like.
        precision: Number format of the engine.
        backend: Its library; None takes what runs it.
        name: For people.
        deciding: What tells the decisions of the engine where more outputs make the other one decide otherwise.
    """

    def __init__(
        self,
        shipped: EngineRunner,
        telling: EngineRunner,
        reference: ReducedViT,
        precision: str,
        backend: str | None = None,
        name: str = "",
        deciding: EngineRunner | None = None,
    ) -> None:
        self._shipped, self._telling, self._reference = shipped, telling, reference
        self._deciding = deciding
        backend = backend or shipped.backend
        self.precision, self.name = judged_as(backend, precision), name or f"{backend} {precision}"

    def observe(self, pixel_values: np.ndarray) -> Observed:
        """See `Observer`."""
        copied = self.read(self._telling.infer_all(pixel_values), self._reference)
        if self._shipped is self._telling:
            return copied
        shipped = self._shipped.infer_all(pixel_values)
        names = operator_of(self._reference.reduction).decision_names
        if all(name in shipped for block in self._reference.deciding_blocks for name in names(block)):
            own = self.read(shipped, self._reference)  # native operators tell what they decide
            return Observed(own.logits, own.decisions, copied.values, copied)
        decisions = copied.decisions
        if self._deciding is not None:
            decisions = decisions_of(self._deciding.infer_all(pixel_values), self._reference)
        return Observed(torch.from_numpy(shipped[OUTPUT]), decisions, copied.values, copied)

    @staticmethod
    def read(outputs: Mapping[str, np.ndarray], reference: ReducedViT) -> Observed:
        """What the outputs of a runner that tells say.

        Args:
            outputs: By name.
            reference: Of the same degree.
        """
        return Observed(
            logits=torch.from_numpy(outputs[OUTPUT]),
            decisions=decisions_of(outputs, reference),
            values={
                name: torch.from_numpy(np.asarray(value, np.float32))
                for name, value in outputs.items()
                if _POINT.fullmatch(name)
            },
        )


class TorchObserver(Observer):
    """The PyTorch reference in a number format, deciding by itself.

    Args:
        reference: It, in any format; untouched.
        precision: One of `DTYPES`.
    """

    def __init__(self, reference: ReducedViT, precision: str) -> None:
        self.precision, self.name = precision, f"torch {precision}"
        self._reference = in_format(reference, precision)

    def observe(self, pixel_values: np.ndarray) -> Observed:
        """See `Observer`."""
        found = replay(self._reference, torch.from_numpy(pixel_values), {})
        chosen = {block: found.natural[block] for block in self._reference.deciding_blocks}
        values, last = dict(found.values), len(self._reference.model.blocks) - 1
        if (read := self._reference.read_tokens) is not None:  # nobody reads what else the last block puts out
            for name in (point_name(last, "remaining"), point_name(last + 1, "tokens")):
                values[name] = values[name][:, :read]
        return Observed(found.logits, chosen, values)


def in_format(reference: ReducedViT, precision: str) -> ReducedViT:
    """A reference in one of `DTYPES`: itself where it is in that format, else a copy."""
    dtype = DTYPES[precision]
    if next(reference.model.parameters()).dtype == dtype:
        return reference
    model = copy.deepcopy(reference.model).to(dtype)
    return ReducedViT(model.eval(), reference.schedule, reduction=reference.reduction)


@dataclass(frozen=True)
class Replay:
    """What the reference does with decisions forced on it.

    Attributes:
        logits: [B, classes].
        natural: Block -> what it would have decided itself.
        signals: Block -> what it decided on.
        values: See `Observed`.
    """

    logits: Tensor
    natural: Mapping[int, AnyDecision]
    signals: Mapping[int, Tensor]
    values: Mapping[str, Tensor]


@torch.no_grad()
def replay(
    reference: ReducedViT, pixel_values: Tensor, decisions: Mapping[int, AnyDecision], shake: float = 0.0
) -> Replay:
    """Runs the reference with given decisions forced on it; it decides itself where none are given.

    Args:
        reference: In any number format, on any device.
        pixel_values: [B, 3, H, W], in any format.
        decisions: Block -> what is decided there.
        shake: Every number of the tokens behind every part changes by up to this share, at random but the same each
            time: what roundings of that size do to the network at hand.

    Returns:
        What it found.
    """
    draw = torch.Generator().manual_seed(0)

    def shaken(x: Tensor) -> Tensor:
        if not shake:
            return x
        noise = torch.rand(x.shape, generator=draw, dtype=torch.float32).to(x.device, x.dtype)
        return x * (1 + shake * (2 * noise - 1))

    parameter = next(reference.model.parameters())
    natural: dict[int, AnyDecision] = {}
    signals: dict[int, Tensor] = {}
    values: dict[str, Tensor] = {}
    x, token_size = shaken(reference.embed(pixel_values.to(parameter.device, parameter.dtype))), None
    for block, r in enumerate(reference.schedule.removed):
        values[point_name(block, "tokens")] = x
        x, signal = reference.attend(block, x, token_size)
        x = shaken(x)
        if r:
            values[point_name(block, "attended")], values[point_name(block, "signal")] = x, signal
            natural[block], signals[block] = reference.reduction.decide(signal, r, reference.model), signal
            token_size = x.new_ones(*x.shape[:2], 1) if token_size is None else token_size
            chosen = decisions.get(block, natural[block])
            x, token_size = reference.reduction.apply(x, token_size, signal, chosen)
            values[point_name(block, "token_size")] = token_size
        values[point_name(block, "remaining")] = x
        x = shaken(reference.feed_forward(block, x))
    values[point_name(len(reference.model.blocks), "tokens")] = x
    return Replay(reference.classify(x, token_size), natural, signals, values)


@contextmanager
def proving_runner(engine: Engine) -> Iterator[EngineRunner]:
    """What answers as the engine does: itself, or where it cannot be run here its graph, on ONNX Runtime."""
    if engine.unrunnable:
        with debug_copy(engine) as runner:
            yield runner
    else:
        with open_engine(engine.file, engine.backend, precision=engine.precision) as runner:
            yield runner


@contextmanager
def observer_of(engine: Engine, reference: ReducedViT, *, batch: int | None = None) -> Iterator[RunnerObserver]:
    """An engine, opened, beside its debug copy; one that cannot be run here is its debug copy alone.

    Args:
        engine: As listed.
        reference: Of the same degree.
        batch: Images that it is prepared for, as a server would; None for any number.
    """
    with debug_copy(engine) as telling:
        if engine.unrunnable:
            yield RunnerObserver(telling, telling, reference, engine.precision, engine.backend)
            return
        with ExitStack() as stack:
            opened = open_engine(engine.file, engine.backend, precision=engine.precision, batch=batch)
            shipped, deciding = stack.enter_context(opened), None
            if BACKENDS[engine.backend].fuses_by_outputs and engine.precision != "fp32" and not engine.native:
                deciding = stack.enter_context(debug_copy(engine, points=False))
            yield RunnerObserver(shipped, telling, reference, engine.precision, deciding=deciding)


def told_by(graph: onnx.ModelProto, *, native: bool, points: bool = True) -> Iterator[str]:
    """Names of the values that a debug copy of a graph also puts out, in order: decisions, and the tokens between.

    Args:
        graph: Of one degree.
        native: Whether native operators run it: they tell their decisions themselves.
        points: Whether to tell the tokens between as well.
    """
    outputs = {value.name for value in graph.graph.output}
    names = [name for node in graph.graph.node for name in (*node.input, *node.output)]
    for name in dict.fromkeys(names):
        point = _POINT.fullmatch(name)
        if points and point and name not in outputs and not (native and point[1] in _INSIDE_NATIVE):
            yield name
    for node in graph.graph.node:
        if node.domain == DOMAIN and not native:
            yield from node.output[2:]


@contextmanager
def beside(graph: Path, variant: onnx.ModelProto) -> Iterator[Path]:
    """A variant of a graph for the moment, beside it because its weight files are found relative to it."""
    prefix, suffix = debug_affixes(graph)
    handle, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=graph.parent)
    os.close(handle)
    file = Path(name)
    try:
        file.write_bytes(variant.SerializeToString())
        yield file
    finally:
        file.unlink(missing_ok=True)


@contextmanager
def debug_copy(engine: Engine, more: Iterable[str] = (), *, points: bool = True) -> Iterator[EngineRunner]:
    """Runs a copy of the engine's graph that also puts out its decisions; the shipped file is not touched.

    Where the engine cannot be run, ONNX Runtime carries the copy out, with every rounding that stands in the graph.

    Args:
        engine: As listed.
        more: Further values of the graph to put out.
        points: Whether to tell the tokens between the parts as well.
    """
    graph = onnx.load(engine.source.file, load_external_data=False)
    known = {value.name: value for value in (*graph.graph.value_info, *graph.graph.output)}
    for name in dict.fromkeys((*told_by(graph, native=engine.native, points=points), *more)):
        # the formats are the graph's, so that this changes none
        unknown = onnx.helper.make_empty_tensor_value_info(name)
        graph.graph.output.append(known.get(name, unknown))
    backend, precision = engine.backend, engine.precision
    if engine.unrunnable:
        graph, backend, precision = emulate_half(graph), "onnxruntime", "fp32"
    elif needs_inlining(graph, backend):
        graph = inline(graph)
    with (
        beside(engine.source.file, graph) as file,
        as_engine(file, backend, engine.build) as opened,
        open_engine(opened, backend, precision=precision) as runner,
    ):
        yield runner
