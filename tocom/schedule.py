"""Merge schedules: how many tokens every block removes, and how many tokens enter it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tocom.errors import InputError


@dataclass(frozen=True)
class MergeSchedule:
    """Tokens removed per block, clamped to what each block can merge.

    A block that N tokens enter, `protected` of them prefix tokens, can merge at most (N - protected) // 2: every merge
    takes one token of an even position into one of an odd position.

    Attributes:
        requested: Tokens asked for per block, length L.
        tokens_in: Tokens entering block 0, prefix included.
        protected: Prefix tokens (class, distillation, register) that are never merged away.

    Raises:
        InputError: If a count is negative or not a whole number, or there is no token to begin with.

    >>> MergeSchedule.constant(16, depth=12, tokens=197).tokens
    (197, 181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11)
    >>> MergeSchedule.constant(16, depth=12, tokens=197).removed[-2:]
    (16, 10)
    """

    requested: tuple[int, ...]
    tokens_in: int
    protected: int = 1

    def __post_init__(self) -> None:
        for block, count in enumerate(self.requested):
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise InputError(
                    f"degree r must be a whole number of 0 or more tokens per block, got {count!r} for block {block}. "
                    "Use 0 to export without merging."
                )
        if self.tokens_in <= self.protected:
            raise InputError(f"a schedule needs more tokens than the {self.protected} protected, got {self.tokens_in}.")

    @classmethod
    def constant(cls, r: int, *, depth: int, tokens: int, protected: int = 1) -> MergeSchedule:
        """The paper's schedule: r tokens in each of `depth` blocks (ToMe, section 3)."""
        return cls((r,) * depth, tokens, protected)

    @classmethod
    def linear(cls, r: int, inflection: float, *, depth: int, tokens: int, protected: int = 1) -> MergeSchedule:
        """About r tokens per block on average, growing or shrinking linearly over the blocks (ToMe, appendix).

        Args:
            r: Mean tokens removed per block.
            inflection: -1 goes from 2r down to 0, 0 is constant, 1 goes from 0 up to 2r.
            depth: Blocks L.
            tokens: Tokens entering block 0, prefix included.
            protected: Prefix tokens.

        Raises:
            InputError: If `inflection` lies outside [-1, 1].

        >>> MergeSchedule.linear(4, -1, depth=5, tokens=65).requested
        (8, 6, 4, 2, 0)
        """
        if not -1 <= inflection <= 1:
            raise InputError(f"inflection must lie between -1 (decreasing) and 1 (increasing), got {inflection}.")
        steps = max(depth - 1, 1)
        counts = tuple(int(r * (1 - inflection) + 2 * r * inflection * block / steps) for block in range(depth))
        return cls(counts, tokens, protected)

    @classmethod
    def per_block(cls, counts: Sequence[int], *, depth: int, tokens: int, protected: int = 1) -> MergeSchedule:
        """An explicit count for every block.

        Raises:
            InputError: If the list does not have one count per block.
        """
        if len(counts) != depth:
            raise InputError(f"a per-block schedule needs one count for each of {depth} blocks, got {len(counts)}.")
        return cls(tuple(counts), tokens, protected)

    @property
    def removed(self) -> tuple[int, ...]:
        """Tokens really removed by every block, after the clamp; length L."""
        return tuple(before - after for before, after in zip(self.tokens, self.tokens[1:], strict=False))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens entering every block, then tokens leaving the last; length L + 1."""
        counts = [self.tokens_in]
        for count in self.requested:
            counts.append(counts[-1] - min(count, (counts[-1] - self.protected) // 2))
        return tuple(counts)

    def require_room(self) -> None:
        """Checks that every block that is asked to merge still finds a pair to merge.

        Raises:
            InputError: If the image is used up before the last block.
        """
        for block, (count, removed) in enumerate(zip(self.requested, self.removed, strict=True)):
            if count and not removed:
                raise InputError(
                    f"degree r must leave tokens to merge in every block, got {max(self.requested)}: of "
                    f"{self.tokens_in} tokens none are left to merge in block {block}. Choose a smaller degree."
                )
