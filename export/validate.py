"""Engine + reference -> report: are the merge decisions the reference's, and the logits right given the decisions?

Merging is discrete: one rounding can flip a tie, and every later number differs although nothing is wrong. So decisions
and values are compared apart. The reference is run once more with the engine's decisions forced on it (replay): its
own choice in every block is compared with the engine's, and the logits then compare at rounding level whatever was
decided. A decision that differs is explained if the engine's choice is within `MARGIN` of the best one in float64.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from export import operator
from export.lower import OUTPUT, decision_names
from runtime.artifacts import Engine, Report
from runtime.engines import EngineRunner, open_engine
from tocom.merging import Matching, cosine_scores, first_positions, match, merge
from tocom.vit import ReducedViT

MARGIN = 1e-6  # cosine; float32 rounding of a dot product of unit vectors stays below it
LOGIT_TOLERANCE = 1e-4  # times the largest logit where that exceeds 1
DEBUG_TOLERANCE = 1e-6  # the debug copy may be optimized differently, not compute something else


@dataclass
class Findings:
    """What was compared, over all images so far."""

    images: int = 0
    decisions: int = 0
    equal_decisions: int = 0
    explained: int = 0
    unexplained: int = 0
    largest_margin: float = 0.0
    max_logit_error: float = 0.0
    max_logit: float = 0.0
    top1_equal: int = 0
    debug_copy_error: float = 0.0
    blocks_with_unexplained: set[int] = field(default_factory=set)

    @property
    def agreement(self) -> float:
        """Share of merge decisions (who merges into whom) equal to the reference's; 1 where nothing merges."""
        return self.equal_decisions / self.decisions if self.decisions else 1.0

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        tolerance = LOGIT_TOLERANCE * max(1.0, self.max_logit)
        return (
            self.unexplained == 0
            and self.max_logit_error <= tolerance
            and self.debug_copy_error <= DEBUG_TOLERANCE * max(1.0, self.max_logit)
        )

    def to_json(self) -> dict[str, Any]:
        """For the manifest and for machines."""
        return {
            "passed": self.passed,
            "images": self.images,
            "decisions": self.decisions,
            "agreement": self.agreement,
            "explained": self.explained,
            "unexplained": self.unexplained,
            "largest_margin": self.largest_margin,
            "max_logit_error": self.max_logit_error,
            "max_logit": self.max_logit,
            "debug_copy_error": self.debug_copy_error,
            "top1_agreement": self.top1_equal / self.images if self.images else 1.0,
            "blocks_with_unexplained": sorted(self.blocks_with_unexplained),
        }


def validate(engine: Engine, reference: ReducedViT, batches: Iterator[np.ndarray]) -> Report:
    """Compares an engine with the PyTorch reference of the same degree.

    Args:
        engine: What is to be proven.
        reference: The reference with the same weights and schedule, float32.
        batches: Normalized images, float32 [B, 3, H, W].

    Returns:
        The report; false if a gate failed.
    """
    findings = Findings()

    @functools.cache  # twice the weights' memory, needed only where a decision differs
    def exact() -> ReducedViT:
        return ReducedViT(copy.deepcopy(reference.model).double(), reference.schedule)

    with open_engine(engine.file, engine.backend) as shipped, debug_copy(engine) as debugged:
        for pixel_values in batches:
            _compare(shipped, debugged, reference, exact, pixel_values, findings)
    return Report(engine=engine, passed=findings.passed, findings=findings.to_json())


@contextmanager
def debug_copy(engine: Engine) -> Iterator[EngineRunner]:
    """Runs a copy of the engine's graph that also puts out its merge decisions; the shipped file is not touched."""
    graph = onnx.load(engine.source.file, load_external_data=False)
    for node in graph.graph.node:
        if node.domain == operator.DOMAIN:
            for name in node.output[2:]:
                graph.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None))
    # beside the original, because its weight files are found relative to the graph
    file = engine.file.with_name(f".{engine.file.stem}.debug.onnx")
    try:
        file.write_bytes(graph.SerializeToString())
        with open_engine(file, engine.backend) as runner:
            yield runner
    finally:
        file.unlink(missing_ok=True)


def decisions_of(outputs: Mapping[str, np.ndarray], reference: ReducedViT) -> dict[int, Matching]:
    """The engine's decisions by block, from the outputs of its debug copy."""
    protected = reference.model.num_prefix_tokens
    found = {}
    for block, removed in enumerate(reference.schedule.removed):
        if removed:
            src, dst, unm = (torch.from_numpy(outputs[name]) for name in decision_names(block))
            found[block] = Matching(src=src, dst=dst, unm=unm, protected=protected)
    return found


