"""Golden values are worked out by hand: log-ratios are multiples of ln 3, because sigmoid(ln 3) is 3/4."""

import math

import numpy as np
import pytest
import torch

from rlflow.algorithms import preference_losses as losses
from rlflow.algorithms.preference_targets import aot_margins, aot_partners, kto_kl

LN2, LN3 = math.log(2.0), math.log(3.0)
RIGHT = math.log(4 / 3)
"""-log sigmoid(ln 3)."""
WRONG = math.log(4.0)
"""-log sigmoid(-ln 3)."""

# beta 1/2, scores ln 3 and -ln 3: rewards (ln 3)/2 and -(ln 3)/2, margin ln 3. At a half ln 3, sigmoid is
# sqrt(3) / (1 + sqrt(3)).
HALF = math.sqrt(3.0) / (1.0 + math.sqrt(3.0))

PAIR_GOLDEN = [
    ("sigmoid", {}, RIGHT),
    ("sigmoid", {"label_smoothing": 0.25}, 0.75 * RIGHT + 0.25 * WRONG),
    ("sigmoid", {"margin": LN3}, LN2),
    ("hinge", {}, 0.0),
    # 2 ln 3 - 1 / (2 * 1/2).
    ("ipo", {}, (2 * LN3 - 1.0) ** 2),
    ("robust", {"label_smoothing": 0.25}, (0.75 * RIGHT - 0.25 * WRONG) / 0.5),
    # 3/4 ln((3/4) / (9/10)) + 1/4 ln((1/4) / (1/10)).
    ("exo_pair", {"label_smoothing": 0.1}, 0.75 * math.log(5 / 6) + 0.25 * math.log(2.5)),
    # -ln h - 1/2 ln(1 - h) - 1/2 ln h.
    ("nca_pair", {}, -1.5 * math.log(HALF) - 0.5 * math.log(1 - HALF)),
    ("bco_pair", {}, -2 * math.log(HALF)),
    # (ln 3 - 1)^2 + (-ln 3 + 1)^2.
    ("sppo", {}, 2 * (LN3 - 1.0) ** 2),
    ("apo_zero", {}, 2 * (1 - HALF)),
    ("apo_down", {}, HALF + 0.25),
    # tau 1: the mix is sigmoid(ln 3) = 3/4, exp(-ln 3) = 1/3.
    ("discopop", {"tau": 1.0}, 0.25 * RIGHT + 0.25),
]


@pytest.fixture(params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def vector(request):
    """Makes a tensor of the tested precision."""
    return lambda values: torch.tensor(values, dtype=request.param)


def equal(actual: torch.Tensor, expected: list[float]) -> None:
    tolerance = 2e-6 if actual.dtype == torch.float32 else 1e-14
    target = torch.tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, target, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "numbers", "expected"), PAIR_GOLDEN)
def test_pair_losses_by_hand(vector, name, numbers, expected):
    loss = getattr(losses, name)(vector([LN3]), vector([-LN3]), 0.5, **numbers)
    equal(loss, [expected])


def test_hinge_costs_what_is_missing_to_the_margin(vector):
    equal(losses.hinge(vector([0.5, 3.0]), vector([1.5, -1.0]), 0.5), [1.5, 0.0])


def test_simpo_is_the_logistic_loss_of_mean_logprobs_less_the_target_margin(vector):
    # beta 2: 2 (-1 + 1.5) - 1 = 0.
    equal(losses.sigmoid(vector([-1.0]), vector([-1.5]), 2.0, margin=1.0), [LN2])


def test_orpo_compares_log_odds(vector):
    # p 3/4 and 1/4: odds 3 and 1/3, log odds ratio ln 9, sigmoid 9/10.
    loss = losses.orpo(vector([math.log(0.75)]), vector([math.log(0.25)]), 0.1)
    equal(loss, [0.1 * math.log(10 / 9)])


def test_orpo_is_finite_for_certain_and_impossible_answers(vector):
    certain = vector([0.0]).requires_grad_()
    loss = losses.orpo(certain, vector([-200.0]), 0.1)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and certain.grad is not None and torch.isfinite(certain.grad).all()


