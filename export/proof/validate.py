"""Engine + reference -> report: are the decisions the reference's, and the numbers right given the decisions?

Removing tokens is discrete: one rounding can flip a tie, and every later number differs although nothing is wrong. So
decisions and values are compared apart, and twice. Replayed: the reference runs once more with the engine's decisions
forced on it, so that logits and tokens compare at rounding level whatever was decided. Part by part: the reference gets
what the engine put into each part of each block, so that nothing adds up, the part at fault is named, and a decision
that differs is judged on the very tokens that it was made about: it is explained if it is as good as the best one to
within the rounding of its number format.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tocom.export.artifacts import Engine, Report
from tocom.export.graph.operators import point_name
from tocom.export.proof.decisions import AnyDecision, judge_of
from tocom.export.proof.findings import Findings
from tocom.export.proof.gates import GATES, margin_allowed
from tocom.export.proof.observe import Observed, Observer, Replay, in_format, observer_of, replay
from tocom.export.proof.parts import compare_parts, distance, logit_distance
from tocom.export.proof.tally import Tally
from tocom.vit import ReducedViT

EXACT = "fp64"


def validate(
    engine: Engine,
    reference: ReducedViT,
    batches: Iterator[np.ndarray],
    plain: ReducedViT | None = None,
    *,
    batch: int | None = None,
) -> Report:
    """Compares an engine with the PyTorch reference of the same degree.

    Args:
        engine: What is to be proven.
        reference: The reference with the same weights and schedule, in float32 or float64; quantized where the engine
            is.
        batches: Normalized images, float32 [B, 3, H, W].
        plain: Of a quantized engine, the reference that is not quantized.
        batch: Images that the engine is prepared for; None for any number.

    Returns:
        The report; false if a gate failed.
    """
    with observer_of(engine, reference, batch=batch) as observer:
        findings = prove(observer, reference, batches, plain)
    findings = replace(findings, run=None if engine.unrunnable else engine.backend)
    return Report(engine=engine, passed=findings.passed, findings=findings)


def prove(
    observer: Observer,
    reference: ReducedViT,
    batches: Iterator[np.ndarray],
    plain: ReducedViT | None = None,
) -> Findings:
    """Compares whatever can be observed with the reference.

    Args:
        observer: What is to be proven.
        reference: See `validate`.
        batches: Likewise.
        plain: Likewise.

    Returns:
        What was found.
    """
    tally = Tally(
        precision=observer.precision,
        reduction=reference.reduction.name,
        depth=len(reference.model.blocks),
    )
    # twice the weights' memory, needed only where a decision differs
    exact = functools.cache(functools.partial(in_format, reference, EXACT))
    for pixel_values in batches:
        compare(observer, reference, exact, pixel_values, tally, plain)
    return tally.findings()


def compare(
    observer: Observer,
    reference: ReducedViT,
    exact: Callable[[], ReducedViT],
    pixel_values: np.ndarray,
    tally: Tally,
    plain: ReducedViT | None = None,
) -> None:
    """Compares one batch, and adds what it finds.

    Args:
        observer: What is to be proven.
        reference: Of the same degree.
        exact: Makes it in float64, where that is needed.
        pixel_values: float32 [B, 3, H, W].
        tally: Added to.
        plain: See `validate`.
    """
    observed, images = observer.observe(pixel_values), torch.from_numpy(pixel_values)
    copied = observed.copy
    tally.images += len(images)
    if invalid := _blocks_with_none(observed, reference, len(images)) | _blocks_with_none(
        copied, reference, len(images)
    ):
        for block in invalid:
            tally.block(block).unexplained += 1
            tally.block(block).margin = float("inf")
        tally.max_logit_error = float("inf")
        tally.logit_errors += [float("inf")] * len(images)
        return  # there is nothing to replay
    forced = replay(reference, images, observed.decisions)
    same = _alike(observed.decisions, copied.decisions, reference, len(images))
    as_copied = forced if len(same) == len(observed.decisions) else replay(reference, images, copied.decisions)
    _compare_copy(observed, forced, as_copied, tally)
    local = compare_parts(reference, images, copied)
    for (block, part), errors in local.errors.items():
        found = tally.block(block)
        found.parts[part] = max(found.parts.get(part, 0.0), float(errors.max()))
        if (middles := local.middles.get((block, part))) is not None:
            found.middles[part] = max(found.middles.get(part, 0.0), float(middles.max()))
    compare_decisions(
        observed.decisions, forced.natural, len(images), reference,
        _exact_signals(observed, images, exact, same & local.signals.keys()), tally,
        {block: natural for block, natural in local.natural.items() if block in same},
    )  # fmt: skip
    _compare_outputs(copied.values, as_copied, tally)
    _compare_logits(observed.logits.to(forced.logits.dtype), forced.logits, tally)
    roundoff = GATES[tally.precision].unit_roundoff
    shaken = replay(reference, images, observed.decisions, roundoff).logits
    tally.shaken += logit_distance(shaken, forced.logits).tolist()
    if plain is not None:
        quantized = logit_distance(replay(plain, images, observed.decisions).logits, forced.logits.float())
        tally.quantization_errors += quantized.tolist()
    _compare_freely(observed, forced, reference, images, tally)


def _alike(
    one: Mapping[int, AnyDecision], other: Mapping[int, AnyDecision], reference: ReducedViT, images: int
) -> set[int]:
    """The first blocks, up to one in which something else is decided of some image."""
    judge, alike = judge_of(reference.reduction), set()
    for block in sorted(one):
        if not all(judge.is_equal(one[block], other[block], image) for image in range(images)):
            break
        alike.add(block)
    return alike


def _exact_signals(
    observed: Observed, images: Tensor, exact: Callable[[], ReducedViT], known: Collection[int]
) -> Callable[[int], Tensor]:
    """What a block decides on, in float64: on the engine's own tokens in blocks where they are known, else replayed."""

    @functools.cache
    def on_its_tokens() -> Mapping[int, Tensor]:
        return compare_parts(exact(), images, observed.copy).signals

    @functools.cache
    def replayed() -> Mapping[int, Tensor]:
        return replay(exact(), images, observed.decisions).signals

    return lambda block: (on_its_tokens() if block in known else replayed())[block]


