"""The margins of decisions: none for the best ones, small for a matter of rounding, infinite for nonsense."""

from __future__ import annotations

import math

import pytest
import torch

from tocom.export.proof.decisions import comparer_of, merge_margin, prune_margin
from tocom.export.proof.gates import margin_allowed
from tocom.merging import Matching
from tocom.pruning import Pruning
from tocom.reduction import MERGE, PRUNE

# tokens: 0 protected, then b a b a b a b -> a-tokens 2, 4, 6 and b-tokens 1, 3, 5, 7
SCORES = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.2, 0.8, 0.0, 0.8 - 4e-7], [0.1, 0.0, 0.8 - 5e-7, 0.3]]).double()


def margin_of(src, dst, unm, *, ordered_by_score=False, scores=SCORES):
    chosen = Matching(torch.tensor([src]), torch.tensor([dst]), torch.tensor([unm], dtype=torch.int64), protected=1)
    if not comparer_of(MERGE).is_valid(chosen, 0, 8):
        return float("inf")
    return merge_margin(scores.clone(), chosen, 0, ordered_by_score=ordered_by_score)


def test_the_best_decisions_have_no_margin():
    assert margin_of([2, 4], [1, 3], [6]) == 0
    assert margin_of([4, 2], [3, 1], [6]) == 0  # in which order they merge makes no difference
    assert margin_of([2, 4, 6], [1, 3, 5], []) == 0


def test_near_ties_have_a_margin_that_is_explained():
    assert margin_of([2, 4], [1, 7], [6]) == pytest.approx(4e-7, rel=0.2)  # another destination, nearly as good
    assert margin_of([2, 6], [1, 5], [4]) == pytest.approx(5e-7, rel=0.2)  # another token, nearly as good
    assert margin_of([2, 6], [1, 5], [4]) < margin_allowed("fp32", "merge")


def test_real_errors_have_a_margin_that_is_not():
    assert margin_of([2, 4], [3, 3], [6]) == pytest.approx(0.8)  # a bad destination
    assert margin_of([4, 6], [3, 5], [2]) == pytest.approx(0.1, rel=1e-4)  # the best token left out
    assert margin_of([2, 4], [1, 5], [6]) == pytest.approx(0.8)


def test_the_margin_that_is_explained_is_a_rounding_error_wide():
    assert 9e-7 < margin_allowed("fp32", "merge") < 1e-6
    small = SCORES.clone()
    small[0, 1] = 0.9 - 2e-6
    assert margin_of([2, 4], [3, 3], [6], scores=small) > margin_allowed("fp32", "merge")  # small, but no rounding


def test_the_order_of_the_tokens_that_stay_counts():
    assert margin_of([2], [1], [4, 6]) == 0
    assert margin_of([2], [1], [6, 4]) == float("inf")
    assert margin_of([2], [1], [4, 6], ordered_by_score=True) == 0
    assert margin_of([2], [1], [6, 4], ordered_by_score=True) == pytest.approx(5e-7, rel=0.2)
    worse = SCORES.clone()
    worse[2] = 0.5
    assert margin_of([2], [1], [6, 4], ordered_by_score=True, scores=worse) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("src", "dst", "unm"),
    [
        ([2, 2], [1, 1], [6]),  # one token twice
        ([2, 4], [1, 3], [4]),  # one token merged and kept
        ([2, 3], [1, 3], [6]),  # a token of the other side
        ([0, 4], [1, 3], [6]),  # a protected token
        ([2, 8], [1, 3], [6]),  # beyond the last
        ([2, 4], [1, 4], [6]),  # into a token of its own side
        ([2, 4], [1, 9], [6]),  # into one beyond the last
        ([2, 4], [1, -1], [6]),
    ],
)
def test_what_is_no_decision_has_an_infinite_margin(src, dst, unm):
    assert margin_of(src, dst, unm) == float("inf")


def test_scores_that_are_not_numbers_explain_nothing():
    scores = SCORES.clone()
    scores[0, 0] = torch.nan
    assert not margin_of([2, 4], [1, 3], [6], scores=scores) < margin_allowed("fp32", "merge")


# token 0 protected; tokens 3 and 4 are nearly alike
ATTENTION = torch.tensor([0.3, 0.25, 0.2, 0.1, 0.1 * (1 - 4e-6), 0.04, 0.01], dtype=torch.float64)
RANGE = math.log(0.25 / 0.01)


