"""Learnt roundings against networks that are replayed with given decisions, and against loops over single weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tocom.calib.quantize.grids import FORMATS, FP8, INT4_WEIGHTS, INT8, INT8_WEIGHTS, Format, Grid
from tocom.calib.quantize.network import (
    Quantization,
    QuantizedLinear,
    QuantizedWeight,
    observe,
    products_of,
    quantized_model,
    round_to_nearest,
)
from tocom.calib.quantize.ranges import scale_of
from tocom.calib.quantize.reconstruct import (
    LearntLinear,
    _BlockByBlock,
    _Course,
    _Reconstruction,
    learnable_rounding,
    reconstruct,
    recorded,
)
from tocom.export.proof.reference import replay
from tocom.merging import Matching
from tocom.reduction import MERGE, PRUNE, Merge, Reduction
from tocom.vit import ReducedViT, schedule_for

THREE_BITS = Format("int3", Grid("INT8", -3, 3), INT8)
SMALL = {"img_size": 32, "depth": 2}


@pytest.fixture
def model(make_tiny) -> nn.Module:
    return make_tiny("deit_tiny_patch16_224", **SMALL)


@pytest.fixture
def pixels(noise) -> Tensor:
    return torch.from_numpy(noise(16, 32, 32))


def rounded(
    model: nn.Module, pixels: Tensor, r: int = 3, form: Format = THREE_BITS, reduction: Reduction = MERGE
) -> Quantization:
    """Everything rounded to nearest."""
    seen = observe([ReducedViT(model, r, reduction=reduction)], lambda network: products_of(network.model), pixels)
    scales = {} if form.activation is None else {name: scale_of(each, INT8, "mse") for name, each in seen.items()}
    weights = {name: round_to_nearest(each.weight, form.weight) for name, each in products_of(model).items()}
    return Quantization(form, model.state_dict(), scales, weights)


def kl(wanted: Tensor, found: Tensor) -> float:
    p, q = (
        np.exp(each) / np.exp(each).sum(1, keepdims=True) for each in (wanted.double().numpy(), found.double().numpy())
    )
    return float((p * np.log(p / q)).sum(1).mean())


def natural_error(model: nn.Module, quantization: Quantization, r: int, pixels: Tensor, reduction=MERGE) -> float:
    """How far a quantized network that decides for itself answers otherwise."""
    with torch.no_grad():
        narrow = ReducedViT(quantized_model(model, quantization), r, reduction=reduction)(pixels)
        return kl(ReducedViT(model, r, reduction=reduction)(pixels), narrow)


def forced_errors(model: nn.Module, quantization: Quantization, r: int, pixels: Tensor) -> list[float]:
    """Mean squared error of the tokens that every block's merge leaves, and of the logits, the decisions forced."""
    plain = replay(ReducedViT(model, r), pixels, {})
    narrow = replay(ReducedViT(quantized_model(model, quantization), r), pixels, plain.natural)
    names = [f"block.{block}.remaining" for block in plain.natural]
    tokens = [float((narrow.values[name] - plain.values[name]).square().mean()) for name in names]
    return [*tokens, float((narrow.logits - plain.logits).square().mean())]


def test_what_is_learnt_is_nearer_to_float_than_rounding_to_nearest(model, pixels, noise):
    given = rounded(model, pixels)
    learnt = reconstruct(model, schedule_for(model, 3), given, pixels, steps=40, batch=8)
    unseen = torch.from_numpy(noise(16, 32, 32, seed=1))
    for images, shares in ((pixels, (0.75, 0.5, 0.2)), (unseen, (0.9, 0.65, 0.4))):
        before, after = (forced_errors(model, each, 3, images) for each in (given, learnt))
        for old, new, share in zip(before, after, shares, strict=True):
            assert new < share * old
        assert natural_error(model, learnt, 3, images) < 0.5 * natural_error(model, given, 3, images)


@pytest.mark.parametrize(
    ("form", "reduction"),
    [(THREE_BITS, MERGE), (FORMATS["int8"], PRUNE), (FORMATS["int4-weights"], MERGE), (FORMATS["fp8"], MERGE)],
    ids=lambda each: each.name,
)
def test_codes_are_the_grids_and_next_to_the_weight(model, pixels, form, reduction):
    given = rounded(model, pixels, 3, form, reduction).without(["blocks.0.mlp.fc1"])
    before = {name: each.clone() for name, each in model.state_dict().items()}
    learnt = reconstruct(model, schedule_for(model, 3), given, pixels, reduction=reduction, steps=8, batch=8)
    assert learnt.weights.keys() == given.weights.keys() and learnt.activations.keys() == given.activations.keys()
    moved = 0
    for name, weight in learnt.weights.items():
        codes, exact = weight.codes, before[f"{name}.weight"] / weight.scale[:, None]
        assert torch.equal(weight.scale, given.weights[name].scale)
        assert torch.equal(form.weight.nearest(codes), codes)
        # no number of the grid lies between the two; float8's numbers are at most an eighth apart
        room = torch.ones_like(exact) if form.weight is not FP8 else (exact.abs() / 8).clamp_min(2**-9)
        assert bool(((codes - exact).abs() < room * (1 + 1e-5)).all())
        moved += int((codes != given.weights[name].codes).sum())
    assert moved
    for scale in learnt.activations.values():
        assert float(np.float16(scale)) == scale
    assert natural_error(model, learnt, 3, pixels, reduction) <= natural_error(model, given, 3, pixels, reduction)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