def _compare_copy(observed: Observed, forced: Replay, as_copied: Replay, tally: Tally) -> None:
    """The debug copy's logits beside the engine's, each less what follows from its own decisions."""
    dtype = forced.logits.dtype
    expected = forced.logits + (observed.copy.logits.to(dtype) - as_copied.logits)
    tally.debug_copy_errors += logit_distance(observed.logits.to(dtype), expected).tolist()


def _compare_outputs(told: Mapping[str, Tensor], forced: Replay, tally: Tally) -> None:
    for block in range(tally.depth):
        name = point_name(block + 1, "tokens")
        if (tokens := told.get(name)) is not None:
            expected = forced.values[name]
            error = float(distance(tokens.to(expected.dtype), expected[:, : tokens.shape[1]]).max())
            tally.block(block).output_error = max(tally.block(block).output_error or 0.0, error)


def _compare_logits(logits: Tensor, expected: Tensor, tally: Tally) -> None:
    error = (logits - expected).abs().max()
    tally.max_logit_error = max(tally.max_logit_error, float(error) if error.isfinite() else float("inf"))
    tally.logit_errors += logit_distance(logits, expected).tolist()
    tally.max_logit = max(tally.max_logit, float(expected.abs().max()))
    tally.top1_equal += int((logits.argmax(1) == expected.argmax(1)).sum())


@torch.no_grad()
def _compare_freely(observed: Observed, forced: Replay, reference: ReducedViT, images: Tensor, tally: Tally) -> None:
    """What a user sees: the engine beside the reference that decides by itself."""
    same = _alike(observed.decisions, forced.natural, reference, len(images))
    all_same = len(same) == len(observed.decisions)
    free = (forced if all_same else replay(reference, images, {})).logits.double()
    logits = observed.logits.double().nan_to_num(nan=torch.finfo(torch.float32).max)
    tally.free_top1_equal += int((logits.argmax(1) == free.argmax(1)).sum())
    tally.cosines += functional.cosine_similarity(logits, free).tolist()
    ours, theirs = logits.log_softmax(1), free.log_softmax(1)
    tally.divergences += functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(1).tolist()


def _blocks_with_none(observed: Observed, reference: ReducedViT, images: int) -> set[int]:
    """Blocks whose outputs are no decisions at all, for one image or another."""
    judge, tokens = judge_of(reference.reduction), reference.schedule.tokens
    return {
        block
        for block, chosen in observed.decisions.items()
        if not all(judge.is_valid(chosen, image, tokens[block]) for image in range(images))
    }


def compare_decisions(
    decisions: Mapping[int, AnyDecision],
    natural: Mapping[int, AnyDecision],
    images: int,
    reference: ReducedViT,
    exact_signal: Callable[[int], Tensor],
    tally: Tally,
    local: Mapping[int, AnyDecision] | None = None,
) -> None:
    """Compares the decisions of one batch, and adds what it finds.

    Args:
        decisions: Block -> what was decided.
        natural: Block -> what the reference decides there, with these decisions in the blocks before.
        images: How many.
        reference: The reference.
        exact_signal: Block -> what is decided on, in float64; called where it is needed.
        tally: Added to.
        local: Block -> what the reference decides on the very same tokens, where they are known: one who decides
            likewise on these is explained.
    """
    judge, local = judge_of(reference.reduction), local or {}
    for block, chosen in decisions.items():
        found = tally.block(block)
        for image in range(images):
            found.decisions += judge.count(chosen)
            found.equal += judge.count_equal(natural[block], chosen, image)
            if judge.is_equal(local.get(block, natural[block]), chosen, image):
                found.explained += not judge.is_equal(natural[block], chosen, image)
                continue
            margin = judge.margin(exact_signal(block), chosen, image, reference.model)
            found.margin = max(found.margin, margin) if margin == margin else float("inf")
            known = block in local
            if margin <= margin_allowed(tally.precision, tally.reduction, on_its_tokens=known):
                found.explained += 1
            else:
                found.unexplained += 1
