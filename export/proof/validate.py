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
from tocom.export.proof.parts import compare_parts, distance, logit_distance
from tocom.export.proof.reference import EXACT, Replay, in_format, replay
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
        findings = validate_observer(observer, reference, batches, plain)
    found = {**findings.to_json(), "run": None if engine.unrunnable else engine.backend}
    return Report(engine=engine, passed=findings.passed, findings=found)


def validate_observer(
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
    findings = Findings(
        precision=observer.precision,
        reduction=reference.reduction.name,
        depth=len(reference.model.blocks),
    )
    # twice the weights' memory, needed only where a decision differs
    exact = functools.cache(functools.partial(in_format, reference, EXACT))
    for pixel_values in batches:
        compare(observer, reference, exact, pixel_values, findings, plain)
    return findings


def compare(
    observer: Observer,
    reference: ReducedViT,
    exact: Callable[[], ReducedViT],
    pixel_values: np.ndarray,
    findings: Findings,
    plain: ReducedViT | None = None,
) -> None:
    """Compares one batch, and adds what it finds.

    Args:
        observer: What is to be proven.
        reference: Of the same degree.
        exact: Makes it in float64, where that is needed.
        pixel_values: float32 [B, 3, H, W].
        findings: Added to.
        plain: See `validate`.
    """
    observed, images = observer.observe(pixel_values), torch.from_numpy(pixel_values)
    copied = observed.debug_copy
    findings.images += len(images)
    if invalid := _blocks_with_none(observed, reference, len(images)) | _blocks_with_none(
        copied, reference, len(images)
    ):
        for block in invalid:
            findings.block(block).unexplained += 1
            findings.block(block).margin = float("inf")
        findings.max_logit_error = float("inf")
        findings.logit_errors += [float("inf")] * len(images)
        return  # there is nothing to replay
    forced = replay(reference, images, observed.decisions)
    same = _alike(observed.decisions, copied.decisions, reference, len(images))
    as_copied = forced if len(same) == len(observed.decisions) else replay(reference, images, copied.decisions)
    _compare_copy(observed, forced, as_copied, findings)
    local = compare_parts(reference, images, copied)
    for (block, part), errors in local.errors.items():
        found = findings.block(block)
        found.parts[part] = max(found.parts.get(part, 0.0), float(errors.max()))
        if (middles := local.middles.get((block, part))) is not None:
            found.middles[part] = max(found.middles.get(part, 0.0), float(middles.max()))
    compare_decisions(
        observed.decisions, forced.natural, len(images), reference,
        _exact_signals(observed, images, exact, same & local.signals.keys()), findings,
        {block: natural for block, natural in local.natural.items() if block in same},
    )  # fmt: skip
    _compare_outputs(copied.values, as_copied, findings)
    _compare_logits(observed.logits.to(forced.logits.dtype), forced.logits, findings)
    roundoff = GATES[findings.precision].unit_roundoff
    shaken = replay(reference, images, observed.decisions, roundoff).logits
    findings.shaken += logit_distance(shaken, forced.logits).tolist()
    if plain is not None:
        quantized = logit_distance(replay(plain, images, observed.decisions).logits, forced.logits.float())
        findings.quantization_errors += quantized.tolist()
    _compare_freely(observed, forced, reference, images, findings)


def _alike(
    one: Mapping[int, AnyDecision], other: Mapping[int, AnyDecision], reference: ReducedViT, images: int
) -> set[int]:
    """The first blocks, up to one in which something else is decided of some image."""
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


def _compare_copy(observed: Observed, forced: Replay, as_copied: Replay, findings: Findings) -> None:
    """The debug copy's logits beside the engine's, each less what follows from its own decisions."""
    dtype = forced.logits.dtype
    expected = forced.logits + (observed.debug_copy.logits.to(dtype) - as_copied.logits)
    findings.debug_copy_errors += logit_distance(observed.logits.to(dtype), expected).tolist()


def _compare_outputs(told: Mapping[str, Tensor], forced: Replay, findings: Findings) -> None:
    for block in range(findings.depth):
        name = point_name(block + 1, "tokens")
        if (tokens := told.get(name)) is not None:
            expected = forced.values[name]
            error = float(distance(tokens.to(expected.dtype), expected[:, : tokens.shape[1]]).max())
            findings.block(block).output_error = max(findings.block(block).output_error or 0.0, error)


def _compare_logits(logits: Tensor, expected: Tensor, findings: Findings) -> None:
    error = (logits - expected).abs().max()
    findings.max_logit_error = max(findings.max_logit_error, float(error) if error.isfinite() else float("inf"))
    findings.logit_errors += logit_distance(logits, expected).tolist()
    findings.max_logit = max(findings.max_logit, float(expected.abs().max()))
    findings.top1_equal += int((logits.argmax(1) == expected.argmax(1)).sum())


@torch.no_grad()
def _compare_freely(
    observed: Observed, forced: Replay, reference: ReducedViT, images: Tensor, findings: Findings
) -> None:
    """What a user sees: the engine beside the reference that decides by itself."""
    same = _alike(observed.decisions, forced.natural, reference, len(images))
    all_same = len(same) == len(observed.decisions)
    free = (forced if all_same else replay(reference, images, {})).logits.double()
    logits = observed.logits.double().nan_to_num(nan=torch.finfo(torch.float32).max)
    findings.free_top1_equal += int((logits.argmax(1) == free.argmax(1)).sum())
    findings.cosines += functional.cosine_similarity(logits, free).tolist()
    ours, theirs = logits.log_softmax(1), free.log_softmax(1)
    findings.divergences += functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(1).tolist()


def _blocks_with_none(observed: Observed, reference: ReducedViT, images: int) -> set[int]:
    """Blocks whose outputs are no decisions at all, for one image or another."""
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
    findings: Findings,
    local: Mapping[int, AnyDecision] | None = None,
) -> None:
    """Compares the decisions of one batch, and adds what it finds.

    Args:
        decisions: Block -> what was decided.
        natural: Block -> what the reference decides there, with these decisions in the blocks before.
        images: How many.
        reference: The reference.
        exact_signal: Block -> what is decided on, in float64; called where it is needed.
        findings: Added to.
        local: Block -> what the reference decides on the very same tokens, where they are known: one who decides
            likewise on these is explained.
    """
    comparer, local = comparer_of(reference.reduction), local or {}
    for block, chosen in decisions.items():
        found = findings.block(block)
        for image in range(images):
            found.decisions += comparer.count(chosen)
            found.equal += comparer.count_equal(natural[block], chosen, image)
            if comparer.is_equal(local.get(block, natural[block]), chosen, image):
                found.explained += not comparer.is_equal(natural[block], chosen, image)
                continue
            margin = comparer.margin(exact_signal(block), chosen, image, reference.model)
            found.margin = max(found.margin, margin) if margin == margin else float("inf")
            known = block in local
            if margin <= margin_allowed(findings.precision, findings.reduction, on_its_tokens=known):
                found.explained += 1
            else:
                found.unexplained += 1
