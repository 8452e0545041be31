"""ONNX graph -> TensorRT plan, by NVIDIA's TensorRT or by TensorRT for RTX, which needs no GPU for that.

Networks are strongly typed: every format stands in the graph (`graph.half_precision`), and TF32 is off, which would
flip decisions. What depends on weights alone is computed here, once: TensorRT for RTX would do it again in every call.
Quantized weights stay codes and scales, from which the library chooses its kernels.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir
from onnxscript import optimizer

from tocom.export.engine.tensorrt.four_bit import PutScalesInBlocks
from tocom.export.engine.tensorrt.plan_options import CURRENT, DEFAULT_TARGETS, PlanOptions
from tocom.export.graph.graph_pass import apply
from tocom.export.graph.inline import inline
from tocom.export.graph.trace import INPUT
from tocom.runtime.backends import BACKENDS
from tocom.runtime.engines.tensorrt import device
from tocom.runtime.engines.tensorrt.runner import complaints, logger
from tocom.runtime.errors import InputError, one_line
from tocom.runtime.family_files import flat_of
from tocom.runtime.files import write_atomically

if TYPE_CHECKING:
    import tensorrt_rtx as trt

_FP8_FROM = "sm89"  # the first that has products of 8-bit floats
_UNLIMITED = 1 << 62
_ITERATIONS = 3  # of folding: what follows from a folded value is folded next


@dataclass(frozen=True)
class Plan:
    """A built plan.

    Attributes:
        content: The serialized engine.
        seconds: What building it took.
        layers: Layers of the network that was parsed, by type.
        log: What the library said.
    """

    content: bytes
    seconds: float
    layers: dict[str, int]
    log: tuple[str, ...]


def library_of(backend: str) -> ModuleType:
    """The library that builds a backend's plans.

    Raises:
        InputError: If it is not installed.
    """
    try:
        return importlib.import_module(BACKENDS[backend].library)
    except ImportError as error:
        raise InputError(f"backend {backend} cannot build plans here: {one_line(error)}") from error


def plan_recipe(backend: str, options: PlanOptions) -> dict[str, Any]:
    """What decides a plan beside its graph."""
    recipe = {"library": library_of(backend).__version__, "options": options.to_json()}
    if backend == "tensorrt":
        recipe["gpu"] = device.describe()
    if options.own_kernels:
        recipe["triton"] = version("triton")
    return recipe


def build_plan(graph: Path, backend: str, options: PlanOptions, cache: Path | None = None) -> Plan:
    """Builds a plan.

    Args:
        graph: Typed ONNX file of this project, with functions or without; its weights lie beside it.
        backend: "tensorrt" or "tensorrt-rtx".
        options: How.
        cache: File of measured kernel times, which TensorRT reads and writes; TensorRT for RTX measures none.

    Raises:
        InputError: If the library is not installed, does not know a target, or refuses the graph; its own words follow.
    """
    library = library_of(backend)
    require_buildable(backend, options)
    with tempfile.TemporaryDirectory() as folder, complaints() as messages:
        file = folded(graph, Path(folder), own_kernels=options.own_kernels)
        if options.own_kernels:
            from tocom.export.engine.tensorrt.register_plugin import register

            register()
        try:
            return _built(library, file, graph.name, backend, options, messages, cache)
        except RuntimeError as error:  # what pybind makes of C++ exceptions
            raise InputError(f"{backend} fails on {graph.name}: {one_line(error)}") from error


def _built(
    library: ModuleType,
    file: Path,
    name: str,
    backend: str,
    options: PlanOptions,
    messages: list[str],
    cache: Path | None,
) -> Plan:
    builder: trt.Builder = library.Builder(logger(library))
    flags = 1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network: trt.INetworkDefinition = builder.create_network(flags)
    parser: trt.OnnxParser = library.OnnxParser(network, logger(library))
    if not parser.parse_from_file(str(file)):
        errors = dict.fromkeys(map(_words, (parser.get_error(index) for index in range(parser.num_errors))))
        raise InputError(f"{backend} refuses {name}: {'; '.join(errors)}")
    config = _config(library, builder, network, backend, options)
    kept: trt.ITimingCache | None = None
    if backend == "tensorrt" and cache is not None:
        kept = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
        config.set_timing_cache(kept, ignore_mismatch=False)
    began = time.monotonic()
    memory: trt.IHostMemory | None = builder.build_serialized_network(network, config)
    seconds = time.monotonic() - began
    if memory is None:
        raise InputError(f"{backend} cannot build {name}: {_last(messages)}")
    if kept is not None and cache is not None:
        write_atomically(cache, bytes(kept.serialize()))
    layers = Counter(network.get_layer(index).type.name.lower() for index in range(network.num_layers))
    return Plan(bytes(memory), seconds, dict(sorted(layers.items())), tuple(messages))


def _last(messages: list[str]) -> str:
    return "; ".join(messages[-3:]) or "it does not say why"


def _words(error: trt.ParserError) -> str:
    return one_line(f"{error.node_operator()} {error.node_name()}: {error.desc()}")


def require_buildable(backend: str, options: PlanOptions) -> None:
    """Refuses what a backend's library cannot build for, before anything is done.

    Raises:
        InputError: If it is not installed, or does not know a target or option.
    """
    library = library_of(backend)
    if backend != "tensorrt-rtx":
        if options.targets:
            raise InputError(
                "targets are for tensorrt-rtx: tensorrt builds for the GPU it runs on. Leave out --target."
            )
        if options.own_kernels and options.hardware_compatible:
            raise InputError("a plugin is compiled for one GPU: give plugin or hardware-compatible, not both.")
        return
    if options.hardware_compatible or options.version_compatible or options.own_kernels:
        raise InputError("hardware-compatible, version-compatible and plugin are for tensorrt: for tensorrt-rtx name "
                         "each --target.")  # fmt: skip
    if options.stripped and (why := device.unusable()):
        raise InputError(f"tensorrt-rtx leaves weights out only where there is a GPU, but here is {why}.")
    if CURRENT in options.targets and (why := device.unusable()):
        raise InputError(f"target {CURRENT} is the GPU of this machine, but here is {why}: name GPUs, like sm89.")
    known = [name.lower() for name in library.ComputeCapability.__members__]
    for target in options.targets:
        if target not in known:
            names = ", ".join([*(name for name in known if name.startswith("sm")), CURRENT])
            raise InputError(f"tensorrt-rtx {library.__version__} builds for {names}, got {target}.")


def _config(
    library: ModuleType,
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    backend: str,
    options: PlanOptions,
) -> trt.IBuilderConfig:
    config: trt.IBuilderConfig = builder.create_builder_config()
    config.clear_flag(library.BuilderFlag.TF32)
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    if backend == "tensorrt-rtx":
        targets = options.targets or _default_targets(library, network)
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(library.ComputeCapability.__members__[target.upper()], index)
    if options.hardware_compatible:
        config.hardware_compatibility_level = library.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.version_compatible:
        config.set_flag(library.BuilderFlag.VERSION_COMPATIBLE)
    if options.stripped:
        config.set_flag(library.BuilderFlag.STRIP_PLAN)
        config.set_flag(library.BuilderFlag.REFIT_IDENTICAL)
    profile: trt.IOptimizationProfile = builder.create_optimization_profile()
    image = tuple(network.get_input(0).shape)[1:]
    smallest, best, largest = options.batch
    profile.set_shape(INPUT, (smallest, *image), (best, *image), (largest, *image))
    config.add_optimization_profile(profile)
    return config


def _default_targets(library: ModuleType, network: trt.INetworkDefinition) -> tuple[str, ...]:
    types = set()
    for number in range(network.num_layers):
        layer: trt.ILayer = network.get_layer(number)
        types.update(layer.get_output_type(index) for index in range(layer.num_outputs))
    first = int(_FP8_FROM[2:]) if library.DataType.FP8 in types else 0
    return tuple(target for target in DEFAULT_TARGETS if int(target[2:]) >= first)


def folded(graph: Path, folder: Path, *, own_kernels: bool = False) -> Path:
    """A copy of a graph without functions, in which everything that no input decides is a constant.

    Weights in a narrow format stay codes and scales, those of 4 bits with scales in blocks.

    Args:
        graph: ONNX file; its weights lie beside it.
        folder: Where the copy and its weights are put.
        own_kernels: Whether merging becomes nodes of our plugins.
    """
    flat = flat_of(graph)  # its weights are found beside it
    try:
        flat.write_bytes(_without_functions(graph, own_kernels=own_kernels).SerializeToString())
        model = ir.load(flat)
        optimizer.optimize_ir(
            model,
            num_iterations=_ITERATIONS,
            input_size_limit=_UNLIMITED,
            output_size_limit=_UNLIMITED,
            should_fold=lambda node: False if node.op_type == "DequantizeLinear" else None,
        )
        PutScalesInBlocks()(model)
        ir.save(model, folder / "graph.onnx", external_data="weights.bin")
    finally:
        flat.unlink(missing_ok=True)
    return folder / "graph.onnx"


def _without_functions(graph: Path, *, own_kernels: bool) -> onnx.ModelProto:
    proto = onnx.load(graph, load_external_data=False)
    if not own_kernels:
        return inline(proto)
    from tocom.export.engine.tensorrt.plugin import LeavePlugins, WithPlugins  # needs Triton

    return apply(LeavePlugins(), apply(WithPlugins(), proto))


def refitted(plan: bytes, graph: Path, backend: str) -> bytes:
    """A plan that was built without weights, with those of its graph. Needs a GPU that the plan is for.

    Args:
        plan: Built with `PlanOptions.stripped`.
        graph: What it was built from; its weights lie beside it.
        backend: Whose it is.

    Raises:
        InputError: If the library refuses either; its own words follow.
    """
    library = library_of(backend)
    with tempfile.TemporaryDirectory() as folder, complaints() as messages:
        content = _refitted(library, plan, folded(graph, Path(folder)))
    if content is None:
        raise InputError(f"{backend} cannot refit a plan by {graph.name}: {_last(messages)}")
    return content


def _refitted(library: ModuleType, plan: bytes, graph: Path) -> bytes | None:
    runtime: trt.Runtime = library.Runtime(logger(library))
    engine: trt.ICudaEngine | None = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return None
    refitter: trt.Refitter = library.Refitter(engine, logger(library))
    parser: trt.OnnxParserRefitter = library.OnnxParserRefitter(refitter, logger(library))
    if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
        return None
    config: trt.ISerializationConfig = engine.create_serialization_config()
    config.clear_flag(library.SerializationFlag.EXCLUDE_WEIGHTS)
    whole: trt.IHostMemory | None = engine.serialize_with_config(config)
    return None if whole is None else bytes(whole)


def layer_information(plan: bytes, backend: str) -> str:
    """The layers that a plan was built into, as the library's JSON. Needs a GPU that the plan is for.

    Raises:
        InputError: If the library does not load the plan.
    """
    library = library_of(backend)
    with complaints() as messages:
        runtime: trt.Runtime = library.Runtime(logger(library))
        engine: trt.ICudaEngine | None = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise InputError(f"{backend} does not load the plan: {_last(messages)}")
        inspector: trt.EngineInspector = engine.create_engine_inspector()
        return inspector.get_engine_information(library.LayerInformationFormat.JSON)
