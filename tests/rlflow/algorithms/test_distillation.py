"""What is learned from a teacher: TRL as an oracle, buckets by hand, gradients, and the objective around them."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from rlflow.algorithms.batch import TensorBatch
from rlflow.algorithms.distillation import generalized_jsd, tail_of, teacher_advantages, with_tail
from rlflow.algorithms.objectives import policy_objective
from rlflow.recipe import algorithm_of
from rlflow.types import Denominators

TWO_TOKENS = Denominators(num_tokens=2, num_sequences=1, num_groups=1)


def logits(seed: int, *shape: int) -> torch.Tensor:
    return 2.0 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_the_divergence_and_its_gradient_are_trls(beta: float, temperature: float):
    trainer = import_module("trl.experimental.gkd").GKDTrainer
    ours, theirs = (logits(0, 2, 5, 11).requires_grad_() for _ in range(2))
    teacher = logits(1, 2, 5, 11)
    scaled = [torch.log_softmax(each / temperature, -1) for each in (ours, teacher)]
    divergence = generalized_jsd(*scaled, beta)
    oracle = trainer.generalized_jsd_loss(theirs, teacher, beta=beta, temperature=temperature, reduction="sum")
    assert divergence.sum().item() == pytest.approx(oracle.item(), rel=1e-6)
    divergence.sum().backward()
    oracle.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_divergence_of_two_buckets_is_that_of_the_definition(beta: float):
    # T = (1/2, 1/2), S = (1/4, 3/4).
    teacher, policy = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    forward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    reverse = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    # M = 0.3 T + 0.7 S = (0.325, 0.675).
    to_mixture = 0.5 * math.log(0.5 / 0.325) + 0.5 * math.log(0.5 / 0.675)
    from_policy = 0.25 * math.log(0.25 / 0.325) + 0.75 * math.log(0.75 / 0.675)
    expected = {0.0: forward, 1.0: reverse, 0.3: 0.3 * to_mixture + 0.7 * from_policy}[beta]
    assert generalized_jsd(policy, teacher, beta).item() == pytest.approx(expected, rel=1e-5)


def test_what_is_not_among_the_most_probable_tokens_is_one_bucket():
    probabilities = torch.tensor([[0.5, 0.25, 0.15, 0.1]], dtype=torch.float64)
    # Logits are probabilities' logarithms and any constant.
    found = with_tail(probabilities.log() + 3.0, torch.tensor([[2, 0]]))
    torch.testing.assert_close(found.exp(), torch.tensor([[0.15, 0.5, 0.35]], dtype=torch.float64))
    torch.testing.assert_close(tail_of(found[:, :2]).exp(), torch.tensor([[0.35]], dtype=torch.float64))


def test_a_tail_that_rounding_took_away_is_no_infinite_divergence():
    all_of_it = torch.tensor([[0.7, 0.3000001]]).log()
    assert tail_of(all_of_it).item() == pytest.approx(math.log(torch.finfo(torch.float32).eps))


def test_buckets_of_all_tokens_but_one_are_the_whole_vocabulary():
    ours, theirs, ids = logits(2, 3, 6), logits(3, 3, 6), torch.arange(5).repeat(3, 1)
    for beta in (0.0, 0.4, 1.0):
        whole = generalized_jsd(torch.log_softmax(ours, -1), torch.log_softmax(theirs, -1), beta)
        torch.testing.assert_close(generalized_jsd(with_tail(ours, ids), with_tail(theirs, ids), beta), whole)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gradients_of_whole_and_of_bucketed_distributions_agree_with_finite_differences(beta: float):
    teacher, ids = logits(4, 2, 5), torch.tensor([[0, 3], [4, 1]])

    def whole(policy: torch.Tensor) -> torch.Tensor:
        return generalized_jsd(torch.log_softmax(policy, -1), torch.log_softmax(teacher, -1), beta)

    def bucketed(policy: torch.Tensor) -> torch.Tensor:
        return generalized_jsd(with_tail(policy, ids), with_tail(teacher, ids), beta)

    for function in (whole, bucketed):
        assert torch.autograd.gradcheck(function, (logits(5, 2, 5).requires_grad_(),))


def test_the_teachers_advantage_is_detached_and_bounded():
    logprobs = torch.tensor([-1.0, -3.0, -0.5]).requires_grad_()
    advantages = teacher_advantages(logprobs, torch.tensor([-2.0, -1.0, -9999.0]), 0.5)
    assert advantages.tolist() == [-0.5, 1.0, -10.0]
    assert not advantages.requires_grad


def batch(**fields: list[float]) -> TensorBatch:
    """Two loss tokens of one sequence, of weight 1/2 each."""
    plain = {name: torch.tensor(values) for name, values in fields.items()}
    return TensorBatch(
        token_ids=torch.zeros(2, dtype=torch.int64),
        position_ids=torch.arange(2),
        loss_mask=torch.ones(2, dtype=torch.bool),
        loss_weights=torch.full((2,), 0.5),
        sequence_ids=torch.zeros(2, dtype=torch.int64),
        labels=torch.zeros(1),
        **plain,
    )


def test_opd_adds_the_teachers_part_to_the_advantages_of_rewards():
    """At ratio 1 the loss is the mean of -A, and its gradient -A / 2 for each token."""
    algorithm = algorithm_of("opd", distill={"coef": 2.0}, correction={"mode": "none"})
    logprobs = torch.tensor([-1.0, -2.0]).requires_grad_()
    given = batch(advantages=[0.5, 0.5], teacher_logprobs=[-1.5, -1.0])
    loss, metrics = policy_objective(logprobs, None, given, algorithm, TWO_TOKENS)
    # A = 0.5 - 2 (-1 + 1.5) = -0.5, and 0.5 - 2 (-2 + 1) = 2.5.
    assert loss.item() == pytest.approx((0.5 - 2.5) / 2)
    loss.backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([0.25, -1.25])
    assert metrics["kl/teacher"].value.item() == pytest.approx((0.5 - 1.0) / 2)


def test_later_updates_of_a_step_keep_the_advantage_of_before_the_first():
    algorithm = algorithm_of("opd", correction={"mode": "none"}, loss={"clip_low": 1.0, "clip_high": 9.0})
    logprobs = torch.tensor([-1.0, -2.0])
    given = batch(advantages=[0.0, 0.0], teacher_logprobs=[-1.5, -1.0], proximal_logprobs=[-1.2, -2.0])
    loss, _ = policy_objective(logprobs, None, given, algorithm, TWO_TOKENS)
    # A = -(-1.2 + 1.5) and 1, at ratios e^0.2 and 1.
    assert loss.item() == pytest.approx((0.3 * math.exp(0.2) - 1.0) / 2)


def test_gkd_weighs_divergences_as_the_reduction_says():
    algorithm = algorithm_of("gkd", distill={"coef": 3.0})
    given = replace(batch(advantages=[0.0, 0.0]), divergences=torch.tensor([0.2, 0.6]))
    loss, metrics = policy_objective(torch.tensor([-1.0, -2.0]), None, given, algorithm, TWO_TOKENS)
    assert loss.item() == pytest.approx(3.0 * 0.4)
    assert metrics["distill/divergence"].value.item() == pytest.approx(0.4)
