"""Is everything that is timed right on this GPU? Decisions and logits against the reference, as `tocom validate` does.

The reference itself is compared with the CPU, the Triton step with the plain one on the same device, and every engine
library that is there with the reference.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from bench.gpu.reasons import reason
from bench.gpu.subject import DTYPES, Deployed, Subject, ensure_usable, plan_options
from export.build import build
from export.decisions import AnyDecision, judge_of
from export.findings import LOGIT_TOLERANCE, Findings
from export.lower import OUTPUT
from export.operators import DOMAIN, operator_of
from export.validate import _compare, default_images, validate
from runtime.engines import EngineRunner
from runtime.engines.plan import TITLES
from runtime.errors import InputError
from tocom.merging import Matching, merge
from tocom.reduction import MERGE
from tocom.vit import ReducedViT, ReduceStep

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
REFERENCE, STEP, NETWORK, ONNXRUNTIME = "reference", "Triton step", "network with the Triton step", "ONNX Runtime CUDA"

_LARGEST_BATCH = 5  # of the images that everything is compared on
_SUM_ERROR = 2e-6  # of a weighted mean in float32, as a share of the largest number in it


@dataclass(frozen=True)
class Check:
    """One comparison at one degree.

    Attributes:
        model: timm's name.
        degree: Tokens removed in every block.
        what: What was compared.
        verdict: `PASSED`, `FAILED` or `NOT_RUN`.
        agreement: Share of the decisions about single tokens that is the other side's; None where nothing is decided.
        explained: Images in whose blocks something else was decided that is as good to within rounding.
        unexplained: Images in whose blocks it is not.
        error: Largest difference of a logit; for a step, of a number in its tokens as a share of the largest one.
        allowed: What it may be.
        why: Why it was not run, or what else failed; one line.
    """

    model: str
    degree: int
    what: str
    verdict: str
    agreement: float | None = None
    explained: int = 0
    unexplained: int = 0
    error: float | None = None
    allowed: float | None = None
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """For the file of finished checks."""
        return asdict(self)


def planned(degree: int, precision: str) -> list[str]:
    """What is compared at a degree where all is timed in a precision, in order."""
    formats = dict.fromkeys(("fp32", precision))
    steps = [f"{STEP}, {name}" for name in DTYPES] + [f"{NETWORK}, {name}" for name in formats]
    libraries = [f"{library}, {name}" for library in (ONNXRUNTIME, *TITLES.values()) for name in formats]
    return [f"{REFERENCE}, fp32", *(steps if degree else []), *libraries]


def run_check(subject: Subject, degree: int, what: str) -> Check:
    """Makes one comparison.

    Args:
        subject: The model.
        degree: Tokens removed in every block.
        what: One of `planned`.

    Raises:
        GateError: It left the GPU unusable.
    """
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
    reference, findings = subject.reference(degree), Findings(precision=precision)
    batches = default_images(subject.size, 1 + _LARGEST_BATCH)
    if who == STEP:
        return _compared_steps(subject.on_device(degree, DTYPES[precision]), batches)
    if who in TITLES.values():
        backend = next(backend for backend, title in TITLES.items() if title == who)
        return _compared_plan(subject, degree, backend, precision)

    @functools.cache
    def exact() -> ReducedViT:
        return ReducedViT(copy.deepcopy(reference.model).double(), reference.schedule)

    with _runners(subject, degree, who, precision) as (shipped, telling):
        for pixel_values in batches:
            _compare(shipped, telling, reference, exact, pixel_values, findings)
    return _summary(findings.to_json())


def _summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a check tells of `Findings`."""
    differs = found["debug_copy_error"]
    return {
        "verdict": PASSED if found["passed"] else FAILED,
        "agreement": found["agreement"] if found["decisions"] else None,
        "explained": found["explained"],
        "unexplained": found["unexplained"],
        "error": found["max_logit_error"],
        "allowed": LOGIT_TOLERANCE[found["precision"]] * max(1.0, found["max_logit"]),
        "why": "" if found["passed"] or not differs else f"the copy that tells decisions differs by {differs:.1e}",
    }


@contextmanager
def _runners(subject: Subject, degree: int, who: str, precision: str) -> Iterator[tuple[EngineRunner, EngineRunner]]:
    """What is compared, and what also tells its decisions.

    Raises:
        InputError: ONNX Runtime does not load.
    """
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
    for node in proto.graph.node:
        for name in node.output[2:] if node.domain == DOMAIN else ():
            proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None))
    file = graph.with_name(f".{graph.stem}.telling.onnx")  # its weight files are found relative to it
    try:
        file.write_bytes(proto.SerializeToString())
        yield file
    finally:
        file.unlink(missing_ok=True)


class _TorchRunner(EngineRunner):
    """A reference on a device, in any number format, as an engine that tells its decisions and tokens."""

    backend = "torch"

    def __init__(self, reference: ReducedViT, *, with_triton: bool) -> None:
        self._reference, model = reference, reference.model
        self._step = _triton_step(reference) if with_triton and reference.deciding_blocks else reference.reduce
        self._decide = _triton_decide(reference) if with_triton else functools.partial(_plain_decide, reference)
        self.classes, self.input_size = model.num_classes, (3, *model.patch_embed.img_size)

    def _infer(self, pixel_values: np.ndarray) -> np.ndarray:
        return self._infer_all(pixel_values)[OUTPUT]

    @torch.no_grad()
    def _infer_all(self, pixel_values: np.ndarray) -> dict[str, np.ndarray]:
        reference, outputs = self._reference, {}

        def step(block: int, x: Tensor, token_size: Tensor, signal: Tensor, r: int) -> tuple[Tensor, Tensor]:
            chosen = self._decide(signal, r)
            names = operator_of(reference.reduction).decision_names(block)
            for name, positions in zip(names, (chosen.src, chosen.dst, chosen.unm), strict=True):
                outputs[name] = positions.cpu().numpy()
            x, token_size = self._step(block, x, token_size, signal, r)
            outputs[f"tokens of {block}"] = x.float().cpu().numpy()
            return x, token_size

        weight = reference.model.patch_embed.proj.weight
        images = torch.from_numpy(pixel_values).to(weight.device, weight.dtype)
        logits = Deployed(reference, step)(images)
        return {OUTPUT: logits.float().cpu().numpy(), **outputs}

    def _close(self) -> None:
        del self._reference


def _plain_decide(reference: ReducedViT, signal: Tensor, r: int) -> AnyDecision:
    return reference.reduction.decide(signal, r, reference.model)


def _triton_decide(reference: ReducedViT):
    from tocom.triton_merge import decide

    model = reference.model
    return functools.partial(decide, protected=model.num_prefix_tokens, keep_order=model.has_class_token)
