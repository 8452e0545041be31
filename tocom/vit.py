"""The reference: a timm VisionTransformer that removes tokens between attention and MLP of its blocks."""

from __future__ import annotations

from collections.abc import Callable

from timm.layers import Attention, GluMlp, Mlp, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from tocom.compensator import Compensation
from tocom.reduction import MERGE, Reduction
from tocom.runtime.errors import InputError
from tocom.schedule import CONSTANT, MergeSchedule, ScheduleFamily

ReduceStep = Callable[[int, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(block, x [B, N, C], token_size [B, N, 1], signal, r) -> the x and token_size that remain."""

ProjectStep = Callable[[int, Tensor, int | None], tuple[Tensor, Tensor, Tensor]]
"""(block, x [B, N, C], queries) -> q [B, H, Q, D] of the first `queries` tokens or of all, scaled; k and v
[B, H, N, D]."""

_POOLS = ("token", "avg", "avgmax", "max", "map")
_MODEL_PARTS = {"patch_embed", "pos_drop", "patch_drop", "norm_pre", "blocks", "norm", "attn_pool", "fc_norm",
                "head_drop", "head", "head_dist"}  # fmt: skip
_MLPS = (Mlp, GluMlp, SwiGLU)  # each token on its own
_BLOCK_PARTS = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
_ATTENTION_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}


def require_supported(model: nn.Module) -> None:
    """Checks that a model is built of the parts that the reference models, and of no others.

    Raises:
        InputError: Naming the first part that is not modelled (rotary or relative positions, windowed attention,
            parallel or post-norm blocks, ...).
    """

    def refuse(what: str, name: str) -> None:
        raise InputError(f"{what} {name} is not modelled: token merging is exported for timm VisionTransformers with "
                         "pre-norm blocks, plain attention and learned positions.")  # fmt: skip

    def require_parts(module: nn.Module, known: set[str]) -> None:
        unknown = sorted({name for name, _ in module.named_children()} - known)
        if unknown:
            refuse(f"part {unknown[0]!r} of", type(module).__name__)

    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        refuse("model", type(model).__name__)
    require_parts(model, _MODEL_PARTS)
    if model.global_pool not in _POOLS:
        refuse("pooling", repr(model.global_pool))
    if model.num_classes < 1:
        refuse("a model without a classifier,", type(model).__name__)
    for index, block in enumerate(model.blocks):
        if type(block) is not Block:
            refuse(f"block {index},", type(block).__name__)
        if type(block.attn) is not Attention:
            refuse(f"attention of block {index},", type(block.attn).__name__)
        if type(block.mlp) not in _MLPS:
            refuse(f"MLP of block {index},", type(block.mlp).__name__)
        require_parts(block, _BLOCK_PARTS)
        require_parts(block.attn, _ATTENTION_PARTS)


class ReducedViT(nn.Module):
    """Runs a timm VisionTransformer with token reduction and proportional attention (ToMe, sections 3 and 3.1).

    The wrapped model is untouched and its parameters are shared. Every module of its blocks is called; a model with a
    part that is not modelled is refused. Without reduction it computes what the wrapped model computes. Pools that
    average over tokens weigh them by token_size, and attention pooling adds log(token_size), so that a merged token
    counts for all its patches.

    Args:
        model: A timm VisionTransformer or VisionTransformerDistilled.
        schedule: Tokens to remove per block, or a constant degree r.
        compensation: The unfused compensator, for training; None for a plain or fused model.
        reduction: How tokens are removed.

    Raises:
        InputError: If the model has a part that is not modelled, the degree or schedule is not valid for it, or the
            reduction needs what it has not.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: MergeSchedule | int = 0,
        compensation: Compensation | None = None,
        reduction: Reduction = MERGE,
    ) -> None:
        super().__init__()
        require_supported(model)
        reduction.require_supported(model)
        self.model = model
        self.reduction = reduction
        self.schedule = schedule if isinstance(schedule, MergeSchedule) else schedule_for(model, schedule)
        made_for = (len(self.schedule.requested), self.schedule.tokens_in, self.schedule.protected)
        if made_for != (len(model.blocks), tokens_in(model), model.num_prefix_tokens):
            raise InputError("a schedule must be made for the model's blocks, tokens and protected tokens, got one for "
                             f"{made_for}.")  # fmt: skip
        self.compensation = compensation

    @property
    def read_tokens(self) -> int | None:
        """How many of the last block's tokens, the first ones, the head reads; None for all of them."""
        if self.model.global_pool != "token":
            return None
        return 2 if isinstance(self.model, VisionTransformerDistilled) else 1

    @property
    def deciding_blocks(self) -> tuple[int, ...]:
        """Blocks whose reduction the logits depend on: a head that reads protected tokens only ignores the last."""
        removed = self.schedule.removed if self.read_tokens is None else self.schedule.removed[:-1]
        return tuple(block for block, r in enumerate(removed) if r)

    def forward(
        self,
        pixel_values: Tensor,
        reduce_step: ReduceStep | None = None,
        project_step: ProjectStep | None = None,
        *,
        skip_unread: bool = False,
    ) -> Tensor:
        """Classifies images.

        Args:
            pixel_values: Normalized images, [B, 3, H, W].
            reduce_step: Carries a reduction out; None decides and applies. Others record decisions, force them, or
                emit an operator into a graph.
            project_step: Computes queries, keys and values; None takes the model's `attn.qkv`.
            skip_unread: Whether to leave out what the logits do not depend on: behind the last block's keys and values,
                only the tokens that the head reads go on. The logits are the same.

        Returns:
            Logits, [B, classes].
        """
        reduce_step = reduce_step or self.reduce
        x, token_size = self.embed(pixel_values), None  # sizes are one until the first reduction: no bias is needed
        last = len(self.model.blocks) - 1
        for index, r in enumerate(self.schedule.removed):
            queries = self.read_tokens if skip_unread and index == last else None
            x, signal = self.attend(index, x, token_size, project_step, queries)
            if r and queries is None:
                if token_size is None:
                    token_size = x.new_ones(x.shape[0], x.shape[1], 1)
                x, token_size = reduce_step(index, x, token_size, signal, r)
            x = self.feed_forward(index, x)
        return self.classify(x, token_size)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the tokens entering block 0, [B, N, C]."""
        model = self.model
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixel_values))))

    def attend(
        self,
        index: int,
        x: Tensor,
        token_size: Tensor | None,
        project_step: ProjectStep | None = None,
        queries: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The first half of a block, its residual included.

        Args:
            index: The block.
            x: The tokens entering it, [B, N, C].
            token_size: Their sizes, [B, N, 1]; None where all are one.
            project_step: See `forward`.
            queries: How many of the tokens, the first ones, go on; None for all.

        Returns:
            Tokens [B, N, C], or the first `queries` of them; and the signal that the reduction decides on.
        """
        block = self.model.blocks[index]
        attended, signal = self._attend(index, block.norm1(x), token_size, project_step or self.project, queries)
        return (x if queries is None else x[:, :queries]) + block.drop_path1(block.ls1(attended)), signal

    def feed_forward(self, index: int, x: Tensor) -> Tensor:
        """The second half of a block, each token on its own: [B, N, C] -> [B, N, C]."""
        block = self.model.blocks[index]
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    def reduce(self, _block: int, x: Tensor, token_size: Tensor, signal: Tensor, r: int) -> tuple[Tensor, Tensor]:
        """The plain reduce step: decide, then apply."""
        decision = self.reduction.decide(signal, r, self.model)
        return self.reduction.apply(x, token_size, signal, decision)

    def project(self, block: int, x: Tensor, queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """The plain project step: the model's `attn.qkv`, and the compensation where there is one."""
        attn = self.model.blocks[block].attn
        batch, tokens, _ = x.shape
        qkv = attn.qkv(x)
        if self.compensation is not None:
            qkv = qkv + self.compensation(block, x)
        q, k, v = qkv.reshape(batch, tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        # q is scaled before the product: TensorRT fuses attention only then
        return attn.q_norm(q[:, :, :queries]) * attn.scale, attn.k_norm(k), v

    def _attend(
        self, block: int, x: Tensor, token_size: Tensor | None, project: ProjectStep, queries: int | None
    ) -> tuple[Tensor, Tensor]:
        """Proportional attention: [B, N, C] -> its output for the queries [B, Q, C], and the reduction's signal."""
        attn = self.model.blocks[block].attn
        q, k, v = project(block, x, queries)
        bias = None if token_size is None else token_size.log().transpose(-2, -1).unsqueeze(1)

        def weights(q: Tensor) -> Tensor:
            logits = q @ k.transpose(-2, -1)
            return (logits if bias is None else logits + bias).softmax(dim=-1)

        out = attn.attn_drop(weights(q)) @ v
        out = attn.norm(out.transpose(1, 2).flatten(2))
        if attn.gate is not None:
            out = out * attn.gate(x[:, :queries]).sigmoid()
        # the class token's row is computed apart from the attention itself, which engines then still fuse
        by_attention = self.reduction.signal == "attention" and self.schedule.removed[block] > 0
        signal = weights(q[:, :, :1]).mean(dim=1).squeeze(1) if by_attention else k.mean(dim=1)
        return attn.proj_drop(attn.proj(out)), signal

    def classify(self, x: Tensor, token_size: Tensor | None) -> Tensor:
        """Tokens that leave the last block [B, N, C], and their sizes [B, N, 1] -> logits [B, classes]."""
        model, x = self.model, self.model.norm(x)
        if token_size is None or model.global_pool in ("token", "max"):
            return model.forward_head(x)
        if model.global_pool == "map":
            first = 0 if model.pool_include_prefix else model.num_prefix_tokens
            bias = token_size[:, first:].log().transpose(-2, -1).unsqueeze(1)
            pooled = model.attn_pool(x[:, first:], attn_mask=bias)
        else:
            pooled = self._average(x, token_size)
            if model.global_pool == "avgmax":
                pooled = 0.5 * (pooled + model.pool(x, "max"))
        return model.head(model.head_drop(model.fc_norm(pooled)))

    def _average(self, x: Tensor, token_size: Tensor) -> Tensor:
        first = 0 if self.model.pool_include_prefix else self.model.num_prefix_tokens
        weight = token_size[:, first:]
        return (x[:, first:] * weight).sum(dim=1) / weight.sum(dim=1)


def schedule_for(model: nn.Module, r: int, family: ScheduleFamily = CONSTANT) -> MergeSchedule:
    """The schedule of degree r for a model."""
    return family.at(r, depth=len(model.blocks), tokens=tokens_in(model), protected=model.num_prefix_tokens)


def tokens_in(model: nn.Module) -> int:
    """Tokens entering block 0 of a timm VisionTransformer, prefix included."""
    return model.num_prefix_tokens + model.patch_embed.num_patches
