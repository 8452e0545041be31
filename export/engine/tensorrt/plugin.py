"""Graph -> a graph whose merging TensorRT can hand to this project's Triton kernels; and how these are launched.

TensorRT 10.15 and later take a node for a plugin where it names a namespace in which one of its type is registered,
see `.register_plugin`. Everything else expands the node's function. So one graph serves both.

A quickly deployable plugin with an ahead-of-time implementation is one kernel. TensorRT passes it pointers to its
inputs and then to its outputs, all contiguous; between them could stand numbers. The kernels of `tocom.triton_merge`
have that order, and all their numbers follow from the node but the batch, which is in the grid: so they are compiled
in. Merging takes two launches, so a node becomes two, TokenMergeDecide and TokenMergeApply. Both stand in the graph,
not in the function of the one: NVIDIA's parser does not pass a function's attributes on to a function that it calls.

Not verified: that TensorRT builds and runs this, which takes its libraries and a GPU. What is verified stands in
tests/export/plans/test_plugin.py: the parser of TensorRT for RTX takes a node for the plugin of its name; the
declarations run in the Python code of `tensorrt.plugin` 10.16 and 11.4; the kernels compile, and launched in Triton's
interpreter as the plugins have it they compute what the reference does. Taken on trust: that TensorRT's tensors begin
at multiples of 16 bytes, and that it launches a kernel that takes no numbers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
import onnx.inliner

from tocom import triton_merge
from tocom.export.graph.operators import DOMAIN
from tocom.export.graph.operators.merge import MergeOperator
from tocom.merging import first_positions

if TYPE_CHECKING:
    import triton

NAMESPACE, PLUGIN_VERSION = "tocom", "1"  # TensorRT allows no dot in a namespace, and no other version
DECIDE, APPLY = "TokenMergeDecide", "TokenMergeApply"
PTX_VERSION = 88  # of CUDA 12.9; Triton would write that of its own assembler, which TensorRT's may not know yet
POINTERS = {"FLOAT": "*fp32", "HALF": "*fp16", "BF16": "*bf16", "INT64": "*i64"}

_ATTRIBUTES = {DECIDE: ("r", "tokens", "protected", "keep_order"), APPLY: ("r", "tokens", "protected")}
_TEXT = "plugin_numbers"  # the same once more, see `.register_plugin`
_SIGNATURES = {
    DECIDE: (("metric",), ("src", "dst", "unm")),
    APPLY: (("x", "token_size", "src", "dst", "unm"), ("merged", "merged_size")),
}


def with_plugins(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which merging is two nodes that name their plugins, each with a function for who has none.

    Args:
        graph: As `tocom.export.graph.lower` writes it, in any number format; weights may lie outside.

    Returns:
        The copy. Nodes that the plugins do not serve stay as they are: those that merge nothing, and those of more
        tokens than one program decides.
    """
    graph = onnx.ModelProto.FromString(graph.SerializeToString())
    nodes = [part for node in graph.graph.node for part in (_parts(node) if _is_served(node) else [node])]
    if len(nodes) > len(graph.graph.node):
        merge = next(each for each in graph.functions if (each.domain, each.name) == (DOMAIN, MergeOperator.name))
        graph.functions.extend(_part_of(merge, name) for name in _SIGNATURES)
        if not any((node.domain, node.op_type) == (DOMAIN, MergeOperator.name) for node in nodes):
            graph.functions.remove(merge)
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.graph.node[:]
        graph.graph.node.extend(nodes)
    return graph


