"""Names in a traced graph that do not depend on the exporter: of decisions, products, the parts of blocks, weights."""

from __future__ import annotations

import ast
import re

import onnx_ir as ir

from tocom.export.graph.operators import DOMAIN, operator_of, point_name
from tocom.vit import ReducedViT

_PROJECTION = re.compile(r"projections\.(\d+)\.([qkv])_(\w+)")
_MODEL = "reference.model."  # before the model's own names
_NORM = re.compile(re.escape(_MODEL) + r"blocks\.(\d+\.norm[12])")


def name_values(model: ir.Model, reference: ReducedViT) -> None:
    """Gives decisions and weights names that do not depend on the exporter's bookkeeping."""
    operator = operator_of(reference.reduction)
    blocks = reference.deciding_blocks
    reductions = [node for node in model.graph if node.domain == DOMAIN]
    for block, node in zip(blocks, reductions, strict=True):
        node.name = f"block.{block}.{reference.reduction.name}"
        for value, name in zip(node.outputs[2:], operator.decision_names(block), strict=True):
            value.name = name
    for node in model.graph:
        if (module := _module_of(node)) is not None:
            node.name = f"{module}.{node.op_type}"
    for name, value in _points(model.graph, reference).items():
        value.name = name
    for name, value in list(model.graph.initializers.items()):
        if _MODEL in name:
            value.name = name.replace(_MODEL, "")
        elif match := _PROJECTION.fullmatch(name):
            value.name = "blocks.{}.attn.{}.{}".format(*match.groups())
    model.graph.doc_string = ""
    for node in model.graph:
        node.metadata_props.clear()  # stack traces with paths of the machine that compiled
        node.doc_string = None
    for value in model.graph.initializers.values():
        value.metadata_props.clear()


def _points(graph: ir.Graph, reference: ReducedViT) -> dict[str, ir.Value]:
    """The tokens between the parts of the blocks, by the names of `tocom.export.graph.operators.point_name`.

    A block's parts are told by what they begin with: its norms, which read the stream, and the sums that go on with it.
    """
    entering: dict[str, ir.Value] = {}
    for node in graph:
        scope = next((norm[1] for name in _scopes(node) if (norm := _NORM.fullmatch(name))), None)
        moving = [value for value in node.inputs if value is not None and value.const_value is None]
        if scope is not None and moving:
            entering.setdefault(scope, moving[0])
    points: dict[str, ir.Value] = {}
    depth = len(reference.model.blocks)
    for block in range(depth):
        parts = [entering.get(f"{block}.norm{half}") for half in (1, 2)]
        reduction = next((node for node in graph if node.name == f"block.{block}.{reference.reduction.name}"), None)
        for name, value in zip(("tokens", "remaining"), parts, strict=True):
            if value is not None:
                points[point_name(block, name)] = value
        if reduction is not None:
            for name, value in zip(("attended", "signal"), (reduction.inputs[0], reduction.inputs[2]), strict=True):
                points[point_name(block, name)] = value
            points[point_name(block, "token_size")] = reduction.outputs[1]
    last = points.get(point_name(depth - 1, "remaining"))
    sums = [] if last is None else [node for node, _ in last.uses() if node.op_type == "Add"]
    if len(sums) == 1:
        points[point_name(depth, "tokens")] = sums[0].outputs[0]
    return points


def _scopes(node: ir.Node) -> list[str]:
    return ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))


def _module_of(node: ir.Node) -> str | None:
    """The part of a block that a product, its bias or a norm is of, like blocks.0.mlp.fc1 or blocks.0.attn.q."""
    if node.op_type not in ("MatMul", "Add", "LayerNormalization"):
        return None
    operand, parameter, *_ = node.inputs
    if node.op_type == "Add":
        made_by = operand.producer()
        if made_by is None or made_by.op_type != "MatMul" or parameter.const_value is None:
            return None
        return _module_of(made_by)
    for value in (parameter, *(() if parameter.producer() is None else parameter.producer().inputs)):
        if match := _PROJECTION.fullmatch(value.name or ""):
            block, name, part = match.groups()
            return f"blocks.{block}.attn.{name}" if part == "weight" else None
    scopes = _scopes(node)
    module = scopes[-2].partition(_MODEL)[2] if len(scopes) > 1 else ""
    return module if module.startswith("blocks.") and parameter.const_value is not None else None