def test_aot_with_equal_order_is_dpo_and_else_compares_by_rank(vector):
    # Policy log-ratios 3, 1, 2 have ranks 2, 0, 1; the reference's sorted are 0, 5, 9; its own were 9, 5, 0.
    own = vector([3.0, 1.0, 2.0]).numpy()
    np.testing.assert_allclose(aot_margins(own, vector([9.0, 5.0, 0.0]).numpy()), [0.0, -5.0, 5.0])
    np.testing.assert_allclose(aot_margins(own, vector([9.0, 0.0, 5.0]).numpy()), 0.0)
    # Log-ratio 3 against its own reference's 2; with the margin 1 nothing is left: ln 2.
    equal(losses.aot(vector([3.0]), vector([2.0]), vector([1.0]), 0.7), [LN2])


def test_aot_unpaired_compares_the_answers_of_equal_rank(vector):
    # Chosen 2 ln 3 and 0 against rejected -ln 3 and 3 ln 3: by rank 0 + ln 3 is right, 2 ln 3 - 3 ln 3 wrong.
    chosen, rejected = vector([2 * LN3, 0.0]), vector([-LN3, 3 * LN3])
    partners = aot_partners(chosen.numpy(), rejected.numpy())
    equal(torch.tensor(partners[0]), [3 * LN3, -LN3])
    equal(torch.tensor(partners[1]), [0.0, 2 * LN3])
    c, r = chosen.requires_grad_(), rejected.requires_grad_()
    loss = losses.aot_unpaired(c, r, *map(torch.tensor, partners), 1.0)
    equal(loss.detach(), [(WRONG + RIGHT) / 2] * 2)
    # Each answer is pushed by its own comparison: sigmoid(ln 3) = 3/4 where it is wrong, 1/4 where it is right.
    loss.sum().backward()
    equal(c.grad, [-0.75, -0.25])
    equal(r.grad, [0.25, 0.75])


def test_aot_unpaired_with_smoothing_and_pairs_of_equal_ranks_is_dpo(vector):
    chosen, rejected = vector([LN3, 2 * LN3]), vector([0.0, 3 * LN3])
    partners = map(torch.tensor, aot_partners(chosen.numpy(), rejected.numpy()))
    loss = losses.aot_unpaired(chosen, rejected, *partners, 1.0, 0.25)
    equal(loss, [0.75 * RIGHT + 0.25 * WRONG, 0.75 * WRONG + 0.25 * RIGHT])
    equal(loss, losses.sigmoid(chosen, rejected, 1.0, 0.25).tolist())


def test_discopop_mixes_at_the_papers_temperature(vector):
    # beta 1, z = 0.05 ln 3: the mix is sigmoid(ln 3) = 3/4.
    loss = losses.discopop(vector([0.05 * LN3]), vector([0.0]), 1.0)
    power = 3.0**-0.05
    equal(loss, [0.25 * math.log(1 + power) + 0.75 * power])


def test_kto_by_hand(vector):
    # beta 1/2, z0 = ln 3. Desirable, r = 3 ln 3: 2 (1 - sigmoid(ln 3)). Undesirable, r = -ln 3: 3 (1 - sigmoid(ln 3)).
    loss = losses.kto(vector([3 * LN3, -LN3]), vector([1.0, -1.0]), LN3, 0.5, 2.0, 3.0)
    equal(loss, [0.5, 0.75])


def test_ktos_reference_point_is_the_mean_of_mismatched_pairs_and_never_negative(vector):
    assert kto_kl(vector([-1.0, -2.0]).numpy(), vector([-2.0, -4.0]).numpy()) == 1.5
    assert kto_kl(vector([-2.0]).numpy(), vector([-1.0]).numpy()) == 0.0


def test_bradley_terry_with_margin_and_centring_by_hand(vector):
    equal(losses.bradley_terry(vector([LN3]), vector([0.0])), [RIGHT])
    equal(losses.bradley_terry(vector([2 * LN3]), vector([0.0]), vector([LN3])), [RIGHT])
    equal(losses.bradley_terry(vector([LN3]), vector([0.0]), 0.0, 0.5), [RIGHT + 0.5 * LN3**2])


def test_identical_answers_have_the_loss_of_a_coin_and_push_nowhere(vector):
    logprob = vector([-4.0]).requires_grad_()
    loss = losses.sigmoid(logprob, logprob, 0.1)
    equal(loss.detach(), [LN2])
    loss.sum().backward()
    assert logprob.grad is not None
    equal(logprob.grad, [0.0])


def test_exo_without_smoothing_says_what_to_do():
    with pytest.raises(ValueError, match="label_smoothing"):
        losses.exo_pair(torch.zeros(1), torch.zeros(1), 0.1, 0.0)
