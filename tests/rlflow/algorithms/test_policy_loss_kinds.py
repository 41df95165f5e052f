"""GMPO, DPPO and the covariance losses: golden values by hand beside each test, in float32 and float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_policy import new_policy, run, samples_for, weigh

from rlflow.algorithms.policy_losses import (
    clip_cov_loss,
    clip_loss,
    dppo_loss,
    gmpo_loss,
    kl_cov_loss,
    leaves_trust_region,
)
from rlflow.algorithms.selections import covariances_of, with_selection
from rlflow.recipe import algorithm_of
from rlflow.types import Sample

LN2 = math.log(2.0)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def vector(request):
    """Makes a tensor of the tested precision."""
    return lambda values, grad=False: torch.tensor(values, dtype=request.param, requires_grad=grad)


def equal(actual: torch.Tensor, expected: list[float]) -> None:
    tolerance = 1e-6 if actual.dtype == torch.float32 else 1e-14
    target = torch.tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual.detach(), target, rtol=tolerance, atol=tolerance)


def test_gmpo_takes_the_geometric_mean_of_ratios_that_are_clipped_where_this_lowers_the_objective(vector):
    # Log2-ratios 1 and 3 of advantage 1, bound 2: mean of 1 and 2. Log2-ratio -1 of advantage -1, bound -1/2.
    log_ratio = vector([LN2, 3 * LN2, -LN2], grad=True)
    sequence_ids = torch.tensor([0, 0, 1])
    loss = gmpo_loss(log_ratio, vector([1.0, 1.0, -1.0]), sequence_ids, 2, 0.5 * LN2, 2 * LN2)
    equal(loss, [-(2**1.5), -(2**1.5), 2**-0.5])
    loss.sum().backward()
    # Both tokens of the first have the mean, of which the first token is a half; a clipped one moves nothing.
    equal(log_ratio.grad, [-(2**1.5), 0.0, 0.0])
    # On the other side of the bound the objective is not lowered: nothing is clipped.
    equal(gmpo_loss(vector([-3 * LN2]), vector([1.0]), torch.tensor([0]), 1, 0.5 * LN2, 2 * LN2), [-(2**-3)])


def test_gmpo_with_a_bound_that_never_holds_is_gspo_without_a_clip():
    policy = new_policy()
    results = []
    for block in (
        algorithm_of("gmpo", loss={"clip_low": 1e3, "clip_high": 1e3}),
        algorithm_of("gspo", loss={"clip_low": 1e3, "clip_high": 1e3}),
    ):
        samples, denominators = weigh(samples_for("gmpo"), block)
        results.append(run(policy, samples, denominators, block))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("divergence", "bound", "old", "new", "advantage", "is_dropped"),
    [
        # |p - p_old|: 0.2 and 0.1, of a bound of 0.15, in the direction of the advantage and against it.
        ("tv", 0.15, 0.5, 0.7, 1.0, True),
        ("tv", 0.15, 0.5, 0.6, 1.0, False),
        ("tv", 0.15, 0.5, 0.7, -1.0, False),
        ("tv", 0.15, 0.5, 0.3, -1.0, True),
        ("tv", 0.15, 0.5, 0.3, 1.0, False),
        # A rare token becomes ten times as probable, which a clip of the ratio would hold.
        ("tv", 0.15, 0.001, 0.01, 1.0, False),
        # A frequent one falls from 0.99 to 0.8, which it would not.
        ("tv", 0.15, 0.99, 0.8, -1.0, True),
        # 1/2 log(0.25 / 0.21) = 0.0872 and 1/2 log(0.25 / 0.24) = 0.0204.
        ("kl", 0.05, 0.5, 0.7, 1.0, True),
        ("kl", 0.05, 0.5, 0.6, 1.0, False),
        ("kl", 0.0872, 0.5, 0.7, 1.0, False),
        ("kl", 0.0871, 0.5, 0.7, 1.0, True),
        ("kl", 0.05, 0.5, 0.3, 1.0, False),
        ("kl", 0.05, 0.5, 0.3, -1.0, True),
    ],
)
def test_dppo_drops_what_goes_on_beyond_the_divergence(vector, divergence, bound, old, new, advantage, is_dropped):
    low, high = (9.0, bound) if advantage > 0 else (bound, 9.0)
    outside = leaves_trust_region(divergence, vector([new]).log(), vector([old]).log(), vector([advantage]), low, high)
    assert outside.tolist() == [is_dropped]


def test_the_divergences_are_finite_where_a_token_is_certain(vector):
    certain, other = vector([0.0, 0.0, -30.0]), vector([0.0, -1e-8, 0.0])
    for divergence in ("tv", "kl"):
        for new, old in ((certain, other), (other, certain)):
            leaves_trust_region(divergence, new, old, vector([1.0, 1.0, 1.0]), 0.1, 0.1)
            assert not leaves_trust_region(divergence, old, old, vector([1.0, -1.0, 1.0]), 0.1, 0.1).any()


def test_dppos_gradient_is_the_bounded_ratio_times_the_advantage_where_it_is_kept(vector):
    # Ratios 10, 0.5, 2, of which the first is bounded by 5 and the last dropped.
    logprobs = vector([0.1, 0.2, 0.8], grad=True)
    loss = dppo_loss(vector([10.0, 0.5, 2.0]), logprobs, vector([2.0, -3.0, 1.0]), torch.tensor([0, 0, 1]).bool(), 5.0)
    loss.sum().backward()
    equal(logprobs.grad, [-10.0, 1.5, 0.0])


def test_without_a_bound_dppo_is_cispo_without_one():
    policy, loss = new_policy(), {"reduction": "token"}
    correction = {"mode": "none", "old_policy": "trainer"}
    results = []
    for block in (
        algorithm_of(
            "dppo", loss={**loss, "bound_low": 1.0, "bound_high": 1.0, "max_weight": 5.0}, correction=correction
        ),
        algorithm_of("cispo", loss=loss, correction=correction),
    ):
        samples, denominators = weigh(samples_for("dppo"), block)
        results.append(run(policy, samples, denominators, block))
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-9)


def test_clip_cov_is_the_clip_without_the_selected_tokens(vector):
    ratio, advantages = vector([1.5, 1.5, 0.5], grad=True), vector([2.0, 2.0, 2.0])
    loss = clip_cov_loss(ratio, advantages, torch.tensor([0, 1, 1]).bool(), 0.2, 0.2)
    equal(loss, [-2.4, 0.0, 0.0])
    loss.sum().backward()
    equal(ratio.grad, [0.0, 0.0, 0.0])
    none = torch.zeros(3, dtype=torch.bool)
    equal(clip_cov_loss(ratio, advantages, none, 0.2, 0.2), clip_loss(ratio, advantages, 0.2, 0.2).tolist())


def test_kl_cov_adds_the_size_of_the_log_ratio_where_selected(vector):
    log_ratio = vector([LN2, -LN2, LN2], grad=True)
    loss = kl_cov_loss(log_ratio.exp(), log_ratio, vector([1.0, 1.0, 1.0]), torch.tensor([1, 1, 0]).bool(), 3.0)
    equal(loss, [-2.0 + 3 * LN2, -0.5 + 3 * LN2, -2.0])
    loss.sum().backward()
    equal(log_ratio.grad, [-2.0 + 3.0, -0.5 - 3.0, -2.0])


def sample(logprobs: list[float], advantages: list[float], **fields) -> Sample:
    """A prompt of one token, whose fields nothing may read, and these loss tokens."""
    mask = np.arange(len(logprobs) + 1) > 0
    return Sample(
        token_ids=np.zeros(len(mask), dtype=np.int32),
        loss_mask=mask,
        loss_weights=np.zeros(len(mask), dtype=np.float32),
        advantages=np.array([np.nan, *advantages], dtype=np.float32),
        old_logprobs=np.array([np.nan, *logprobs], dtype=np.float32),
        **fields,
    )


TWO = [sample([-1.0, -2.0], [1.0, 0.0]), sample([-3.0, -2.0], [-1.0, 4.0])]
"""Mean logprob -2, mean advantage 1: covariances 0, 0, 2, 0."""


def selected(samples: list[Sample]) -> list[list[float]]:
    return [s.selected.tolist() for s in samples]


def test_the_covariance_is_about_the_means_of_all_loss_tokens_of_the_update():
    np.testing.assert_allclose(covariances_of(TWO), [0.0, 0.0, 2.0, 0.0], atol=1e-12)


def test_the_trainers_logprobs_of_before_the_update_are_taken_where_they_are_known():
    known = [replace(s, proximal_logprobs=2 * s.old_logprobs) for s in TWO]
    np.testing.assert_allclose(covariances_of(known), [0.0, 0.0, 4.0, 0.0], atol=1e-12)


def test_kl_cov_selects_a_share_of_the_largest_over_the_whole_update():
    block = algorithm_of("kl_cov", loss={"share": 0.25}).loss
    assert selected(with_selection(TWO, block, 0, "a")) == [[0, 0, 0], [0, 1, 0]]
    block = algorithm_of("kl_cov", loss={"share": 0.5}).loss
    assert selected(with_selection(TWO, block, 0, "a")) == [[0, 1, 0], [0, 1, 0]], "of equals the first"
    block = algorithm_of("kl_cov", loss={"share": 1e-6}).loss
    assert selected(with_selection(TWO, block, 0, "a")) == [[0, 0, 0], [0, 1, 0]], "one at least"


def test_clip_cov_draws_between_its_bounds_alone_and_the_same_for_the_same_seed():
    random = np.random.default_rng(0)
    samples = [sample(random.normal(size=9).tolist(), random.normal(size=9).tolist()) for _ in range(9)]
    covariances = covariances_of(samples)
    loss = {"share": 0.1, "covariance_low": 0.1, "covariance_high": 1.0}
    block = algorithm_of("clip_cov", loss=loss).loss
    drawn = [np.concatenate([s.selected[1:] for s in with_selection(samples, block, 0, n)]) for n in "aab"]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()
    for of_seed in drawn:
        assert of_seed.sum() == 8, "a tenth of 81"
        assert ((covariances > 0.1) & (covariances < 1.0))[of_seed > 0].all()
    none = algorithm_of("clip_cov", loss={**loss, "covariance_low": 50.0, "covariance_high": 60.0}).loss
    assert not any(s.selected.any() for s in with_selection(samples, none, 0, "a"))


def test_losses_that_treat_all_tokens_alike_select_none():
    assert all(s.selected is None for s in with_selection(TWO, algorithm_of("grpo").loss, 0, "a"))
