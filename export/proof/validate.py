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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from calib.quantize.grids import FORMATS
from export.build import PLANNED, as_engine, needs_inlining
from export.lower import OUTPUT, inline
from export.operators import DOMAIN
from export.precision import HALF, precision_of
from export.proof.decisions import AnyDecision, decisions_of, judge_of, tokens_of
from export.proof.findings import DEBUG_TOLERANCE, LOGIT_TOLERANCE, Findings
from export.rounding import rounded
from runtime.artifacts import Engine, Report
from runtime.engines import EngineRunner, open_engine
from tocom.vit import ReducedViT

_SMALLEST = 1e-12  # nothing is divided by less


def validate(
    engine: Engine, reference: ReducedViT, batches: Iterator[np.ndarray], plain: ReducedViT | None = None
) -> Report:
    """Compares an engine with the PyTorch reference of the same degree.

    Args:
        engine: What is to be proven.
        reference: The reference with the same weights and schedule, float32; quantized where the engine is.
        batches: Normalized images, float32 [B, 3, H, W].
        plain: Of a quantized engine, the reference that is not quantized.

    Returns:
        The report; false if a gate failed.
    """
    findings = Findings(precision=engine.precision, debug_tolerance=_debug_tolerance(engine))

    @functools.cache  # twice the weights' memory, needed only where a decision differs
    def exact() -> ReducedViT:
        return ReducedViT(copy.deepcopy(reference.model).double(), reference.schedule, reduction=reference.reduction)

    with _runners(engine) as (shipped, debugged):
        for pixel_values in batches:
            compare(shipped, debugged, reference, exact, pixel_values, findings, plain)
    found = {**findings.to_json(), "run": None if engine.unrunnable else engine.backend}
    return Report(engine=engine, passed=findings.passed, findings=found)


@contextmanager
def proving_runner(engine: Engine) -> Iterator[EngineRunner]:
    """What answers as the engine does: itself, or where it cannot be run here its graph, on ONNX Runtime."""
    if engine.unrunnable:
        with debug_copy(engine) as runner:
            yield runner
    else:
        with open_engine(**_opened_as(engine, engine.file)) as runner:
            yield runner


@contextmanager
def _runners(engine: Engine) -> Iterator[tuple[EngineRunner, EngineRunner]]:
    """What is shipped, and what also tells its decisions.

    A native operator tells them as it is. What cannot be run here is proven by its graph, on ONNX Runtime.
    """
    if engine.native or engine.unrunnable:
        with proving_runner(engine) as runner:
            yield runner, runner
    else:
        with open_engine(**_opened_as(engine, engine.file)) as shipped, debug_copy(engine) as debugged:
            yield shipped, debugged


def _debug_tolerance(engine: Engine) -> float:
    """A plan with more outputs may be built of other kernels, which round otherwise; so may quantized products be."""
    exact = engine.backend not in PLANNED and engine.precision not in FORMATS
    return DEBUG_TOLERANCE if exact else LOGIT_TOLERANCE[engine.precision]


def _opened_as(engine: Engine, file: Path) -> dict[str, Any]:
    return {"path": file, "backend": engine.backend, "precision": engine.precision}


@contextmanager
def debug_copy(engine: Engine) -> Iterator[EngineRunner]:
    """Runs a copy of the engine's graph that also puts out its decisions; the shipped file is not touched.

    Where the engine cannot be run, ONNX Runtime carries the copy out, with every rounding that stands in the graph.
    """
    graph = onnx.load(engine.source.file, load_external_data=False)
    values = {value.name: value for value in graph.graph.value_info}
    for node in graph.graph.node:
        if node.domain == DOMAIN:
            for name in node.output[2:]:
                graph.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None))
            if precision_of(graph) in HALF:  # the formats are the graph's, so that this changes none
                graph.graph.output.append(values[node.output[0]])
    backend, precision = engine.backend, engine.precision
    if engine.unrunnable:
        graph, backend, precision = rounded(graph), "onnxruntime", "fp32"
    elif needs_inlining(graph, backend):
        graph = inline(graph)
    # beside the original, because its weight files are found relative to the graph
    file = engine.source.file.with_name(f".{engine.source.file.stem}.debug.onnx")
    try:
        file.write_bytes(graph.SerializeToString())
        with (
            as_engine(file, backend, engine.build) as opened,
            open_engine(opened, backend, precision=precision) as runner,
        ):
            yield runner
    finally:
        file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Replay:
    """What the reference does with decisions forced on it.

    Attributes:
        logits: [B, classes].
        natural: Block -> what it would have decided itself.
        signals: Block -> what it decided on.
        tokens: Block -> the tokens that remained, [B, N - r, C].
    """

    logits: Tensor
    natural: Mapping[int, AnyDecision]
    signals: Mapping[int, Tensor]
    tokens: Mapping[int, Tensor]


