"""How well a random model is conditioned: how far PyTorch's own float32 is from float64, in the units of the gates.

What float32 itself gets wrong by many roundings no engine can get right: an alarm about such a model says that the gate
knows the format only, and not the network.
"""

from __future__ import annotations

import math
from statistics import median

import torch

from bench.proof.models import Drawn, compensator_of, model_of
from tocom.export.graph.fuse import fuse
from tocom.export.proof.gates import GATES
from tocom.export.proof.parts import compare_parts, logit_distance
from tocom.export.proof.reference import TorchObserver, in_format, replay
from tocom.export.source.images import default_images
from tocom.reduction import reduction_named
from tocom.vit import ReducedViT

_FORMAT = "fp32"


def own_errors(drawn: Drawn) -> dict[str, float]:
    """PyTorch in float32 beside float64: what `bench.proof.case.measured` says of an engine, under the same names.

    Args:
        drawn: The model; not quantized, whatever its precision.
    """
    model = model_of(drawn)
    if drawn.delta_scale is not None:
        compensation = compensator_of(drawn, model).between(0, drawn.degree, drawn.delta_scale)
        model.load_state_dict(fuse(model.state_dict(), compensation))
    reference = ReducedViT(model, drawn.schedule_of(model), reduction=reduction_named(drawn.reduction))
    exact, observer = in_format(reference, "fp64"), TorchObserver(reference, _FORMAT)
    unit = GATES[_FORMAT].unit_roundoff
    errors: list[float] = []
    found: dict[str, float] = {}
    for batch in default_images((3, *model.patch_embed.img_size), seed=drawn.seed):
        images, observed = torch.from_numpy(batch), observer.observe(batch)
        expected = replay(exact, images, observed.decisions).logits
        errors += logit_distance(observed.logits.double(), expected).tolist()
        for (_, part), error in compare_parts(exact, images, observed).errors.items():
            found[part] = max(found.get(part, 0.0), float(error.max()) / unit)
    grown = unit * math.sqrt(len(model.blocks))
    found["logits of the worst image"] = max(errors) / grown
    found["logits of the image in the middle"] = median(errors) / grown
    return found