def prune_margin_of(kept, dropped, *, attention=ATTENTION):
    chosen = Pruning(torch.tensor([kept], dtype=torch.int64), torch.tensor([dropped]), protected=1)
    if not comparer_of(PRUNE).is_valid(chosen, 0, len(attention)):
        return float("inf")
    return prune_margin(attention.clone(), chosen, 0)


def test_the_best_prunings_have_no_margin():
    assert prune_margin_of([1, 2, 3, 4], [5, 6]) == 0
    assert prune_margin_of([1, 2, 3], [4, 5, 6]) == 0
    assert prune_margin_of([], [1, 2, 3, 4, 5, 6]) == 0


def test_a_near_tie_of_attention_has_a_margin_that_is_explained():
    assert prune_margin_of([1, 2, 4], [3, 5, 6]) == pytest.approx(4e-6 / RANGE, rel=1e-3)
    assert prune_margin_of([1, 2, 4], [3, 5, 6]) < margin_allowed("fp32", "prune") < 1e-5


def test_wrongly_dropped_tokens_have_a_margin_that_is_not():
    assert prune_margin_of([1, 2, 5], [3, 4, 6]) == pytest.approx(math.log(2.5) / RANGE)
    assert prune_margin_of([6], [1, 2, 3, 4, 5]) == pytest.approx(1)
    worse = ATTENTION.clone()
    worse[4] = 0.1 * (1 - 4e-5)
    assert prune_margin_of([1, 2, 4], [3, 5, 6], attention=worse) > margin_allowed(
        "fp32", "prune"
    )  # small, but no rounding


def test_the_margin_of_a_pruning_does_not_depend_on_the_attention_of_the_prefix():
    scaled = torch.cat([torch.tensor([0.9]).double(), ATTENTION[1:] / 7])
    assert prune_margin_of([1, 2, 5], [3, 4, 6], attention=scaled) == pytest.approx(
        prune_margin_of([1, 2, 5], [3, 4, 6])
    )


def test_where_all_are_attended_alike_the_margin_is_not_blown_up():
    flat = torch.full((7,), 0.1).double()
    flat[1] *= 1 + 1e-7
    assert prune_margin_of([2, 3, 4], [1, 5, 6], attention=flat) == pytest.approx(1e-7, rel=1e-3)


def test_attention_that_float32_cannot_hold_is_equally_little():
    faint = ATTENTION.clone()
    faint[5:] = torch.tensor([0.0, 1e-60])
    assert prune_margin_of([1, 2, 3, 4, 5], [6], attention=faint) == 0


@pytest.mark.parametrize(
    ("kept", "dropped"),
    [
        ([1, 2, 3, 4], [5, 5]),  # one token twice
        ([1, 2, 3, 5], [5, 6]),  # one token kept and dropped
        ([0, 1, 2, 3], [5, 6]),  # a protected token
        ([1, 2, 3, 4], [0, 6]),
        ([1, 2, 3, 4], [5, 7]),  # beyond the last
        ([1, 2, 3, 4], [-1, 6]),
        ([1, 2, 3], [5, 6]),  # one left out
        ([1, 3, 2, 4], [5, 6]),  # out of position order
        ([1, 2, 3, 4], [6, 5]),
    ],
)
def test_what_is_no_pruning_has_an_infinite_margin(make_vit, kept, dropped):
    chosen = Pruning(torch.tensor([kept]), torch.tensor([dropped]), protected=1)
    assert comparer_of(PRUNE).margin(ATTENTION[None], chosen, 0, make_vit("deit_tiny")) == float("inf")


def test_attention_that_is_no_number_explains_nothing():
    attention = ATTENTION.clone()
    attention[3] = torch.nan
    assert not prune_margin_of([1, 2, 3, 4], [5, 6], attention=attention) < margin_allowed("fp32", "prune")


def test_equal_prunings_are_counted_by_dropped_token():
    judge = comparer_of(PRUNE)
    one = Pruning(torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]]), protected=1)
    other = Pruning(torch.tensor([[1, 2, 4]]), torch.tensor([[3, 5, 6]]), protected=1)
    assert (judge.count(one), judge.count_equal(one, other, 0), judge.count_equal(one, one, 0)) == (3, 2, 3)
    assert judge.is_equal(one, one, 0)
    assert not judge.is_equal(one, other, 0)
