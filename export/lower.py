"""Fused weights -> one ONNX graph per degree: static token counts, dynamic batch, merging as `ai.tocom::TokenMerge`.

Legal because a merge's token counts depend on the degree alone; which tokens merge is data inside the operator.
"""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path

import onnx
import onnx.inliner
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from export import operator
from export.weights import WeightStore
from runtime.artifacts import FusedCheckpoint, OnnxGraph, sha256_file, write_atomically
from tocom.merging import first_positions
from tocom.schedule import MergeSchedule
from tocom.vit import ReducedViT, ReduceStep

OPSET = 20
INPUT, OUTPUT = "pixel_values", "logits"


def decision_names(block: int) -> tuple[str, ...]:
    """Names of a block's decisions (src, dst, unm) in every graph: values that a debug copy can make outputs."""
    return tuple(f"block.{block}.{name}" for name in operator.DECISIONS)


def lower(
    model: nn.Module, schedule: MergeSchedule, fused: FusedCheckpoint, store: WeightStore, name: str
) -> OnnxGraph:
    """Exports one degree.

    Args:
        model: The plain timm model; untouched.
        schedule: Tokens removed per block.
        fused: The weights of this degree.
        store: The family folder's weight files.
        name: File name of the graph, within the store's folder.

    Returns:
        The graph, and the weight files it needs.
    """
    reference = reference_model(model, schedule, fused)
    graph_model = _export(reference)
    _name_values(graph_model, schedule)
    weight_files = store.place(graph_model)
    proto = ir.to_proto(graph_model)
    file = store.folder / name
    write_atomically(file, proto.SerializeToString())
    _ensure_contract(file, proto, schedule)
    return OnnxGraph(
        file=file,
        files={part: sha256_file(store.folder / part) for part in (name, *weight_files)},
        tokens=schedule.tokens,
        gmacs=count_gmacs(reference),
        source=fused,
    )


def reference_model(model: nn.Module, schedule: MergeSchedule, fused: FusedCheckpoint) -> ReducedViT:
    """The PyTorch reference of one degree: a copy of the model with the fused weights, merging as scheduled."""
    own = copy.deepcopy(model)
    own.load_state_dict(dict(fused.weights))
    return ReducedViT(own.eval().requires_grad_(False), schedule)


def count_gmacs(reference: ReducedViT) -> float:
    """Multiply-accumulates of one image in units of 1e9, counted by torch over matrix products and convolutions."""
    size = reference.model.patch_embed.img_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reference(torch.zeros(1, 3, *size))
    return counter.get_total_flops() / 2 / 1e9


def inline(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without model-local functions, for engines that do not expand them (TensorRT-RTX, OpenVINO)."""
    return onnx.inliner.inline_local_functions(graph)


def _symbolic_merge(model: nn.Module) -> ReduceStep:
    """A merge step that puts the operator into the exported graph instead of merging."""
    prefix, keep_order = model.num_prefix_tokens, int(model.has_class_token)

    def step(_block: int, x: Tensor, token_size: Tensor, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
        batch, tokens, width = x.shape
        stay = len(range(first_positions(prefix)[0], tokens, 2)) - r
        outputs = torch.onnx.ops.symbolic_multi_out(
            f"{operator.DOMAIN}::{operator.NAME}",
            [x, token_size, metric],
            {"r": r, "protected": prefix, "keep_order": keep_order},
            dtypes=[x.dtype, token_size.dtype, torch.int64, torch.int64, torch.int64],
            shapes=[(batch, tokens - r, width), (batch, tokens - r, 1), (batch, r), (batch, r), (batch, stay)],
            version=operator.VERSION,
        )
        return outputs[0], outputs[1]

    return step


class _Exportable(nn.Module):
    """The reference with the operator in place of its merges; names the graph's input."""

    def __init__(self, reference: ReducedViT) -> None:
        super().__init__()
        self.reference = reference

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.reference(pixel_values, _symbolic_merge(self.reference.model))


def _export(reference: ReducedViT) -> ir.Model:
    sample = torch.zeros(2, 3, *reference.model.patch_embed.img_size)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's deprecations of its own parts
        program = torch.onnx.export(
            _Exportable(reference),
            (sample,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1 << 16)},),
            opset_version=OPSET,
            verbose=False,
        )
    model = program.model
    if any(reference.schedule.removed):
        function = ir.from_proto(operator.function_proto())
        model.functions[function.identifier()] = function
        model.graph.opset_imports[operator.DOMAIN] = operator.VERSION
    return model


def _name_values(model: ir.Model, schedule: MergeSchedule) -> None:
    """Gives decisions and weights names that do not depend on the exporter's bookkeeping."""
    blocks = [index for index, removed in enumerate(schedule.removed) if removed]
    merges = [node for node in model.graph if node.domain == operator.DOMAIN]
    for block, node in zip(blocks, merges, strict=True):
        node.name = f"block.{block}.merge"
        for value, name in zip(node.outputs[2:], decision_names(block), strict=True):
            value.name = name
    for name, value in list(model.graph.initializers.items()):
        if "reference.model." in name:
            value.name = name.replace("reference.model.", "")
    model.graph.doc_string = ""
    for node in model.graph:
        node.metadata_props.clear()  # stack traces with paths of the machine that compiled
        node.doc_string = None
    for value in model.graph.initializers.values():
        value.metadata_props.clear()


def _ensure_contract(file: Path, proto: onnx.ModelProto, schedule: MergeSchedule) -> None:
    onnx.checker.check_model(file)  # by path, so that it also looks at the weight files
    merges = [node for node in proto.graph.node if node.domain == operator.DOMAIN]
    expected = [removed for removed in schedule.removed if removed]
    found = [next(attr.i for attr in node.attribute if attr.name == "r") for node in merges]
    if found != expected:
        raise AssertionError(f"the graph must merge {expected} tokens, merges {found}")
    names = [value.name for value in (*proto.graph.input, *proto.graph.output)]
    if names != [INPUT, OUTPUT]:
        raise AssertionError(f"the graph must have exactly {INPUT} and {OUTPUT}, has {names}")
    batch = proto.graph.input[0].type.tensor_type.shape.dim[0]
    if not batch.dim_param:
        raise AssertionError("the graph's batch must be dynamic")
