"""Token merging as Triton kernels: what `tocom.merging` decides and merges, in two launches per block on CUDA.

Written from the paper (ToMe, section 3). Each image is decided by itself, and nothing depends on the order in which
programs run, so equal inputs give equal bits. The kernels have no gradient.
"""

# ruff: noqa: N803 - a kernel's compile-time constants are in capitals

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tocom.merging import _NORM_FLOOR, Matching, first_positions
from tocom.reduction import MERGE, Reduction
from tocom.runtime.errors import InputError

if TYPE_CHECKING:
    from tocom.vit import ReduceStep  # loads timm, which the kernels do not need

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise InputError("the merge kernels need Triton, which is not installed. Run `pip install triton` on Linux, or use "
                     "tocom.merging.") from error  # fmt: skip

_FORMATS = (torch.float32, torch.float16, torch.bfloat16)
_ONE_PROGRAM = 128  # so many a-tokens and b-tokens at most are scored and ranked by one program
# Loading ahead takes shared memory for every head, more than there is. Sums and products round as they are written.
_OPTIONS = {"num_stages": 1, "enable_fp_fusion": False}
_FLOOR = tl.constexpr(_NORM_FLOOR)
_LOWEST = tl.constexpr(-(2**31))  # below the key of every score
_HIGHEST = tl.constexpr(2**31 - 1)  # the key of NaN, which torch sorts above every number


@triton.jit
def _load_metric(
    keys, tokens, inside, columns, head_stride, token_stride, column_stride, WIDTH: tl.constexpr, HEADS: tl.constexpr
):
    """The mean over heads for some tokens and columns, rounded to the number format of the keys as torch does."""
    at = keys + tokens[:, None] * token_stride + columns[None, :] * column_stride
    mask = inside[:, None] & (columns < WIDTH)[None, :]
    total = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    for head in tl.static_range(1, HEADS):
        total += tl.load(at + head * head_stride, mask=mask, other=0.0).to(tl.float32)
    return (total * (1.0 / HEADS)).to(keys.dtype.element_ty)


@triton.jit
def _reciprocal_norm(squares):
    return tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(squares), _FLOOR))


@triton.jit
def _order_of(scores):
    """float32 -> int32 keys that compare as torch sorts: -0 equals 0, and NaN is above everything."""
    bits = scores.to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ _HIGHEST, bits)
    keys = tl.where(scores == 0.0, 0, keys)
    return tl.where(scores != scores, _HIGHEST, keys)


