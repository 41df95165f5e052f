"""Golden values are worked out by hand beside each test, and hold in float32 and float64."""

import math

import pytest
import torch

from rlflow.algorithms import corrections
from rlflow.algorithms.kl import absolute, k1, k2, k3, unbiased
from rlflow.algorithms.policy_losses import (
    cispo_loss,
    clip_loss,
    sapo_loss,
    sequence_product_ratio,
    sequence_ratio,
    sequence_token_ratio,
    token_ratio,
)
from rlflow.algorithms.value_losses import value_loss

LN2 = math.log(2.0)
# Two sequences: log-ratios ln 2, ln 8 (sum ln 16, mean ln 4), and -ln 2.
LOG_RATIO = [LN2, 3 * LN2, -LN2]
SEQUENCE_IDS = torch.tensor([0, 0, 1])


@pytest.fixture(params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def vector(request):
    """Makes a tensor of the tested precision."""
    return lambda values, grad=False: torch.tensor(values, dtype=request.param, requires_grad=grad)


def equal(actual: torch.Tensor, expected: list[float]) -> None:
    tolerance = 1e-6 if actual.dtype == torch.float32 else 1e-14
    target = torch.tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual.detach(), target, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("ratio_fn", "values", "gradients"),
    [
        # d exp(x_t) / d x_t.
        (token_ratio, [2, 8, 0.5], [2, 8, 0.5]),
        # Both tokens are exp(mean) = 4, and each moves both by 4 / 2.
        (sequence_ratio, [4, 4, 0.5], [4, 4, 0.5]),
        # The same values, but a token moves its own only.
        (sequence_token_ratio, [4, 4, 0.5], [4, 4, 0.5]),
        # Both are exp(sum) = 16, and each token moves both by 16.
        (sequence_product_ratio, [16, 16, 0.5], [32, 32, 0.5]),
    ],
)
def test_ratios_and_the_gradients_of_their_sum(vector, ratio_fn, values, gradients):
    log_ratio = vector(LOG_RATIO, grad=True)
    ratio = ratio_fn(log_ratio, SEQUENCE_IDS, 2)
    equal(ratio, values)
    ratio.sum().backward()
    equal(log_ratio.grad, gradients)


def test_gspo_and_its_token_variant_differ_where_advantages_differ_within_a_sequence(vector):
    # sum_t A_t s: GSPO's gradient at each token is s (A_0 + A_1) / 2, the token variant's s A_t.
    advantages = vector([1.0, -3.0, 0.0])
    for ratio_fn, expected in ((sequence_ratio, [-4, -4, 0]), (sequence_token_ratio, [4, -12, 0])):
        log_ratio = vector(LOG_RATIO, grad=True)
        (ratio_fn(log_ratio, SEQUENCE_IDS, 2) * advantages).sum().backward()
        equal(log_ratio.grad, expected)


def test_extreme_log_ratios_give_finite_ratios(vector):
    for ratio_fn in (token_ratio, sequence_ratio, sequence_token_ratio, sequence_product_ratio):
        assert torch.isfinite(ratio_fn(vector([500.0, 500.0, -500.0]), SEQUENCE_IDS, 2)).all()


def test_the_clip_holds_only_where_it_lowers_the_objective(vector):
    # ratio          1.5    1.5    0.5    0.5    1.1
    # advantage       2     -2      2     -2     -2
    # objective     1.2*2  1.5*-2  0.5*2 0.8*-2  1.1*-2
    ratio = vector([1.5, 1.5, 0.5, 0.5, 1.1], grad=True)
    loss = clip_loss(ratio, vector([2.0, -2.0, 2.0, -2.0, -2.0]), 0.2, 0.2)
    equal(loss, [-2.4, 3.0, -1.0, 1.6, 2.2])
    loss.sum().backward()
    equal(ratio.grad, [0, 2, -2, 0, 2])


def test_clip_higher_has_its_own_upper_bound(vector):
    ratio = vector([1.25, 1.5, 0.7])
    equal(clip_loss(ratio, vector([1.0, 1.0, -1.0]), 0.2, 0.28), [-1.25, -1.28, 0.8])


def test_dual_clip_bounds_the_loss_of_negative_advantages(vector):
    # c = 3: ratio 5 with A = -2 costs 6 instead of 10; A > 0 and ratios below 3 are as before.
    ratio = vector([5.0, 5.0, 2.0], grad=True)
    loss = clip_loss(ratio, vector([-2.0, 2.0, -2.0]), 0.2, 0.2, dual=3.0)
    equal(loss, [6.0, -2.4, 4.0])
    loss.sum().backward()
    equal(ratio.grad, [0, 0, 2])


def test_cispo_clips_the_weight_and_keeps_every_tokens_gradient(vector):
    # Weights 6, 0.5, 2 within [0, 5]: 5, 0.5, 2.
    logprobs = vector([-1.0, -2.0, -3.0], grad=True)
    loss = cispo_loss(vector([6.0, 0.5, 2.0]), logprobs, vector([1.0, -2.0, 3.0]), 1.0, 4.0)
    equal(loss, [5.0, -2.0, 18.0])
    loss.sum().backward()
    equal(logprobs.grad, [-5.0, 1.0, -6.0])


def test_sapo_gates_smoothly_with_a_temperature_for_each_sign(vector):
    # tau 1, ratio 1 + ln 3: sigmoid = 3/4, times 4 = 3, times A 2. tau 2, ratio 1 - (ln 3) / 2: 1/4 * 2 * -1.
    log3 = math.log(3.0)
    loss = sapo_loss(vector([1 + log3, 1 - log3 / 2]), vector([2.0, -1.0]), 1.0, 2.0)
    equal(loss, [-6.0, 0.5])


