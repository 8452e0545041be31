"""Every exported graph is accepted and built by TensorRT for RTX, which needs no GPU for that."""

from __future__ import annotations

import onnx
import pytest

from export.lower import inline
from tocom.reduction import PRUNE

trt = pytest.importorskip(
    "tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install tocom[tensorrt-rtx]", exc_type=ImportError
)


class Messages(trt.ILogger):
    """Keeps what TensorRT complains about, to be shown where a build fails."""

    def __init__(self):
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity, message):
        if severity <= trt.ILogger.ERROR:
            self.errors.append(message)


def build_plan(graph: onnx.ModelProto) -> tuple[int, list[str]]:
    """Bytes of the plan for batches of 1 to 8 on SM80 (0 where there is none), and the complaints on the way."""
    messages = Messages()
    builder = trt.Builder(messages)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, messages)
    if not parser.parse(graph.SerializeToString()):
        return 0, [str(parser.get_error(index)) for index in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM80, 0)
    profile = builder.create_optimization_profile()
    entrance = network.get_input(0)
    image = tuple(entrance.shape)[1:]
    profile.set_shape(entrance.name, (1, *image), (5, *image), (8, *image))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return (0 if plan is None else plan.nbytes), messages.errors


def check_builds(engine) -> None:
    graph = inline(onnx.load(engine.file))
    assert not graph.functions
    size, complaints = build_plan(graph)
    assert size > 10_000, complaints
    assert not complaints


def test_every_exported_graph_builds(case, exported):
    check_builds(exported(*case))


def test_pruning_every_patch_into_one_token_builds(exported):
    check_builds(exported("two_patches", 1, PRUNE))


def test_what_cannot_be_built_is_told(exported):
    """The check above can fail: a graph with an operator that TensorRT does not know is refused."""
    graph = inline(onnx.load(exported("deit_tiny", 8).file))
    next(node for node in graph.graph.node if node.op_type == "TopK").op_type = "TokenMerge"
    size, complaints = build_plan(graph)
    assert size == 0
    assert complaints
