"""Demonstrations beside rollouts: the schedule and the loss by hand, and that no split of the batch matters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from toy_policy import logprobs_of, new_policy, run, samples_for, weigh

from rlflow.algorithms.mixture import mixed
from rlflow.algorithms.policy_losses import demonstration_loss
from rlflow.batching import pack
from rlflow.recipe import algorithm_of
from rlflow.types import Sample


def shown(*lengths: int) -> list[Sample]:
    """Demonstrations as rows become them: a prompt of one token, and so many that are trained."""
    random = np.random.default_rng(1)
    return [
        Sample(
            random.integers(0, 7, size=1 + length).astype(np.int32),
            np.arange(1 + length) > 0,
            np.zeros(1 + length, np.float32),
        )
        for length in lengths
    ]


def rollouts() -> list[Sample]:
    return samples_for("chord")


def test_mu_rises_in_a_line_and_falls_as_half_a_cosine():
    schedule = {"mu_peak": 0.8, "mu_valley": 0.2, "mu_warmup_steps": 4, "mu_decay_steps": 6}
    mu = algorithm_of("chord", mixture=schedule).mixture.mu
    assert [mu(step) for step in range(5)] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    # Half-way the mean of both; a third of the way cos 60 degrees is 1/2.
    assert mu(7) == pytest.approx(0.5)
    assert mu(6) == pytest.approx(0.2 + 0.6 * 0.75)
    assert [mu(10), mu(1000)] == [0.2, 0.2]


def test_without_warm_up_and_decay_mu_is_the_valley_and_the_papers_start_is_nine_tenths():
    assert algorithm_of("chord").mixture.mu(0) == 0.9
    assert algorithm_of("chord").mixture.mu(200) == 0.05
    constant = {"mu_peak": 0.3, "mu_valley": 0.3, "mu_decay_steps": 0}
    assert [algorithm_of("chord", mixture=constant).mixture.mu(step) for step in (0, 7)] == [0.3, 0.3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_phi_weighs_a_token_by_its_uncertainty_and_has_no_gradient(dtype):
    logprobs = torch.tensor([0.5, 0.9, 0.1], dtype=dtype).log().requires_grad_()
    loss = demonstration_loss(logprobs, weighs_by_certainty=True)
    expected = [0.25 * math.log(2), -0.09 * math.log(0.9), -0.09 * math.log(0.1)]
    torch.testing.assert_close(loss.detach(), torch.tensor(expected, dtype=dtype))
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-0.25, -0.09, -0.09], dtype=dtype))


@pytest.mark.parametrize("phi", [False, True])
def test_the_loss_is_one_part_the_rollouts_and_one_the_demonstrations_mean(phi):
    policy, mu = new_policy(), 0.3
    block, alone = algorithm_of("chord", mixture={"phi": phi}), algorithm_of("chord", mixture=None)
    weighed, denominators = weigh(rollouts(), block)
    demonstrations = shown(3, 5)
    loss, gradient, metrics = run(policy, mixed(weighed, demonstrations, mu), denominators, block)
    of_rollouts, gradient_of_rollouts, metrics_alone = run(policy, weighed, denominators, alone)
    taught = torch.zeros((), dtype=torch.float64)
    for sample in demonstrations:
        logprobs, _ = logprobs_of(policy, pack([sample], max_tokens=100, num_ranks=1)[0][0])
        p = logprobs[1:].exp().detach()
        taught = taught - (logprobs[1:] * (p * (1 - p) if phi else 1.0)).sum() / 8
    (gradient_of_shown,) = torch.autograd.grad(taught, policy)
    assert loss == pytest.approx((1 - mu) * of_rollouts + mu * float(taught.detach()), rel=1e-6)
    expected = (1 - mu) * gradient_of_rollouts + mu * gradient_of_shown
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
    # Means over the rollouts' tokens do not see the demonstrations.
    same = ("ratio/mean", "clip/low_fraction", "clip/high_fraction", "entropy", "mismatch/kl")
    assert {key: metrics[key] for key in same} == pytest.approx({key: metrics_alone[key] for key in same})


@pytest.mark.parametrize("phi", [False, True])
def test_no_split_into_micro_batches_or_ranks_changes_the_mixed_loss(phi):
    policy, block = new_policy(), algorithm_of("chord", mixture={"phi": phi}, kl={"coef": 0.1})
    weighed, denominators = weigh(rollouts(), block)
    samples = mixed(weighed, shown(3, 5, 1, 9), 0.4)
    whole = run(policy, samples, denominators, block)
    for max_tokens, num_ranks in [(40, 1), (1, 1), (10_000, 2), (1, 3)]:
        split = run(policy, samples, denominators, block, max_tokens=max_tokens, num_ranks=num_ranks)
        assert split[0] == pytest.approx(whole[0], rel=1e-6)
        torch.testing.assert_close(split[1], whole[1], rtol=1e-6, atol=1e-9)
        assert split[2] == pytest.approx(whole[2], rel=1e-6, abs=1e-7)


def test_at_a_weight_of_0_the_rollouts_are_alone_and_as_they_were():
    weighed, _ = weigh(rollouts(), algorithm_of("chord"))
    assert mixed(weighed, shown(3), 0.0) == weighed
    assert mixed(weighed, [], 0.5) == weighed


def test_at_a_weight_of_1_only_the_demonstrations_count():
    policy, block = new_policy(), algorithm_of("chord")
    weighed, denominators = weigh(rollouts(), block)
    _, gradient, _ = run(policy, mixed(weighed, shown(4), 1.0), denominators, block)
    (sample,) = shown(4)
    logprobs, _ = logprobs_of(policy, pack([sample], max_tokens=100, num_ranks=1)[0][0])
    (expected,) = torch.autograd.grad(-logprobs[1:].mean(), policy)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
