"""Engine + reference -> report: are the decisions the reference's, and the numbers right given the decisions?

Removing tokens is discrete: one rounding can flip a tie, and every later number differs although nothing is wrong. So
decisions and values are compared apart, and twice. Replayed: the reference runs once more with the engine's decisions
forced on it, so that logits and tokens compare at rounding level whatever was decided. Part by part: the reference gets
what the engine put into each part of each block, so that nothing adds up, the part at fault is named, and a decision
that differs is measured on the very tokens that it was made about: it is explained if it is as good as the best one to
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
from tocom.export.proof.decisions import AnyDecision, comparer_of
from tocom.export.proof.findings import Findings
from tocom.export.proof.gates import GATES, margin_allowed
from tocom.export.proof.observe import Observed, Observer, observer_of
from tocom.export.proof.parts import compare_parts, distance, divergences, logit_distance
from tocom.export.proof.reference import EXACT, Replay, in_format, replay
from tocom.export.proof.tally import Tally
from tocom.vit import ReducedViT


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
        engine: What is validated.
        reference: The reference with the same weights and schedule, in float32 or float64; quantized where the engine
            is.
        batches: Normalized images, float32 [B, 3, H, W].
        plain: Of a quantized engine, the reference that is not quantized.
        batch: Images that the engine is prepared for; None for any number.

    Returns:
        The report; false if a gate failed.
    """
    with observer_of(engine, reference, batch=batch) as observer:
        findings = validate_observer(observer, reference, batches, plain)
    findings = replace(findings, run=None if engine.unrunnable else engine.backend)
    return Report(engine=engine, passed=findings.passed, findings=findings)


def validate_observer(
    observer: Observer,
    reference: ReducedViT,
    batches: Iterator[np.ndarray],
    plain: ReducedViT | None = None,
) -> Findings:
    """Compares an observer with the reference.

    Args:
        observer: What is validated.
        reference: See `validate`.
        batches: Likewise.
        plain: Likewise.

    Returns:
        The findings.
    """
    tally = Tally(
        precision=observer.precision,
        reduction=reference.reduction.name,
        depth=len(reference.model.blocks),
    )
    # twice the weights' memory, needed only where a decision differs
    exact = functools.cache(functools.partial(in_format, reference, EXACT))
    for pixel_values in batches:
        _compare_batch(observer, reference, exact, pixel_values, tally, plain)
    return tally.findings()


def _compare_batch(
    observer: Observer,
    reference: ReducedViT,
    exact: Callable[[], ReducedViT],
    pixel_values: np.ndarray,
    tally: Tally,
    plain: ReducedViT | None = None,
) -> None:
    """Compares one batch, and adds it to the tally.

    Args:
        observer: What is validated.
        reference: Of the same degree.
        exact: Makes it in float64, where that is needed.
        pixel_values: float32 [B, 3, H, W].
        tally: Added to.
        plain: See `validate`.
    """
    observed, images = observer.observe(pixel_values), torch.from_numpy(pixel_values)
    copied = observed.debug_copy
    tally.images += len(images)
    invalid = {block for answer in (observed, copied) for block in _invalid_blocks(answer, reference, len(images))}
    if invalid:
        _note_invalid(invalid, len(images), tally)
        return  # there is nothing to replay
    forced = replay(reference, images, observed.decisions)
    same = _alike(observed.decisions, copied.decisions, reference, len(images))
    as_copied = forced if len(same) == len(observed.decisions) else replay(reference, images, copied.decisions)
    _compare_copy(observed, forced, as_copied, tally)
    local = compare_parts(reference, images, copied)
    for (block, part), errors in local.errors.items():
        errors_of_block = tally.block(block)
        errors_of_block.parts[part] = max(errors_of_block.parts.get(part, 0.0), float(errors.max()))
        if (middles := local.middles.get((block, part))) is not None:
            errors_of_block.middles[part] = max(errors_of_block.middles.get(part, 0.0), float(middles.max()))
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


