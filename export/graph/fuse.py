"""Checkpoint + compensator -> the weights of one degree.

Legal because the pairs are linear at inference: W x + scale * up (gate * (down x)) is the same as
(W + scale * up diag(gate) down) x, so the fused network has the plain network's graph and only the q and v rows of
`attn.qkv` differ (ToCom, section 3.3).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tocom.compensator import Compensation
from tocom.runtime.errors import InputError


def fuse(weights: Mapping[str, Tensor], compensation: Compensation) -> dict[str, Tensor]:
    """Adds a compensation to the query and value rows of every block's qkv weight.

    Args:
        weights: State dict of a timm VisionTransformer; left untouched.
        compensation: The change, for one source degree, target degree and scale.

    Returns:
        A new state dict. Tensors that do not change are the same objects, not copies.

    Raises:
        InputError: If a qkv weight is missing, its shape does not fit the compensator, or the scale overflows it.
    """
    width = compensation.compensator.info.width
    fused = dict(weights)
    for block in range(compensation.compensator.info.depth):
        name = f"blocks.{block}.attn.qkv.weight"
        if name not in weights or weights[name].shape != (3 * width, width):
            shape = list(weights[name].shape) if name in weights else "none"
            raise InputError(f"fusing needs {name} of shape {[3 * width, width]}, got {shape}.")
        qkv = weights[name].double().clone()
        rows = {"q": slice(0, width), "v": slice(2 * width, 3 * width)}
        for which, part in rows.items():
            qkv[part] = qkv[part] + compensation.delta(block, which)
        fused[name] = qkv.to(weights[name].dtype)
        if not fused[name].isfinite().all():
            raise InputError(
                f"the compensated {name} must be finite, got infinity at scale {compensation.delta_scale}."
            )
    _ensure_only_qkv_changed(weights, fused)
    return fused


def _ensure_only_qkv_changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    changed = {name for name in after if after[name] is not before[name]}
    strays = {name for name in changed if not name.endswith(".attn.qkv.weight")}
    if strays or after.keys() != before.keys():
        raise AssertionError(f"fusing may change attn.qkv.weight only, changed {sorted(strays)}")
