"""Accuracy of a checkpoint at every degree, as it is and with a compensator at a scale chosen on other sheets."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from bench.experiment.protocol import Method, Protocol
from bench.experiment.tasks import Task
from tocom.calib.scale_choice import best_scale
from tocom.calib.scales_file import Trial
from tocom.compensator import Compensator
from tocom.export.graph.fuse import fuse
from tocom.reduction import reduction_named
from tocom.schedule import ScheduleFamily
from tocom.vit import ReducedViT, schedule_for

VAL_SEED, TEST_SEED = 3, 4
_BATCH = 128


@dataclass(frozen=True)
class Outcome:
    """One checkpoint at one degree; shares are in percent.

    Attributes:
        target: Degree it ran at.
        plain: Top-1 as it is.
        compensated: Top-1 with the compensator at the chosen scale.
        standard_error: Of compensated - plain over the test sheets, which both saw.
        scale: Chosen on the validation sheets.
    """

    target: int
    plain: float
    compensated: float
    standard_error: float
    scale: float


def evaluate(
    model: nn.Module, source: int, task: Task, compensator: Compensator, method: Method, protocol: Protocol
) -> list[dict[str, float]]:
    """Measures a checkpoint at every target degree.

    Args:
        model: The fine-tuned timm model.
        source: Degree it was fine-tuned at, with constant schedules.
        task: What it was fine-tuned on.
        compensator: Trained for the method.
        method: How tokens are removed.
        protocol: Degrees and numbers of sheets.

    Returns:
        An `Outcome` per target degree, as plain data.
    """
    val = task.sheets("val", VAL_SEED, protocol.val_sheets)
    test = task.sheets("test", TEST_SEED, protocol.test_sheets)
    outcomes = []
    for target in protocol.targets:
        plain = hits(at_degree(model, target, method), *test)
        if target == source:  # nothing to compensate
            share = 100 * float(plain.double().mean())
            outcomes.append(Outcome(target, share, share, 0.0, 0.0))
            continue
        variants = {
            scale: at_degree(compensated(model, compensator, source, target, scale), target, method)
            for scale in protocol.scales
        }
        tried = [Trial(scale, float(hits(variant, *val).double().mean()), None) for scale, variant in variants.items()]
        scale = best_scale(tried, compensator.info.training_scale)
        with_compensator = hits(variants[scale], *test)
        difference = with_compensator.double() - plain.double()
        outcomes.append(
            Outcome(
                target,
                100 * float(plain.double().mean()),
                100 * float(with_compensator.double().mean()),
                100 * float(difference.std() / len(difference) ** 0.5),
                scale,
            )
        )
    return [asdict(outcome) for outcome in outcomes]


def at_degree(model: nn.Module, degree: int, method: Method) -> ReducedViT:
    """The model at a degree of a method."""
    schedule = schedule_for(model, degree, ScheduleFamily(method.schedule))
    return ReducedViT(model, schedule, reduction=reduction_named(method.reduction)).eval()


def compensated(model: nn.Module, compensator: Compensator, source: int, target: int, scale: float) -> nn.Module:
    """A copy of the model with the compensator fused into its weights, as it is deployed."""
    own = copy.deepcopy(model)
    own.load_state_dict(fuse(model.state_dict(), compensator.between(source, target, scale)))
    return own


@torch.inference_mode()
def hits(network: nn.Module, pixels: Tensor, classes: Tensor) -> Tensor:
    """Which sheets are classified right, bool [N] on the CPU; the sheets go to the network's device."""
    device = next(network.parameters()).device
    guesses = [network(part.to(device)).argmax(1).cpu() for part in pixels.split(_BATCH)]
    return torch.cat(guesses) == classes
