"""Fused weights -> one ONNX graph per degree: static token counts, dynamic batch, token reduction as an operator.

Legal because a reduction's token counts depend on the degree alone; which tokens go is data inside the operator.
"""

from __future__ import annotations

import ast
import copy
import logging
import re
import warnings
from collections.abc import Collection
from pathlib import Path

import onnx
import onnx.inliner
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tocom.export.artifacts import FusedCheckpoint, OnnxGraph
from tocom.export.graph.half_precision import precision_of, typed
from tocom.export.graph.operators import DOMAIN, VERSION, operator_of, point_name
from tocom.export.graph.split_qkv import FACTORS, projections
from tocom.export.graph.template import Template
from tocom.export.graph.weight_store import WeightStore
from tocom.reduction import MERGE, Reduction
from tocom.runtime.files import sha256_file, write_atomically
from tocom.schedule import MergeSchedule
from tocom.vit import ReducedViT

OPSET = 20
_PROJECTION = re.compile(r"projections\.(\d+)\.([qkv])_(\w+)")
_MODEL = "reference.model."  # before the model's own names
_NORM = re.compile(re.escape(_MODEL) + r"blocks\.(\d+\.norm[12])")
INPUT, OUTPUT = "pixel_values", "logits"


class Lowering:
    """Lowers the degrees of one model, of which it traces those that no other one can be made from.

    Args:
        model: The plain timm model; untouched.
        store: The family folder's weight files.
        reduction: How tokens are removed.
    """

    def __init__(self, model: nn.Module, store: WeightStore, reduction: Reduction = MERGE) -> None:
        self._model, self._store, self._reduction = model, store, reduction
        self._templates: dict[tuple[int, ...], tuple[Template, tuple[str, ...]]] = {}  # by blocks that reduce

    def lower(
        self,
        schedule: MergeSchedule,
        fused: FusedCheckpoint,
        name: str,
        precision: str = "fp32",
        float_blocks: Collection[int] = (),
    ) -> OnnxGraph:
        """Exports one degree.

        Args:
            schedule: Tokens removed per block.
            fused: The weights of this degree.
            name: File name of the graph, within the store's folder.
            precision: Number format that stands in the graph, one of `tocom.export.graph.half_precision.FORMATS`.
            float_blocks: Blocks that stay float32.

        Returns:
            The graph, and the weight files it needs.
        """
        reference = reference_model(self._model, schedule, fused, self._reduction)
        proto, weight_files = self._graph(reference, fused)
        proto = typed(proto, precision, float_blocks)
        file = self._store.folder / name
        write_atomically(file, proto.SerializeToString())
        _ensure_contract(file, proto, reference)
        return OnnxGraph(
            file=file,
            files={part: sha256_file(self._store.folder / part) for part in (name, *weight_files)},
            tokens=schedule.tokens,
            gmacs=count_gmacs(reference),
            source=fused,
            precision=precision_of(proto),
        )

    def _graph(self, reference: ReducedViT, fused: FusedCheckpoint) -> tuple[onnx.ModelProto, tuple[str, ...]]:
        steps = projections(reference.model, self._model, fused)
        gates = {
            f"blocks.{block}.attn.{name.replace('_', '.')}": value.numpy()
            for block, step in enumerate(steps)
            for name, value in step.named_buffers()
            if name.endswith("_gate")
        }
        shared = bool(gates) or self._has_own_weights(fused)
        for blocks, (template, weight_files) in self._templates.items() if shared else ():
            fits = reference.deciding_blocks in ((), blocks) and (template.compensated or not gates)
            if fits and (proto := template.retargeted(reference, gates)) is not None:
                return proto, weight_files
        traced = _export(reference, steps)
        _name_values(traced, reference)
        weight_files = self._store.place(traced)
        proto = ir.to_proto(traced)
        if shared and reference.deciding_blocks and (template := Template.of(proto, reference)) is not None:
            self._templates[reference.deciding_blocks] = template, weight_files
        return proto, weight_files

    def _has_own_weights(self, fused: FusedCheckpoint) -> bool:
        """Whether the weights are the model's, with nothing folded in."""
        own = self._model.state_dict()
        return all(torch.equal(tensor, own[name]) for name, tensor in fused.weights.items())


