"""Accuracy of a checkpoint at every degree, as it is and with a compensator at a scale chosen on other sheets."""

from __future__ import annotations

import copy

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


def evaluate(
    model: nn.Module, source: int, task: Task, compensator: Compensator, method: Method, protocol: Protocol
) -> list[dict[str, float]]:
    """Measures a checkpoint, fine-tuned at a source degree with constant schedules, at every target degree.

    Returns:
        For each `target`, in percent of the test sheets: `plain`, top-1 as it is; `compensated`, with the compensator
        at the `scale` that was chosen on the validation sheets; `standard_error` of the difference.
    """
    val = task.sheets("val", VAL_SEED, protocol.val_sheets)
    test = task.sheets("test", TEST_SEED, protocol.test_sheets)
    outcomes = []
    for target in protocol.targets:
        plain = hits(at_degree(model, target, method), *test).double()
        found = {"target": target, "plain": 100 * float(plain.mean())}
        if target == source:  # nothing to compensate
            outcomes.append({**found, "compensated": found["plain"], "standard_error": 0.0, "scale": 0.0})
            continue
        variants = {
            scale: at_degree(compensated(model, compensator, source, target, scale), target, method)
            for scale in protocol.scales
        }
        tried = [Trial(scale, float(hits(variant, *val).double().mean()), None) for scale, variant in variants.items()]
        scale = best_scale(tried, compensator.info.training_scale)
        better = hits(variants[scale], *test).double()
        error = 100 * float((better - plain).std() / len(plain) ** 0.5)
        outcomes.append({**found, "compensated": 100 * float(better.mean()), "standard_error": error, "scale": scale})
    return outcomes


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