@triton.jit
def _pick_best(
    keys, rows, count_a, count_b, first_a, first_b, head_stride, token_stride, column_stride,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, NATIVE: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each a-token's best score as a key, and the lowest b-token that has it.

    Products are taken of the metric as it is and divided by the norms afterwards: in 16 bits they are then exact, which
    tensor cores sum in float32 (NATIVE); in float32 they are taken without tensor cores, which would round them.
    """
    best = tl.full([BLOCK_A], _LOWEST, tl.int32)
    pick = tl.zeros([BLOCK_A], tl.int32)
    for begin in range(0, count_b, BLOCK_B):
        columns = begin + tl.arange(0, BLOCK_B)
        dots = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
        squares_a = tl.zeros([BLOCK_A], tl.float32)
        squares_b = tl.zeros([BLOCK_B], tl.float32)
        for start in range(0, WIDTH, BLOCK_D):
            depth = start + tl.arange(0, BLOCK_D)
            a = _load_metric(keys, first_a + 2 * rows, rows < count_a, depth,
                             head_stride, token_stride, column_stride, WIDTH, HEADS)  # fmt: skip
            b = _load_metric(keys, first_b + 2 * columns, columns < count_b, depth,
                             head_stride, token_stride, column_stride, WIDTH, HEADS)  # fmt: skip
            exact_a, exact_b = a.to(tl.float32), b.to(tl.float32)
            squares_a += tl.sum(exact_a * exact_a, axis=1)
            squares_b += tl.sum(exact_b * exact_b, axis=1)
            if NATIVE:
                dots = tl.dot(a, tl.trans(b), dots)
            else:
                dots = tl.dot(exact_a, tl.trans(exact_b), dots, input_precision="ieee")
        scores = dots * _reciprocal_norm(squares_a)[:, None] * _reciprocal_norm(squares_b)[None, :]
        order = tl.where((columns < count_b)[None, :], _order_of(scores), _LOWEST)
        top = tl.max(order, axis=1)
        lowest = tl.min(tl.where(order == top[:, None], columns[None, :], _HIGHEST), axis=1)
        pick = tl.where(top > best, lowest, pick)
        best = tl.maximum(best, top)
    return best, pick


@triton.jit
def _placing_of(best, rows, count_a):
    """int64 whose order is that of a stable sort: by score, then by lower position; padding comes last."""
    best = tl.where(rows < count_a, best, _LOWEST)
    return (best.to(tl.int64) << 32) | (rows ^ _HIGHEST).to(tl.int64)


@triton.jit
def _write_decisions(src, dst, unm, image, rank, pick, rows, r, count_a, first_a, first_b, KEEP_ORDER: tl.constexpr):
    valid = rows < count_a
    merged, stays = valid & (rank < r), valid & (rank >= r)
    tl.store(src + image * r + rank, (first_a + 2 * rows).to(tl.int64), mask=merged)
    tl.store(dst + image * r + rank, (first_b + 2 * pick).to(tl.int64), mask=merged)
    slot = tl.cumsum(stays.to(tl.int32), axis=0) - 1 if KEEP_ORDER else rank - r
    tl.store(unm + image * (count_a - r) + slot, (first_a + 2 * rows).to(tl.int64), mask=stays)


@triton.jit(do_not_specialize=["r", "count_a", "count_b", "first_a", "first_b"])
def _decide_image(
    keys, src, dst, unm, r, count_a, count_b, first_a, first_b,
    image_stride, head_stride, token_stride, column_stride,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, NATIVE: tl.constexpr, KEEP_ORDER: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program decides one image; for as many a-tokens as one block holds."""
    image = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BLOCK_A)
    best, pick = _pick_best(
        keys + image * image_stride, rows, count_a, count_b, first_a, first_b, head_stride, token_stride, column_stride,
        WIDTH, HEADS, NATIVE, BLOCK_A, BLOCK_B, BLOCK_D,
    )  # fmt: skip
    placing = _placing_of(best, rows, count_a)
    rank = tl.sum((placing[None, :] > placing[:, None]).to(tl.int32), axis=1)
    _write_decisions(src, dst, unm, image, rank, pick, rows, r, count_a, first_a, first_b, KEEP_ORDER)


