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

from tocom.export.graph.operators import DOMAIN, operator_of
from tocom.export.graph.strip import is_compensated, strip_compensation, strip_reductions
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
        own = onnx.ModelProto()
        own.CopyFrom(proto)
        tokens = _tokens(reference)
        reshapes = _reshapes_by_stage(own.graph, tokens)
        attention = reference.model.blocks[0].attn
        numbers = {attention.num_heads, attention.head_dim, *_numbers(own.graph, reshapes)}
        return None if numbers & set(tokens[1:]) else cls(own, tokens, reshapes, is_compensated(own.graph))

    def retargeted(self, reference: ReducedViT, gates: Mapping[str, np.ndarray]) -> onnx.ModelProto | None:
        """The graph of another degree; None if nodes would have to be taken out and cannot be.

        Args:
            reference: Of that degree; it reduces behind the same blocks, or not at all.
            gates: Name of an initializer -> its value, and names that the graph does not have; none where nothing is
                compensated.
        """
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        self._set_numbers(proto.graph, reference, gates)
        if self.compensated and not gates:
            strip_compensation(proto.graph)
        if not reference.deciding_blocks:
            if not strip_reductions(proto.graph):
                return None
            kept = [function for function in proto.functions if function.domain != DOMAIN]
            del proto.functions[:]
            proto.functions.extend(kept)
            proto.opset_import.remove(next(opset for opset in proto.opset_import if opset.domain == DOMAIN))
        return proto

    def _set_numbers(self, graph: onnx.GraphProto, reference: ReducedViT, gates: Mapping[str, np.ndarray]) -> None:
        removed = [reference.schedule.removed[block] for block in reference.deciding_blocks]
        removed = iter(removed or [0] * (len(self.tokens) - 1))
        operator = operator_of(reference.reduction)
        tokens = _tokens(reference) if reference.deciding_blocks else self.tokens[:1] * len(self.tokens)
        shapes = {value.name: value.type.tensor_type.shape for value in graph.value_info}
        stage = 0
        for node in graph.node:
            if node.domain == DOMAIN:
                attributes = {attribute.name: attribute for attribute in node.attribute}
                attributes["tokens"].i, attributes["r"].i = tokens[stage], next(removed)
                counts = operator.decision_counts(reference.model, tokens[stage], attributes["r"].i)
                for name, count in zip(node.output[2:], counts, strict=True):
                    if name in shapes:
                        shapes[name].dim[1].dim_value = count
                stage += 1
            for name in node.output if node.domain != DOMAIN else node.output[:2]:
                for dim in shapes[name].dim if name in shapes else ():
                    if stage and dim.dim_value == self.tokens[stage]:
                        dim.dim_value = tokens[stage]
        values = dict(gates)
        for initializer in graph.initializer:
            if (at := self.reshapes.get(initializer.name)) is not None:
                shape = numpy_helper.to_array(initializer).copy()
                shape[1] = tokens[at]
                values[initializer.name] = shape
            if initializer.name in values:
                initializer.CopyFrom(numpy_helper.from_array(values[initializer.name], initializer.name))


def _tokens(reference: ReducedViT) -> tuple[int, ...]:
    schedule = reference.schedule
    return (schedule.tokens_in, *(schedule.tokens[block + 1] for block in reference.deciding_blocks))


def _reshapes_by_stage(graph: onnx.GraphProto, tokens: tuple[int, ...]) -> dict[str, int]:
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer if _is_whole(each)}
    stages: dict[str, set[int]] = {}
    stage = 0
    for node in graph.node:
        stage += node.domain == DOMAIN
        for index, name in enumerate(node.input):
            shape = constants.get(name)
            if shape is not None:
                of_tokens = node.op_type == "Reshape" and index == 1 and len(shape) > 1 and shape[1] == tokens[stage]
                stages.setdefault(name, set()).add(stage if of_tokens else -1)
    return {name: found.pop() for name, found in stages.items() if len(found) == 1 and min(found) > 0}


def _is_whole(initializer: onnx.TensorProto) -> bool:
    return initializer.data_type == onnx.TensorProto.INT64


def _numbers(graph: onnx.GraphProto, reshapes: Mapping[str, int]) -> Iterable[int]:
    """Numbers in a graph that are not the shapes of what it computes; of reshapes, without the tokens."""
    for initializer in graph.initializer:
        yield from initializer.dims
        if _is_whole(initializer):
            numbers = numpy_helper.to_array(initializer).ravel()
            yield from map(int, np.delete(numbers, 1) if initializer.name in reshapes else numbers)
    for node in graph.node:
        for attribute in node.attribute if node.domain != DOMAIN else ():
            yield from (attribute.i, *attribute.ints)
