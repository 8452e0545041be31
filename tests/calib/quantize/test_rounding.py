"""Second-order rounding against naive solvers of the same problem."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tocom.calib.quantize.rounding
from tocom.calib.quantize.grids import FP8, INT4_WEIGHTS, INT8_WEIGHTS, Grid, scale_for
from tocom.calib.quantize.network import QuantizedWeight, round_to_nearest
from tocom.calib.quantize.rounding import channel_errors, gptq, quantease

GRIDS = pytest.mark.parametrize("grid", [INT8_WEIGHTS, INT4_WEIGHTS, FP8], ids=["int8", "int4", "fp8"])


def problem(out: int, width: int, rows: int, seed: int = 0, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """A weight and correlated rows, channels of different size."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=draw) / width**0.5
    mixing = torch.randn(rank or max(width // 4, 1), width, generator=draw)
    x = torch.randn(rows, len(mixing), generator=draw) @ mixing + 0.3 * torch.randn(rows, width, generator=draw)
    return weight, x * (0.2 + 2 * torch.rand(width, generator=draw))


def damped(rows: Tensor, damp: float) -> np.ndarray:
    x = rows.double().numpy()
    hessian = x.T @ x
    return hessian + damp * np.mean(np.diag(hessian)) * np.eye(len(hessian))


def on_grid(rounded: QuantizedWeight, grid: Grid) -> bool:
    codes = rounded.codes
    inside = bool((codes >= grid.lowest).all() and (codes <= grid.largest).all())
    return inside and torch.equal(grid.nearest(codes), codes)


def naive_errors(weight: Tensor, rows: Tensor, rounded: QuantizedWeight) -> list[float]:
    """Row by row and channel by channel, float64."""
    difference = rounded.codes.double() * rounded.scale.double()[:, None] - weight.double()
    return [sum(float(x @ each) ** 2 for x in rows.double()) for each in difference]


def test_channel_errors() -> None:
    weight, rows = problem(5, 12, 20)
    rounded = round_to_nearest(weight, INT4_WEIGHTS)
    np.testing.assert_allclose(channel_errors(weight, rows, rounded), naive_errors(weight, rows, rounded), rtol=1e-4)


@pytest.fixture(params=[128, 7], ids=["one_block", "five_blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Columns that are worked on at once, of 32."""
    monkeypatch.setattr(tocom.calib.quantize.rounding, "_BLOCK", request.param)
    return request.param


def test_gptq_is_what_solving_for_the_rest_after_every_column_gives(block: int) -> None:
    width = 32
    weight, rows = problem(16, width, 3 * width)
    hessian, scale = damped(rows, 0.01), scale_for(weight.abs().amax(dim=1), INT4_WEIGHTS).double().numpy()
    order = sorted(range(width), key=lambda column: -hessian[column, column])
    exact = weight.double().numpy()
    now, codes = exact.copy(), np.zeros_like(exact)
    for index, column in enumerate(order):
        codes[:, column] = np.clip(np.round(now[:, column] / scale), -7, 7)
        done, left = order[: index + 1], order[index + 1 :]
        fixed = (codes[:, done] * scale[:, None] - exact[:, done]) @ hessian[np.ix_(done, left)]
        if left:
            now[:, left] = exact[:, left] - np.linalg.solve(hessian[np.ix_(left, left)], fixed.T).T
    found = gptq(weight, rows, INT4_WEIGHTS)
    np.testing.assert_array_equal(found.codes.numpy(), codes)
    assert not torch.equal(found.codes, round_to_nearest(weight, INT4_WEIGHTS).codes)


@GRIDS
def test_gptq_beats_the_nearest_by_far_where_channels_are_correlated(grid: Grid) -> None:
    weight, rows = problem(16, 48, 900)
    rows, held_out = rows[:400], rows[400:]
    near = round_to_nearest(weight, grid)
    found = gptq(weight, rows, grid)
    assert on_grid(found, grid) and torch.equal(found.scale, near.scale)
    assert sum(naive_errors(weight, rows, found)) < 0.5 * sum(naive_errors(weight, rows, near))
    assert channel_errors(weight, held_out, found).sum() < 0.6 * channel_errors(weight, held_out, near).sum()


sizes = st.tuples(st.integers(1, 5), st.integers(1, 12), st.integers(1, 20))


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 2**31), st.sampled_from([INT8_WEIGHTS, INT4_WEIGHTS, FP8]), st.sampled_from([0.01, 0.3]))
def test_no_channel_is_ever_worse_than_the_start(
    size: tuple[int, int, int], seed: int, grid: Grid, damp: float
) -> None:
    weight, rows = problem(*size, seed=seed, rank=2)
    near = round_to_nearest(weight, grid)
    found = {
        "gptq": gptq(weight, rows, grid, damp=damp),
        "squares": gptq(weight, rows, grid, damp=damp, scales="squares"),
        "quantease": quantease(weight, rows, grid, sweeps=3, damp=damp),
    }
    pairs = [(each, near) for each in found.values()]
    pairs.append((quantease(weight, rows, grid, sweeps=3, damp=damp, start=found["squares"]), found["squares"]))
    for rounded, start in pairs:
        assert on_grid(rounded, grid)
        before, after = (np.array(naive_errors(weight, rows, each)) for each in (start, rounded))
        assert (after <= before * (1 + 1e-4) + 1e-9).all()


def test_coordinate_descent_ends_where_no_single_step_helps(block: int) -> None:
    weight, rows = problem(8, 32, 300)
    found = quantease(weight, rows, INT4_WEIGHTS, sweeps=200, damp=0.0)
    hessian, exact = damped(rows, 0.0), weight.double().numpy()
    scale = found.scale.double().numpy()

    def error(channel: int, codes: np.ndarray) -> float:
        difference = codes * scale[channel] - exact[channel]
        return float(difference @ hessian @ difference)

    for channel, codes in enumerate(found.codes.double().numpy()):
        least = error(channel, codes)
        for column in range(32):
            for step in (-1, 1):
                moved = codes.copy()
                moved[column] += step
                assert abs(moved[column]) > 7 or error(channel, moved) >= least * (1 - 1e-9)


@GRIDS
def test_coordinate_descent_improves_on_either_start(grid: Grid) -> None:
    weight, rows = problem(16, 48, 400)
    for start in (round_to_nearest(weight, grid), gptq(weight, rows, grid, scales="squares")):
        found = quantease(weight, rows, grid, start=start)
        assert torch.equal(found.scale, start.scale) and on_grid(found, grid)
        assert sum(naive_errors(weight, rows, found)) < 0.995 * sum(naive_errors(weight, rows, start))
    near = quantease(weight, rows, grid, start=round_to_nearest(weight, grid))
    assert torch.equal(near.codes, quantease(weight, rows, grid).codes)


def test_searched_scales_have_the_least_weighted_error_of_plain_rounding() -> None:
    weight, rows = problem(6, 40, 200)
    found = gptq(weight, rows, INT4_WEIGHTS, scales="squares")
    importance = np.diag(damped(rows, 0.01))
    largest = weight.abs().amax(dim=1)

    def error(channel: int, scale: float) -> float:
        w = weight[channel].double().numpy()
        return float((np.clip(np.round(w / scale), -7, 7) * scale - w) ** 2 @ importance)

    for channel in range(6):
        tried = [float(scale_for(largest[channel] * (1 - 0.0125 * step), INT4_WEIGHTS)) for step in range(41)]
        assert float(found.scale[channel]) == min(tried, key=lambda scale: error(channel, scale))
    assert (found.scale < scale_for(largest, INT4_WEIGHTS)).any()


def test_rows_may_be_quantized() -> None:
    """The product of quantized rows is what is kept: a channel that rounds to zero in all rows is free to move."""
    weight, rows = problem(8, 24, 300)
    rows[:, :4] *= 0.001
    scale = float(rows.abs().max()) / 127
    quantized = (rows / scale).round() * scale
    assert not quantized[:, :4].any()
    near, found = round_to_nearest(weight, INT4_WEIGHTS), gptq(weight, quantized, INT4_WEIGHTS)
    assert channel_errors(weight, quantized, found).sum() < 0.6 * channel_errors(weight, quantized, near).sum()


@GRIDS
def test_where_nothing_goes_in_the_nearest_is_kept(grid: Grid) -> None:
    weight, rows = problem(4, 12, 30)
    near = round_to_nearest(weight, grid)
    for found in (gptq(weight, 0 * rows, grid), quantease(weight, 0 * rows, grid)):
        assert torch.equal(found.codes, near.codes) and torch.equal(found.scale, near.scale)


def test_a_weight_of_zeros() -> None:
    rows = problem(4, 12, 30)[1]
    for round_ in (gptq, quantease):
        assert not round_(torch.zeros(4, 12), rows, INT8_WEIGHTS).values.any()
