"""Self-distillation on a tiny problem: what is trained, what is not, and by which loss."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from calib.distill import DistillOptions, _divergence, _draw_degrees, _schedule, distill
from tocom.errors import InputError
from tocom.vit import ReducedViT


def endless(images: torch.Tensor):
    return itertools.repeat(images)


def train(model, images, *, on_step=None, **options):
    origin = {"backbone": "deit3_small_patch16_224", "backbone_sha256": "d" * 64}
    return distill(model, endless(images), options=DistillOptions(**options), on_step=on_step, **origin)


@pytest.fixture
def model(make_vit):
    return make_vit("deit3")


@pytest.fixture
def images(noise):
    return torch.from_numpy(noise(8, 64, 64))


def test_the_backbone_is_left_as_it_was(model, images):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compensator = train(model, images, steps=5, lr=0.1)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not compensator.training
    assert all(weight.abs().max() > 0 for weight in compensator.parameters())  # every pair was trained


def test_the_origin_is_kept(model, images):
    info = train(model, images, steps=1, rank=3, delta_scale=0.15).info
    assert (info.width, info.depth, info.rank, info.groups) == (48, 2, 3, 16)
    assert (info.backbone, info.backbone_sha256, info.training_scale) == ("deit3_small_patch16_224", "d" * 64, 0.15)


@torch.no_grad()
def gap(model, images, compensator, pairs) -> float:
    """Mean KL from the network at the source degree to the one at the target degree, with or without compensator."""
    total = 0.0
    for source, target in pairs:
        change = None if compensator is None else compensator.between(source, target)
        student = ReducedViT(model, target, change)(images)
        total += float(_divergence(ReducedViT(model, source)(images), student, 1.0))
    return total / len(pairs)


def test_training_closes_the_gap_between_degrees(model, images):
    steps, losses = 120, []
    compensator = train(model, images, steps=steps, lr=5e-3, warmup=5, on_step=lambda _, loss: losses.append(loss))
    assert len(losses) == steps
    assert all(math.isfinite(loss) and loss >= -1e-6 for loss in losses)
    pairs = [(0, 16), (16, 0), (4, 12), (0, 8), (13, 2)]
    assert gap(model, images, compensator, pairs) < 0.8 * gap(model, images, None, pairs)
    # and the losses themselves fall, each against what it would have been without a compensator
    draw = torch.Generator().manual_seed(0)
    start = [gap(model, images, None, [_draw_degrees(16, draw)]) for _ in range(steps)]
    ratio = np.array(losses) / np.array(start)
    assert ratio[0] == pytest.approx(1, abs=1e-4)  # a new compensator changes nothing
    assert np.mean(losses[-30:]) / np.mean(start[-30:]) < 0.85


def test_a_seed_decides_everything(make_vit, images):
    def weights(seed):
        torch.manual_seed(seed + 100)  # what the surrounding program drew before makes no difference
        return train(make_vit("deit3"), images, steps=3, seed=seed).state_dict()

    one, same, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_steps_are_told(model, images):
    told = []
    train(model, images, steps=3, on_step=lambda done, loss: told.append((done, loss)))
    assert [done for done, _ in told] == [1, 2, 3]


def test_batches_that_run_out_are_refused(model, images):
    origin = {"backbone": "x", "backbone_sha256": "d" * 64}
    with pytest.raises(InputError, match="needs 5 batches of images, the data ended after 2"):
        distill(model, iter([images, images]), options=DistillOptions(steps=5), **origin)


def test_degrees_are_different_and_uniform():
    draw, times = torch.Generator().manual_seed(0), 272 * 60
    counts = np.zeros((17, 17))
    for _ in range(times):
        counts[_draw_degrees(16, draw)] += 1
    assert np.trace(counts) == 0
    expected = times / 272
    chi_square = ((counts[~np.eye(17, dtype=bool)] - expected) ** 2 / expected).sum()
    assert abs(chi_square - 271) < 4 * math.sqrt(2 * 271)  # mean and standard deviation of 271 degrees of freedom


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_kl_of_the_teacher_to_the_student(temperature):
    draw = np.random.default_rng(0)
    teacher, student = draw.standard_normal((2, 4, 6)) * 3

    def softmax(logits):
        powers = np.exp(logits / temperature)
        return powers / powers.sum(axis=1, keepdims=True)

    p, q = softmax(teacher), softmax(student)
    expected = (p * np.log(p / q)).sum(axis=1).mean() * temperature**2
    found = _divergence(torch.from_numpy(teacher), torch.from_numpy(student), temperature)
    assert float(found) == pytest.approx(expected, rel=1e-12)
    assert float(_divergence(torch.from_numpy(teacher), torch.from_numpy(teacher), temperature)) == pytest.approx(
        0, abs=1e-15
    )


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    options = DistillOptions(steps=200, warmup=50)
    rates = [_schedule(step, options) for step in range(200)]
    assert rates[0] == pytest.approx(1 / 50)
    assert rates[49] == pytest.approx(0.5 * (1 + math.cos(math.pi * 49 / 200)))
    assert rates[:40] == sorted(rates[:40])
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert _schedule(0, DistillOptions(steps=1, warmup=0)) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"rank": 0}, {"lr": 0}, {"lr": -1.0}, {"temperature": 0}, {"lr": math.nan}, {"lr": math.inf},
        {"temperature": math.nan}, {"weight_decay": -0.1}, {"weight_decay": math.nan}, {"delta_scale": math.nan},
        {"delta_scale": 0.0},
    ],
)  # fmt: skip
def test_options_that_cannot_train_are_refused(wrong):
    with pytest.raises(InputError, match="must be"):
        DistillOptions(**wrong)
