"""AOT's two losses from the driver's margins to the gradient: a sort of the whole batch, whatever its split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_policy import logprobs_of, new_policy, run, samples_for

from rlflow.algorithms.batch_targets import with_targets
from rlflow.algorithms.weighing import weigh
from rlflow.batching import pack
from rlflow.recipe import algorithm_of
from rlflow.types import Sample

MARGIN = 5e-6
"""Margins travel as float32."""


def logprobs(policy: torch.Tensor, samples: list[Sample]) -> list[torch.Tensor]:
    return [logprobs_of(policy, pack([sample], max_tokens=10_000, num_ranks=1)[0][0])[0] for sample in samples]


def scores(values: list[torch.Tensor], samples: list[Sample], length_normalized: bool) -> torch.Tensor:
    masked = [x[torch.tensor(sample.loss_mask)] for x, sample in zip(values, samples, strict=True)]
    return torch.stack([x.mean() if length_normalized else x.sum() for x in masked])


def sorted_loss(loss: str, policy: torch.Tensor, samples: list[Sample], length_normalized: bool) -> torch.Tensor:
    """arXiv 2406.05882: the mean of -log sigmoid(beta difference) over ranks."""
    ours = scores(logprobs(policy, samples), samples, length_normalized)
    ref = scores([torch.tensor(s.ref_logprobs).double() for s in samples], samples, length_normalized)
    if loss == "aot":
        greater, less = ours[::2] - ours[1::2], ref[::2] - ref[1::2]
    else:
        greater, less = (ours - ref)[::2], (ours - ref)[1::2]
    difference = greater.sort().values - less.sort().values
    return -torch.nn.functional.logsigmoid(0.3 * difference).mean()


@pytest.mark.parametrize("length_normalized", [False, True])
@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_any_split_has_the_sorted_batchs_loss_and_gradient(loss, length_normalized):
    policy, samples = new_policy(), samples_for("dpo")
    block = algorithm_of("dpo", preference={"loss": loss, "beta": 0.3, "length_normalized": length_normalized})
    units = list(zip(samples[::2], samples[1::2], strict=True))
    targeted = with_targets(units, block, lambda asked: [x.detach().numpy() for x in logprobs(policy, asked)])
    weighed, denominators = weigh(targeted, block, 64)
    expected = sorted_loss(loss, policy, samples, length_normalized)
    (gradient,) = torch.autograd.grad(expected, policy)
    paired = scores(logprobs(policy, samples), samples, length_normalized).detach().numpy()
    assert (np.argsort(paired[::2]) != np.argsort(paired[1::2])).any()
    for max_tokens, num_ranks in [(10_000, 1), (1, 1), (40, 3)]:
        value, actual, _ = run(policy, weighed, denominators, block, max_tokens=max_tokens, num_ranks=num_ranks)
        assert value == pytest.approx(float(expected.detach()), rel=MARGIN)
        torch.testing.assert_close(actual, gradient, rtol=MARGIN, atol=MARGIN * float(gradient.abs().max()))
