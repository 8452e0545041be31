"""The merge plugins: their kernels compile and compute, their declarations run, and one graph serves who has none.

No test here runs a plugin in TensorRT, which takes its libraries and a GPU.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnxscript import optimizer

from tocom.export.engine.tensorrt.plan import PlanOptions, build_plan
from tocom.export.graph.graph_pass import apply
from tocom.export.graph.half_precision import typed
from tocom.export.graph.operators import DOMAIN
from tocom.runtime.errors import InputError

triton = pytest.importorskip("triton", reason="Triton is not installed: it comes with torch on Linux")
plugin = importlib.import_module("tocom.export.engine.tensorrt.plugin")
kernels = importlib.import_module("tocom.triton_merge")
ROOT = Path(__file__).resolve().parents[4]
api_file = importlib.util.spec_from_file_location("tensorrt_api", ROOT / "tests/runtime/engines/tensorrt/test_api.py")
api = importlib.util.module_from_spec(api_file)  # knows where TensorRT's bindings are, and what they need
api_file.loader.exec_module(api)

RTX = "tensorrt-rtx"
FORMATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64}
NODE = {"r": 16, "tokens": 197, "protected": 1, "keep_order": 1}  # of DeiT-S
SMALL = {"r": 5, "tokens": 33, "protected": 1, "keep_order": 1}


def take_steps(*args: str, path: str = "", **environment: str) -> str:
    """Runs plugin_steps.py, and returns what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), path))} | environment
    command = [sys.executable, str(Path(__file__).with_name("plugin_steps.py")), *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def launches_of(node: dict[str, int], x: str, metric: str, width: int = 384, head_width: int = 64) -> list:
    """Both launches of a node, with sizes in float32."""
    decisions = ["*i64"] * 3
    decide = plugin.decide_launch([f"*{metric}", *decisions], head_width, **node)
    where = {name: value for name, value in node.items() if name != "keep_order"}
    return [decide, plugin.apply_launch([f"*{x}", "*fp32", *decisions, f"*{x}", "*fp32"], width, **where)]


@pytest.mark.parametrize(
    ("node", "x", "metric", "width", "head_width"),
    [
        (NODE, "fp16", "fp32", 384, 64),
        (NODE | {"r": 98}, "fp32", "fp32", 192, 24),
        (NODE | {"tokens": 257, "r": 8}, "bf16", "bf16", 768, 144),
        ({"r": 1, "tokens": 17, "protected": 0, "keep_order": 0}, "fp16", "fp16", 20, 16),
        ({"r": 13, "tokens": 70, "protected": 5, "keep_order": 1}, "bf16", "fp32", 100, 80),
    ],
)
def test_kernels_are_launched_as_the_library_launches_them(monkeypatch, node, x, metric, width, head_width):
    """With the arguments, the options and the grid that `tocom.triton_merge` gives Triton."""
    launched = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((self.kernel, grid, args, options))

    for name in ("_decide_image", "_score_rows", "_rank_image", "_merge_rows"):
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name)))
    monkeypatch.setattr(kernels, "_require_usable", lambda name, tensor: None)
    how = {"protected": node["protected"], "keep_order": bool(node["keep_order"])}
    with torch.device("meta"):
        tokens = torch.empty(8, node["tokens"], width, dtype=FORMATS[x])
        token_size = torch.empty(8, node["tokens"], 1)
        matching = kernels.decide(torch.empty(8, node["tokens"], head_width, dtype=FORMATS[metric]), node["r"], **how)
        kernels.apply(tokens, token_size, matching)
    monkeypatch.undo()
    planned = launches_of(node, x, metric, width, head_width)
    assert len(launched) == len(planned)
    for launch, (kernel, grid, args, options) in zip(planned, launched, strict=True):
        assert launch.kernel is kernel and grid == (8 * launch.programs,)
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
        tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
        assert [tensor.dtype for tensor in tensors] == [FORMATS[pointer[1:]] for pointer in launch.pointers]
        given = {name: value for name, value in given.items() if not isinstance(value, torch.Tensor)}
        assert given == {**launch.constants, **launch.options}


