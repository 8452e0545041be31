"""Self-distillation on a tiny problem: what is trained, what is not, and that a run goes on exactly."""

from __future__ import annotations

import csv
import math
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from tocom.calib.distill import DistillOptions, distill
from tocom.calib.distill.draws import degrees_at
from tocom.calib.distill.self_distillation import divergence
from tocom.runtime.errors import GateError, InputError
from tocom.runtime.errors import InputError as RuntimeInputError
from tocom.vit import ReducedViT

ORIGIN = {"backbone": "deit3_small_patch16_224", "backbone_sha256": "d" * 64}


class Noise:
    """A source of batches: image i of the run is noise with the seed i, or one of a few."""

    def __init__(self, different: int = 8, size: int = 64) -> None:
        self.different, self.size = different, size
        self.asked: list[tuple[int, int]] = []

    def batch(self, first_pair: int, pairs: int) -> torch.Tensor:
        self.asked.append((first_pair, pairs))
        return torch.stack([self.image(number) for number in range(2 * first_pair, 2 * (first_pair + pairs))])

    def image(self, number: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(number % self.different)
        return torch.randn(3, self.size, self.size, generator=draw)


def train(model, source=None, *, batch=8, listeners=None, **options):
    return distill(model, source or Noise(), options=DistillOptions(batch=batch, **options), **ORIGIN,
                   **(listeners or {}))  # fmt: skip


def weights_equal(one, other) -> bool:
    one, other = one.state_dict(), other.state_dict()
    return all(torch.equal(one[name], other[name]) for name in one)


def furthest(one, other) -> float:
    one, other = one.state_dict(), other.state_dict()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture
def model(make_vit):
    return make_vit("deit3")


@pytest.fixture
def images(noise):
    return torch.from_numpy(noise(8, 64, 64))


def test_the_backbone_is_left_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compensator = train(model, steps=5, lr=6.4)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not compensator.training
    assert all(weight.abs().max() > 0 for weight in compensator.parameters())  # every pair was trained


def test_the_origin_is_kept(model):
    asked = {"rank": 3, "delta_scale": 0.15, "schedule": "strided:2", "reduction": "prune"}
    info = train(model, steps=1, **asked).info
    assert (info.width, info.depth, info.rank, info.groups) == (48, 2, 3, 16)
    assert (info.backbone, info.backbone_sha256, info.training_scale) == ("deit3_small_patch16_224", "d" * 64, 0.15)
    assert (info.schedule, info.reduction) == ("strided:2", "prune")


@torch.no_grad()
def gap(model, images, compensator, pairs) -> float:
    """Mean KL from the network at the source degree to the one at the target degree, with or without compensator."""
    total = 0.0
    for source, target in pairs:
        change = None if compensator is None else compensator.between(source, target)
        student = ReducedViT(model, target, change)(images)
        total += float(divergence(ReducedViT(model, source)(images), student, 1.0))
    return total / len(pairs)


def test_training_closes_the_gap_between_degrees(model):
    steps, losses, images = 120, [], Noise().batch(0, 4)
    told = {"on_step": lambda _, loss: losses.append(loss)}
    compensator = train(model, steps=steps, lr=0.32, warmup=5, listeners=told)
    assert len(losses) == steps
    assert all(math.isfinite(loss) and loss >= -1e-6 for loss in losses)
    pairs = [(0, 16), (16, 0), (4, 12), (0, 8), (13, 2)]
    assert gap(model, images, compensator, pairs) < 0.8 * gap(model, images, None, pairs)
    # and the losses themselves fall, each against what it would have been without a compensator
    start = [gap(model, images, None, [degrees_at(step, 16, seed=0)]) for step in range(steps)]
    ratio = np.array(losses) / np.array(start)
    assert ratio[0] == pytest.approx(1, abs=1e-4)  # a new compensator changes nothing
    assert np.mean(losses[-30:]) / np.mean(start[-30:]) < 0.85


def test_a_seed_decides_everything(make_vit):
    def weights(seed):
        torch.manual_seed(seed + 100)  # what the surrounding program drew before makes no difference
        return train(make_vit("deit3"), steps=3, seed=seed)

    state = torch.get_rng_state()
    one, same, other = weights(1), weights(1), weights(2)
    assert weights_equal(one, same) and not weights_equal(one, other)
    torch.manual_seed(102)
    drawn = torch.rand(3)
    weights(2)
    torch.manual_seed(102)
    assert torch.equal(drawn, torch.rand(3))
    torch.set_rng_state(state)


def test_the_division_of_a_step_makes_no_difference_but_rounding(make_vit):
    whole = train(make_vit("deit3"), steps=4, batch=12, lr=2.0, dropout=0.3)
    parts = train(make_vit("deit3"), steps=4, batch=4, accumulate=3, lr=2.0, dropout=0.3)
    without = train(make_vit("deit3"), steps=4, batch=12, lr=2.0, dropout=0.0)
    assert furthest(whole, parts) < 1e-5 < 1e-3 < furthest(whole, without)


def test_the_learning_rate_is_for_512_images(make_vit):
    """AdamW's first step moves every trained weight by the learning rate, whatever the gradient."""
    for batch, accumulate in ((8, 1), (8, 2), (16, 1)):
        zeroed = train(make_vit("deit3"), steps=1, batch=batch, accumulate=accumulate, lr=0.5, warmup=1,
                       weight_decay=0.0)  # fmt: skip
        moved = max(float(weight.abs().max()) for name, weight in zeroed.state_dict().items() if "adapter_up" in name)
        assert moved == pytest.approx(0.5 * batch * accumulate / 512, rel=1e-3)


def test_the_gradient_is_clipped_where_that_is_asked_for(make_vit):
    """The first step of AdamW forgets the gradient's size, the second one weighs it against the first."""
    free, loose, tight = (train(make_vit("deit3"), steps=2, lr=2.0, clip_grad=clip) for clip in (None, 1e6, 1e-4))
    assert weights_equal(free, loose) and not weights_equal(free, tight)


def test_bf16_comes_close_to_fp32(make_vit, images):
    """As close as rounding lets it: what that alone makes of the network, on this processor, adds to a divergence."""
    losses = {"fp32": [], "bf16": []}
    for precision, told in losses.items():
        train(
            make_vit("deit3"),
            steps=3,
            precision=precision,
            listeners={"on_step": lambda _, loss, t=told: t.append(loss)},
        )
    plain = ReducedViT(make_vit("deit3"), 8)
    with torch.no_grad():
        exact = plain(images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = plain(images)
    rounding = float(divergence(exact, rounded.float(), 1.0))
    assert rounding < min(losses["fp32"])  # else the losses would say nothing
    for bf16, fp32 in zip(losses["bf16"], losses["fp32"], strict=True):
        assert bf16 == pytest.approx(fp32, rel=0.2, abs=0.2 * fp32 + rounding) and bf16 != fp32


def test_a_source_is_asked_for_every_pair_once_in_order(model):
    source = Noise()
    train(model, source, steps=3, batch=4, accumulate=2)
    assert source.asked == [(first, 2) for first in range(0, 12, 2)]


def test_images_are_augmented_and_tensors_taken(make_tiny):
    model = make_tiny("vit_tiny_patch16_224", img_size=32)
    photos = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (40, 40, 3), np.uint8)) for n in range(6)]
    results = [train(model, photos, steps=2, lr=2.0, augment=augment) for augment in ("none", "light", "timm", "timm")]
    assert weights_equal(results[2], results[3])
    assert not weights_equal(results[0], results[1]) and not weights_equal(results[1], results[2])
    tensors = [torch.zeros(3, 32, 32) + number for number in range(6)]
    assert weights_equal(train(model, tensors, steps=1), train(model, tensors, steps=1, workers=1))


