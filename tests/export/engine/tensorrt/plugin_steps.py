"""What the tests of the merge plugins do in a process of its own, where it prints what it finds.

    python tests/export/plans/plugin_steps.py declare NODE LIBRARY ...
    TRITON_INTERPRET=1 python tests/export/plans/plugin_steps.py interpret

The first takes the attributes of a node as JSON, and libraries that TensorRT's bindings load without being TensorRT's.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import torch


class Dimension:
    """Stands in for the library's expression of a dimension: a number for every batch."""

    def __init__(self, at) -> None:
        self.at = at if callable(at) else lambda batch: at


class Expressions:
    """Stands in for what makes them."""

    def constant(self, value: int) -> Dimension:
        return Dimension(value)

    def operation(self, operation, one: Dimension, other: Dimension) -> Dimension:
        assert operation.name == "PROD"
        return Dimension(lambda batch: one.at(batch) * other.at(batch))


def declare(node: dict[str, int], libraries: list[str]) -> None:
    """Registers the plugins with the Python code of TensorRT, takes its steps of building with them, and prints them.

    What the library itself keeps or makes is stood in for: the registry, expressions of dimensions, their containers.
    """
    for library in libraries:
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    trt = sys.modules["tensorrt"] = importlib.import_module("tensorrt_bindings")
    creators = {}
    trt.get_plugin_registry = lambda: SimpleNamespace(
        register_creator=lambda creator, namespace: creators.update({(namespace, creator.name): creator}),
        get_creator=lambda name, version, namespace: creators[namespace, name],
    )
    trt.IDimensionExpr, trt.DimsExprs = Dimension, lambda count: [None] * count
    importlib.import_module("tensorrt.plugin")._tensor.SymExprImpl = lambda value: value._expr
    plugin = importlib.import_module("tocom.export.engine.tensorrt.plugin")
    for capability in (90, 80):  # the later one counts
        importlib.import_module("tocom.export.engine.tensorrt.register_plugin").register(capability)
    tokens, r = node["tokens"], node["r"]
    decisions = [((-1, count, 1), trt.int64) for count in (r, r, plugin.counts_of(tokens, node["protected"])[0] - r)]
    given = {
        plugin.DECIDE: [((-1, tokens, 64), trt.float32)],
        plugin.APPLY: [((-1, tokens, 384), trt.float16), ((-1, tokens, 1), trt.float32), *decisions],
    }
    for (namespace, name), creator in creators.items():
        text = " ".join(str(node[attribute]) for attribute in plugin._ATTRIBUTES[name])
        data = np.frombuffer(text.encode() + b"\0", np.int8).copy()  # as the parser copies an attribute of the node
        fields = [trt.PluginField(field.name, data, trt.PluginFieldType.CHAR) for field in creator.field_names]
        made = creator.create_plugin(name, namespace, trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD,
                                     trt.QuickPluginCreationRequest.UNKNOWN)  # fmt: skip
        inputs = [[Dimension(size if size > 0 else lambda batch: batch) for size in shape] for shape, _ in given[name]]
        types = made.get_output_data_types([dtype for _, dtype in given[name]], [3] * len(inputs))
        outputs = made.get_output_shapes(inputs, [], Expressions())
        tensors = []
        for sizes, dtype in zip([*inputs, *outputs], [*(dtype for _, dtype in given[name]), *types], strict=True):
            tensor = trt.PluginTensorDesc()
            tensor.dims = trt.Dims([-1 if size.at(1) != size.at(2) else size.at(1) for size in sizes])
            tensor.type, tensor.format = dtype, trt.TensorFormat.LINEAR
            tensors.append(trt.DynamicPluginTensorDesc())
            tensors[-1].desc = tensor
        formats = made.get_supported_format_combinations(tensors, len(inputs))
        made.configure_plugin(tensors[: len(inputs)], tensors[len(inputs) :])
        made.set_tactic(0)
        launch, extra = SimpleNamespace(), type("Expressions", (dict,), {})()
        made.get_launch_params(inputs, tensors, len(inputs), launch, extra, Expressions())
        descriptions = [each.desc for each in tensors]
        kernel, code = made.get_kernel(descriptions[: len(inputs)], descriptions[len(inputs) :])
        found = {
            "id": [namespace, name, creator.plugin_version, [field.name for field in creator.field_names]],
            "kind": type(made).__name__,
            "types": [dtype.name for dtype in types],
            "shapes": [[size.at(8) for size in sizes] for sizes in outputs],
            "formats": [[each.type.name, each.format.name] for each in formats],
            "tactics": made.get_valid_tactics(),
            "launch": {name: value.at(8) for name, value in vars(launch).items()},
            "extra": [extra.nbSymExprs, len(extra)],
            "kernel": kernel,
            "code": code.decode(),
        }
        print(json.dumps(found))


def interpret() -> None:
    """Carries out both launches of some nodes through Triton's interpreter, and compares with the reference."""
    plugin = importlib.import_module("tocom.export.engine.tensorrt.plugin")
    merging = importlib.import_module("tocom.merging")

    def run(launch, *tensors: torch.Tensor) -> None:
        launch.kernel[len(tensors[0]) * launch.programs,](*tensors, **launch.constants, **launch.options)

    for tokens, r, protected, keep_order, width in ((41, 9, 1, 1, 130), (34, 17, 0, 0, 24), (38, 1, 5, 1, 24)):
        random = torch.Generator().manual_seed(tokens)
        x, metric = (torch.randn(3, tokens, size, generator=random) for size in (width, 24))
        token_size = torch.randint(1, 9, (3, tokens, 1), generator=random).float()
        expected = merging.match(metric, r, protected=protected, keep_order=bool(keep_order))
        of = {"r": r, "tokens": tokens, "protected": protected}
        decisions = [torch.full_like(each, -1) for each in (expected.src, expected.dst, expected.unm)]
        launch = plugin.decide_launch(["*fp32", *["*i64"] * 3], 24, **of, keep_order=keep_order)
        run(launch, metric, *decisions)
        for found, name in zip(decisions, ("src", "dst", "unm"), strict=True):
            assert torch.equal(found, getattr(expected, name)), name
        merged, merged_size = torch.empty(3, tokens - r, width), torch.empty(3, tokens - r, 1)
        launch = plugin.apply_launch(["*fp32"] * 2 + ["*i64"] * 3 + ["*fp32"] * 2, width, **of)
        run(launch, x, token_size, *decisions, merged, merged_size)
        tokens_expected, sizes_expected = merging.merge(x, token_size, expected)
        torch.testing.assert_close(merged, tokens_expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(merged_size, sizes_expected)


if __name__ == "__main__":
    # the graph's side is not asked for here, and takes longer to load than the rest to run
    sys.modules["tocom.export.graph.operators"] = SimpleNamespace(DOMAIN="ai.tocom")
    sys.modules["tocom.export.graph.operators.merge"] = SimpleNamespace(
        MergeOperator=SimpleNamespace(name="TokenMerge")
    )
    interpret() if sys.argv[1] == "interpret" else declare(json.loads(sys.argv[2]), sys.argv[3:])