@pytest.mark.parametrize("form", [THREE_BITS, FORMATS["int4-weights"], FORMATS["fp8"]], ids=lambda each: each.name)
def test_what_learns_computes_as_what_is_kept(form):
    """At every moment, and the gradient of an activation's scale is LSQ's."""
    draw = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=draw) for shape in ((6, 40), (6,), (5, 7, 40)))
    scale = 0.015625 if form.activation is INT8 else 0.0078125  # some inputs are clipped
    product = LearntLinear(weight, bias, round_to_nearest(weight, form.weight), form, scale)
    for change in (0.0, 0.3):
        with torch.no_grad():
            product.rounding += change * torch.randn(6, 40, generator=draw)
        kept, own = product.decided()
        found = product(x)
        assert torch.allclose(found, QuantizedLinear(kept, bias, form.activation, own)(x), atol=1e-5, rtol=0)
    assert own == scale
    if form.activation is INT8:
        (gradient,) = torch.autograd.grad(found.sum(), product.log_change)
        inner = x.double().numpy() / scale
        slope = np.where(inner < -128, -128, np.where(inner > 127, 127, np.round(inner) - inner))
        expected = (slope @ kept.values.double().numpy().T).sum() * scale
        assert float(gradient) == pytest.approx(expected, rel=1e-3)
        assert np.abs(inner).max() > 128


def test_the_scales_of_activations_are_learnt_where_that_is_wished(model, pixels):
    given = rounded(model, pixels)
    for wished in (True, False):
        learnt = reconstruct(model, schedule_for(model, 3), given, pixels, steps=8, batch=8, learn_activations=wished)
        assert learnt is not given
        assert (learnt.activations != given.activations) is wished


def test_a_block_that_got_worse_is_not_taken(model, pixels):
    """At an absurd learning rate roundings are thrown about at random."""
    given = rounded(model, pixels, form=FORMATS["int8"])
    course = _Course(3, 8, 1.0, 1.0, 1e3, True)
    work = _Reconstruction(model, schedule_for(model, 3), MERGE, given, pixels, course, seed=0)
    assert work.learn(0, given, lambda _done: None) is given
    with torch.no_grad():  # and the next block gets what the network that was kept makes
        narrow = ReducedViT(quantized_model(model, given), 3)
        expected = replay(narrow, pixels, recorded(ReducedViT(model, 3), pixels, 8)[1]).values["block.0.remaining"]
        mlp = narrow.model.blocks[0]
        expected = expected + mlp.ls2(mlp.mlp(mlp.norm2(expected)))
    assert torch.allclose(work.x, expected, atol=1e-5, rtol=0)


def test_a_network_that_got_worse_is_not_returned(model, pixels, monkeypatch):
    """Even if every block were taken."""
    given = rounded(model, pixels, form=FORMATS["int8"])
    falling = iter(range(100, 0, -1))
    monkeypatch.setattr(_Reconstruction, "_errors", lambda *_: torch.full((3,), float(next(falling))))
    assert reconstruct(model, schedule_for(model, 3), given, pixels, steps=3, batch=8, learning_rate=1e3) is given
    assert next(falling) == 100 - 2 * len(model.blocks)


class Watched(Merge):
    """Merging that remembers which decisions were carried out."""

    def __init__(self) -> None:
        self.applied: list[Matching] = []

    def apply(self, x, token_size, signal, decision):
        self.applied.append(decision)
        return super().apply(x, token_size, signal, decision)


def rows(matching: Matching) -> set[tuple[int, ...]]:
    return {tuple(row) for row in torch.cat([matching.src, matching.dst, matching.unm], dim=1).tolist()}