@pytest.mark.parametrize(
    ("capability", "node", "x", "metric"),
    [(80, SMALL, "fp16", "fp32")]
    + [
        pytest.param(*each, marks=pytest.mark.full)
        for each in ((89, SMALL, "bf16", "fp32"), (90, SMALL, "fp32", "fp32"))
    ]
    + [
        pytest.param(capability, NODE, *formats, marks=pytest.mark.full)
        for capability in (75, 80, 86, 89, 90, 100, 120)
        for formats in (("fp32", "fp32"), ("fp16", "fp32"), ("bf16", "fp32"), ("fp16", "fp16"))
    ],
)
def test_kernels_compile_to_code_that_takes_inputs_and_outputs_alone(
    monkeypatch, tmp_path, capability, node, x, metric
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assembler = triton.knobs.nvidia.ptxas_blackwell if capability >= 100 else triton.knobs.nvidia.ptxas
    names = set()
    for launch in launches_of(node, x, metric):
        kernel = launch.compiled(capability)
        entry = re.search(rf"\.visible \.entry {kernel.name}\(([^)]*)\)\s+\.reqntid {kernel.threads}\b", kernel.ptx)
        assert len(entry[1].split(",")) == len(launch.pointers) == entry[1].count(".param .u64")
        assert f".version {plugin.PTX_VERSION / 10}" in kernel.ptx
        target = re.search(r"\.target (sm_\d+a?)", kernel.ptx)[1]
        assert target.rstrip("a") == f"sm_{capability}"
        (tmp_path / "kernel.ptx").write_text(kernel.ptx)
        command = [assembler.path, f"-arch={target}", "kernel.ptx", "-o", "kernel.cubin"]
        subprocess.run(command, check=True, cwd=tmp_path)
        command = [triton.knobs.nvidia.cuobjdump.path, "-elf", "kernel.cubin"]
        elf = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True).stdout
        assert len(set(re.findall(r"Ordinal\s*:\s*(0x\w+)", elf))) == len(launch.pointers)
        names.add(kernel.name)
    assert len(names) == 2


def test_a_kernel_that_needs_more_than_it_is_given_is_refused():
    parameters = ",\n".join(f"\t.param .u64 .ptr .global .align 1 add_param_{index}" for index in range(6))
    ptx = f".visible .entry add(\n{parameters}\n)\n{{\n\tld.param.b64 %rd1, [add_param_3];\n"
    assert re.findall(r"add_param_\d", plugin._less_scratch(ptx, "add", 4))[3:] == ["add_param_3"] * 2
    with pytest.raises(AssertionError, match="must have 3 parameters and two for scratch memory"):
        plugin._less_scratch(ptx, "add", 3)
    with pytest.raises(AssertionError, match="uses scratch memory"):
        plugin._less_scratch(f"{ptx}\tld.param.b64 %rd2, [add_param_5];\n", "add", 4)


@pytest.mark.full
def test_launched_in_the_interpreter_they_compute_what_the_reference_does():
    take_steps("interpret", TRITON_INTERPRET="1")


