"""Whole objectives by hand: reductions, options and metrics together, in float32 and float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlflow.algorithms.batch import TensorBatch
from rlflow.algorithms.objectives import sft_objective
from rlflow.algorithms.policy_objectives import policy_objective, value_objective
from rlflow.algorithms.preference_objectives import kto_objective, preference_objective, reward_model_objective
from rlflow.algorithms.reductions import count_denominators, loss_weights
from rlflow.recipe import algorithm_of
from rlflow.types import Denominators

ONE_SEQUENCE = Denominators(num_tokens=2, num_sequences=1, num_groups=1)
PAIR = Denominators(num_tokens=3, num_sequences=2, num_groups=1)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def vector(request):
    """Makes a tensor of the tested precision."""
    return lambda values: torch.tensor(values, dtype=request.param)


def equal(actual: torch.Tensor, expected: float) -> None:
    tolerance = 1e-6 if actual.dtype == torch.float32 else 1e-12
    assert float(actual) == pytest.approx(expected, rel=tolerance, abs=tolerance)


def tokens_of(vector, lengths=(2,), **fields) -> TensorBatch:
    """Sequences of loss tokens only, each of weight 1/2 unless others are given. Logprobs come as probabilities."""
    size, number = sum(lengths), len(lengths)
    plain = {"advantages", "loss_weights", "old_values", "returns", "labels"}
    given = {name: vector(v) if name in plain else vector(v).log() for name, v in fields.items()}
    return TensorBatch(
        **{
            "token_ids": torch.zeros(size, dtype=torch.int64),
            "position_ids": torch.cat([torch.arange(length) for length in lengths]),
            "loss_mask": torch.ones(size, dtype=torch.bool),
            "loss_weights": vector([0.5] * size),
            "sequence_ids": torch.repeat_interleave(torch.arange(number), torch.tensor(lengths)),
            "labels": vector([0.0] * number),
            **given,
        }
    )


# Losses of two sequences of one and three tokens, of two prompts; -A at ratio 1.
LOSSES = [4.0, 1.0, 2.0, 6.0]


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("token", 13 / 4),
        # Token means 4 and 3.
        ("sequence", 7 / 2),
        # One prompt: 13 / 4.
        ("prompt", 13 / 4),
        # 2 sequences of at most 5 tokens.
        ("fixed_length", 13 / 10),
    ],
)
@pytest.mark.parametrize("name", ["policy", "critic", "sft"])
def test_reductions_of_a_batch_by_hand(vector, reduction, expected, name):
    counts, groups = np.array([1, 3]), np.array([7, 7])
    denominators = count_denominators(counts, groups)
    weights = np.repeat(loss_weights(reduction, counts, groups, denominators, 5), counts)
    block = algorithm_of("ppo", loss={"reduction": reduction}, critic={"clip": None})
    fields = {"loss_weights": weights, "old_logprobs": [0.5] * 4, "advantages": [-x for x in LOSSES]}
    batch = tokens_of(vector, (1, 3), **fields, returns=[0.0] * 4, old_values=[0.0] * 4)
    if name == "policy":
        loss, _ = policy_objective(vector([0.5] * 4).log(), None, batch, block, denominators)
    elif name == "critic":
        # Half the squares of sqrt(2 x) are x.
        loss, _ = value_objective(vector([2 * x for x in LOSSES]).sqrt(), None, batch, block, denominators)
    else:
        loss, _ = sft_objective(vector([-x for x in LOSSES]), None, batch, block, denominators)
    equal(loss, expected)


def test_prompts_have_equal_weight_whatever_their_completions(vector):
    # Two prompts, of tokens 4 and 1, 2, 6: means 4 and 3.
    counts, groups = np.array([1, 3]), np.array([7, 9])
    denominators = count_denominators(counts, groups)
    weights = np.repeat(loss_weights("prompt", counts, groups, denominators, 5), counts)
    batch = tokens_of(vector, (1, 3), loss_weights=weights)
    equal(sft_objective(vector([-x for x in LOSSES]), None, batch, algorithm_of("sft"), denominators)[0], 7 / 2)


ENGINE = {"old_policy": "engine", "mode": "none"}
UNCORRECTED = {"mode": "none"}


def test_the_trainers_logprobs_are_the_denominator_unless_the_engines_are_asked_for(vector):
    # Now 0.6 and 0.3; the engine said 0.4 and 0.3, the trainer 0.5 and 0.2 before the first update.
    logprobs = vector([0.6, 0.3]).log()
    batch = tokens_of(vector, old_logprobs=[0.4, 0.3], proximal_logprobs=[0.5, 0.2], advantages=[1.0, -1.0])
    wide = {"clip_low": 0.9, "clip_high": 9.0, "reduction": "token"}
    of_engine = algorithm_of("dapo", loss=wide, correction=ENGINE)
    engine, metrics = policy_objective(logprobs, None, batch, of_engine, ONE_SEQUENCE)
    equal(engine, 0.5 * (-0.6 / 0.4 + 0.3 / 0.3))
    equal(metrics["ratio/mean"].value, (1.5 + 1.0) / 2)
    # By default the tokens are weighed as well: 0.5 / 0.4 and 0.2 / 0.3.
    loss, metrics = policy_objective(logprobs, None, batch, algorithm_of("dapo", loss=wide), ONE_SEQUENCE)
    equal(loss, 0.5 * (-0.6 / 0.5 * 0.5 / 0.4 + 0.3 / 0.2 * 0.2 / 0.3))
    plain = algorithm_of("dapo", loss=wide, correction=UNCORRECTED)
    loss, metrics = policy_objective(logprobs, None, batch, plain, ONE_SEQUENCE)
    equal(loss, 0.5 * (-0.6 / 0.5 + 0.3 / 0.2))
    # The mismatch is the engine's against the trainer's of the same parameters, whatever the ratio is of.
    equal(metrics["mismatch/kl"].value, (np.log(0.4 / 0.5) + np.log(0.3 / 0.2)) / 2)
    equal(metrics["mismatch/logprob_abs_diff"].value, (np.log(0.5 / 0.4) + np.log(0.3 / 0.2)) / 2)
    equal(metrics["mismatch/logprob_abs_diff_max"].value, np.log(1.5))
    assert {name for name, metric in metrics.items() if metric.over_ranks == "max"} == {
        "ratio/value_max",
        "mismatch/logprob_abs_diff_max",
    }
    of_first = {name for name, metric in metrics.items() if metric.over_updates == "first"}
    assert of_first == {name for name in metrics if name.startswith("mismatch/")}
    assert metrics["ratio/value_max"].over_updates == "max" and metrics["ratio/mean"].over_updates == "mean"


def test_where_the_engines_logprobs_are_of_another_distribution_nothing_is_made_of_them(vector):
    batch = tokens_of(vector, proximal_logprobs=[0.5, 0.2], advantages=[1.0, -1.0])
    wide = {"clip_low": 0.9, "clip_high": 9.0}
    block = algorithm_of("dapo", loss=wide, correction=UNCORRECTED)
    loss, metrics = policy_objective(vector([0.6, 0.3]).log(), None, batch, block, ONE_SEQUENCE)
    equal(loss, 0.5 * (-0.6 / 0.5 + 0.3 / 0.2))
    assert not [name for name in metrics if name.startswith(("mismatch/", "correction/"))]


@pytest.mark.parametrize(
    ("correction", "weights", "bounded"),
    [
        # pi_trainer / pi_engine: 0.5 / 0.2 = 2.5 and 0.3 / 0.3 = 1; product 2.5, geometric mean sqrt(2.5).
        ({}, [2.0, 1.0], 0.5),
        ({"level": "token", "high": 3.0}, [2.5, 1.0], 0.0),
        ({"level": "token", "low": 1.2, "high": 3.0}, [2.5, 1.2], 0.5),
        ({"level": "sequence"}, [2.0, 2.0], 1.0),
        ({"level": "sequence_mean"}, [2.5**0.5, 2.5**0.5], 0.0),
        ({"mode": "mask", "level": "token"}, [0.0, 1.0], 0.5),
        ({"mode": "mask", "level": "token", "low": 1.2, "high": 3.0}, [1.0, 0.0], 0.5),
        ({"mode": "mask", "level": "sequence"}, [0.0, 0.0], 1.0),
        # Kept, and not weighed.
        ({"mode": "mask", "level": "sequence_mean"}, [1.0, 1.0], 0.0),
        ({"mode": "weighted_mask", "level": "token"}, [0.0, 1.0], 0.5),
        ({"mode": "weighted_mask", "level": "token", "high": 3.0}, [2.5, 1.0], 0.0),
        ({"mode": "weighted_mask", "level": "sequence_mean"}, [2.5**0.5, 2.5**0.5], 0.0),
    ],
)
def test_the_correction_weighs_the_policy_loss_and_not_the_kl(vector, correction, weights, bounded):
    given = {"old_logprobs": [0.2, 0.3], "proximal_logprobs": [0.5, 0.3], "ref_logprobs": [0.25, 0.3]}
    batch = tokens_of(vector, **given, advantages=[1.0, -4.0])
    kl = {"coef": 0.1, "estimator": "k2"}
    block = algorithm_of("grpo", kl=kl, correction=correction)
    loss, metrics = policy_objective(vector([0.5, 0.3]).log(), None, batch, block, ONE_SEQUENCE)
    policy_loss = 0.5 * (-1.0 * weights[0] + 4.0 * weights[1])
    distance = np.log(2) ** 2 / 2 / 2
    equal(metrics["loss/policy"].value, policy_loss)
    equal(metrics["kl/ref"].value, distance)
    equal(loss, policy_loss + 0.1 * distance)
    equal(metrics["correction/weight_mean"].value, np.mean(weights))
    equal(metrics["correction/bounded_fraction"].value, bounded)


def test_the_entropy_bonus_and_clip_fractions(vector):
    batch = tokens_of(vector, old_logprobs=[0.4, 0.2], advantages=[1.0, -1.0])
    block = algorithm_of("dapo", loss={"entropy_coef": 0.1}, correction=ENGINE)
    loss, metrics = policy_objective(vector([0.6, 0.1]).log(), vector([1.0, 2.0]), batch, block, ONE_SEQUENCE)
    # Ratios 1.5 -> 1.28 and 0.5 -> 0.8; entropy mean 1.5.
    equal(metrics["loss/policy"].value, 0.5 * (-1.28 + 0.8))
    equal(loss, 0.5 * (-1.28 + 0.8) - 0.1 * 1.5)
    equal(metrics["entropy"].value, 1.5)
    equal(metrics["clip/low_fraction"].value, 0.5)
    equal(metrics["clip/high_fraction"].value, 0.5)
    equal(metrics["ratio/value_max"].value, 1.5)
    equal(metrics["kl/old"].value, (0.5 - np.log(1.5) + -0.5 - np.log(0.5)) / 2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Now 1/2 twice, the reference 1/4 and 1/2; the old policy 1/4 and 1/2: ratios 2 and 1.
        ({"estimator": "k1"}, np.log(2) / 2),
        ({"estimator": "k2"}, np.log(2) ** 2 / 4),
        ({"estimator": "k3"}, (np.log(2) - 0.5) / 2),
        ({"estimator": "k1", "unbiased_gradient": True}, np.log(2)),
        ({"estimator": "k3", "unbiased_gradient": True}, np.log(2) - 0.5),
    ],
)
def test_every_kl_in_the_loss(vector, options, expected):
    batch = tokens_of(vector, proximal_logprobs=[0.25, 0.5], ref_logprobs=[0.25, 0.5], advantages=[0.0, 0.0])
    block = algorithm_of("grpo", kl={"coef": 0.3, **options}, correction=UNCORRECTED)
    loss, _ = policy_objective(vector([0.5, 0.5]).log(), None, batch, block, ONE_SEQUENCE)
    equal(loss, 0.3 * expected)


def test_kl_in_the_reward_leaves_the_loss_alone_and_is_still_measured(vector):
    batch = tokens_of(vector, old_logprobs=[0.5, 0.5], ref_logprobs=[0.25, 0.25], advantages=[1.0, -1.0])
    loss, metrics = policy_objective(vector([0.5, 0.5]).log(), None, batch, algorithm_of("ppo"), ONE_SEQUENCE)
    equal(loss, 0.0)
    equal(metrics["kl/ref"].value, np.log(2))


def pair_of(vector) -> tuple[torch.Tensor, TensorBatch]:
    """A chosen answer of two tokens and a rejected one of one."""
    batch = tokens_of(vector, (2, 1), ref_logprobs=[0.5, 0.25, 0.5], labels=[1.0, -1.0])
    return vector([0.75, 0.5, 0.5]).log(), batch


def test_dpo_sums_log_ratios_and_adds_the_chosen_answers_likelihood(vector):
    # Chosen: ln(0.75 * 0.5 / (0.5 * 0.25)) = ln 3; rejected: 0. beta 1: -log sigmoid(ln 3) = ln(4/3).
    logprobs, batch = pair_of(vector)
    block = algorithm_of("dpo", preference={"beta": 1.0, "sft_coef": 2.0})
    loss, metrics = preference_objective(logprobs, None, batch, block, PAIR)
    equal(metrics["loss/preference"].value, np.log(4 / 3))
    equal(loss, np.log(4 / 3) + 2 * -0.5 * np.log(0.75 * 0.5))
    equal(metrics["preference/margin"].value, np.log(3))
    equal(metrics["preference/accuracy"].value, 1.0)
    equal(metrics["preference/chosen_logprob"].value, np.log(0.375))


def test_simpo_takes_means_without_a_reference(vector):
    logprobs, batch = pair_of(vector)
    loss, _ = preference_objective(logprobs, None, batch, algorithm_of("simpo"), PAIR)
    equal(loss, np.log1p(np.exp(-(2.0 * (np.log(0.375) / 2 - np.log(0.5)) - 1.0))))


def test_cpo_takes_sums_without_a_reference_and_the_chosen_answers_likelihood(vector):
    # beta 1: z = ln 0.375 - ln 0.5 = ln(3/4), so log(1 + 4/3).
    logprobs, batch = pair_of(vector)
    loss, _ = preference_objective(logprobs, None, batch, algorithm_of("cpo", preference={"beta": 1.0}), PAIR)
    equal(loss, np.log(7 / 3) - 0.5 * np.log(0.375))


def test_orpo_takes_odds_of_mean_logprobs_and_the_chosen_answers_likelihood(vector):
    # Means: p = sqrt(0.375) and 1/2, of odds 1: z = log(p / (1 - p)).
    logprobs, batch = pair_of(vector)
    loss, _ = preference_objective(logprobs, None, batch, algorithm_of("orpo"), PAIR)
    p = np.sqrt(0.375)
    equal(loss, 0.1 * np.log1p((1 - p) / p) - 0.5 * np.log(0.375))


def test_kto_takes_sums_against_the_batchs_kl(vector):
    # beta 1, z0 = ln 3. Desirable, ln 3: 2 (1 - sigmoid(0)). Undesirable, 0: 3 (1 - sigmoid(ln 3)).
    logprobs, batch = pair_of(vector)
    batch = replace(batch, batch_kls=vector([np.log(3)] * 2))
    weights = {"beta": 1.0, "desirable_weight": 2.0, "undesirable_weight": 3.0}
    loss, metrics = kto_objective(logprobs, None, batch, algorithm_of("kto", preference=weights), PAIR)
    equal(loss, (2 * 0.5 + 3 * 0.25) / 2)
    equal(metrics["kto/kl"].value, np.log(3))
    equal(metrics["kto/margin"].value, np.log(3) / 2)


def test_a_reward_model_compares_one_score_a_sequence(vector):
    # Scores ln 6 and 0, margin ln 2: -log sigmoid(ln 3) = ln(4/3); centring (ln 6)^2 / 2.
    _, batch = pair_of(vector)
    batch = replace(batch, reward_margins=vector([np.log(2)] * 2))
    block = algorithm_of("reward_model", preference={"center_coef": 0.5})
    loss, metrics = reward_model_objective(vector([np.log(6), 0.0]), None, batch, block, PAIR)
    equal(loss, np.log(4 / 3) + 0.5 * np.log(6) ** 2)
    equal(metrics["preference/margin"].value, np.log(6))


def test_the_critics_loss_and_clip_fraction(vector):
    # Old 1, clip 0.2, returns 0. V = 2: plain 4 / 2. V = 1.1: plain 1.21 / 2.
    batch = tokens_of(vector, old_values=[1.0, 1.0], returns=[0.0, 0.0])
    loss, metrics = value_objective(
        vector([2.0, 1.1]), None, batch, algorithm_of("ppo", critic={"clip": 0.2}), ONE_SEQUENCE
    )
    equal(loss, 0.5 * (2.0 + 0.605))
    equal(metrics["value/clip_fraction"].value, 0.5)


def test_a_missing_reference_is_named(vector):
    logprobs, batch = pair_of(vector)
    with pytest.raises(AssertionError, match="ref_logprobs"):
        preference_objective(logprobs, None, replace(batch, ref_logprobs=None), algorithm_of("dpo"), PAIR)
