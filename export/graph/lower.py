"""Fused weights -> one ONNX graph per degree: static token counts, dynamic batch, token reduction as an operator.

Legal because a reduction's token counts depend on the degree alone; which tokens go is data inside the operator.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tocom.export.artifacts import FusedCheckpoint, OnnxGraph
from tocom.export.graph.graph_pass import integers_of, reductions_of
from tocom.export.graph.half_precision import precision_of, typed
from tocom.export.graph.naming import name_values
from tocom.export.graph.operators import operator_of
from tocom.export.graph.split_qkv import projections
from tocom.export.graph.template import Template
from tocom.export.graph.trace import INPUT, OUTPUT, trace
from tocom.export.graph.weight_store import WeightStore
from tocom.reduction import MERGE, Reduction
from tocom.runtime.files import sha256_file, write_atomically
from tocom.schedule import MergeSchedule
from tocom.vit import ReducedViT


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
            fused=fused,
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
        shared = bool(gates) or self._has_plain_weights(fused)
        for blocks, (template, weight_files) in self._templates.items() if shared else ():
            fits = reference.deciding_blocks in ((), blocks) and (template.compensated or not gates)
            if fits and (proto := template.at(reference, gates)) is not None:
                return proto, weight_files
        traced = trace(reference, steps)
        name_values(traced, reference)
        weight_files = self._store.place(traced)
        proto = ir.to_proto(traced)
        if shared and reference.deciding_blocks and (template := Template.of(proto, reference)) is not None:
            self._templates[reference.deciding_blocks] = template, weight_files
        return proto, weight_files

    def _has_plain_weights(self, fused: FusedCheckpoint) -> bool:
        """Whether the weights are the model's, with nothing folded in."""
        plain = self._model.state_dict()
        return all(torch.equal(tensor, plain[name]) for name, tensor in fused.weights.items())


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
    model = copy.deepcopy(model)
    model.load_state_dict(dict(fused.weights))
    return ReducedViT(model.eval().requires_grad_(False), schedule, reduction=reduction)


def count_gmacs(reference: ReducedViT) -> float:
    """Multiply-accumulates of one image in units of 1e9, counted by torch over matrix products and convolutions."""
    size = reference.model.patch_embed.img_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reference(torch.zeros(1, 3, *size))
    return counter.get_total_flops() / 2 / 1e9


def _ensure_contract(file: Path, proto: onnx.ModelProto, reference: ReducedViT) -> None:
    onnx.checker.check_model(file)  # by path, so that it also looks at the weight files
    operator = operator_of(reference.reduction).name
    expected = [(operator, reference.schedule.removed[block]) for block in reference.deciding_blocks]
    reductions = [(node.op_type, integers_of(node)["r"]) for node in reductions_of(proto)]
    if reductions != expected:
        raise AssertionError(f"the graph must remove tokens as {expected}, does so as {reductions}")
    names = [value.name for value in (*proto.graph.input, *proto.graph.output)]
    if names != [INPUT, OUTPUT]:
        raise AssertionError(f"the graph must have exactly {INPUT} and {OUTPUT}, has {names}")
    batch = proto.graph.input[0].type.tensor_type.shape.dim[0]
    if not batch.dim_param:
        raise AssertionError("the graph's batch must be dynamic")
