"""A PyTorch reference of one degree -> its ONNX graph, with token reductions as operators, by torch's exporter."""

from __future__ import annotations

import logging
import warnings

import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn

from tocom.export.graph.operators import DOMAIN, VERSION, operator_of
from tocom.export.graph.split_qkv import FACTORS
from tocom.vit import ReducedViT

OPSET = 20
INPUT, OUTPUT = "pixel_values", "logits"


def trace(reference: ReducedViT, projections: nn.ModuleList) -> ir.Model:
    """Traces a reference; the batch is dynamic, token counts are static.

    Args:
        reference: Of one degree.
        projections: Its blocks' project steps (`.split_qkv`).

    Returns:
        The graph, with the exporter's names; its reductions are operators, whose function stands beside it.
    """
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


def _reads_factor(node: ir.Node) -> bool:
    """Whether a node computes with what degrees share: folded, it would be another weight for each of them."""
    return any(value is not None and (value.name or "").endswith(FACTORS) for value in node.inputs)
