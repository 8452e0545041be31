"""tocom.merging against loops over tokens that know nothing of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tocom.merging import cosine_scores, first_positions, match, merge


@st.composite
def cases(draw):
    protected = draw(st.integers(0, 6))
    tokens = protected + draw(st.integers(2, 23))
    return {
        "protected": protected,
        "tokens": tokens,
        "r": draw(st.integers(0, 16)),  # often beyond the clamp
        "keep_order": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def check_decisions(naive, metric: np.ndarray, case: dict) -> None:
    found = match(torch.from_numpy(metric), case["r"], protected=case["protected"], keep_order=case["keep_order"])
    for image, vectors in enumerate(metric.tolist()):
        src, dst, unm = naive.match(vectors, case["r"], case["protected"], case["keep_order"])
        assert found.src[image].tolist() == src
        assert found.dst[image].tolist() == dst
        assert found.unm[image].tolist() == unm


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases(), dtype=st.sampled_from([np.float32, np.float64]))
def test_matching_equals_the_loop_with_exact_ties_and_zero_vectors(naive, tied_metric, case, dtype):
    check_decisions(naive, tied_metric(2, case["tokens"], case["seed"], dtype), case)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases())
def test_matching_equals_the_loop_on_random_metrics(naive, case):
    metric = np.random.default_rng(case["seed"]).standard_normal((2, case["tokens"], 16))
    check_decisions(naive, metric, case)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=cases())
def test_merging_equals_the_weighted_mean_loop_and_conserves_sizes(naive, case):
    random = np.random.default_rng(case["seed"])
    metric = random.standard_normal((2, case["tokens"], 8))
    x = random.standard_normal((2, case["tokens"], 5))
    token_size = random.integers(1, 40, (2, case["tokens"], 1)).astype(np.float64)
    how = {"protected": case["protected"], "keep_order": case["keep_order"]}
    found = match(torch.from_numpy(metric), case["r"], **how)
    merged, sizes = merge(torch.from_numpy(x), torch.from_numpy(token_size), found)
    removed = min(case["r"], (case["tokens"] - case["protected"]) // 2)
    assert merged.shape == (2, case["tokens"] - removed, 5)
    for image in range(2):
        decisions = naive.match(metric[image].tolist(), case["r"], **how)
        expected, expected_sizes = naive.merge(x[image], token_size[image, :, 0], decisions, case["protected"])
        np.testing.assert_allclose(merged[image].numpy(), expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(sizes[image, :, 0].numpy(), expected_sizes)
        assert sizes[image].sum() == token_size[image].sum()


@pytest.mark.parametrize("protected", range(4))
def test_merging_equal_tokens_loses_nothing(protected):
    draw = torch.Generator().manual_seed(protected)
    pairs = torch.randn(2, 8, 6, dtype=torch.float64, generator=draw).repeat_interleave(2, dim=1)
    x = torch.cat([torch.randn(2, protected, 6, dtype=torch.float64, generator=draw), pairs], dim=1)
    token_size = torch.randint(1, 9, (2, x.shape[1], 1), generator=draw).double()
    merged, sizes = merge(x, token_size, match(x, 8, protected=protected))
    assert sizes.sum() == token_size.sum()
    for image in range(2):
        nearest = torch.cdist(merged[image], x[image]).min(dim=1).values
        assert nearest.max() <= 1e-6  # every token that is left is one of those that were there
        assert len(merged[image].round(decimals=9).unique(dim=0)) == protected + 8


def test_merges_are_permutations_of_the_images_in_a_batch(tied_metric):
    metric = torch.from_numpy(tied_metric(5, 17, seed=3))
    together = match(metric, 4)
    for image in range(5):
        alone = match(metric[image : image + 1], 4)
        assert torch.equal(alone.src[0], together.src[image])
        assert torch.equal(alone.dst[0], together.dst[image])


def test_half_precision_is_matched_in_float32():
    metric = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(0))
    scores = cosine_scores(metric.half(), protected=1)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, cosine_scores(metric.half().float(), protected=1))
    assert cosine_scores(metric.double(), protected=1).dtype == torch.float64


@pytest.mark.parametrize("protected", range(7))
def test_first_positions_are_the_first_even_and_odd_ones_behind_the_prefix(protected):
    even, odd = first_positions(protected)
    assert {even, odd} == {protected, protected + 1}
    assert (even % 2, odd % 2) == (0, 1)


def test_a_distillation_token_is_never_merged_into():
    metric = torch.ones(1, 12, 4)  # everything is equally similar: the lowest index would be the distillation token
    found = match(metric, 5, protected=2)
    assert set(found.dst.flatten().tolist()) == {3}
    assert found.src.flatten().tolist() == [2, 4, 6, 8, 10]
