"""Queries, keys and values as three products, whose weights a family stores once for all its degrees.

`attn.qkv` is one product, and a compensated one differs from degree to degree in two thirds of its bytes. Apart, the
keys' weight is the same at every degree, and the compensated ones are

    W_q + up . diag(gate) . down

(ToCom, section 3.3), of which only the gate, G*k numbers, depends on the degree. Engines fold it when they load the
graph, since it has no input. The attention scale is folded into the weights too, where no norm stands between.
"""

from __future__ import annotations

import torch
from timm.layers import Attention
from torch import Tensor, nn

from tocom.compensator import Compensation
from tocom.export.artifacts import FusedCheckpoint

FACTORS = ("_down", "_gate", "_up")  # how their names end


class Projection(nn.Module):
    """The project step of one block (`tocom.vit.ProjectStep`); weights lie as [in, out], as MatMul takes them.

    Args:
        attn: The block's attention.
        weight: Of `attn.qkv`, [3C, C]; plain where there is a compensation, which is added in the graph.
        block: Block index.
        compensation: The change of q and v; None for none.
    """

    def __init__(self, attn: Attention, weight: Tensor, block: int, compensation: Compensation | None) -> None:
        super().__init__()
        self.attn = [attn]  # in a list, so that its weights are not this module's
        self.folded = isinstance(attn.q_norm, nn.Identity)
        self.compensated = compensation is not None
        bias = attn.qkv.bias
        rows = dict(zip("qkv", weight.chunk(3), strict=True))
        biases = dict(zip("qkv", (None,) * 3 if bias is None else bias.chunk(3), strict=True))
        for name, part in rows.items():
            scale = attn.scale if name == "q" and self.folded else 1.0
            self._keep(f"{name}_weight", part.T * scale)
            self._keep(f"{name}_bias", None if biases[name] is None else biases[name] * scale)
            if compensation is not None and name != "k":
                up, gate, down = compensation.factors(block, name)
                self._keep(f"{name}_down", down.T)
                self._keep(f"{name}_gate", gate * scale)
                self._keep(f"{name}_up", up.T)

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, None if tensor is None else tensor.detach().float().contiguous())

    def forward(self, x: Tensor, queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, C] -> q [B, H, Q, D], k and v [B, H, N, D]."""
        (attn,) = self.attn
        asking = x if queries is None else x[:, :queries]
        q, k, v = (
            self._product(part, name).unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2)
            for name, part in {"q": asking, "k": x, "v": x}.items()
        )
        q = q if self.folded else attn.q_norm(q) * attn.scale
        return q, attn.k_norm(k), v

    def _product(self, x: Tensor, name: str) -> Tensor:
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        if self.compensated and name != "k":
            down, gate, up = (getattr(self, f"{name}_{part}") for part in ("down", "gate", "up"))
            weight = weight + (down * gate) @ up
        product = torch.matmul(x, weight)
        return product if bias is None else product + bias


def projections(model: nn.Module, plain: nn.Module, fused: FusedCheckpoint) -> nn.ModuleList:
    """The project steps of all blocks.

    Args:
        model: With the fused weights.
        plain: With the weights that the compensation was added to.
        fused: Where the fused weights come from.
    """
    compensation = fused.compensation
    if compensation is not None and not compensation.gate.any():
        compensation = None
    base = model if compensation is None else plain
    return nn.ModuleList(
        Projection(block.attn, base.blocks[index].attn.qkv.weight, index, compensation)
        for index, block in enumerate(model.blocks)
    )
