"""torch.autograd.gradcheck in float64, at points away from the kinks of the clips."""

import numpy as np
import pytest
import torch

from rlflow.algorithms import policy_losses, preference_losses
from rlflow.algorithms.batch import segment_mean, segment_sum
from rlflow.algorithms.kl import k1, k2, k3, unbiased
from rlflow.algorithms.preference_targets import aot_partners
from rlflow.algorithms.value_losses import value_loss

ADVANTAGES = torch.tensor([1.0, -2.0, 0.5, -0.7, 1.3], dtype=torch.float64)
SEQUENCE_IDS = torch.tensor([0, 0, 1, 1, 1])
OLD = torch.tensor([-1.0, -0.4, -2.0, -0.9, -1.7], dtype=torch.float64)


def point(seed: int, size: int = 5, scale: float = 0.6) -> torch.Tensor:
    noise = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (OLD[:size] + scale * noise).requires_grad_()


@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_product"])
@pytest.mark.parametrize("kind", ["clip", "dual", "sapo"])
def test_policy_losses(ratio, kind):
    def loss(logprobs):
        weights = policy_losses.RATIOS[ratio](logprobs - OLD, SEQUENCE_IDS, 2)
        if kind == "sapo":
            return policy_losses.sapo_loss(weights, ADVANTAGES, 1.0, 1.05)
        return policy_losses.clip_loss(weights, ADVANTAGES, 0.2, 0.28, 1.4 if kind == "dual" else None)

    assert torch.autograd.gradcheck(loss, (point(0),))


def test_cispo_with_a_fixed_weight():
    ratio = torch.tensor([0.5, 1.0, 3.0, 7.0, 1.1], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: policy_losses.cispo_loss(ratio, x, ADVANTAGES, 1.0, 4.0), (point(1),))


def test_gmpo_away_from_its_bounds():
    assert torch.autograd.gradcheck(
        lambda x: policy_losses.gmpo_loss(x - OLD, ADVANTAGES, SEQUENCE_IDS, 2, 0.3, 0.4), (point(0),)
    )


def test_the_kl_of_selected_tokens():
    selected = torch.tensor([True, False, True, False, True])
    assert torch.autograd.gradcheck(
        lambda x: policy_losses.kl_cov_loss((x - OLD).exp(), x - OLD, ADVANTAGES, selected, 0.7), (point(1),)
    )


@pytest.mark.parametrize("divergence", list(preference_losses.DIVERGENCES))
def test_divergences(divergence):
    assert torch.autograd.gradcheck(preference_losses.DIVERGENCES[divergence], (point(2),))


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_kl_estimators(estimator):
    assert torch.autograd.gradcheck(lambda x: estimator(x, OLD), (point(2),))
    assert torch.autograd.gradcheck(lambda x: unbiased(estimator(x, OLD), x - OLD), (point(2),))


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_losses(clip):
    assert torch.autograd.gradcheck(lambda x: value_loss(x, OLD, ADVANTAGES, clip), (point(3),))


@pytest.mark.parametrize("segment", [segment_sum, segment_mean])
def test_segment_reductions_with_an_empty_sequence(segment):
    ids = torch.tensor([0, 0, 2, 2, 2])
    assert torch.autograd.gradcheck(lambda x: segment(x, ids, 4), (point(4),))


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("sigmoid", {"label_smoothing": 0.1, "margin": 0.3}),
        ("hinge", {}),
        ("ipo", {}),
        ("robust", {"label_smoothing": 0.1}),
        ("exo_pair", {"label_smoothing": 1e-3}),
        ("nca_pair", {}),
        ("bco_pair", {}),
        ("sppo", {}),
        ("apo_zero", {}),
        ("apo_down", {}),
        ("discopop", {}),
        ("orpo", {}),
    ],
)
def test_preference_losses(name, numbers):
    # Negative scores: orpo takes mean logprobs.
    chosen, rejected = point(5, scale=0.2), point(6, scale=0.2)
    function = getattr(preference_losses, name)
    assert torch.autograd.gradcheck(lambda w, r: function(w, r, 0.4, **numbers), (chosen, rejected))


def test_aot_against_given_references():
    margins = ADVANTAGES
    assert torch.autograd.gradcheck(
        lambda w, r: preference_losses.aot(w, r, margins, 0.4, 0.1), (point(5, scale=0.2), point(6, scale=0.2))
    )


def test_aot_unpaired_against_differences_of_the_whole_batchs_loss():
    # Its value has half of each comparison's two gradients: differences are of the sorted batch instead.
    scores = torch.cat([point(5), point(6)]).detach()

    def of_batch(values):
        chosen, rejected = (x.sort().values for x in values.chunk(2))
        return float(preference_losses.sigmoid(chosen, rejected, 0.4, 0.1).sum())

    moves = 1e-6 * torch.eye(len(scores), dtype=torch.float64)
    expected = [(of_batch(scores + move) - of_batch(scores - move)) / 2e-6 for move in moves]
    scores.requires_grad_()
    partners = aot_partners(*(x.detach().numpy() for x in scores.chunk(2)))
    loss = preference_losses.aot_unpaired(*scores.chunk(2), *map(torch.tensor, partners), 0.4, 0.1).sum()
    assert float(loss.detach()) == pytest.approx(of_batch(scores.detach()), rel=1e-12)
    np.testing.assert_allclose(torch.autograd.grad(loss, scores)[0], expected, rtol=1e-6, atol=1e-8)


def test_unpaired_and_reward_model_losses():
    labels = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: preference_losses.kto(x, labels, 0.2, 0.4, 1.3, 0.8), (point(7),))
    assert torch.autograd.gradcheck(
        lambda w, r: preference_losses.bradley_terry(w, r, ADVANTAGES, 0.01), (point(8), point(9))
    )
