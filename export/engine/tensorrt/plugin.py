"""Graph -> a graph whose merging TensorRT can hand to this project's Triton kernels; and how these are launched.

TensorRT 10.15 and later take a node for a plugin where it names a namespace in which one of its type is registered,
see `.register_plugin`. Everything else expands the node's function. So one graph serves both.

A quickly deployable plugin with an ahead-of-time implementation is one kernel. TensorRT passes it pointers to its
inputs and then to its outputs, all contiguous; between them could stand numbers. The kernels of `tocom.triton_merge`
have that order, and all their numbers follow from the node but the batch, which is in the grid: so they are compiled
in. Merging takes two launches, so a node becomes two, TokenMergeDecide and TokenMergeApply. Both stand in the graph,
not in the function of the one: NVIDIA's parser does not pass a function's attributes on to a function that it calls.

Not verified: that TensorRT builds and runs this, which takes its libraries and a GPU. What is verified stands in
tests/export/engine/tensorrt/test_plugin.py: the parser of TensorRT for RTX takes a node for the plugin of its name; the
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
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from tocom import triton_merge
from tocom.export.graph.graph_pass import ProtoPass, copy_of, integers_of, reductions_of
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


class WithPlugins(ProtoPass):
    """Merging becomes two nodes that name their plugins, each with a function for who has none.

    Nodes that the plugins do not serve stay as they are: those that merge nothing, and those of more tokens than one
    program decides.
    """

    def requires(self, model: onnx.ModelProto) -> None:
        """Merging has its function in the model, as in every graph of this project.

        Raises:
            PreconditionError: If it is not so.
        """
        if any(map(_is_merging, model.graph.node)) and _merge_function(model) is None:
            raise PreconditionError(f"{MergeOperator.name} must have its function in the model")

    def call(self, model: onnx.ModelProto) -> PassResult:
        """See the class."""
        copy = copy_of(model)
        nodes = [part for node in model.graph.node for part in (_parts(node) if _is_served(node) else [node])]
        if len(nodes) == len(model.graph.node):
            return PassResult(copy, modified=False)
        merge = _merge_function(copy)
        copy.functions.extend(_part_of(merge, name) for name in _SIGNATURES)
        if not any(map(_is_merging, nodes)):
            copy.functions.remove(merge)
        del copy.graph.node[:]
        copy.graph.node.extend(nodes)
        return PassResult(copy, modified=True)

    def ensures(self, model: onnx.ModelProto) -> None:
        """What plugins serve is theirs, and their nodes have a function each.

        Raises:
            PostconditionError: If it is not so.
        """
        if left := [node.name for node in model.graph.node if _is_served(node)]:
            raise PostconditionError(f"plugins must do what they serve, {left} is not theirs")
        functions = {function.name for function in model.functions}
        if missing := {node.op_type for node in reductions_of(model)} & _SIGNATURES.keys() - functions:
            raise PostconditionError(f"plugins' nodes must have a function each, {sorted(missing)} have none")


class LeavePlugins(ProtoPass):
    """For a parser that has the plugins: it must take them, as their functions go; others are inlined."""

    def call(self, model: onnx.ModelProto) -> PassResult:
        """See the class."""
        kept = [(DOMAIN, name) for name in _SIGNATURES]
        flat = onnx.inliner.inline_selected_functions(model, kept, exclude=True)
        del flat.functions[:]
        return PassResult(flat, modified=bool(model.functions))

    def ensures(self, model: onnx.ModelProto) -> None:
        """No functions are left, and no operators but the plugins'.

        Raises:
            PostconditionError: If it is not so.
        """
        if left := {node.op_type for node in reductions_of(model)} - _SIGNATURES.keys():
            raise PostconditionError(f"operators without a plugin must be inlined, {sorted(left)} are not")


def _is_merging(node: onnx.NodeProto) -> bool:
    return (node.domain, node.op_type) == (DOMAIN, MergeOperator.name)


def _merge_function(model: onnx.ModelProto) -> onnx.FunctionProto | None:
    named = (DOMAIN, MergeOperator.name)
    return next((function for function in model.functions if (function.domain, function.name) == named), None)


def _is_served(node: onnx.NodeProto) -> bool:
    if not _is_merging(node):
        return False
    numbers = integers_of(node)
    return numbers["r"] > 0 and max(counts_of(numbers["tokens"], numbers["protected"])) <= triton_merge._ONE_PROGRAM


def _parts(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The two nodes that do what the one does; its values keep their names."""
    x, token_size, metric = node.input
    merged, merged_size, *decisions = node.output
    attributes = integers_of(node)
    parts = []
    for name, inputs, outputs in (
        (DECIDE, [metric], decisions),
        (APPLY, [x, token_size, *decisions], [merged, merged_size]),
    ):
        numbers = {attribute: attributes[attribute] for attribute in _ATTRIBUTES[name]}
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
        kernel_source = ASTSource(self.kernel, signature, dict(self.constants), aligned)
        binary = triton.compile(kernel_source, target=target, options={**self.options, "ptx_version": PTX_VERSION})
        compiled = binary.metadata
        if (
            compiled.global_scratch_size
            or compiled.profile_scratch_size
            or compiled.num_ctas > 1
            or compiled.shared > 48 << 10
        ):
            raise AssertionError(f"{compiled.name} cannot be launched by TensorRT: {compiled}")
        name = f"{compiled.name}_{hashlib.sha256(repr(self).encode()).hexdigest()[:16]}"
        ptx = _less_scratch(binary.asm["ptx"], compiled.name, len(pointers)).replace(compiled.name, name)
        return Kernel(name, ptx, 32 * compiled.num_warps, compiled.shared)


def _less_scratch(ptx: str, name: str, count: int) -> str:
    """Code without the two parameters that Triton appends for memory that kernels may ask it for.

    Raises:
        AssertionError: If there are others, or they are used.
    """
    declared = re.search(rf"(\.entry {name}\()(.*?)(\))", ptx, re.DOTALL)
    parameters = declared[2].split(",") if declared else []
    scratch = [f"{name}_param_{index}" for index in (count, count + 1)]
    if [parameter.split()[-1] for parameter in parameters[count:]] != scratch:
        raise AssertionError(f"{name} must have {count} parameters and two for scratch memory, has {parameters}")
    shorter = ptx.replace(declared[0], f"{declared[1]}{','.join(parameters[:count])}\n{declared[3]}")
    if any(re.search(rf"\b{parameter}\b", shorter) for parameter in scratch):
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
