"""tocom.pruning against loops over tokens that know nothing of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tocom.pruning import prune, select


@st.composite
def cases(draw):
    protected = draw(st.sampled_from([0, 1, 2, 5]))
    free = draw(st.integers(1, 23))
    return {
        "protected": protected,
        "tokens": protected + free,
        "r": draw(st.integers(0, free - 1)),  # up to all of them fused into one
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def check_decisions(naive, attention: np.ndarray, case: dict) -> None:
    found = select(torch.from_numpy(attention), case["r"], protected=case["protected"])
    assert found.protected == case["protected"]
    for image, values in enumerate(attention.tolist()):
        kept, dropped = naive.select(values, case["r"], case["protected"])
        assert found.kept[image].tolist() == kept
        assert found.dropped[image].tolist() == dropped


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases(), dtype=st.sampled_from([np.float16, np.float32, np.float64]))
def test_selecting_equals_the_loop_with_exact_ties_and_zeros(naive, tied_attention, case, dtype):
    check_decisions(naive, tied_attention(2, case["tokens"], case["seed"], dtype), case)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases())
def test_selecting_equals_the_loop_on_random_attention(naive, case):
    check_decisions(naive, np.random.default_rng(case["seed"]).random((2, case["tokens"])), case)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases(), tied=st.booleans())
def test_pruning_equals_the_weighted_mean_loop_and_conserves_sizes(naive, tied_attention, case, tied):
    random = np.random.default_rng(case["seed"])
    attention = random.random((2, case["tokens"]))
    if tied:
        attention = tied_attention(2, case["tokens"], case["seed"], np.float64)
    x = random.standard_normal((2, case["tokens"], 5))
    token_size = random.integers(1, 40, (2, case["tokens"], 1)).astype(np.float64)
    tensors = [torch.from_numpy(each) for each in (x, token_size, attention)]
    pruned, sizes = prune(*tensors, select(tensors[2], case["r"], protected=case["protected"]))
    assert pruned.shape == (2, case["tokens"] - case["r"], 5)
    for image in range(2):
        decisions = naive.select(attention[image].tolist(), case["r"], case["protected"])
        expected, expected_sizes = naive.prune(
            x[image], token_size[image, :, 0], attention[image].tolist(), decisions, case["protected"]
        )
        # the weights' floor of 1e-12 moves a mean by about that much
        np.testing.assert_allclose(pruned[image].numpy(), expected, rtol=0, atol=1e-8)
        np.testing.assert_array_equal(sizes[image, :, 0].numpy(), expected_sizes)
        assert sizes[image].sum() == token_size[image].sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_without_any_attention_become_their_plain_mean(dtype):
    x = torch.randn(2, 9, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    attention = torch.zeros(2, 9, dtype=dtype)
    pruned, sizes = prune(x, torch.ones(2, 9, 1, dtype=dtype), attention, select(attention, 3, protected=1))
    torch.testing.assert_close(pruned[:, -1], x[:, 5:].mean(dim=1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pruned[:, :-1], x[:, :5], rtol=0, atol=0)
    assert sizes[:, :, 0].tolist() == [[1, 1, 1, 1, 1, 4]] * 2


@pytest.mark.parametrize("protected", [1, 2, 5])
def test_fusing_equal_tokens_loses_nothing(protected):
    draw = torch.Generator().manual_seed(protected)
    x = torch.randn(3, protected + 12, 6, dtype=torch.float64, generator=draw)
    attention = torch.rand(3, protected + 12, dtype=torch.float64, generator=draw)
    found = select(attention, 6, protected=protected)
    same = torch.randn(6, dtype=torch.float64, generator=draw)
    for image in range(3):
        x[image, found.dropped[image]] = same
    pruned, sizes = prune(x, torch.ones(3, protected + 12, 1).double(), attention, found)
    torch.testing.assert_close(pruned[:, -1], same.expand(3, -1), rtol=0, atol=1e-12)
    assert (sizes[:, -1] == 7).all()


def test_the_prefix_stays_however_little_it_is_attended():
    attention = torch.tensor([[0.0, 0.0, 0.5, 0.4, 0.3]])
    found = select(attention, 1, protected=2)
    assert (found.kept.tolist(), found.dropped.tolist()) == ([[2]], [[3, 4]])


def test_prunings_are_permutations_of_the_images_in_a_batch(tied_attention):
    attention = torch.from_numpy(tied_attention(5, 17, seed=3))
    together = select(attention, 4)
    for image in range(5):
        alone = select(attention[image : image + 1], 4)
        assert torch.equal(alone.kept[0], together.kept[image])
        assert torch.equal(alone.dropped[0], together.dropped[image])
