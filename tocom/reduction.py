"""Token reductions behind one interface: which tokens go, told by a signal, and what becomes of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, Literal, TypeVar

from torch import Tensor, nn

from tocom import names
from tocom.merging import Matching, match, merge
from tocom.pruning import Pruning, prune, select
from tocom.runtime.errors import InputError

Decision = TypeVar("Decision", Matching, Pruning)
Signal = Literal["metric", "attention"]


class Reduction(ABC, Generic[Decision]):
    """Takes r tokens away between attention and MLP of a block, in two steps: decide, then apply.

    Attributes:
        name: As in `--reduction` and in files.
        signal: What it decides on: "metric", the mean over heads of the attention keys, [B, N, D]; or "attention",
            the class token's attention to every token, mean over heads, [B, N].
    """

    name: str
    signal: Signal

    @abstractmethod
    def require_supported(self, model: nn.Module) -> None:
        """Checks that a timm VisionTransformer has what this reduction needs.

        Raises:
            InputError: If it has not.
        """

    @abstractmethod
    def decide(self, signal: Tensor, r: int, model: nn.Module) -> Decision:
        """Decides which r tokens go.

        Args:
            signal: See `signal`.
            r: Tokens to remove, at most (N - protected) // 2.
            model: The timm model, for its prefix tokens.
        """

    @abstractmethod
    def apply(self, x: Tensor, token_size: Tensor, signal: Tensor, decision: Decision) -> tuple[Tensor, Tensor]:
        """Carries a decision out: [B, N, C] and sizes [B, N, 1] -> [B, N - r, C] and [B, N - r, 1]."""


class Merge(Reduction[Matching]):
    """Bipartite soft matching (ToMe, section 3): similar tokens merge into their mean."""

    name = names.MERGE
    signal: Signal = "metric"

    def require_supported(self, model: nn.Module) -> None:
        """Every supported model can merge."""

    def decide(self, signal: Tensor, r: int, model: nn.Module) -> Matching:
        """Matches on the keys, see `tocom.merging.match`."""
        return match(signal, r, protected=model.num_prefix_tokens, keep_order=model.has_class_token)

    def apply(self, x: Tensor, token_size: Tensor, signal: Tensor, decision: Matching) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Merges, see `tocom.merging.merge`."""
        return merge(x, token_size, decision)


class Prune(Reduction[Pruning]):
    """Pruning by class-token attention (EViT, section 3): the least attended tokens are fused into one."""

    name = names.PRUNE
    signal: Signal = "attention"

    def require_supported(self, model: nn.Module) -> None:
        """Needs a class token.

        Raises:
            InputError: If the model has none.
        """
        if not model.has_class_token:
            raise InputError("pruning drops the tokens that the class token attends least, but the model has no class "
                             "token. Use --reduction merge.")  # fmt: skip

    def decide(self, signal: Tensor, r: int, model: nn.Module) -> Pruning:
        """Selects by attention, see `tocom.pruning.select`."""
        return select(signal, r, protected=model.num_prefix_tokens)

    def apply(self, x: Tensor, token_size: Tensor, signal: Tensor, decision: Pruning) -> tuple[Tensor, Tensor]:
        """Fuses what was dropped, see `tocom.pruning.prune`."""
        return prune(x, token_size, signal, decision)


MERGE, PRUNE = Merge(), Prune()
REDUCTIONS: dict[str, Reduction] = {reduction.name: reduction for reduction in (MERGE, PRUNE)}


def reduction_named(name: str) -> Reduction:
    """The reduction of that name.

    Raises:
        InputError: If there is none.
    """
    if name not in REDUCTIONS:
        raise InputError(f"a reduction must be one of {', '.join(REDUCTIONS)}, got {name[:80]!r}.")
    return REDUCTIONS[name]