def log_of(folder) -> list[dict[str, str]]:
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_stopped_run_goes_on_exactly(make_vit, tmp_path):
    """SIGTERM in the middle, then SIGINT: the state is saved, and the same call goes on."""
    options = {"steps": 9, "lr": 2.0, "save_every": 100, "dropout": 0.2}
    straight = train(make_vit("deit3"), listeners={"state_folder": tmp_path / "straight"}, **options)
    folder, plans, before = tmp_path / "stopped", [], signal.getsignal(signal.SIGTERM)
    for number, at in ((signal.SIGTERM, 3), (signal.SIGINT, 5)):
        with pytest.raises(KeyboardInterrupt):
            train(make_vit("deit3"), listeners={
                "state_folder": folder,
                "on_start": plans.append,
                "on_step": lambda step, _, number=number, at=at: step == at and os.kill(os.getpid(), number),
            }, **options)  # fmt: skip
    assert signal.getsignal(signal.SIGTERM) == before
    done = train(make_vit("deit3"), listeners={"state_folder": folder, "on_start": plans.append}, **options)
    assert [plan.steps_done for plan in plans] == [0, 4, 6]  # a step that has begun is finished
    assert weights_equal(done, straight)
    columns = ("step", "loss", "lr", "source", "target", "unreadable")
    logs = [[[row[name] for name in columns] for row in log_of(tmp_path / name)] for name in ("straight", "stopped")]
    assert logs[0] == logs[1] and [row[0] for row in logs[0]] == [str(step) for step in range(1, 10)]


