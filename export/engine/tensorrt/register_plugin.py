"""Registers the merge plugins with TensorRT: what they put out, and the kernels that make it.

Read `.plugin` first. A plugin takes its numbers from one text: of an attribute that is a number, TensorRT
10.16 makes an array, of which recent NumPy makes no number.
"""

# Annotations are not postponed: TensorRT reads those of the functions that it is given.
# ruff: noqa: ARG001 - it also goes by the names of their arguments

from functools import cache

from tocom.export.engine.tensorrt.plugin import (
    APPLY,
    DECIDE,
    NAMESPACE,
    POINTERS,
    apply_launch,
    counts_of,
    decide_launch,
    numbers_of,
)
from tocom.runtime.errors import InputError

OLDEST = (10, 15)  # the first TensorRT whose parser asks for plugins before it expands functions


def register(capability: int | None = None) -> None:
    """Registers the plugins, for every network of this process; a later call changes what kernels are compiled for.

    Args:
        capability: The GPU that kernels are compiled for, like 89 for sm89; None takes the one that is here.

    Raises:
        InputError: If TensorRT is not installed, or knows no such plugins. TensorRT for RTX never does.
    """
    try:
        import tensorrt as trt
        import tensorrt.plugin as trtp
    except ImportError as error:
        raise InputError(f"the merge plugins need TensorRT, which is not installed here: {error}") from error
    if tuple(map(int, trt.__version__.split(".")[:2])) < OLDEST:
        raise InputError(f"the merge plugins need TensorRT {OLDEST[0]}.{OLDEST[1]} or later, got {trt.__version__}.")
    _describe()
    implementation = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]

    @trtp.aot_impl(f"{NAMESPACE}::{DECIDE}")
    def decide(metric, plugin_numbers, outputs, tactic) -> implementation:
        numbers = numbers_of(DECIDE, plugin_numbers)
        return implement(decide_launch(types_of(metric, *outputs), metric.shape[2], **numbers), metric)

    @trtp.aot_impl(f"{NAMESPACE}::{APPLY}")
    def apply(x, token_size, src, dst, unm, plugin_numbers, outputs, tactic) -> implementation:
        types = types_of(x, token_size, src, dst, unm, *outputs)
        return implement(apply_launch(types, x.shape[2], **numbers_of(APPLY, plugin_numbers)), x)

    def types_of(*tensors):
        return [POINTERS[tensor.dtype.name] for tensor in tensors]

    def implement(launch, first):
        compiled = launch.compiled(capability)
        programs = first.shape_expr[0] * launch.programs
        where = trtp.KernelLaunchParams(grid_x=programs, block_x=compiled.threads, shared_mem=compiled.shared_bytes)
        return compiled.name, compiled.ptx, where, trtp.SymIntExprs(0)


@cache
def _describe() -> None:
    """Tells TensorRT of both plugins' outputs, which it takes once."""
    import tensorrt as trt
    import tensorrt.plugin as trtp

    @trtp.register(f"{NAMESPACE}::{DECIDE}")
    def decide(
        metric: trtp.TensorDesc, plugin_numbers: str
    ) -> tuple[trtp.TensorDesc, trtp.TensorDesc, trtp.TensorDesc]:
        numbers = numbers_of(DECIDE, plugin_numbers)
        r = numbers["r"]
        counts = r, r, counts_of(numbers["tokens"], numbers["protected"])[0] - r
        return tuple(trtp.from_shape_expr((metric.shape_expr[0], count, 1), trt.int64) for count in counts)

    @trtp.register(f"{NAMESPACE}::{APPLY}")
    def apply(
        x: trtp.TensorDesc,
        token_size: trtp.TensorDesc,
        src: trtp.TensorDesc,
        dst: trtp.TensorDesc,
        unm: trtp.TensorDesc,
        plugin_numbers: str,
    ) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
        numbers = numbers_of(APPLY, plugin_numbers)
        remaining = numbers["tokens"] - numbers["r"]
        images, _, width = x.shape_expr
        merged = trtp.from_shape_expr((images, remaining, width), x.dtype)
        return merged, trtp.from_shape_expr((images, remaining, 1), token_size.dtype)
