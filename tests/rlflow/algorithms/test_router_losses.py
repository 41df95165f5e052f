from __future__ import annotations

import math

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from rlflow.algorithms.batch import segment_mean
from rlflow.algorithms.router_losses import balance_loss, one_hot_choices, z_loss

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
LENGTHS = [5, 1, 9]
IDS = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))


def decisions(num_experts: int = 6, num_chosen: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, scores and choices of all tokens."""
    logits = torch.randn(sum(LENGTHS), num_experts, generator=torch.manual_seed(0))
    scores = logits.softmax(dim=1)
    return logits, scores, scores.topk(num_chosen, dim=1).indices


def balance_of(scores: torch.Tensor, chosen: torch.Tensor, sequence_ids: torch.Tensor) -> torch.Tensor:
    """Of tokens: [S]."""
    size = int(sequence_ids.max()) + 1
    choices = one_hot_choices(chosen, scores.shape[1])
    means = [segment_mean(values, sequence_ids, size) for values in (choices, scores)]
    return balance_loss(*means, num_chosen=chosen.shape[1])


@DTYPES
def test_balance_by_hand(dtype):
    # Two tokens, three experts, one chosen: f = (3/1)(1/2, 1/2, 0), P = (0.4, 0.4, 0.2).
    scores = torch.tensor([[0.6, 0.2, 0.2], [0.2, 0.6, 0.2]], dtype=dtype)
    chosen = torch.tensor([[0], [1]])
    assert balance_of(scores, chosen, torch.zeros(2, dtype=torch.long)).tolist() == pytest.approx([1.2])


def test_balance_is_one_for_even_use_and_experts_over_chosen_for_the_same_ones_always():
    ids = torch.zeros(4, dtype=torch.long)
    assert balance_of(torch.full((4, 4), 0.25), torch.arange(4)[:, None], ids).tolist() == [1.0]
    certain = torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(4, 4)
    assert balance_of(certain, torch.tensor([[0, 1]]).expand(4, 2), ids).tolist() == [2.0]


def test_balance_of_a_sequence_is_that_of_transformers_over_the_number_chosen():
    """Which counts choices, not shares of them, and sees one sequence and one layer here."""
    logits, scores, chosen = decisions()
    for sequence, loss in enumerate(balance_of(scores, chosen, IDS)):
        theirs = load_balancing_loss_func((logits[sequence == IDS],), num_experts=6, top_k=2)
        assert float(loss) == pytest.approx(float(theirs) / 2)


def test_the_gradient_of_the_balance_is_the_load_of_each_expert():
    _, scores, chosen = decisions()
    scores.requires_grad_()
    balance_of(scores, chosen, IDS)[2].backward()
    load = torch.bincount(chosen[IDS == 2].flatten(), minlength=6) * 6 / (2 * 9)
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad[IDS == 2], (load / 9).expand(9, 6))
    assert not scores.grad[IDS < 2].any()


@DTYPES
def test_z_by_hand(dtype):
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [1.0, 1.0]], dtype=dtype)
    assert z_loss(logits).tolist() == pytest.approx([math.log(2) ** 2, math.log(4) ** 2, (1 + math.log(2)) ** 2])


def test_sequences_do_not_see_each_other():
    _, scores, chosen = decisions()
    together = balance_of(scores, chosen, IDS)
    for sequence, length in enumerate(LENGTHS):
        own, alone = sequence == IDS, torch.zeros(length, dtype=torch.long)
        assert balance_of(scores[own], chosen[own], alone).item() == pytest.approx(together[sequence].item())
