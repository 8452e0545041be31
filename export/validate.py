"""Engine + reference -> report: are the decisions the reference's, and the logits right given the decisions?

Removing tokens is discrete: one rounding can flip a tie, and every later number differs although nothing is wrong. So
decisions and values are compared apart. The reference is run once more with the engine's decisions forced on it
(replay): its own choice in every block is compared with the engine's, and the logits then compare at rounding level
whatever was decided. A decision that differs is explained if it is as good as the best one to within rounding.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from export.build import needs_inlining
from export.decisions import AnyDecision, decisions_of, judge_of
from export.lower import OUTPUT, inline
from export.operators import DOMAIN
from runtime.artifacts import Engine, Report
from runtime.engines import EngineRunner, open_engine
from tocom.vit import ReducedViT

LOGIT_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # by precision; times the largest logit where that exceeds 1
DEBUG_TOLERANCE = 1e-6  # the debug copy may be optimized differently, not compute something else


@dataclass
class Findings:
    """What was compared, over all images so far.

    Attributes:
        precision: What the engine computes in: rounding is judged by it.
    """

    precision: str = "fp32"
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
        """Share of decisions (who merges into whom, who is dropped) equal to the reference's; 1 where nothing goes."""
        return self.equal_decisions / self.decisions if self.decisions else 1.0

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        tolerance = LOGIT_TOLERANCE[self.precision] * max(1.0, self.max_logit)
        return (
            self.unexplained == 0
            and self.max_logit_error <= tolerance
            and self.debug_copy_error <= DEBUG_TOLERANCE * max(1.0, self.max_logit)
        )

    def to_json(self) -> dict[str, Any]:
        """For the manifest and for machines."""
        return {
            "passed": self.passed,
            "precision": self.precision,
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
    findings = Findings(precision=engine.precision)

    @functools.cache  # twice the weights' memory, needed only where a decision differs
    def exact() -> ReducedViT:
        return ReducedViT(copy.deepcopy(reference.model).double(), reference.schedule, reduction=reference.reduction)

    shipped = open_engine(engine.file, engine.backend, precision=engine.precision)
    # a native operator tells its decisions as it is, so no copy is needed
    with shipped, nullcontext(shipped) if engine.native else debug_copy(engine) as debugged:
        for pixel_values in batches:
            _compare(shipped, debugged, reference, exact, pixel_values, findings)
    return Report(engine=engine, passed=findings.passed, findings=findings.to_json())


@contextmanager
def debug_copy(engine: Engine) -> Iterator[EngineRunner]:
    """Runs a copy of the engine's graph that also puts out its decisions; the shipped file is not touched."""
    graph = onnx.load(engine.source.file, load_external_data=False)
    for node in graph.graph.node:
        if node.domain == DOMAIN:
            for name in node.output[2:]:
                graph.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None))
    if needs_inlining(graph, engine.backend):
        graph = inline(graph)
    # beside the original, because its weight files are found relative to the graph
    file = engine.file.with_name(f".{engine.file.stem}.debug.onnx")
    try:
        file.write_bytes(graph.SerializeToString())
        with open_engine(file, engine.backend, precision=engine.precision) as runner:
            yield runner
    finally:
        file.unlink(missing_ok=True)


@torch.no_grad()
def replay(
    reference: ReducedViT, pixel_values: Tensor, decisions: Mapping[int, AnyDecision]
) -> tuple[Tensor, dict[int, AnyDecision], dict[int, Tensor]]:
    """Runs the reference with given decisions forced on it; it decides itself where none are given.

    Returns:
        Its logits; what it would have decided in each block; and the signal that each block decided on.
    """
    reduction = reference.reduction
    natural: dict[int, AnyDecision] = {}
    signals: dict[int, Tensor] = {}

    def step(block: int, x: Tensor, token_size: Tensor, signal: Tensor, r: int) -> tuple[Tensor, Tensor]:
        natural[block] = reduction.decide(signal, r, reference.model)
        signals[block] = signal
        return reduction.apply(x, token_size, signal, decisions.get(block, natural[block]))

    return reference(pixel_values, step), natural, signals


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
    invalid = _blocks_with_none(decisions, reference, len(images))
    if invalid:
        findings.unexplained += len(invalid)
        findings.blocks_with_unexplained |= invalid
        findings.largest_margin = findings.max_logit_error = float("inf")
        return  # there is nothing to replay
    expected, natural, _ = replay(reference, images, decisions)
    _compare_decisions(
        decisions, natural, len(images), reference, lambda: replay(exact(), images.double(), decisions)[2], findings
    )
    findings.max_logit_error = max(findings.max_logit_error, _largest_difference(logits, expected))
    findings.max_logit = max(findings.max_logit, float(expected.abs().max()))
    findings.top1_equal += int((logits.argmax(1) == expected.argmax(1)).sum())
    debug_error = _largest_difference(logits, torch.from_numpy(outputs[OUTPUT]))
    findings.debug_copy_error = max(findings.debug_copy_error, debug_error)


def _blocks_with_none(decisions: Mapping[int, AnyDecision], reference: ReducedViT, images: int) -> set[int]:
    """Blocks whose outputs are no decisions at all, for one image or another."""
    judge, tokens = judge_of(reference.reduction), reference.schedule.tokens
    return {
        block
        for block, chosen in decisions.items()
        if not all(judge.is_valid(chosen, image, tokens[block]) for image in range(images))
    }


def _compare_decisions(
    decisions: Mapping[int, AnyDecision],
    natural: Mapping[int, AnyDecision],
    images: int,
    reference: ReducedViT,
    exact_signals: Callable[[], dict[int, Tensor]],
    findings: Findings,
) -> None:
    judge = judge_of(reference.reduction)
    signals: dict[int, Tensor] | None = None
    for block, chosen in decisions.items():
        for image in range(images):
            findings.decisions += judge.count(chosen)
            findings.equal_decisions += judge.count_equal(natural[block], chosen, image)
            if judge.is_equal(natural[block], chosen, image):
                continue
            signals = signals or exact_signals()
            margin = judge.margin(signals[block], chosen, image, reference.model)
            findings.largest_margin = max(findings.largest_margin, margin)
            if margin < judge.bounds[findings.precision]:
                findings.explained += 1
            else:
                findings.unexplained += 1
                findings.blocks_with_unexplained.add(block)


def _largest_difference(one: Tensor, other: Tensor) -> float:
    error = (one - other).abs().max()
    return float(error) if error.isfinite() else float("inf")


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
