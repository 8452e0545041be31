"""Graph -> the same without model-local functions, for engines that do not expand them (TensorRT, OpenVINO)."""

from __future__ import annotations

import onnx
import onnx.inliner


def inline(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without model-local functions, for engines that do not expand them (TensorRT, OpenVINO)."""
    return onnx.inliner.inline_local_functions(graph)