@pytest.mark.parametrize("library", [api.NEW, pytest.param(api.OLD, marks=pytest.mark.full)])
def test_the_declarations_run_in_tensorrts_python_code(library, monkeypatch, tmp_path):
    """From the registration to the code that TensorRT is handed; it is not launched."""
    if not (api.WHEELS / library).is_dir():
        pytest.skip(f"the bindings of TensorRT {library} were not fetched: make setup-tensorrt-api")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    libraries = map(str, api.save_empty_libraries(tmp_path, library.partition(".")[0]).glob("*.so.*"))
    said = take_steps("declare", json.dumps(SMALL), *libraries, path=str(api.WHEELS / library))
    decide, apply = (json.loads(line) for line in said.splitlines() if line.startswith("{"))
    assert decide["id"] == ["tocom", "TokenMergeDecide", "1", ["plugin_numbers"]]
    assert apply["id"] == ["tocom", "TokenMergeApply", "1", ["plugin_numbers"]]
    assert (decide["types"], apply["types"]) == (["INT64"] * 3, ["HALF", "FLOAT"])
    assert decide["shapes"] == [[8, 5, 1], [8, 5, 1], [8, 11, 1]]
    assert apply["shapes"] == [[8, 28, 384], [8, 28, 1]]
    for found, launch in zip((decide, apply), launches_of(SMALL, "fp16", "fp32"), strict=True):
        assert found["kind"] == "_TemplateAOTPlugin"
        assert [plugin.POINTERS[name] for name, layout in found["formats"] if layout == "LINEAR"] == [*launch.pointers]
        assert found["extra"] == [0, 0] and found["tactics"] == []
        kernel = launch.compiled(80)
        assert (found["kernel"], found["code"]) == (kernel.name, kernel.ptx)
        other = {"grid_y": 1, "grid_z": 1, "block_y": 1, "block_z": 1}
        assert found["launch"] == other | {
            "grid_x": 8 * launch.programs, "block_x": kernel.threads, "shared_mem": kernel.shared_bytes
        }  # fmt: skip


@pytest.fixture
def merging_graph(exported):
    """An exported graph in a number format, as it is and with plugins: files beside the weights."""
    made = []

    def make(family, degree, precision):
        engine = exported(family, degree)
        graph = typed(onnx.load(engine.file, load_external_data=False), precision)
        for content in (graph, apply(plugin.WithPlugins(), graph)):
            made.append(engine.file.with_name(f"plugin-{os.getpid()}-{len(made)}.onnx"))
            made[-1].write_bytes(content.SerializeToString())
        return made[-2:]

    yield make
    for file in made:
        file.unlink()


def types_of(graph: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in graph.graph.node if node.domain == DOMAIN]


@pytest.mark.parametrize(
    ("family", "precision"),
    [("deit_tiny", "fp16"), pytest.param("deit_tiny", "fp32", marks=pytest.mark.full)]
    + [
        pytest.param(family, precision, marks=pytest.mark.full)
        for family in ("deit_distilled", "gap", "map", "reg4_dinov2", "clip")
        for precision in ("fp32", "fp16")
    ],
)
def test_who_has_no_plugins_computes_the_same_bits(merging_graph, make_vit, photographs, family, precision):
    before, after = merging_graph(family, 8, precision)
    graph = onnx.load(after, load_external_data=False)
    onnx.checker.check_model(str(after), full_check=True)
    blocks = types_of(onnx.load(before, load_external_data=False)).count("TokenMerge")
    assert types_of(graph) == [plugin.DECIDE, plugin.APPLY] * blocks and blocks > 0
    assert sorted(each.name for each in graph.functions) == [plugin.APPLY, plugin.DECIDE]
    decisions = [name for node in graph.graph.node if node.op_type == plugin.DECIDE for name in node.output]
    answers = []
    images = photographs(*make_vit(family).patch_embed.img_size)
    for file in (before, after):
        shown = onnx.load(file, load_external_data=False)
        for name in decisions:
            shown.graph.output.append(helper.make_tensor_value_info(name, TensorProto.INT64, None))
        file.write_bytes(shown.SerializeToString())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        answers.append(session.run(None, {"pixel_values": images}))
    assert len(answers[0]) == 1 + 3 * blocks
    for one, other in zip(*answers, strict=True):
        np.testing.assert_array_equal(one, other)


def test_nodes_that_the_plugins_do_not_serve_stay_as_they_are(merging_graph):
    graph = onnx.load(merging_graph("deit_tiny", 8, "fp32")[0], load_external_data=False)
    other = onnx.ModelProto.FromString(graph.SerializeToString())
    for node in other.graph.node:
        node.op_type = node.op_type.replace("TokenMerge", "TokenPrune")
    assert apply(plugin.WithPlugins(), other) == other
    first, *others = (node for node in graph.graph.node if node.domain == DOMAIN)
    next(each for each in first.attribute if each.name == "tokens").i = 577
    served = [plugin.DECIDE, plugin.APPLY] * len(others)
    assert types_of(apply(plugin.WithPlugins(), graph)) == ["TokenMerge", *served]
    assert types_of(apply(plugin.LeavePlugins(), apply(plugin.WithPlugins(), graph))) == served
    assert types_of(graph) == ["TokenMerge"] * (1 + len(others))


