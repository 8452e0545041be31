"""Inside a block at fault: which of its products, norms and steps is the first to be wrong?

The reference gets the tokens that the engine's block got, and what every product and norm of it puts out is compared,
in the order in which they are computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from tocom.export.artifacts import Engine
from tocom.export.graph.operators import DOMAIN, point_name
from tocom.export.proof.debug_copy import debug_copy
from tocom.export.proof.gates import GATES
from tocom.export.proof.observe import Observed, RunnerObserver
from tocom.export.proof.parts import compare_parts, distance
from tocom.vit import ReducedViT

_NAMED = ("MatMul", "Add", "LayerNormalization")  # nodes that bear the name of what they are of
_THROUGH = ("Cast", "QuantizeLinear", "DequantizeLinear")
_INPUTS = ("attn.proj", "mlp.fc2")  # what goes into them comes out of softmax and the activation, which have no name


@dataclass(frozen=True)
class OperatorError:
    """What one operator of a block puts out, beside the reference.

    Attributes:
        name: In the graph, like blocks.2.attn.v, or of the part that it ends.
        error: Distance from the reference.
        allowed: What healthy ones may be off.
    """

    name: str
    error: float
    allowed: float

    @property
    def is_wrong(self) -> bool:
        """Whether it is further off."""
        return not self.error <= self.allowed

    def __str__(self) -> str:
        return f"{self.name}: {self.error:.1e}, allowed {self.allowed:.1e}"


def operators_of_block(
    engine: Engine, reference: ReducedViT, batches: Iterable[np.ndarray], block: int
) -> list[OperatorError]:
    """Compares what the operators of one block put out, in their order.

    Args:
        engine: As listed.
        reference: Of the same degree, float64; quantized where the engine is.
        batches: Normalized images, float32 [B, 3, H, W].
        block: The one at fault.
    """
    proto = onnx.load(engine.source.file, load_external_data=False)
    values = dict(_values(proto.graph, block))
    largest: dict[str, float] = {}
    with debug_copy(engine, values.values()) as runner:
        for pixel_values in batches:
            outputs = runner.infer_all(pixel_values)
            observed = RunnerObserver.read(outputs, reference)
            expected = _expected(reference, torch.from_numpy(pixel_values), observed, block)
            for label, name in values.items():
                if label not in expected:
                    continue
                value = torch.from_numpy(np.asarray(outputs[name], np.float64))
                wanted = expected[label][:, : value.shape[1]]
                if value.shape == wanted.shape:
                    error = float(distance(value, wanted).max())
                    largest[label] = max(largest.get(label, 0.0), error)
            local = compare_parts(reference, torch.from_numpy(pixel_values), observed)
            for (at, part), errors in local.errors.items():
                if at == block and (ending := _ENDS.get(part)) is not None:
                    largest[ending] = max(largest.get(ending, 0.0), float(errors.max()))
    gates = GATES[engine.precision]
    order = [*values, *_ENDS.values()]
    order.sort(key=lambda label: _place(proto.graph, values.get(label), label, block))
    return [
        OperatorError(f"blocks.{block}.{label}", largest[label], gates.part * gates.unit_roundoff)
        for label in order
        if label in largest
    ]


_ENDS = {"attention": "attn + residual", "reduction": "reduction", "mlp": "mlp + residual"}
_ENDING = {"attn + residual": ("attended", 0), "reduction": ("remaining", 0), "mlp + residual": ("tokens", 1)}


def _place(graph: onnx.GraphProto, name: str | None, label: str, block: int) -> int:
    """Where in the graph a value is made."""
    if name is None:
        point, later = _ENDING[label]
        name = point_name(block + later, point)
    return next((index for index, node in enumerate(graph.node) if name in node.output), len(graph.node))


def _values(graph: onnx.GraphProto, block: int) -> Iterator[tuple[str, str]]:
    """What of a block bears a name: its label within the block, and the value."""
    made_by = {name: node for node in graph.node for name in node.output}
    prefix = f"blocks.{block}."
    last: dict[str, str] = {}
    for node in graph.node:
        module, _, kind = node.name.rpartition(".")
        if node.domain == DOMAIN or kind not in _NAMED or not module.startswith(prefix):
            continue
        label = module.removeprefix(prefix)
        if kind == "MatMul" and label in _INPUTS:
            source = node.input[0]
            while source in made_by and made_by[source].op_type in _THROUGH:
                source = made_by[source].input[0]
            yield f"input of {label}", source
        last[label] = node.output[0]
    yield from last.items()


@torch.no_grad()
def _expected(reference: ReducedViT, pixel_values: Tensor, observed: Observed, block: int) -> dict[str, Tensor]:
    """Label -> what the reference puts out there, from the tokens that the engine's block got."""
    found: dict[str, Tensor] = {}
    module = reference.model.blocks[block]
    with _watched(module, found):
        compare_parts(reference, pixel_values, observed, only=block)
    if (qkv := found.pop("attn.qkv", None)) is not None:
        attn = module.attn
        scale = attn.scale if isinstance(attn.q_norm, nn.Identity) else 1.0
        found |= dict(zip(("attn.q", "attn.k", "attn.v"), qkv.chunk(3, dim=-1), strict=True))
        found["attn.q"] = found["attn.q"] * scale
    return found


@contextmanager
def _watched(block: nn.Module, found: dict[str, Tensor]) -> Iterator[None]:
    """Notes what the parts of a block put out, and what goes into some."""
    with ExitStack() as stack:
        for name, part in block.named_modules():
            if name:
                hook = part.register_forward_hook(
                    lambda _part, _inputs, output, name=name: found.__setitem__(name, output)
                )
                stack.callback(hook.remove)
            if name in _INPUTS:
                hook = part.register_forward_pre_hook(
                    lambda _part, inputs, name=name: found.__setitem__(f"input of {name}", inputs[0])
                )
                stack.callback(hook.remove)
        yield
