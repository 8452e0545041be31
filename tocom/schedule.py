"""Merge schedules: how many tokens every block removes, and how a degree is spread over the blocks."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from tocom.runtime.errors import InputError

_LARGEST = 1000  # tokens per unit of degree in one block; more is a slip


@dataclass(frozen=True)
class MergeSchedule:
    """Tokens removed per block, clamped to what each block can merge.

    A block that N tokens enter, `protected` of them prefix tokens, can merge at most (N - protected) // 2: every merge
    takes one token of an even position into one of an odd position. Pruning keeps to the same bound, so that a degree
    means the same token counts whatever removes them.

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


@dataclass(frozen=True)
class ScheduleFamily:
    """How a degree is spread over the blocks: what each block removes per unit of degree.

    A compensator is trained for one family, because its ranks describe the steps from one degree to the next.

    Attributes:
        name: One of
            "constant": r tokens in every block (ToMe, section 3);
            "decreasing": 2r in the first block, falling linearly to none in the last (ToMe, appendix);
            "strided:K": K*r tokens in every K-th block, in the middle of each K: about the constant family's
            multiplications, with a K-th of its merges;
            a comma-separated list, one number per block, e.g. "0,3,0,0,3,0": r times that number, rounded down.

    Raises:
        InputError: If the name is none of these.

    >>> ScheduleFamily("strided:3").at(8, depth=6, tokens=65).requested
    (0, 24, 0, 0, 24, 0)
    >>> ScheduleFamily("decreasing").at(4, depth=5, tokens=65).requested
    (8, 6, 4, 2, 0)
    """

    name: str = "constant"

    def __post_init__(self) -> None:
        kind, _, stride = self.name.partition(":")
        if self.name in ("constant", "decreasing"):
            return
        if kind == "strided" and re.fullmatch("[0-9]{1,4}", stride) and 2 <= int(stride) <= _LARGEST:
            object.__setattr__(self, "name", f"strided:{int(stride)}")
            return
        counts = _numbers(self.name)
        if counts is None:
            raise InputError("a schedule must be constant, decreasing, strided:K with K of 2 or more, or one number "
                             f"per block like 0,3,0,0,3,0, got {self.name[:80]!r}.")  # fmt: skip
        object.__setattr__(self, "name", ",".join(f"{float(count):g}" for count in counts))

    def per_degree(self, depth: int) -> tuple[Fraction, ...]:
        """Tokens each of `depth` blocks removes per unit of degree.

        Raises:
            InputError: If the family does not fit the depth.
        """
        if self.name == "constant" or (self.name == "decreasing" and depth == 1):
            return (Fraction(1),) * depth
        if self.name == "decreasing":
            return tuple(Fraction(2 * (depth - 1 - block), depth - 1) for block in range(depth))
        if self.name.startswith("strided:"):
            stride = int(self.name.partition(":")[2])
            if stride > depth:
                raise InputError(f"the stride of a schedule must not exceed the {depth} blocks, got {self.name}.")
            return tuple(Fraction(stride if block % stride == (stride - 1) // 2 else 0) for block in range(depth))
        counts = _numbers(self.name) or ()
        if len(counts) != depth:
            raise InputError(f"a per-block schedule needs one number for each of {depth} blocks, got {len(counts)}.")
        return counts

    def at(self, r: int, *, depth: int, tokens: int, protected: int = 1) -> MergeSchedule:
        """The schedule of degree r.

        Raises:
            InputError: If the family does not fit the depth, or the degree is not a whole number of 0 or more.
        """
        MergeSchedule.constant(r, depth=depth, tokens=tokens, protected=protected)  # checks the degree
        counts = tuple(math.floor(r * share) for share in self.per_degree(depth))
        return MergeSchedule(counts, tokens, protected)


CONSTANT = ScheduleFamily("constant")


def _numbers(text: str) -> tuple[Fraction, ...] | None:
    """The numbers of a per-block list; None if it is none, or removes nothing anywhere."""
    try:
        counts = tuple(Fraction(f"{float(part):g}") for part in text.split(","))
    except (ValueError, OverflowError):
        return None
    return counts if any(counts) and all(0 <= count <= _LARGEST for count in counts) else None