def _note_invalid(blocks: Collection[int], images: int, tally: Tally) -> None:
    """Adds a batch in which some blocks put out no decisions at all."""
    for block in blocks:
        tally.block(block).unexplained += 1
        tally.block(block).margin = float("inf")
    tally.max_logit_error = float("inf")
    tally.logit_errors += [float("inf")] * images


def _alike(
    one: Mapping[int, AnyDecision], other: Mapping[int, AnyDecision], reference: ReducedViT, images: int
) -> set[int]:
    """The first blocks, up to the one in which both decide differently for some image."""
    comparer, alike = comparer_of(reference.reduction), set()
    for block in sorted(one):
        if not all(comparer.is_equal(one[block], other[block], image) for image in range(images)):
            break
        alike.add(block)
    return alike


def _exact_signals(
    observed: Observed, images: Tensor, exact: Callable[[], ReducedViT], known: Collection[int]
) -> Callable[[int], Tensor]:
    """What a block decides on, in float64: on the engine's own tokens in blocks where they are known, else replayed."""

    @functools.cache
    def on_its_tokens() -> Mapping[int, Tensor]:
        return compare_parts(exact(), images, observed.debug_copy).signals

    @functools.cache
    def replayed() -> Mapping[int, Tensor]:
        return replay(exact(), images, observed.decisions).signals

    return lambda block: (on_its_tokens() if block in known else replayed())[block]


def _compare_copy(observed: Observed, forced: Replay, as_copied: Replay, tally: Tally) -> None:
    """The debug copy's logits beside the engine's, each less what follows from its own decisions."""
    dtype = forced.logits.dtype
    expected = forced.logits + (observed.debug_copy.logits.to(dtype) - as_copied.logits)
    tally.debug_copy_errors += logit_distance(observed.logits.to(dtype), expected).tolist()


def _compare_outputs(values: Mapping[str, Tensor], forced: Replay, tally: Tally) -> None:
    """The tokens that leave each block, beside those of the reference with the same decisions."""
    for block in range(tally.depth):
        name = point_name(block + 1, "tokens")
        if (tokens := values.get(name)) is not None:
            expected = forced.values[name]
            error = float(distance(tokens.to(expected.dtype), expected[:, : tokens.shape[1]]).max())
            tally.block(block).output_error = max(tally.block(block).output_error or 0.0, error)


def _compare_logits(logits: Tensor, expected: Tensor, tally: Tally) -> None:
    """The logits, beside those of the reference with the same decisions."""
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
    tally.divergences += divergences(logits, free)


def _invalid_blocks(observed: Observed, reference: ReducedViT, images: int) -> set[int]:
    """Blocks whose outputs are no decisions at all for at least one image."""
    comparer, tokens = comparer_of(reference.reduction), reference.schedule.tokens
    return {
        block
        for block, chosen in observed.decisions.items()
        if not all(comparer.is_valid(chosen, image, tokens[block]) for image in range(images))
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
    """Compares the decisions of one batch, and adds them to the tally.

    Args:
        decisions: Block -> what was decided.
        natural: Block -> what the reference decides there, with these decisions in the blocks before.
        images: How many.
        reference: The reference.
        exact_signal: Block -> what is decided on, in float64; called where it is needed.
        tally: Added to.
        local: Block -> what the reference decides on the very same tokens, where they are known: the same decision on
            these is explained.
    """
    comparer, local = comparer_of(reference.reduction), local or {}
    for block, chosen in decisions.items():
        counts = tally.block(block)
        for image in range(images):
            counts.decisions += comparer.count(chosen)
            counts.equal += comparer.count_equal(natural[block], chosen, image)
            if comparer.is_equal(local.get(block, natural[block]), chosen, image):
                counts.explained += not comparer.is_equal(natural[block], chosen, image)
                continue
            margin = comparer.margin(exact_signal(block), chosen, image, reference.model)
            counts.margin = max(counts.margin, margin) if margin == margin else float("inf")
            known = block in local
            if margin <= margin_allowed(tally.precision, tally.reduction, on_its_tokens=known):
                counts.explained += 1
            else:
                counts.unexplained += 1
