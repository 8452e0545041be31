"""The loss of a step: which networks, which formula, and how many copies of the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tocom.calib.distill.self_distillation import SelfDistillation, divergence
from tocom.compensator import Compensator, CompensatorInfo
from tocom.reduction import PRUNE
from tocom.schedule import ScheduleFamily
from tocom.vit import ReducedViT, schedule_for


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_kl_of_the_teacher_to_the_student(temperature):
    draw = np.random.default_rng(0)
    teacher, student = draw.standard_normal((2, 4, 6)) * 3

    def softmax(logits):
        powers = np.exp(logits / temperature)
        return powers / powers.sum(axis=1, keepdims=True)

    p, q = softmax(teacher), softmax(student)
    expected = (p * np.log(p / q)).sum(axis=1).mean() * temperature**2
    found = divergence(torch.from_numpy(teacher), torch.from_numpy(student), temperature)
    assert float(found) == pytest.approx(expected, rel=1e-12)
    same = divergence(torch.from_numpy(teacher), torch.from_numpy(teacher), temperature)
    assert float(same) == pytest.approx(0, abs=1e-15)


def test_the_loss_is_float32_under_autocast():
    draw = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(4, 1000, generator=draw).bfloat16() for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = divergence(teacher, student, 1.0)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(divergence(teacher.double(), student.double(), 1.0)), rel=1e-5)


@pytest.fixture
def distillation(make_vit, make_compensator):
    model = make_vit("deit3")
    info = {"schedule": "strided:2", "reduction": "prune"}
    compensator = make_compensator(48, 2, **info).train().requires_grad_(True)
    return SelfDistillation(model, compensator, temperature=1.0, seed=0, dropout=0.0)


def test_teacher_and_student_are_the_model_at_two_degrees(distillation, noise):
    images = torch.from_numpy(noise(4, 64, 64))
    (model,), family = distillation._backbone, ScheduleFamily("strided:2")
    teacher = ReducedViT(model, schedule_for(model, 3, family), reduction=PRUNE)(images)
    change = distillation.compensator.between(3, 11)
    student = ReducedViT(model, schedule_for(model, 11, family), change, PRUNE)(images)
    expected = torch.nn.functional.kl_div(
        student.log_softmax(1), teacher.softmax(1), reduction="none"
    ).sum(1).mean()  # fmt: skip
    loss = distillation(images, 3, 11, step=0, first_image=0)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert loss.item() > 1e-3
    loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in distillation.compensator.parameters())


def test_the_backbones_weights_exist_once_and_are_not_trained(distillation, noise):
    (model,) = distillation._backbone
    before = {parameter.data_ptr() for parameter in model.parameters()}
    seen, hooks = [], []
    for name, module in model.named_modules():
        if not name.endswith("qkv"):
            continue
        hooks.append(module.register_forward_hook(lambda module, _in, _out: seen.append(module.weight.data_ptr())))
    distillation(torch.from_numpy(noise(2, 64, 64)), 2, 9, step=0, first_image=0)
    assert len(seen) == 4 and len(set(seen)) == 2 and set(seen) <= before  # two blocks, twice, the same two tensors
    own = {parameter.data_ptr() for parameter in distillation.parameters()}
    assert own == {parameter.data_ptr() for parameter in distillation.compensator.parameters()}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_every_degree_works_where_there_is_no_room_for_it(make_tiny, noise):
    """17 tokens: at degree 16 the first block takes 8 of them, and soon there is nothing left to take."""
    model = make_tiny("vit_tiny_patch16_224", img_size=32, depth=3)
    compensator = Compensator(CompensatorInfo(width=48, depth=3)).train()
    distillation = SelfDistillation(model, compensator, temperature=1.0, seed=0, dropout=0.1)
    for source, target in ((0, 16), (16, 0), (16, 15), (5, 9)):
        assert distillation(torch.from_numpy(noise(2, 32, 32)), source, target, step=0, first_image=0).isfinite()