def test_a_finished_run_is_not_repeated(make_vit, tmp_path):
    source = Noise()
    once = train(make_vit("deit3"), steps=2, listeners={"state_folder": tmp_path})
    steps = []
    again = train(make_vit("deit3"), source, steps=2, listeners={
        "state_folder": tmp_path, "on_step": lambda *step: steps.append(step)})  # fmt: skip
    assert weights_equal(once, again) and not steps and not source.asked


@pytest.mark.parametrize(
    ("change", "named"),
    [({"lr": 0.5}, "lr"), ({"steps": 3}, "steps"), ({"seed": 1}, "seed"), ({"batch": 4}, "total batch"),
     ({"schedule": "strided:2"}, "schedule"), ({"precision": "bf16"}, "precision"), ({"rank": 1}, "rank")],
)  # fmt: skip
def test_a_run_with_other_options_is_refused(make_vit, tmp_path, change, named):
    given = {"steps": 1, "listeners": {"state_folder": tmp_path}}
    train(make_vit("deit3"), **given)
    with pytest.raises(RuntimeInputError, match=f"begun with {named} .* --restart"):
        train(make_vit("deit3"), **{**given, **change})
    train(make_vit("deit3"), batch=4, accumulate=2, steps=1, listeners={"state_folder": tmp_path})  # the same total


def test_another_backbone_is_refused(make_vit, tmp_path):
    options = DistillOptions(steps=1, batch=2)
    distill(make_vit("deit3"), Noise(), options=options, state_folder=tmp_path, **ORIGIN)
    other = {**ORIGIN, "backbone_sha256": "e" * 64}
    with pytest.raises(RuntimeInputError, match="begun with backbone sha256"):
        distill(make_vit("deit3"), Noise(), options=options, state_folder=tmp_path, **other)
    distill(make_vit("deit3"), Noise(), options=options, state_folder=tmp_path, restart=True, **other)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_state(make_vit, tmp_path):
    class Poisoned(Noise):
        def image(self, number: int) -> torch.Tensor:
            return super().image(number) * (float("nan") if number == 4 * 8 + 5 else 1)

    source, target = degrees_at(4, 16, seed=0)
    words = rf"the loss of step 5 \(degree {source} -> {target}\) is nan.*last good state is kept in .*state.pt"
    with pytest.raises(GateError, match=words):
        train(make_vit("deit3"), Poisoned(), steps=9, save_every=3, listeners={"state_folder": tmp_path})
    plans = []
    with pytest.raises(GateError, match="step 5"):
        train(make_vit("deit3"), Poisoned(), steps=9, save_every=3, listeners={
            "state_folder": tmp_path, "on_start": plans.append})  # fmt: skip
    assert plans[0].steps_done == 3
    assert [row["step"] for row in log_of(tmp_path)] == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"precision": "fp16", "device": "cpu"}, RuntimeInputError, "fp16 needs a CUDA device"),
        ({"precision": "fp8"}, RuntimeInputError, "the precision one of fp32, bf16, fp16, got .*fp8"),
        ({"device": "tpu"}, RuntimeInputError, "the device must be one of auto, cpu, cuda .*'tpu'"),
        ({"schedule": "weekly"}, InputError, "a schedule must be"),
        ({"schedule": "strided:3"}, InputError, "must not exceed the 2 blocks"),
        ({"reduction": "drop"}, InputError, "a reduction must be one of"),
    ],
)
def test_what_cannot_be_done_is_refused(model, options, error, words):
    with pytest.raises(error, match=words):
        train(model, steps=1, **options)


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    options = DistillOptions(steps=200, warmup=50, lr=2.0)
    rates = [options.lr_at(step, 256) for step in range(200)]
    assert rates[0] == pytest.approx(1 / 50)
    assert rates[49] == pytest.approx(0.5 * (1 + math.cos(math.pi * 49 / 200)))
    assert rates[:40] == sorted(rates[:40])
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert DistillOptions(steps=1, warmup=0, lr=3.0).lr_at(0, 512) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"rank": 0}, {"lr": 0}, {"lr": -1.0}, {"temperature": 0}, {"lr": math.nan}, {"lr": math.inf},
        {"temperature": math.nan}, {"weight_decay": -0.1}, {"weight_decay": math.nan}, {"delta_scale": math.nan},
        {"delta_scale": 0.0}, {"batch": 7}, {"batch": 0}, {"accumulate": 0}, {"clip_grad": 0.0}, {"dropout": 1.0},
        {"dropout": -0.1}, {"erasing": 1.5}, {"warmup": -1}, {"workers": -1}, {"save_every": 0}, {"seed": -1},
        {"augment": "heavy"},
    ],
)  # fmt: skip
def test_options_that_cannot_train_are_refused(wrong):
    with pytest.raises(InputError, match="must be"):
        DistillOptions(**wrong)