def lower(
    model: nn.Module,
    schedule: MergeSchedule,
    fused: FusedCheckpoint,
    store: WeightStore,
    name: str,
    reduction: Reduction = MERGE,
) -> OnnxGraph:
    """Exports one degree by itself; see `Lowering`, which exports several faster."""
    return Lowering(model, store, reduction).lower(schedule, fused, name)


def reference_model(
    model: nn.Module, schedule: MergeSchedule, fused: FusedCheckpoint, reduction: Reduction = MERGE
) -> ReducedViT:
    """The PyTorch reference of one degree: a copy of the model with the fused weights, reducing as scheduled."""
    own = copy.deepcopy(model)
    own.load_state_dict(dict(fused.weights))
    return ReducedViT(own.eval().requires_grad_(False), schedule, reduction=reduction)


def count_gmacs(reference: ReducedViT) -> float:
    """Multiply-accumulates of one image in units of 1e9, counted by torch over matrix products and convolutions."""
    size = reference.model.patch_embed.img_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reference(torch.zeros(1, 3, *size))
    return counter.get_total_flops() / 2 / 1e9


def inline(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without model-local functions, for engines that do not expand them (TensorRT, OpenVINO)."""
    return onnx.inliner.inline_local_functions(graph)


class _Exportable(nn.Module):
    """The reference with the operator in place of its reduction, less what nobody reads; names the graph's input."""

    def __init__(self, reference: ReducedViT, projections: nn.ModuleList) -> None:
        super().__init__()
        self.reference = reference
        self.projections = projections

    def forward(self, pixel_values: Tensor) -> Tensor:
        def project(block: int, x: Tensor, queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
            return self.projections[block](x, queries)

        reduce_step = operator_of(self.reference.reduction).symbolic_step(self.reference.model)
        return self.reference(pixel_values, reduce_step, project, skip_unread=True)


def _export(reference: ReducedViT, projections: nn.ModuleList) -> ir.Model:
    sample = torch.zeros(2, 3, *reference.model.patch_embed.img_size)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's deprecations of its own parts
        program = torch.onnx.export(
            _Exportable(reference, projections),
            (sample,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1 << 16)},),
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
    model = program.model
    optimizer.optimize_ir(model, should_fold=lambda node: False if _reads_factor(node) else None)
    if reference.deciding_blocks:
        operator = operator_of(reference.reduction)
        function = ir.from_proto(operator.function_proto(operator.attributes(reference.model)))
        model.functions[function.identifier()] = function
        model.graph.opset_imports[DOMAIN] = VERSION
    return model


def _reads_factor(node: ir.Node) -> bool:
    """Whether a node computes with what degrees share: folded, it would be another weight for each of them."""
    return any(value is not None and (value.name or "").endswith(FACTORS) for value in node.inputs)


def _name_values(model: ir.Model, reference: ReducedViT) -> None:
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
        scope = next((found[1] for each in _scopes(node) if (found := _NORM.fullmatch(each))), None)
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
    source, parameter, *_ = node.inputs
    if node.op_type == "Add":
        made_by = source.producer()
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


def _ensure_contract(file: Path, proto: onnx.ModelProto, reference: ReducedViT) -> None:
    onnx.checker.check_model(file)  # by path, so that it also looks at the weight files
    operator = operator_of(reference.reduction).name
    expected = [(operator, reference.schedule.removed[block]) for block in reference.deciding_blocks]
    found = [
        (node.op_type, next(attr.i for attr in node.attribute if attr.name == "r"))
        for node in proto.graph.node
        if node.domain == DOMAIN
    ]
    if found != expected:
        raise AssertionError(f"the graph must remove tokens as {expected}, does so as {found}")
    names = [value.name for value in (*proto.graph.input, *proto.graph.output)]
    if names != [INPUT, OUTPUT]:
        raise AssertionError(f"the graph must have exactly {INPUT} and {OUTPUT}, has {names}")
    batch = proto.graph.input[0].type.tensor_type.shape.dim[0]
    if not batch.dim_param:
        raise AssertionError("the graph's batch must be dynamic")
