"""Self-distillation: a pre-trained backbone and its own training images -> a compensator (ToCom, section 3.4).

Teacher and student are the same frozen network at two degrees; only the compensator's pairs are trained, so the
network that comes out of it is the one that went in.

    options = DistillOptions(steps=3000, batch=64, lr=0.04, schedule="strided:3", reduction="merge")
    compensator = distill(model, images, backbone=name, backbone_sha256=hash_tensors(model.state_dict()),
                          options=options, state_folder=Path("work/compensator.training"),
                          on_step=lambda step, loss: print(step, loss))

`images` is a `tocom.calib.distill.pairs.BatchSource`, an object with `batch(first_pair, pairs) -> [2 * pairs, 3, H, W]`
that makes normalized images; or anything with `len()` and `[index]` that holds PIL images, which are augmented as the
options say, or normalized tensors [3, H, W], which are taken as they are. Everything random follows from the seed, the
step and the pair's number: with a state folder, the same call goes on where it was, and the result does not depend on
how a step's total batch is divided over processes (torchrun) and turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import nn

from tocom.calib.distill.augmentation import Augmentation
from tocom.calib.distill.cluster import Cluster
from tocom.calib.distill.options import DistillOptions
from tocom.calib.distill.pairs import BatchSource, ImagePairs
from tocom.calib.distill.training import Listeners, Training, TrainingOverview
from tocom.compensator import Compensator, CompensatorInfo
from tocom.reduction import reduction_named
from tocom.schedule import ScheduleFamily
from tocom.vit import require_supported, schedule_for

__all__ = ["DistillOptions", "TrainingOverview", "distill"]

_DEFAULTS = DistillOptions()


def distill(
    model: nn.Module,
    images: BatchSource | Sequence[object],
    *,
    backbone: str,
    backbone_sha256: str,
    options: DistillOptions = _DEFAULTS,
    state_folder: Path | None = None,
    restart: bool = False,
    on_start: Callable[[TrainingOverview], None] | None = None,
    on_step: Callable[[int, float], None] | None = None,
    on_unreadable: Callable[[tuple[str, ...]], None] | None = None,
) -> Compensator:
    """Trains a compensator for a backbone.

    Every step draws a source and a target degree, different, from 0..16; the teacher is the frozen model at the source
    degree, the student the frozen model at the target degree with the compensator; the loss is KL(teacher || student)
    on the soft labels.

    Args:
        model: The pre-trained timm model; its weights are frozen, moved to the device while training, and left as they
            were.
        images: See this module's head.
        backbone: Architecture name, kept in the compensator.
        backbone_sha256: Hash of the model's weights, kept in the compensator.
        options: How to train.
        state_folder: Where the state, `log.csv` and TensorBoard events are kept, and where an earlier call with the
            same options is taken up; None keeps nothing.
        restart: Whether to begin anew in a folder that holds a state.
        on_start: Called once, with what will be trained. All three are called in process 0 only.
        on_step: Called after every step with the steps done and the loss.
        on_unreadable: Called with the names of images that could not be read, new ones each time.

    Returns:
        The compensator, on the CPU, in evaluation mode; the same in every process.

    Raises:
        InputError: If the model, the options or the images cannot be used, or the state folder is of another run.
        GateError: If a loss is not finite.
        KeyboardInterrupt: After SIGINT or SIGTERM, when the state has been saved.
    """
    family, reduction = ScheduleFamily(options.schedule), reduction_named(options.reduction)
    require_supported(model)
    reduction.require_supported(model)
    schedule_for(model, 1, family)
    info = CompensatorInfo(
        width=model.embed_dim,
        depth=len(model.blocks),
        rank=options.rank,
        backbone=backbone,
        training_scale=options.delta_scale,
        schedule=family.name,
        reduction=reduction.name,
        backbone_sha256=backbone_sha256,
    )
    source = pairs_of(images, model, options) if hasattr(images, "__getitem__") else images
    cluster = Cluster.join(options.device, options.precision)
    training = Training(model, info, source, options, cluster)
    identity = {
        **options.deciding,
        **asdict(info),
        "images": getattr(images, "identity", None) or _described(images),
        "total_batch": training.division.total,
    }
    training.run(state_folder, identity, restart, Listeners(on_start, on_step, on_unreadable))
    cluster.leave()
    return training.compensator


def pairs_of(images: Sequence[object], model: nn.Module, options: DistillOptions) -> ImagePairs:
    """The images as pairs, augmented for a model."""
    augmentation = Augmentation.for_model(model, options.augment, flip=options.flip, erasing=options.erasing)
    return ImagePairs(images, augmentation.prepare, augmentation.mix, options.seed)


def _described(images: object) -> str:
    size = f" of {len(images)}" if hasattr(images, "__len__") else ""
    return f"{type(images).__name__}{size}"