def without_functions(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy for a parser that has the plugins: it must take them, as their functions are gone; others are inlined.

    Args:
        graph: As `with_plugins` returns it.
    """
    kept = [(DOMAIN, name) for name in _SIGNATURES]
    graph = onnx.inliner.inline_selected_functions(graph, kept, exclude=True)
    del graph.functions[:]
    return graph


def _is_served(node: onnx.NodeProto) -> bool:
    if (node.domain, node.op_type) != (DOMAIN, MergeOperator.name):
        return False
    given = {attribute.name: attribute.i for attribute in node.attribute}
    return given["r"] > 0 and max(counts_of(given["tokens"], given["protected"])) <= triton_merge._ONE_PROGRAM


def _parts(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The two nodes that do what the one does; its values keep their names."""
    x, token_size, metric = node.input
    merged, merged_size, *decisions = node.output
    given = {attribute.name: attribute.i for attribute in node.attribute}
    parts = []
    for name, inputs, outputs in (
        (DECIDE, [metric], decisions),
        (APPLY, [x, token_size, *decisions], [merged, merged_size]),
    ):
        numbers = {attribute: given[attribute] for attribute in _ATTRIBUTES[name]}
        named = {"plugin_namespace": NAMESPACE, "plugin_version": PLUGIN_VERSION}
        text = {_TEXT: " ".join(map(str, numbers.values()))}
        where = {"name": f"{node.name}.{name}", "domain": DOMAIN}
        parts.append(onnx.helper.make_node(name, inputs, outputs, **where, **numbers, **named, **text))
    return parts


def numbers_of(name: str, text: str) -> dict[str, int]:
    """What the text of a node says, by attribute.

    Args:
        name: Type of the node, `DECIDE` or `APPLY`.
        text: Its attribute plugin_numbers, which NVIDIA's parser ends with a zero byte.
    """
    return dict(zip(_ATTRIBUTES[name], map(int, text.rstrip("\0").split()), strict=True))


def _part_of(merge: onnx.FunctionProto, name: str) -> onnx.FunctionProto:
    """What of a function's body makes some values out of others."""
    inputs, outputs = _SIGNATURES[name]
    needed, nodes = set(outputs), []
    for node in reversed(merge.node):
        if needed.intersection(node.output) and not set(inputs).intersection(node.output):
            nodes.append(node)
            needed.update(node.input)
    attributes = [*_ATTRIBUTES[name], "plugin_namespace", "plugin_version", _TEXT]
    return onnx.helper.make_function(DOMAIN, name, inputs, outputs, nodes[::-1], merge.opset_import, attributes)


def counts_of(tokens: int, protected: int) -> tuple[int, int]:
    """How many a-tokens and b-tokens there are."""
    first_a, first_b = first_positions(protected)
    return len(range(first_a, tokens, 2)), len(range(first_b, tokens, 2))


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Attributes:
        name: Of its entry; no other kernel has it.
        ptx: Its code, which takes pointers to inputs and outputs and nothing else.
        threads: Per program.
        shared_bytes: Of shared memory per program.
    """

    name: str
    ptx: str
    threads: int
    shared_bytes: int


@dataclass(frozen=True)
class Launch:
    """How a kernel of `tocom.triton_merge` is launched for a node.

    Attributes:
        kernel: The kernel.
        pointers: Types of what its first parameters point to, as Triton writes them.
        constants: Values of its other parameters.
        options: How it is compiled.
        programs: Per image.
    """

    kernel: triton.JITFunction
    pointers: tuple[str, ...]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    programs: int

    def compiled(self, capability: int | None = None) -> Kernel:
        """Compiles the kernel.

        Args:
            capability: The GPU that it is for, like 89 for sm89; None takes the one that is here.

        Raises:
            AssertionError: If the kernel needs what TensorRT does not give: memory of its own, or more than a GPU has
                to share without being asked.
        """
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = [parameter.name for parameter in self.kernel.params]
        pointers = dict(zip(names, self.pointers, strict=False))
        signature = {name: pointers.get(name, "constexpr") for name in names}
        aligned = {(index,): [["tt.divisibility", 16]] for index in range(len(pointers))}
        target = GPUTarget("cuda", capability, 32) if capability else None
        source = ASTSource(self.kernel, signature, dict(self.constants), aligned)
        binary = triton.compile(source, target=target, options={**self.options, "ptx_version": PTX_VERSION})
        made = binary.metadata
        if made.global_scratch_size or made.profile_scratch_size or made.num_ctas > 1 or made.shared > 48 << 10:
            raise AssertionError(f"{made.name} cannot be launched by TensorRT: {made}")
        name = f"{made.name}_{hashlib.sha256(repr(self).encode()).hexdigest()[:16]}"
        ptx = _less_scratch(binary.asm["ptx"], made.name, len(pointers)).replace(made.name, name)
        return Kernel(name, ptx, 32 * made.num_warps, made.shared)


def _less_scratch(ptx: str, name: str, count: int) -> str:
    """Code without the two parameters that Triton appends for memory that kernels may ask it for.

    Raises:
        AssertionError: If there are others, or they are used.
    """
    declared = re.search(rf"(\.entry {name}\()(.*?)(\))", ptx, re.DOTALL)
    parameters = declared[2].split(",") if declared else []
    scratch = [f"{name}_param_{index}" for index in (count, count + 1)]
    if [each.split()[-1] for each in parameters[count:]] != scratch:
        raise AssertionError(f"{name} must have {count} parameters and two for scratch memory, has {parameters}")
    shorter = ptx.replace(declared[0], f"{declared[1]}{','.join(parameters[:count])}\n{declared[3]}")
    if any(re.search(rf"\b{each}\b", shorter) for each in scratch):
        raise AssertionError(f"{name} uses scratch memory")
    return shorter


def decide_launch(
    pointers: Sequence[str], width: int, *, r: int, tokens: int, protected: int, keep_order: int
) -> Launch:
    """How `tocom.triton_merge.decide` launches its kernel, for up to 128 a-tokens and b-tokens.

    Args:
        pointers: Types of metric [B, N, D], src [B, r, 1], dst [B, r, 1] and unm [B, A - r, 1], in this order.
        width: D.
        r: Tokens to remove, at least one.
        tokens: N.
        protected: Prefix tokens.
        keep_order: Whether unmerged tokens keep their order.
    """
    (first_a, first_b), (count_a, count_b) = first_positions(protected), counts_of(tokens, protected)
    native = pointers[0] != POINTERS["FLOAT"]
    block = triton_merge._block_for(max(count_a, count_b))
    constants = {
        "r": r, "count_a": count_a, "count_b": count_b, "first_a": first_a, "first_b": first_b,
        "image_stride": tokens * width, "head_stride": tokens * width, "token_stride": width, "column_stride": 1,
        "WIDTH": width, "HEADS": 1, "NATIVE": native, "KEEP_ORDER": bool(keep_order),
        "BLOCK_A": block, "BLOCK_B": block, "BLOCK_D": min(triton_merge._block_for(width), 128 if native else 16),
    }  # fmt: skip
    options = {"num_warps": 8 if block > 64 else 4, **triton_merge._OPTIONS}
    return Launch(triton_merge._decide_image, tuple(pointers), constants, options, 1)


def apply_launch(pointers: Sequence[str], width: int, *, r: int, tokens: int, protected: int) -> Launch:
    """How `tocom.triton_merge.apply` launches its kernel.

    Args:
        pointers: Types of x [B, N, C], token_size [B, N, 1], src, dst, unm, merged [B, N - r, C] and merged_size
            [B, N - r, 1], in this order.
        width: C.
        r: As for `decide_launch`.
        tokens: As for `decide_launch`.
        protected: As for `decide_launch`.
    """
    remaining, block = tokens - r, min(triton_merge._block_for(width), 128)
    constants = {
        "log_size": None, "r": r, "protected": protected, "first_b": first_positions(protected)[1],
        "count_unm": counts_of(tokens, protected)[0] - r, "remaining": remaining, "width": width,
        "x_image": tokens * width, "x_token": width, "x_column": 1, "size_image": tokens, "size_token": 1,
        "ROWS": 16, "BLOCK_C": block, "BLOCK_R": triton_merge._block_for(r),
    }  # fmt: skip
    options = {"num_warps": 4, **triton_merge._OPTIONS}
    programs = -(-remaining // 16) * -(-width // block)
    return Launch(triton_merge._merge_rows, tuple(pointers), constants, options, programs)
