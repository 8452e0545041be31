"""Token reductions as ONNX operators: model-local functions whose bodies are their specification."""

from __future__ import annotations

from tocom.export.graph.operators.interface import DOMAIN, POINTS, VERSION, Operator, point_name
from tocom.export.graph.operators.merge import MergeOperator
from tocom.export.graph.operators.prune import PruneOperator
from tocom.reduction import MERGE, PRUNE, Reduction

__all__ = ["DOMAIN", "OPERATORS", "POINTS", "VERSION", "Operator", "operator_of", "point_name"]

OPERATORS: dict[str, Operator] = {MERGE.name: MergeOperator(), PRUNE.name: PruneOperator()}


def operator_of(reduction: Reduction) -> Operator:
    """The operator that a reduction becomes in a graph."""
    return OPERATORS[reduction.name]
