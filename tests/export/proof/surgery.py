"""Editing an exported graph: whoever plants a bug in one block leaves all other blocks alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, helper, numpy_helper

OPERATORS = "ai.tocom"


class Nodes:
    """Nodes in order, of a graph or of an operator's body."""

    def __init__(self, owner: GraphProto | FunctionProto) -> None:
        self.owner = owner

    def maker(self, value: str) -> NodeProto:
        """The node that puts a value out."""
        return next(node for node in self.owner.node if value in node.output)

    def readers(self, value: str) -> list[NodeProto]:
        """The nodes that read it."""
        return [node for node in self.owner.node if value in node.input]

    def before(self, node: NodeProto, *new: NodeProto) -> None:
        """Puts nodes in front of one."""
        index = list(self.owner.node).index(node)
        for each in reversed(new):
            self.owner.node.insert(index, each)

    def instead(self, value: str, kind: str, *inputs: str, **attributes: object) -> None:
        """Another node makes a value."""
        maker = self.maker(value)
        maker.CopyFrom(helper.make_node(kind, inputs, list(maker.output), name=maker.name, **attributes))

    def read(self, value: str, other: str, readers: Iterable[NodeProto] | None = None) -> None:
        """Whoever reads a value reads another one."""
        for node in list(self.readers(value) if readers is None else readers):
            node.input[:] = [other if name == value else name for name in node.input]

    def behind(self, value: str, kind: str, *others: str, **attributes: object) -> str:
        """Everyone reads what a node makes of a value (its first input) and others, which stand before it."""
        readers, new = self.readers(value), f"{value}.planted"
        self.before(readers[0], helper.make_node(kind, [value, *others], [new], **attributes))
        self.read(value, new, readers)
        return new

    def calculate(self, before: str, kind: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        """One more node, in front of the one that makes a value."""
        self.before(self.maker(before), helper.make_node(kind, inputs, [output], **attributes))
        return output


class Surgery(Nodes):
    """A whole model with its weights in memory.

    Args:
        model: Changed in place.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model.graph)
        self.model = model

    @classmethod
    def on(cls, file: Path) -> Surgery:
        """A graph that was exported, with its weights."""
        return cls(onnx.load(file))

    def named(self, name: str) -> NodeProto:
        """The node of a name."""
        return next(node for node in self.owner.node if node.name == name)

    def within(self, first: str, last: str, kind: str) -> list[NodeProto]:
        """The nodes of a kind between two nodes, by their names."""
        names = [node.name for node in self.owner.node]
        between = list(self.owner.node)[names.index(first) : names.index(last) + 1]
        return [node for node in between if node.op_type == kind]

    def attention(self, block: int, kind: str) -> list[NodeProto]:
        """The nodes of a kind in a block's attention, the norm before it included."""
        return self.within(f"blocks.{block}.norm1.LayerNormalization", f"blocks.{block}.attn.proj.Add", kind)

    def mlp(self, block: int, kind: str) -> list[NodeProto]:
        """The nodes of a kind in a block's MLP, the norm before it included."""
        return self.within(f"blocks.{block}.norm2.LayerNormalization", f"blocks.{block}.mlp.fc2.Add", kind)

    def array(self, name: str) -> np.ndarray:
        """A weight's numbers, to be changed and given to `weight`."""
        return numpy_helper.to_array(next(each for each in self.owner.initializer if each.name == name)).copy()

    def weight(self, node: NodeProto, index: int, array: np.ndarray) -> None:
        """Gives one node other numbers to read; who shares the old ones keeps them."""
        name = f"{node.input[index]}.planted.{len(self.owner.initializer)}"
        node.input[index] = self.constant(array, name)

    def constant(self, array: np.ndarray | float | Sequence[int], name: str) -> str:
        """A weight of its own."""
        array = np.asarray(array)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        self.owner.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        return name

    def change(self, node: NodeProto, index: int, change: object) -> None:
        """Gives one node a function of the numbers that it reads."""
        self.weight(node, index, change(self.array(node.input[index])))

    def operator(self, block: int) -> NodeProto:
        """The node that reduces the tokens of a block."""
        return next(n for n in self.owner.node if n.domain == OPERATORS and n.name.startswith(f"block.{block}."))

    def body(self, block: int) -> Nodes:
        """The operator's body, for this block alone."""
        node = self.operator(block)
        if node.op_type.endswith(f"Of{block}"):
            return Nodes(next(each for each in self.model.functions if each.name == node.op_type))
        own = copy.deepcopy(next(each for each in self.model.functions if each.name == node.op_type))
        own.name = node.op_type = f"{own.name}Of{block}"
        self.model.functions.append(own)
        return Nodes(self.model.functions[-1])


def attribute(node: NodeProto, name: str) -> AttributeProto:
    """An attribute of a node, to be changed."""
    return next(each for each in node.attribute if each.name == name)


def constant(nodes: Nodes, name: str, **value: object) -> str:
    """A constant in front of everything in an operator's body."""
    nodes.owner.node.insert(0, helper.make_node("Constant", [], [name], **value))
    return name