def test_the_float_networks_decisions_are_forced_while_learning(model, pixels):
    given, watched = rounded(model, pixels), Watched()
    schedule = schedule_for(model, 3)
    work = _Reconstruction(model, schedule, watched, given, pixels, _Course(5, 8, 1.0, 1.0, 0.02, True), seed=0)
    expected = replay(ReducedViT(model, 3), pixels, {}).natural
    own = replay(ReducedViT(quantized_model(model, given), 3), pixels, {}).natural
    assert rows(own[0]) - rows(expected[0]), "a network that decides alike shows nothing"
    watched.applied.clear()
    work.learn(0, given, lambda _done: None)
    known = rows(expected[0]) | rows(expected[1])
    assert watched.applied and all(rows(each) <= known for each in watched.applied)


def test_decisions_of_batches_stay_with_their_images(model, pixels):
    reference = _BlockByBlock(model, schedule_for(model, 3))
    logits, decisions = recorded(reference, pixels, batch=7)
    for block, expected in replay(reference, pixels, {}).natural.items():
        assert all(
            torch.equal(getattr(decisions[block], part), getattr(expected, part)) for part in ("src", "dst", "unm")
        )
    x = reference.embed(pixels)
    size = torch.ones(*x.shape[:2], 1)
    assert torch.allclose(reference.answer(0, x, size, decisions), logits, atol=1e-5, rtol=0)
    _, others = recorded(reference, pixels.flip(0), batch=7)
    assert not torch.allclose(reference.answer(0, x, size, others), logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", ["deit_distilled", "reg4_dinov2", "gap", "map", "normed", "clip"])
def test_the_pieces_make_up_the_reference(make_vit: Callable[[str], nn.Module], noise, family):
    model = make_vit(family)
    reference = _BlockByBlock(model, schedule_for(model, 4))
    images = torch.from_numpy(noise(2, *model.patch_embed.img_size))
    logits, decisions = recorded(reference, images, 2)
    with torch.no_grad():
        x = reference.embed(images)
        found = reference.answer(0, x, torch.ones(*x.shape[:2], 1), decisions)
        expected = ReducedViT(model, 4)(images)
    assert torch.allclose(logits, expected, atol=1e-5, rtol=0)
    assert torch.allclose(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [INT4_WEIGHTS, INT8_WEIGHTS, FP8], ids=["int4", "int8", "fp8"])
def test_the_two_codes_against_a_loop(grid):
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 30, generator=draw)
    scale = weight.abs().amax(1) / grid.largest * torch.tensor([1.0, 1.0, 0.7, 0.7])  # two are clipped
    codes = grid.nearest(weight / scale[:, None])
    codes[:, ::3] = grid.nearest(codes[:, ::3] + grid.largest / 3)  # as second-order rounding puts some elsewhere
    lower, upper, share = learnable_rounding(weight, QuantizedWeight(codes, scale), grid)
    if grid is FP8:  # sign, exponent and mantissa, read bit by bit
        magnitudes = [m / 8 * 2.0**-6 for m in range(8)]
        magnitudes += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
        levels = sorted({sign * each for each in magnitudes for sign in (-1, 1)})
    else:
        levels = [float(each) for each in range(int(grid.lowest), int(grid.largest) + 1)]
    for i in range(4):
        for j in range(30):
            exact, code = float(weight[i, j] / scale[i]), float(codes[i, j])
            towards = -1 if code > exact else 1
            if code == levels[-1]:
                towards = -1
            if code == levels[0]:
                towards = 1
            pair = sorted([code, levels[levels.index(code) + towards]])
            assert [float(lower[i, j]), float(upper[i, j])] == pair
            expected = min(max((exact - pair[0]) / (pair[1] - pair[0]), 0.0), 1.0)
            assert float(share[i, j]) == pytest.approx(expected, abs=1e-5)


def test_a_seed_decides_and_steps_are_told(model, pixels):
    given, schedule = rounded(model, pixels), schedule_for(model, 3)
    told: list[tuple[int, int]] = []

    def run(seed: int) -> Quantization:
        return reconstruct(
            model, schedule, given, pixels, steps=5, batch=8, seed=seed, tell=lambda *each: told.append(each)
        )

    one, same, other = run(0), run(0), run(1)
    assert told[:10] == [(done, 10) for done in range(1, 11)]
    assert all(torch.equal(one.weights[name].codes, same.weights[name].codes) for name in one.weights)
    assert one.activations == same.activations
    assert any(not torch.equal(one.weights[name].codes, other.weights[name].codes) for name in one.weights)


def test_a_network_that_is_exact_is_left_alone(model, pixels):
    """Weights that lie on the grid, and float inputs: there is nothing to learn."""
    form = FORMATS["int8-weights"]
    first = rounded(model, pixels, form=form)
    exact = Quantization(form, first.dequantized(), {}, first.weights)
    assert reconstruct(model, schedule_for(model, 3), exact, pixels, steps=3, learning_rate=10) is exact
