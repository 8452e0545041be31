"""One traced graph -> the graphs of other degrees, which differ from it in a few numbers.

Tracing a model takes most of the time of a compile. Two degrees that reduce tokens behind the same blocks have the same
nodes and weights: what differs is r, the compensator's gates, and token counts in the shapes. So one of them is traced
and the others are copies with these numbers set; one that reduces nothing, or has no compensation, is a copy
with nodes taken out. A graph in which a token count cannot be told from another number is
not copied; its degree is traced like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from tocom.export.graph.graph_pass import ProtoPass, apply, copy_of, integers_of, reductions_of
from tocom.export.graph.operators import DOMAIN, operator_of
from tocom.export.graph.strip import StripCompensation, StripReductions, can_strip_reductions, is_compensated
from tocom.vit import ReducedViT


@dataclass(frozen=True)
class Template:
    """A graph that other degrees can be made from.

    Attributes:
        proto: The graph; large weights lie outside.
        tokens: Tokens before its first reduction, behind it, behind its second, ...
        reshapes: Name of a constant that reshapes read, with the tokens as its second number -> how many reductions
            stand before them.
        compensated: Whether a compensation is added to its weights.
    """

    proto: onnx.ModelProto
    tokens: tuple[int, ...]
    reshapes: Mapping[str, int]
    compensated: bool

    @classmethod
    def of(cls, proto: onnx.ModelProto, reference: ReducedViT) -> Template | None:
        """Takes a copy of a traced graph; None if a token count in it could be mistaken for something else."""
        proto = copy_of(proto)
        tokens = _tokens(reference)
        reshapes = _reshapes_by_stage(proto.graph, tokens)
        attention = reference.model.blocks[0].attn
        numbers = {attention.num_heads, attention.head_dim, *_numbers(proto.graph, reshapes)}
        return None if numbers & set(tokens[1:]) else cls(proto, tokens, reshapes, is_compensated(proto.graph))

    def at(self, reference: ReducedViT, gates: Mapping[str, np.ndarray]) -> onnx.ModelProto | None:
        """The graph of another degree; None if nodes would have to be taken out and cannot be.

        Args:
            reference: Of that degree; it reduces behind the same blocks, or not at all.
            gates: Name of an initializer -> its value, and names that the graph does not have; none where nothing is
                compensated.
        """
        if not reference.deciding_blocks and not can_strip_reductions(self.proto):
            return None
        proto = apply(Retarget(self.tokens, self.reshapes, reference, gates), self.proto)
        if self.compensated and not gates:
            proto = apply(StripCompensation(), proto)
        return proto if reference.deciding_blocks else apply(StripReductions(), proto)


class Retarget(ProtoPass):
    """Sets the numbers of another degree: r, token counts, and the compensator's gates.

    Args:
        tokens: See `Template`.
        reshapes: See `Template`.
        reference: See `Template.at`.
        gates: See `Template.at`.
    """

    def __init__(
        self,
        tokens: tuple[int, ...],
        reshapes: Mapping[str, int],
        reference: ReducedViT,
        gates: Mapping[str, np.ndarray],
    ) -> None:
        self._before, self._reshapes, self._reference, self._gates = tokens, reshapes, reference, gates
        blocks = reference.deciding_blocks
        self._removed = [reference.schedule.removed[block] for block in blocks] or [0] * (len(tokens) - 1)
        self._tokens = _tokens(reference) if blocks else tokens[:1] * len(tokens)

    def requires(self, model: onnx.ModelProto) -> None:
        """The graph reduces tokens as often as its token counts say.

        Raises:
            PreconditionError: If it is not so.
        """
        count = len(reductions_of(model))
        if not count == len(self._before) - 1 == len(self._removed):
            raise PreconditionError(
                f"a graph that is given {len(self._removed)} counts must reduce tokens as often, does so {count} times"
            )

    def call(self, model: onnx.ModelProto) -> PassResult:
        """See the class."""
        copy = copy_of(model)
        self._set_counts(copy.graph)
        self._set_constants(copy.graph)
        return PassResult(copy, modified=True)

    def ensures(self, model: onnx.ModelProto) -> None:
        """Every reduction has the r and the tokens of the degree; of one that reduces nothing, r is 0.

        Raises:
            PostconditionError: If it is not so.
        """
        attributes = [integers_of(node) for node in reductions_of(model)]
        counts = [(values["tokens"], values["r"]) for values in attributes]
        expected = list(zip(self._tokens, self._removed, strict=False))
        if counts != expected:
            raise PostconditionError(f"tokens must be removed (of how many, r) as {expected}, are as {counts}")

    def _set_counts(self, graph: onnx.GraphProto) -> None:
        """In the reductions, and in the shapes of what is computed."""
        reference = self._reference
        operator = operator_of(reference.reduction)
        shapes = {value.name: value.type.tensor_type.shape for value in graph.value_info}
        stage = 0
        for node in graph.node:
            if node.domain == DOMAIN:
                attributes = {attribute.name: attribute for attribute in node.attribute}
                attributes["tokens"].i, attributes["r"].i = self._tokens[stage], self._removed[stage]
                counts = operator.decision_counts(reference.model, self._tokens[stage], self._removed[stage])
                for name, count in zip(node.output[2:], counts, strict=True):
                    if name in shapes:
                        shapes[name].dim[1].dim_value = count
                stage += 1
            for name in node.output if node.domain != DOMAIN else node.output[:2]:
                for dim in shapes[name].dim if name in shapes else ():
                    if stage and dim.dim_value == self._before[stage]:
                        dim.dim_value = self._tokens[stage]

    def _set_constants(self, graph: onnx.GraphProto) -> None:
        values = dict(self._gates)
        for initializer in graph.initializer:
            if (stage := self._reshapes.get(initializer.name)) is not None:
                shape = numpy_helper.to_array(initializer).copy()
                shape[1] = self._tokens[stage]
                values[initializer.name] = shape
            if initializer.name in values:
                initializer.CopyFrom(numpy_helper.from_array(values[initializer.name], initializer.name))


def _tokens(reference: ReducedViT) -> tuple[int, ...]:
    schedule = reference.schedule
    return (schedule.tokens_in, *(schedule.tokens[block + 1] for block in reference.deciding_blocks))


def _reshapes_by_stage(graph: onnx.GraphProto, tokens: tuple[int, ...]) -> dict[str, int]:
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if _is_integer(tensor)}
    stages: dict[str, set[int]] = {}
    stage = 0
    for node in graph.node:
        stage += node.domain == DOMAIN
        for index, name in enumerate(node.input):
            shape = constants.get(name)
            if shape is not None:
                of_tokens = node.op_type == "Reshape" and index == 1 and len(shape) > 1 and shape[1] == tokens[stage]
                stages.setdefault(name, set()).add(stage if of_tokens else -1)
    return {name: numbers.pop() for name, numbers in stages.items() if len(numbers) == 1 and min(numbers) > 0}


def _is_integer(initializer: onnx.TensorProto) -> bool:
    return initializer.data_type == onnx.TensorProto.INT64


def _numbers(graph: onnx.GraphProto, reshapes: Mapping[str, int]) -> Iterable[int]:
    """Numbers in a graph that are not the shapes of what it computes; of reshapes, without the tokens."""
    for initializer in graph.initializer:
        yield from initializer.dims
        if _is_integer(initializer):
            numbers = numpy_helper.to_array(initializer).ravel()
            yield from map(int, np.delete(numbers, 1) if initializer.name in reshapes else numbers)
    for node in graph.node:
        for attribute in node.attribute if node.domain != DOMAIN else ():
            yield from (attribute.i, *attribute.ints)