@pytest.mark.parametrize(
    "precision", ["fp16", *(pytest.param(each, marks=pytest.mark.full) for each in ("fp32", "bf16"))]
)
def test_tensorrt_for_rtx_builds_the_graph(merging_graph, precision):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed", exc_type=ImportError)
    plan = build_plan(merging_graph("deit_tiny", 8, precision)[1], RTX, PlanOptions((1, 5, 8), ("sm80",)))
    assert plan.content and not plan.log and plan.layers["topk"] > 1


@pytest.fixture
def parse():
    """Parses a graph with the parser of TensorRT for RTX: the network, its errors, and what it said of plugins."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed", exc_type=ImportError)

    class Logger(rtx.ILogger):
        def __init__(self):
            rtx.ILogger.__init__(self)
            self.lines = []

        def log(self, severity, message):
            self.lines.append(message)

    def parsed(graph: onnx.ModelProto, folder: Path) -> tuple[object, list[str], list[str]]:
        builder = rtx.Builder(logger := Logger())
        network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = rtx.OnnxParser(network, logger)
        parser.parse(graph.SerializeToString(), str(folder / "graph.onnx"))
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        return network, errors, [line for line in logger.lines if "plugin" in line]

    return parsed


def test_nvidias_parser_asks_for_the_plugins_and_else_expands_their_functions(parse, merging_graph):
    """The parser of TensorRT for RTX, which is NVIDIA's too; it takes no quickly deployable plugins in the end."""
    rtx = importlib.import_module("tensorrt_rtx")
    file = merging_graph("deit_tiny", 8, "fp16")[1]
    graph = onnx.load(file, load_external_data=False)
    network, errors, said = parse(graph, file.parent)
    assert not errors and network.num_outputs == 1
    for name in (plugin.DECIDE, plugin.APPLY):
        asked = f"{name}, plugin_version: 1, plugin_namespace: tocom"
        assert any(line.endswith(asked) for line in said)
    alone = apply(plugin.LeavePlugins(), graph)
    assert any("Plugin not found" in error for error in parse(alone, file.parent)[1])

    class Creator(rtx.IPluginCreatorV3Quick):
        def __init__(self):
            rtx.IPluginCreatorV3Quick.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = plugin.DECIDE, "tocom", "1"
            self.field_names = rtx.PluginFieldCollection([])

    registry, creator = rtx.get_plugin_registry(), Creator()
    registry.register_creator(creator, "tocom")
    try:
        for each in (graph, alone):
            _, errors, said = parse(each, file.parent)
            assert f"Found registered plugin: {plugin.DECIDE}. Importing this node as a plugin." in said
            assert any("IPluginCreatorV3One" in error for error in errors)
    finally:
        registry.deregister_creator(creator)


SLICE = """
<ir_version: 10, opset_import: ["" : 20, "ai.tocom" : 1]>
slice (float[8, 2] image) => (float[3, 2] rows) { rows = ai.tocom.CALLED <r = 3> (image) }
<domain: "ai.tocom", opset_import: ["ai.tocom" : 1]>
Outer <r> (x) => (y) { y = ai.tocom.Inner <r: int = @r> (x) }
<domain: "ai.tocom", opset_import: ["" : 20]>
Inner <r> (x) => (y) {
    count = Constant <value_int: int = @r> ()
    first = Constant <value_ints = [0]> ()
    end = Unsqueeze (count, first)
    y = Slice (x, first, end, first)
}"""