@triton.jit(do_not_specialize=["count_a", "count_b", "first_a", "first_b"])
def _score_rows(
    keys, placings, picks, count_a, count_b, first_a, first_b,
    image_stride, head_stride, token_stride, column_stride,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, NATIVE: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program scores some of one image's a-tokens."""
    blocks = tl.cdiv(count_a, BLOCK_A)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * BLOCK_A + tl.arange(0, BLOCK_A)
    best, pick = _pick_best(
        keys + image * image_stride, rows, count_a, count_b, first_a, first_b, head_stride, token_stride, column_stride,
        WIDTH, HEADS, NATIVE, BLOCK_A, BLOCK_B, BLOCK_D,
    )  # fmt: skip
    tl.store(placings + image * count_a + rows, _placing_of(best, rows, count_a), mask=rows < count_a)
    tl.store(picks + image * count_a + rows, pick, mask=rows < count_a)


@triton.jit(do_not_specialize=["r", "count_a", "first_a", "first_b"])
def _rank_image(
    placings, picks, src, dst, unm, r, count_a, first_a, first_b,
    KEEP_ORDER: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """One program ranks one image's a-tokens, each by how many others come before it."""
    image = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BLOCK_A)
    valid = rows < count_a
    placing = tl.load(placings + image * count_a + rows, mask=valid, other=0)
    pick = tl.load(picks + image * count_a + rows, mask=valid, other=0)
    rank = tl.zeros([BLOCK_A], tl.int32)
    for begin in range(0, count_a, BLOCK_J):
        others = begin + tl.arange(0, BLOCK_J)
        other = tl.load(placings + image * count_a + others, mask=others < count_a, other=0)
        before = (other[None, :] > placing[:, None]) & (others < count_a)[None, :]
        rank += tl.sum(before.to(tl.int32), axis=1)
    _write_decisions(src, dst, unm, image, rank, pick, rows, r, count_a, first_a, first_b, KEEP_ORDER)


@triton.jit(do_not_specialize=["r", "protected", "first_b", "count_unm", "remaining"])
def _merge_rows(
    x, token_size, src, dst, unm, merged, merged_size, log_size, r, protected, first_b, count_unm, remaining, width,
    x_image, x_token, x_column, size_image, size_token,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program makes some of one image's remaining tokens, some channels of them."""
    parts, blocks = tl.cdiv(width, BLOCK_C), tl.cdiv(remaining, ROWS)
    part, block = tl.program_id(0) % parts, tl.program_id(0) // parts % blocks
    image = (tl.program_id(0) // parts // blocks).to(tl.int64)
    x += image * x_image
    token_size += image * size_image
    rows = block * ROWS + tl.arange(0, ROWS)
    columns = part * BLOCK_C + tl.arange(0, BLOCK_C)
    exists, in_width = rows < remaining, columns < width

    # the token that stands in each row: prefix, unmerged a-tokens, b-tokens
    behind = rows - protected
    unmerged = (behind >= 0) & (behind < count_unm)
    receives = (behind >= count_unm) & exists
    kept = tl.load(unm + image * count_unm + behind, mask=unmerged, other=0).to(tl.int32)
    token = tl.where(unmerged, kept, tl.where(receives, first_b + 2 * (behind - count_unm), rows))
    at = x + columns[None, :] * x_column
    kept_token = tl.load(at + token[:, None] * x_token, mask=exists[:, None] & in_width[None, :], other=0.0)
    size = tl.load(token_size + token * size_token, mask=exists, other=1.0).to(tl.float32)

    # the tokens that merge into it, best match first
    ranks = tl.arange(0, BLOCK_R)
    into = tl.load(dst + image * r + ranks, mask=ranks < r, other=-1).to(tl.int32)
    joins = (into[None, :] == token[:, None]) & receives[:, None]
    count = tl.sum(joins.to(tl.int32), axis=1)
    total = kept_token.to(tl.float32) * size[:, None]
    last = tl.full([ROWS], -1, tl.int32)
    for _ in range(0, tl.max(count, axis=0)):
        last = tl.min(tl.where(joins & (ranks[None, :] > last[:, None]), ranks[None, :], BLOCK_R), axis=1)
        is_left = last < r
        joining_token = tl.load(src + image * r + last, mask=is_left, other=0).to(tl.int32)
        weight = tl.load(token_size + joining_token * size_token, mask=is_left, other=0.0).to(tl.float32)
        joining = tl.load(at + joining_token[:, None] * x_token, mask=is_left[:, None] & in_width[None, :], other=0.0)
        total += joining.to(tl.float32) * weight[:, None]
        size += weight

    mean = tl.where((count > 0)[:, None], total / size[:, None], kept_token.to(tl.float32))
    row = image * remaining + rows
    tl.store(merged + row[:, None] * width + columns[None, :], mean.to(merged.dtype.element_ty),
             mask=exists[:, None] & in_width[None, :])  # fmt: skip
    once = rows + part * remaining < remaining  # by the program of the first channels
    tl.store(merged_size + row, size.to(merged_size.dtype.element_ty), mask=once)
    if log_size is not None:
        tl.store(log_size + row, tl.log(size).to(log_size.dtype.element_ty), mask=once)


_INTERPRETED = not isinstance(_decide_image, triton.JITFunction)  # TRITON_INTERPRET=1: runs on the CPU, for tests


def _require_usable(name: str, tensor: Tensor) -> None:
    """Checks what every kernel needs of an input.

    Raises:
        InputError: If it has a number format that the kernels do not know, or lies where they do not run.
    """
    if tensor.dtype not in _FORMATS:
        raise InputError(f"the merge kernels take float32, float16 and bfloat16, got {name} in {tensor.dtype}.")
    if not (tensor.is_cuda or _INTERPRETED):
        raise InputError(f"the merge kernels run on CUDA devices, got {name} on {tensor.device}. Move the model and "
                         "its input to one, or use tocom.merging.")  # fmt: skip


def _on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _block_for(count: int) -> int:
    """The block that holds so many: a power of two, 16 or more, which dot products need."""
    return max(16, triton.next_power_of_2(count))


def decide(metric: Tensor, r: int, *, protected: int = 1, keep_order: bool = True) -> Matching:
    """Decides which r tokens merge into which, see `tocom.merging.match`.

    Scores are summed in another order than torch does: where two choices are equally good to within rounding, the
    decision may be the other one. Equal tokens are equally good here too, and the lowest is picked.

    Args:
        metric: The mean over heads of the attention keys, [B, N, D], any strides; vectors no longer than 1e19.
        r: Tokens to remove; clamped to (N - protected) // 2.
        protected: Prefix tokens, neither merged away nor merged into.
        keep_order: Unmerged a-tokens in position order or in score order.

    Returns:
        The decisions.

    Raises:
        InputError: If the metric is not on a CUDA device, or not float32, float16 or bfloat16; or r is negative.
    """
    return decide_from_keys(metric.unsqueeze(1), r, protected=protected, keep_order=keep_order)


def decide_from_keys(keys: Tensor, r: int, *, protected: int = 1, keep_order: bool = True) -> Matching:
    """Decides on the attention keys themselves: the metric, `keys.mean(dim=1)`, then takes no launch of its own.

    Args:
        keys: Attention keys, [B, H, N, D], with any strides: a view of the output of `attn.qkv` will do.
        r: As for `decide`.
        protected: As for `decide`.
        keep_order: As for `decide`.

    Returns:
        The decisions.

    Raises:
        InputError: As for `decide`.
    """
    _require_usable("metric", keys)
    if r < 0:
        raise InputError(f"degree r must be 0 or more tokens per block, got {r}.")
    batch, heads, tokens, width = keys.shape
    first_a, first_b = first_positions(protected)
    count_a, count_b = len(range(first_a, tokens, 2)), len(range(first_b, tokens, 2))
    r = min(r, (tokens - protected) // 2)
    src, dst, unm = (keys.new_empty(batch, count, dtype=torch.int64) for count in (r, r, count_a - r))
    # the interpreter multiplies the bits of bfloat16 as if they were integers
    native = keys.dtype != torch.float32 and not (_INTERPRETED and keys.dtype == torch.bfloat16)
    block_d = min(_block_for(width), 128 if native else 16)  # without tensor cores, operands lie in registers
    how = {"WIDTH": width, "HEADS": heads, "NATIVE": native, "BLOCK_D": block_d, **_OPTIONS}
    with _on_device_of(keys):
        if max(count_a, count_b) <= _ONE_PROGRAM:
            block = _block_for(max(count_a, count_b))
            _decide_image[batch,](
                keys, src, dst, unm, r, count_a, count_b, first_a, first_b, *keys.stride(),
                KEEP_ORDER=keep_order, BLOCK_A=block, BLOCK_B=block, num_warps=8 if block > 64 else 4, **how,
            )  # fmt: skip
        else:
            placings = keys.new_empty(batch, count_a, dtype=torch.int64)
            picks = keys.new_empty(batch, count_a, dtype=torch.int32)
            _score_rows[batch * triton.cdiv(count_a, 64),](
                keys, placings, picks, count_a, count_b, first_a, first_b, *keys.stride(),
                BLOCK_A=64, BLOCK_B=64, num_warps=4, **how,
            )  # fmt: skip
            block = _block_for(count_a)
            _rank_image[batch,](
                placings, picks, src, dst, unm, r, count_a, first_a, first_b,
                KEEP_ORDER=keep_order, BLOCK_A=block, BLOCK_J=32, num_warps=16 if block > 512 else 8, **_OPTIONS,
            )  # fmt: skip
    return Matching(src=src, dst=dst, unm=unm, protected=protected)


def apply(
    x: Tensor,
    token_size: Tensor,
    matching: Matching,
    *,
    size_dtype: torch.dtype = torch.float32,
    log_size: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Merges tokens as decided, summing in float32, see `tocom.merging.merge`.

    Args:
        x: Tokens, [B, N, C], with any strides.
        token_size: Input patches each token stands for, [B, N, 1].
        matching: What was decided for these N tokens, by `decide` or by the reference.
        size_dtype: Number format of the sizes that are returned.
        log_size: Where the logarithm of these sizes is written too, [B, N - r, 1], contiguous.

    Returns:
        Tokens [B, N - r, C] in the number format of x, ordered prefix, unmerged a-tokens, b-tokens; and their sizes
        [B, N - r, 1].

    Raises:
        InputError: If x or token_size is not on a CUDA device, or not float32, float16 or bfloat16; x needs a gradient;
            or the shapes do not belong together.
    """
    _require_usable("x", x)
    _require_usable("token_size", token_size)
    if torch.is_grad_enabled() and (x.requires_grad or token_size.requires_grad):
        raise InputError("the merge kernels have no gradient, and x needs one. Use tocom.merging or torch.no_grad().")
    batch, tokens, width = x.shape
    r, count_unm = matching.src.shape[1], matching.unm.shape[1]
    first_a, first_b = first_positions(matching.protected)
    left = batch, tokens - r, 1
    fits = token_size.shape == (batch, tokens, 1) and matching.dst.shape == matching.src.shape
    fits = fits and (len(matching.src), r + count_unm) == (batch, len(range(first_a, tokens, 2)))
    if not fits or not (log_size is None or (log_size.shape == left and log_size.is_contiguous())):
        raise InputError(f"sizes, decisions and log_size must be made for x of shape {tuple(x.shape)}.")
    merged, merged_size = x.new_empty(batch, tokens - r, width), x.new_empty(left, dtype=size_dtype)
    block_c = min(_block_for(width), 128)
    programs = batch * triton.cdiv(tokens - r, 16) * triton.cdiv(width, block_c)
    with _on_device_of(x):
        _merge_rows[programs,](
            x, token_size, matching.src.contiguous(), matching.dst.contiguous(), matching.unm.contiguous(),
            merged, merged_size, log_size, r, matching.protected, first_b, count_unm, tokens - r, width,
            *x.stride(), *token_size.stride()[:2],
            ROWS=16, BLOCK_C=block_c, BLOCK_R=_block_for(r), num_warps=4, **_OPTIONS,
        )  # fmt: skip
    return merged, merged_size


def triton_step(model: nn.Module, reduction: Reduction = MERGE) -> ReduceStep:
    """The reduce step with which `tocom.vit.ReducedViT.forward` merges by these kernels.

    Args:
        model: The timm model, for its prefix tokens.
        reduction: The reduction of the `ReducedViT`; only merging has kernels.

    Returns:
        The step. Token sizes keep their number format, as in the reference.

    Raises:
        InputError: If the reduction is another one.
    """
    if reduction is not MERGE:
        raise InputError(f"the merge kernels carry out --reduction merge, got {reduction.name!r}.")

    def step(_block: int, x: Tensor, token_size: Tensor, signal: Tensor, r: int) -> tuple[Tensor, Tensor]:
        matching = decide(signal, r, protected=model.num_prefix_tokens, keep_order=model.has_class_token)
        return apply(x, token_size, matching, size_dtype=token_size.dtype)

    return step