@torch.no_grad()
def replay(reference: ReducedViT, pixel_values: Tensor, decisions: Mapping[int, AnyDecision]) -> Replay:
    """Runs the reference with given decisions forced on it; it decides itself where none are given.

    Returns:
        What it found.
    """
    reduction = reference.reduction
    natural: dict[int, AnyDecision] = {}
    signals: dict[int, Tensor] = {}
    tokens: dict[int, Tensor] = {}

    def step(block: int, x: Tensor, token_size: Tensor, signal: Tensor, r: int) -> tuple[Tensor, Tensor]:
        natural[block] = reduction.decide(signal, r, reference.model)
        signals[block] = signal
        tokens[block], size = reduction.apply(x, token_size, signal, decisions.get(block, natural[block]))
        return tokens[block], size

    return Replay(reference(pixel_values, step), natural, signals, tokens)


def compare(
    shipped: EngineRunner,
    debugged: EngineRunner,
    reference: ReducedViT,
    exact: Callable[[], ReducedViT],
    pixel_values: np.ndarray,
    findings: Findings,
    plain: ReducedViT | None = None,
) -> None:
    """Compares one batch, and adds what it finds.

    Args:
        shipped: The engine.
        debugged: What also tells its decisions.
        reference: Of the same degree.
        exact: Makes it in float64, where that is needed.
        pixel_values: float32 [B, 3, H, W].
        findings: Added to.
        plain: See `validate`.
    """
    logits = torch.from_numpy(shipped.infer(pixel_values))
    outputs = debugged.infer_all(pixel_values)
    decisions = decisions_of(outputs, reference)
    images = torch.from_numpy(pixel_values)
    findings.images += len(images)
    invalid = _blocks_with_none(decisions, reference, len(images))
    if invalid:
        for block in invalid:
            findings.block(block).unexplained += 1
        findings.largest_margin = findings.max_logit_error = float("inf")
        return  # there is nothing to replay
    forced = replay(reference, images, decisions)
    expected = forced.logits
    compare_decisions(
        decisions,
        forced.natural,
        len(images),
        reference,
        lambda: replay(exact(), images.double(), decisions).signals,
        findings,
    )
    for block, tokens in tokens_of(outputs, reference).items():
        largest = float(forced.tokens[block].abs().max())
        error = _largest_difference(tokens, forced.tokens[block]) / max(largest, _SMALLEST)
        findings.block(block).token_error = max(findings.block(block).token_error or 0.0, error)
    findings.max_logit_error = max(findings.max_logit_error, _largest_difference(logits, expected))
    findings.logit_errors += _of_each_image(logits, expected)
    if plain is not None:
        findings.quantization_errors += _of_each_image(replay(plain, images, decisions).logits, expected)
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


def compare_decisions(
    decisions: Mapping[int, AnyDecision],
    natural: Mapping[int, AnyDecision],
    images: int,
    reference: ReducedViT,
    exact_signals: Callable[[], Mapping[int, Tensor]],
    findings: Findings,
) -> None:
    """Compares the decisions of one batch, and adds what it finds.

    Args:
        decisions: Block -> what was decided.
        natural: Block -> what the reference decides on the same tokens.
        images: How many.
        reference: The reference.
        exact_signals: Block -> what is decided on, in float64, with the same decisions before; called where it is
            needed.
        findings: Added to.
    """
    judge = judge_of(reference.reduction)
    signals: Mapping[int, Tensor] | None = None
    for block, chosen in decisions.items():
        found = findings.block(block)
        for image in range(images):
            found.decisions += judge.count(chosen)
            found.equal += judge.count_equal(natural[block], chosen, image)
            if judge.is_equal(natural[block], chosen, image):
                continue
            signals = signals or exact_signals()
            margin = judge.margin(signals[block], chosen, image, reference.model)
            findings.largest_margin = max(findings.largest_margin, margin)
            if margin < judge.bounds[findings.precision]:
                found.explained += 1
            else:
                found.unexplained += 1


def _of_each_image(one: Tensor, other: Tensor) -> list[float]:
    """Largest difference of a logit."""
    return (one - other).abs().amax(dim=1).nan_to_num(nan=float("inf")).tolist()


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