def test_sapo_starts_with_the_gradient_of_the_plain_ratio(vector):
    ratio = vector([1.0, 1.0], grad=True)
    sapo_loss(ratio, vector([2.0, -3.0]), 1.0, 1.05).sum().backward()
    equal(ratio.grad, [-2.0, 3.0])


def test_kl_estimators_and_their_gradients_by_hand(vector):
    # pi = 1/2, ref = 1/4: log-ratio ln 2. d k1 = 1, d k2 = ln 2, d k3 = 1 - ref/pi = 1/2, d abs = 1.
    by_hand = ((k1, LN2, 1.0), (k2, LN2**2 / 2, LN2), (k3, LN2 - 0.5, 0.5), (absolute, LN2, 1.0))
    for estimator, value, gradient in by_hand:
        logprobs = vector([math.log(0.5)], grad=True)
        estimate = estimator(logprobs, vector([math.log(0.25)]))
        equal(estimate, [value])
        estimate.sum().backward()
        equal(logprobs.grad, [gradient])


def test_kl_estimators_are_zero_at_the_reference_and_finite_far_from_it(vector):
    for estimator in (k1, k2, k3, absolute):
        equal(estimator(vector([-1.5]), vector([-1.5])), [0.0])
        assert torch.isfinite(estimator(vector([-300.0, -0.1]), vector([-0.1, -300.0]))).all()


def test_the_size_of_the_log_ratio_has_a_gradient_of_one_size_on_either_side_and_none_between(vector):
    logprobs = vector([-1.0, -2.0, -3.0], grad=True)
    distance = absolute(logprobs, vector([-2.0, -2.0, -2.0]))
    equal(distance, [1.0, 0.0, 1.0])
    distance.sum().backward()
    equal(logprobs.grad, [1.0, 0.0, -1.0])


@pytest.mark.parametrize("estimator", [k1, k3])
def test_the_weighted_estimate_has_the_gradient_of_the_exact_kl(estimator):
    # Over all outcomes of a categorical distribution the expectation is a sum, so gradients compare exactly.
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    ref_logprobs = torch.log_softmax(torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64), 0)
    old_logprobs = torch.log_softmax(torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), 0)
    logprobs = torch.log_softmax(logits, 0)
    exact = (logprobs.exp() * (logprobs - ref_logprobs)).sum()
    weighted = (old_logprobs.exp() * unbiased(estimator(logprobs, ref_logprobs), logprobs - old_logprobs)).sum()
    torch.testing.assert_close(weighted, exact)
    gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (weighted, exact)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_k2_has_the_gradient_of_the_exact_kl_on_policy():
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    ref_logprobs = torch.log_softmax(torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64), 0)
    logprobs = torch.log_softmax(logits, 0)
    exact = (logprobs.exp() * (logprobs - ref_logprobs)).sum()
    sampled = (logprobs.detach().exp() * k2(logprobs, ref_logprobs)).sum()
    gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (sampled, exact)]
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("level", "expected"), [("token", [2, 8, 0.5]), ("sequence", [16, 16, 0.5]), ("sequence_mean", [4, 4, 0.5])]
)
def test_mismatch_weights_of_a_token_a_sequence_and_its_geometric_mean(vector, level, expected):
    trainer = vector([LN2 - 5, 3 * LN2 - 4, -LN2 - 3], grad=True)
    weights = corrections.mismatch_weights(trainer, vector([-5.0, -4.0, -3.0]), SEQUENCE_IDS, 2, level)
    tolerance = 1e-5 if weights.dtype == torch.float32 else 1e-13
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=weights.dtype), rtol=tolerance, atol=0)
    assert not weights.requires_grad


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("truncate", [0.5, 0.5, 1.0, 2.0, 2.0]),
        ("mask", [0.0, 1.0, 1.0, 1.0, 0.0]),
        ("weighted_mask", [0.0, 0.5, 1.0, 2.0, 0.0]),
    ],
)
def test_weights_out_of_bounds_are_cut_or_dropped(vector, mode, expected):
    weights = vector([0.4, 0.5, 1.0, 2.0, 2.1])
    equal(corrections.CORRECTIONS[mode](weights, 0.5, 2.0), expected)
    assert corrections.is_out_of_bounds(weights, 0.5, 2.0).tolist() == [True, False, False, False, True]
    # 0 is no lower bound.
    assert float(corrections.CORRECTIONS[mode](weights, 0.0, 2.0)[0]) > 0


def test_value_loss_takes_the_worse_of_the_clipped_and_the_plain_error(vector):
    # old 1, clip 0.2. V=2, R=0: plain 4, clipped 1.2 -> 1.44: 4/2, with gradient. V=2, R=3: plain 1, clipped 1.8^2.
    # Downwards, V=0, R=-3: plain 9, clipped 0.8 -> 3.8^2.
    values = vector([2.0, 2.0, 1.1, 0.0], grad=True)
    loss = value_loss(values, vector([1.0, 1.0, 1.0, 1.0]), vector([0.0, 3.0, 0.1, -3.0]), clip=0.2)
    equal(loss, [2.0, 1.62, 0.5, 7.22])
    loss.sum().backward()
    equal(values.grad, [2.0, 0.0, 1.0, 0.0])


def test_value_loss_without_clip_is_half_the_squared_error(vector):
    equal(value_loss(vector([2.0]), vector([1.0]), vector([-1.0])), [4.5])
