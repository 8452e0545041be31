"""One training step's loss: the same frozen network at two degrees, the student with the compensator."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tocom.compensator import Compensator
from tocom.dropout import DropoutKey
from tocom.reduction import reduction_named
from tocom.schedule import ScheduleFamily
from tocom.vit import ReducedViT, schedule_for


class SelfDistillation(nn.Module):
    """KL(teacher || student) for a pair of degrees (ToCom, section 3.4).

    Teacher and student are `backbone` itself, whose weights exist once and are no parameters of this module: only the
    compensator is trained, saved, and averaged over processes.

    Args:
        backbone: The frozen timm model, in evaluation mode.
        compensator: What is trained.
        temperature: tau of both softmaxes.
        seed: Of the dropout.
        dropout: Share of low-rank activations that are dropped.
    """

    def __init__(
        self, backbone: nn.Module, compensator: Compensator, *, temperature: float, seed: int, dropout: float
    ) -> None:
        super().__init__()
        self.compensator = compensator
        self._backbone = (backbone,)  # in a tuple, so that it is not registered
        self._temperature, self._seed, self._dropout = temperature, seed, dropout
        self._family = ScheduleFamily(compensator.info.schedule)
        self._reduction = reduction_named(compensator.info.reduction)

    def forward(self, images: Tensor, source: int, target: int, step: int, first_image: int) -> Tensor:
        """The loss of a batch.

        Args:
            images: Normalized images, [B, 3, H, W].
            source: Degree of the teacher.
            target: Degree of the student.
            step: Training step, for the dropout.
            first_image: Number of the batch's first image within the step's total batch, for the dropout.

        Returns:
            A float32 number, mean over the batch.
        """
        (backbone,) = self._backbone
        key = DropoutKey(self._seed, step, first_image, self._dropout) if self._dropout else None
        compensation = self.compensator.between(source, target, dropout=key)
        with torch.no_grad():
            teacher = ReducedViT(backbone, schedule_for(backbone, source, self._family), reduction=self._reduction)
            taught = teacher(images)
        student = ReducedViT(backbone, schedule_for(backbone, target, self._family), compensation, self._reduction)
        return divergence(taught, student(images), self._temperature)


def divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of the softened predictions, mean over the batch, in float32 at least.

    Args:
        teacher: Logits [B, classes].
        student: Logits [B, classes].
        temperature: tau; the result is multiplied by its square.
    """
    with torch.autocast(teacher.device.type, enabled=False):
        precise = torch.promote_types(teacher.dtype, torch.float32)
        log_teacher = functional.log_softmax(teacher.to(precise) / temperature, dim=-1)
        log_student = functional.log_softmax(student.to(precise) / temperature, dim=-1)
        return functional.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean") * temperature**2
