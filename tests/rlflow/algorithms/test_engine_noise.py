"""An engine that rounds otherwise than the trainer, as in bfloat16: nothing is clipped before the policy has moved."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlflow.algorithms.batch import TensorBatch
from rlflow.algorithms.policy_objectives import policy_objective
from rlflow.recipe import ALGORITHMS, algorithm_of
from rlflow.types import Denominators

NOISE = 0.02
"""Standard deviation of a token's logprob between the two, in nats: assumed, of the size bfloat16 engines show."""
ONLINE = [name for name, row in ALGORITHMS.items() if row.task == "online"]


def sequences(number: int = 200) -> tuple[torch.Tensor, TensorBatch, Denominators]:
    """The trainer's logprobs, and a batch of sequences of 200 to 1,000 tokens with an engine's beside them."""
    random = np.random.default_rng(0)
    lengths = torch.tensor(random.integers(200, 1001, size=number))
    size = int(lengths.sum())
    trainer = torch.tensor(np.log(random.uniform(0.05, 1.0, size=size)))
    batch = TensorBatch(
        token_ids=torch.zeros(size, dtype=torch.int64),
        position_ids=torch.zeros(size, dtype=torch.int64),
        loss_mask=torch.ones(size, dtype=torch.bool),
        loss_weights=torch.full((size,), 1.0 / size, dtype=torch.float64),
        sequence_ids=torch.repeat_interleave(torch.arange(number), lengths),
        labels=torch.zeros(number),
        advantages=torch.repeat_interleave(torch.tensor(random.choice([-1.0, 1.0], size=number)), lengths),
        old_logprobs=trainer + NOISE * torch.tensor(random.normal(size=size)),
        selected=torch.zeros(size),
    )
    return trainer, batch, Denominators(size, number, number)


def clipped(name: str, **correction) -> float:
    """Share of the tokens that the first update's clip holds."""
    trainer, batch, denominators = sequences()
    block = algorithm_of(name, kl={"coef": 0.0}, **correction)
    _, metrics = policy_objective(trainer, None, batch, block, denominators)
    return sum(float(metric.value) for key, metric in metrics.items() if key.startswith("clip/"))


@pytest.mark.parametrize("name", ONLINE)
def test_no_token_is_clipped_before_the_policy_has_moved(name):
    assert clipped(name) == 0.0


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "rloo"])
def test_with_the_engines_logprobs_under_it_a_sequences_ratio_is_clipped_by_the_noise_alone(name):
    assert 0.2 < clipped(name, correction={"old_policy": "engine", "mode": "none"}) < 0.5


def test_the_weight_of_a_token_is_near_one_and_the_ratio_exactly():
    trainer, batch, denominators = sequences()
    _, metrics = policy_objective(trainer, None, batch, algorithm_of("gspo"), denominators)
    assert float(metrics["ratio/mean"].value) == float(metrics["ratio/value_max"].value) == 1.0
    assert float(metrics["kl/old"].value) == 0.0
    assert float(metrics["correction/weight_mean"].value) == pytest.approx(1.0, abs=1e-3)
    assert float(metrics["correction/bounded_fraction"].value) == 0.0
    # Mean of |x| of a normal distribution: sqrt(2 / pi) of its standard deviation.
    assert float(metrics["mismatch/logprob_abs_diff"].value) == pytest.approx(NOISE * (2 / np.pi) ** 0.5, rel=0.02)