def test_nvidias_parser_does_not_pass_a_functions_attributes_on(parse, tmp_path):
    """Why both nodes stand in the graph."""
    sizes = {}
    for called in ("Inner", "Outer"):
        model = onnx.parser.parse_model(SLICE.replace("CALLED", called))
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        assert session.run(None, {"image": np.zeros((8, 2), np.float32)})[0].shape == (3, 2)
        network, errors, _ = parse(model, tmp_path)
        sizes[called] = tuple(network.get_output(0).shape) if not errors else None
    assert sizes == {"Inner": (3, 2), "Outer": (0, 2)}


def test_a_folded_graph_still_names_the_plugins(merging_graph, tmp_path):
    """Nothing that the plan builder does before a graph is parsed takes the nodes away, or what they say."""
    file = merging_graph("deit_tiny", 8, "fp16")[1]
    alone = apply(plugin.LeavePlugins(), onnx.load(file, load_external_data=False))
    assert not alone.functions
    file.write_bytes(alone.SerializeToString())
    model = ir.load(file)
    optimizer.optimize_ir(model, num_iterations=3, input_size_limit=1 << 62, output_size_limit=1 << 62)
    expected = [{each.name: helper.get_attribute_value(each) for each in node.attribute}
                for node in alone.graph.node if node.domain == DOMAIN]  # fmt: skip
    found = [{each.name: helper.get_attribute_value(each) for each in node.attribute}
             for node in ir.to_proto(model).graph.node if node.domain == DOMAIN]  # fmt: skip
    assert found == expected
    assert expected[0]["plugin_numbers"].decode().split()[0] == str(expected[0]["r"])


@pytest.mark.parametrize(
    ("version", "words"),
    [(None, "need TensorRT, which is not installed"), ("10.14.1.48", "need TensorRT 10.15 or later, got 10.14.1.48")],
)
def test_without_a_tensorrt_that_has_such_plugins_registering_says_so_in_one_line(monkeypatch, version, words):
    library = version and SimpleNamespace(__version__=version, plugin=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", library and library.plugin)
    with pytest.raises(InputError, match=words) as refused:
        importlib.import_module("tocom.export.engine.tensorrt.register_plugin").register()
    assert "\n" not in str(refused.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_driver_launches_them_as_tensorrt_would(precision):
    """Inputs, then outputs, and nothing else: the bits are those that Triton's own launches give."""
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")

    def launch(how, *tensors: torch.Tensor) -> None:
        kernel = how.compiled()
        status, module = driver.cuModuleLoadData(kernel.ptx.encode() + b"\0")
        assert status == driver.CUresult.CUDA_SUCCESS
        status, function = driver.cuModuleGetFunction(module, kernel.name.encode())
        assert status == driver.CUresult.CUDA_SUCCESS
        given = tuple(each.data_ptr() for each in tensors), (ctypes.c_void_p,) * len(tensors)
        grid, stream = len(tensors[0]) * how.programs, torch.cuda.current_stream().cuda_stream
        (status,) = driver.cuLaunchKernel(
            function, grid, 1, 1, kernel.threads, 1, 1, kernel.shared_bytes, stream, given, 0
        )
        assert status == driver.CUresult.CUDA_SUCCESS
        torch.cuda.synchronize()

    random = torch.Generator("cuda").manual_seed(0)
    x, metric = (torch.randn(4, 197, width, device="cuda", generator=random) for width in (384, 64))
    x, token_size = x.to(FORMATS[precision]), torch.randint(1, 9, (4, 197, 1), device="cuda", generator=random).float()
    decide, apply = launches_of(NODE, precision, "fp32")
    expected = kernels.decide(metric, 16)
    decisions = [torch.full_like(each, -1) for each in (expected.src, expected.dst, expected.unm)]
    launch(decide, metric, *decisions)
    for found, name in zip(decisions, ("src", "dst", "unm"), strict=True):
        assert torch.equal(found, getattr(expected, name)), name
    found = torch.empty(4, 181, 384, device="cuda", dtype=x.dtype), torch.empty(4, 181, 1, device="cuda")
    launch(apply, x, token_size, *decisions, *found)
    for one, other in zip(found, kernels.apply(x, token_size, expected), strict=True):
        assert torch.equal(one, other)
