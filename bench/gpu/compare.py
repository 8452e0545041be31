"""Is everything that is timed right on this GPU? Decisions and logits against the reference, as `tocom validate` does.

The reference itself is compared with the CPU, the Triton step with the plain one on the same device, and every engine
library that is there with the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from bench.gpu.reasons import reason
from bench.gpu.subject import DTYPES, Deployed, Subject, ensure_runs, ensure_usable, plan_options
from tocom.export.engine.build import build
from tocom.export.graph.operators import operator_of, point_name
from tocom.export.graph.trace import OUTPUT
from tocom.export.proof.debug_copy import debug_outputs
from tocom.export.proof.findings import Findings
from tocom.export.proof.observe import RunnerObserver
from tocom.export.proof.tally import Tally
from tocom.export.proof.validate import compare_decisions, validate, validate_observer
from tocom.export.source.images import default_images
from tocom.merging import Matching, merge
from tocom.reduction import MERGE
from tocom.runtime.engines.base import EngineRunner
from tocom.runtime.engines.tensorrt.plan import TITLES
from tocom.runtime.errors import InputError
from tocom.vit import ReducedViT, ReduceStep

Decide = Callable[[Tensor, int], Matching]

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
REFERENCE, STEP, NETWORK, ONNXRUNTIME = "reference", "Triton step", "network with the Triton step", "ONNX Runtime CUDA"

_LARGEST_BATCH = 5  # of the images that everything is compared on
_SUM_ERROR = 2e-6  # of a weighted mean in float32, as a share of the largest number in it


@dataclass(frozen=True)
class Check:
    """One comparison at one degree."""

    model: str  # timm's name
    degree: int  # tokens removed in every block
    what: str  # what was compared
    verdict: str  # `PASSED`, `FAILED` or `NOT_RUN`
    agreement: float | None = None  # share of decisions about tokens that are the other side's, if any
    explained: int = 0  # images in whose blocks something else was decided that is as good to within rounding
    unexplained: int = 0  # images in whose blocks it is not
    error: float | None = None  # largest difference of a logit; of a step as a share of its largest number
    allowed: float | None = None  # what it may be
    why: str = ""  # why it was not run, or what else failed; one line


def planned(degree: int, precision: str) -> list[str]:
    """What is compared at a degree where all is timed in a precision, in order."""
    formats = dict.fromkeys(("fp32", precision))
    steps = [f"{STEP}, {name}" for name in DTYPES] + [f"{NETWORK}, {name}" for name in formats]
    libraries = [f"{library}, {name}" for library in (ONNXRUNTIME, *TITLES.values()) for name in formats]
    return [f"{REFERENCE}, fp32", *(steps if degree else []), *libraries]


def run_check(subject: Subject, degree: int, what: str) -> Check:
    """Makes one comparison."""
    who, precision = what.rsplit(", ", 1)
    try:
        found = _compared(subject, degree, who, precision)
    except AssertionError as error:  # the engine answers with NaN
        return Check(subject.name, degree, what, FAILED, why=reason(error))
    except Exception as error:  # noqa: BLE001 - what cannot run is told, and the next one has its turn
        why = reason(error)
    else:
        return Check(subject.name, degree, what, **found)
    ensure_usable(f"{what} at r = {degree}", why)
    return Check(subject.name, degree, what, NOT_RUN, why=why)


def _compared(subject: Subject, degree: int, who: str, precision: str) -> dict[str, Any]:
    """What a check found."""
    reference = subject.reference(degree)
    batches = default_images(subject.size, 1 + _LARGEST_BATCH)
    if who == STEP:
        return _compared_steps(subject.on_device(degree, DTYPES[precision]), batches)
    if who in TITLES.values():
        backend = next(backend for backend, title in TITLES.items() if title == who)
        return _compared_plan(subject, degree, backend, precision, batches)

    with _runners(subject, degree, who, precision) as (shipped, telling):
        observer = RunnerObserver(shipped, telling, reference, precision, name=who)
        findings = validate_observer(observer, reference, batches)
    return _summary(findings)


def _summary(found: Findings) -> dict[str, Any]:
    """What a check tells of `Findings`."""
    worst = found.gates["logits of the worst image"]
    return {
        "verdict": PASSED if found.passed else FAILED,
        "agreement": found.agreement if found.decisions else None,
        "explained": found.explained,
        "unexplained": found.unexplained,
        "error": worst.found,
        "allowed": worst.allowed,
        "why": str(found.faults[0]) if found.faults else "",
    }


@contextmanager
def _runners(subject: Subject, degree: int, who: str, precision: str) -> Iterator[tuple[EngineRunner, EngineRunner]]:
    """What is compared, and what also tells its decisions."""
    if who == ONNXRUNTIME:
        try:
            from bench.gpu.ort_cuda import CudaOrtRunner
        except ImportError as error:
            raise InputError(f"ONNX Runtime does not load: {error}") from error
        graph = subject.graph(degree, precision).file
        with CudaOrtRunner(graph) as shipped, _telling_copy(graph) as copied, CudaOrtRunner(copied) as telling:
            yield shipped, telling
        return
    with _TorchRunner(subject.on_device(degree, DTYPES[precision]), with_triton=who == NETWORK) as runner:
        yield runner, runner


@contextmanager
def _telling_copy(graph: Path) -> Iterator[Path]:
    """A copy of a graph that also puts out its decisions; removed afterwards."""
    proto = onnx.load(graph, load_external_data=False)
    known = {value.name: value for value in proto.graph.value_info}
    proto.graph.output.extend([known[name] for name in debug_outputs(proto, native=False)])
    file = graph.with_name(f".{graph.stem}.telling.onnx")  # its weight files are found relative to it
    try:
        file.write_bytes(proto.SerializeToString())
        yield file
    finally:
        file.unlink(missing_ok=True)


class _TorchRunner(EngineRunner):
    """A reference on a device, in any number format, as an engine that tells its decisions and tokens."""

    backend = "onnxruntime"  # by whose gates it is judged: those of the number format alone

    def __init__(self, reference: ReducedViT, *, with_triton: bool) -> None:
        self._reference, model = reference, reference.model
        self._way = _by_triton(model) if with_triton else _plain(model)
        self.classes, self.input_size = model.num_classes, (3, *model.patch_embed.img_size)

    def _infer(self, pixel_values: np.ndarray) -> np.ndarray:
        return self._infer_all(pixel_values)[OUTPUT]

    def _infer_all(self, pixel_values: np.ndarray) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        decide, merge_step = self._way

        def step(block: int, x: Tensor, token_size: Tensor, signal: Tensor, r: int) -> tuple[Tensor, Tensor]:
            chosen = decide(signal, r)
            names = operator_of(MERGE).decision_names(block)
            for name, positions in zip(names, (chosen.src, chosen.dst, chosen.unm), strict=True):
                found[name] = positions.cpu().numpy()
            x, token_size = merge_step(block, x, token_size, signal, r)
            found[point_name(block, "remaining")] = x.float().cpu().numpy()
            return x, token_size

        return {OUTPUT: _logits(self._reference, step, pixel_values).float().cpu().numpy(), **found}

    def _close(self) -> None:
        del self._reference


@torch.no_grad()
def _logits(reference: ReducedViT, step: ReduceStep, pixel_values: np.ndarray) -> Tensor:
    weight = reference.model.patch_embed.proj.weight
    return Deployed(reference, step)(torch.from_numpy(pixel_values).to(weight.device, weight.dtype))


def _plain(model: nn.Module) -> tuple[Decide, ReduceStep]:
    """How the reference decides, and merges."""

    def step(_block: int, x: Tensor, token_size: Tensor, signal: Tensor, r: int) -> tuple[Tensor, Tensor]:
        return MERGE.apply(x, token_size, signal, MERGE.decide(signal, r, model))

    return lambda signal, r: MERGE.decide(signal, r, model), step


def _by_triton(model: nn.Module) -> tuple[Decide, ReduceStep]:
    """How the kernels do."""
    from tocom.triton_merge import decide, triton_step

    how = {"protected": model.num_prefix_tokens, "keep_order": model.has_class_token}
    return lambda signal, r: decide(signal, r, **how), triton_step(model)


def _compared_steps(reference: ReducedViT, batches: Iterator[np.ndarray]) -> dict[str, Any]:
    """The Triton step beside the plain one, in every block of a network that goes on with what Triton gave.

    Both see the same numbers, so that decisions are judged as those of float32 whatever the number format is.
    """
    model, tally, error = reference.model, Tally(), 0.0
    (decide, _), (decide_by_triton, step_by_triton) = _plain(model), _by_triton(model)

    def step(block: int, x: Tensor, token_size: Tensor, signal: Tensor, r: int) -> tuple[Tensor, Tensor]:
        nonlocal error
        expected, chosen = _on_cpu(decide(signal, r)), _on_cpu(decide_by_triton(signal, r))
        compare_decisions({block: chosen}, {block: expected}, len(x), reference, lambda _: signal.double().cpu(), tally)
        merged, merged_size = step_by_triton(block, x, token_size, signal, r)
        wide = [each.float().cpu() for each in (x, token_size, merged, merged_size)]
        tokens, sizes = merge(*wide[:2], chosen)
        error = max(error, float((wide[2] - tokens).abs().max() / tokens.abs().max()))
        if not torch.equal(wide[3], sizes):
            error = float("inf")
        return merged, merged_size

    for pixel_values in batches:
        _logits(reference, step, pixel_values)
    allowed = torch.finfo(model.patch_embed.proj.weight.dtype).eps + _SUM_ERROR
    return {
        "verdict": PASSED if error <= allowed and not tally.total("unexplained") else FAILED,
        "agreement": tally.agreement,
        "explained": tally.total("explained"),
        "unexplained": tally.total("unexplained"),
        "error": error,
        "allowed": allowed,
    }


def _on_cpu(matching: Matching) -> Matching:
    return Matching(matching.src.cpu(), matching.dst.cpu(), matching.unm.cpu(), matching.protected)


def _compared_plan(
    subject: Subject, degree: int, backend: str, precision: str, batches: Iterator[np.ndarray]
) -> dict[str, Any]:
    """A plan beside the reference."""
    options = plan_options(backend, 1, _LARGEST_BATCH)
    engine = build(subject.graph(degree, precision), backend=backend, precision=precision, plan=options)
    ensure_runs(engine)
    return _summary(validate(engine, subject.reference(degree), batches).findings)