@torch.no_grad()
def replay(
    reference: ReducedViT, pixel_values: Tensor, decisions: Mapping[int, Matching]
) -> tuple[Tensor, dict[int, Matching], dict[int, Tensor]]:
    """Runs the reference with given decisions forced on it.

    Returns:
        Its logits; what it would have decided in each block; and the matching scores of each block, [B, A, Nb].
    """
    model = reference.model
    natural: dict[int, Matching] = {}
    scores: dict[int, Tensor] = {}

    def step(block: int, x: Tensor, token_size: Tensor, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
        natural[block] = match(metric, r, protected=model.num_prefix_tokens, keep_order=model.has_class_token)
        scores[block] = cosine_scores(metric, model.num_prefix_tokens)
        return merge(x, token_size, decisions[block])

    return reference(pixel_values, step), natural, scores


def decision_margin(scores: Tensor, chosen: Matching, image: int, ordered_by_score: bool) -> float:
    """How much worse the decisions for one image are than the best ones, in cosine; 0 for the best ones.

    Args:
        scores: Cosine of every a-token to every b-token, float64 [B, A, Nb].
        chosen: The decisions to judge.
        image: Which image of the batch.
        ordered_by_score: Whether unmerged tokens are to stand in score order, best first.

    Returns:
        The largest of: best score of a merged token minus the score of its destination; best score among the tokens
        left unmerged minus the lowest best score among the merged; the largest step up within the unmerged order.
        Infinity if they are no valid decisions at all.
    """
    scores = scores[image]
    if not _are_decisions(chosen, image, chosen.protected + sum(scores.shape)):
        return float("inf")
    first_a, first_b = first_positions(chosen.protected)
    src, unm = (chosen.src[image] - first_a) // 2, (chosen.unm[image] - first_a) // 2
    dst = (chosen.dst[image] - first_b) // 2
    best = scores.max(dim=1).values
    margins = [(best[src] - scores[src, dst]).max()]
    if len(unm):
        margins.append(best[unm].max() - best[src].min())
        if ordered_by_score:
            highest_behind = best[unm].flip(0).cummax(0).values.flip(0)
            margins.append((highest_behind - best[unm]).max())
        elif not torch.equal(unm, unm.sort().values):
            return float("inf")
    return float(torch.stack(margins).max().clamp_min(0))  # NaN stays NaN, which explains nothing


def _are_decisions(chosen: Matching, image: int, tokens: int) -> bool:
    """Whether every a-token is named once, merged or unmerged, and every destination is a b-token."""
    first_a, first_b = first_positions(chosen.protected)
    named = torch.cat([chosen.src[image], chosen.unm[image]]).sort().values
    return torch.equal(named, torch.arange(first_a, tokens, 2)) and bool(
        torch.isin(chosen.dst[image], torch.arange(first_b, tokens, 2)).all()
    )


def _compare(
    shipped: EngineRunner,
    debugged: EngineRunner,
    reference: ReducedViT,
    exact: Callable[[], ReducedViT],
    pixel_values: np.ndarray,
    findings: Findings,
) -> None:
    logits = torch.from_numpy(shipped.infer(pixel_values))
    outputs = debugged.infer_all(pixel_values)
    decisions = decisions_of(outputs, reference)
    images = torch.from_numpy(pixel_values)
    findings.images += len(images)
    for block, chosen in decisions.items():
        if not all(_are_decisions(chosen, image, reference.schedule.tokens[block]) for image in range(len(images))):
            findings.unexplained += 1
            findings.blocks_with_unexplained.add(block)
            findings.largest_margin = findings.max_logit_error = float("inf")
            return  # there is nothing to replay
    expected, natural, _ = replay(reference, images, decisions)
    exact_scores: dict[int, Tensor] | None = None
    for block, chosen in decisions.items():
        for image in range(len(images)):
            same = _equal_decisions(natural[block], chosen, image)
            findings.decisions += chosen.src.shape[1]
            findings.equal_decisions += same
            in_order = torch.equal(natural[block].unm[image], chosen.unm[image])
            if same == chosen.src.shape[1] and in_order:
                continue
            if exact_scores is None:
                _, _, exact_scores = replay(exact(), images.double(), decisions)
            margin = decision_margin(exact_scores[block], chosen, image, not reference.model.has_class_token)
            findings.largest_margin = max(findings.largest_margin, margin)
            if margin < MARGIN:
                findings.explained += 1
            else:
                findings.unexplained += 1
                findings.blocks_with_unexplained.add(block)
    findings.max_logit_error = max(findings.max_logit_error, _largest_difference(logits, expected))
    findings.max_logit = max(findings.max_logit, float(expected.abs().max()))
    findings.top1_equal += int((logits.argmax(1) == expected.argmax(1)).sum())
    debug_error = _largest_difference(logits, torch.from_numpy(outputs[OUTPUT]))
    findings.debug_copy_error = max(findings.debug_copy_error, debug_error)


def _largest_difference(one: Tensor, other: Tensor) -> float:
    error = (one - other).abs().max()
    return float(error) if error.isfinite() else float("inf")


def _equal_decisions(one: Matching, other: Matching, image: int) -> int:
    """How many tokens merge into the same token in both."""
    pairs = [set(zip(each.src[image].tolist(), each.dst[image].tolist(), strict=True)) for each in (one, other)]
    return len(pairs[0] & pairs[1])


def default_images(size: tuple[int, int, int], images: int = 6, seed: int = 0) -> Iterator[np.ndarray]:
    """Batches for when no images are given: noise, and smooth random patterns with flat areas as photographs have.

    Yields:
        A batch of one and a batch of five, for noise and for patterns; float32 [B, 3, H, W].
    """
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(images, *size, generator=draw)
    coarse = torch.randn(images, size[0], 5, 5, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, size[1:], mode="bicubic").clamp(-2, 1)
    for kind in (noise, smooth):
        yield kind[:1].numpy()
        yield kind[1:].contiguous().numpy()
