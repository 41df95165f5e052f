from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_policy import algorithm, logprobs_of, new_policy, preference_block, run, samples_for, weigh

from rlflow.algorithms.batch import TensorBatch
from rlflow.algorithms.objectives import (
    PREFERENCE_LOSSES,
    policy_objective,
    preference_objective,
    value_objective,
)
from rlflow.batching import pack
from rlflow.recipe import ALGORITHMS
from rlflow.types import Denominators

ONLINE = [name for name, row in ALGORITHMS.items() if row.family == "online"]
FIELDS = ("advantages", "old_logprobs", "proximal_logprobs", "ref_logprobs")
SPLITS = [(40, 1), (1, 1), (10_000, 2), (40, 3), (1, 3), (10_000, 17)]
ALL_OPTIONS = {
    "kl": {"coef": 0.1, "estimator": "k3", "placement": "loss", "unbiased_gradient": True},
    "correction": {"old_policy": "trainer", "mode": "mask", "level": "sequence_mean"},
    "loss": {"entropy_coef": 0.05},
}


def assert_same(actual, expected):
    (loss, gradient, metrics), (loss_0, gradient_0, metrics_0) = actual, expected
    assert loss == pytest.approx(loss_0, rel=1e-6, abs=1e-9)
    torch.testing.assert_close(gradient, gradient_0, rtol=1e-6, atol=1e-9)
    assert metrics == pytest.approx(metrics_0, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_split_into_micro_batches_or_ranks_changes_loss_gradient_or_metrics(name):
    policy, block = new_policy(), algorithm(name)
    samples, denominators = weigh(samples_for(name), block)
    whole = run(policy, samples, denominators, block)
    assert whole[1].abs().max() > 1e-4
    for max_tokens, num_ranks in SPLITS:
        assert_same(run(policy, samples, denominators, block, max_tokens=max_tokens, num_ranks=num_ranks), whole)


@pytest.mark.parametrize("reduction", ["token", "sequence", "prompt", "fixed_length"])
@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_token", "sequence_product"])
def test_no_split_matters_with_every_option_on(reduction, ratio):
    options = {**ALL_OPTIONS, "loss": {**ALL_OPTIONS["loss"], "reduction": reduction, "ratio": ratio, "dual_clip": 3.0}}
    policy, block = new_policy(), algorithm("grpo", **options)
    samples, denominators = weigh(samples_for("grpo"), block)
    whole = run(policy, samples, denominators, block)
    for max_tokens, num_ranks in SPLITS:
        assert_same(run(policy, samples, denominators, block, max_tokens=max_tokens, num_ranks=num_ranks), whole)


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_no_split_matters_for_any_pairwise_loss(loss):
    fields = {**preference_block(loss), "sft_coef": 0.5}
    policy, block = new_policy(), algorithm("dpo", preference=fields)
    samples, denominators = weigh(samples_for("dpo"), block)
    if loss == "orpo":
        samples = [replace(sample, ref_logprobs=np.zeros_like(sample.ref_logprobs)) for sample in samples]
    whole = run(policy, samples, denominators, block)
    assert np.isfinite(whole[0])
    for max_tokens, num_ranks in SPLITS:
        assert_same(run(policy, samples, denominators, block, max_tokens=max_tokens, num_ranks=num_ranks), whole)


def test_no_split_matters_for_the_critic():
    values, block = new_policy(), algorithm("ppo")
    samples, denominators = weigh(samples_for("ppo"), block)
    whole = run(values, samples, denominators, block, objective=value_objective)
    for max_tokens, num_ranks in SPLITS:
        split = run(
            values, samples, denominators, block, max_tokens=max_tokens, num_ranks=num_ranks, objective=value_objective
        )
        assert_same(split, whole)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_batch_of_filler_has_loss_and_gradient_zero(name):
    policy, block = new_policy(), algorithm(name)
    sample = samples_for(name, count=2)
    filler_only = pack(sample, max_tokens=10_000, num_ranks=3, unit_size=2)[2]
    assert filler_only[0].sample_indices.tolist() == [-1]
    empty = [replace(s, loss_mask=np.zeros_like(s.loss_mask), label=0.0) for s in sample]
    loss, gradient, metrics = run(policy, empty, Denominators(0, 0, 0), block)
    assert loss == 0.0
    assert not gradient.any()
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("name", ONLINE)
def test_the_first_update_on_policy_has_ratio_one_and_the_plain_policy_gradient(name):
    policy, block = new_policy(), algorithm(name, kl={"coef": 0.0}, correction={"old_policy": "trainer"})
    samples, denominators = weigh([replace(s, proximal_logprobs=None) for s in samples_for(name)], block)
    _, gradient, metrics = run(policy, samples, denominators, block)
    assert metrics["ratio/mean"] == pytest.approx(1.0)
    assert metrics["ratio/value_max"] == 1.0
    expected = torch.zeros_like(policy)
    for sample in (s for s in samples if s.loss_mask.any()):
        # RLOO's action is the whole answer: its logprob is the sum, the reduction the mean over sequences.
        actions = sample.loss_mask.sum() if block.loss.ratio == "sequence_product" else 1
        batch = pack([sample], max_tokens=10_000, num_ranks=1)[0][0]
        logprobs, _ = logprobs_of(policy, batch)
        coefficients = np.nan_to_num(sample.loss_weights * sample.advantages) * actions
        if block.loss.ratio in ("sequence", "sequence_product"):
            coefficients[sample.loss_mask] = coefficients[sample.loss_mask].mean()
        mask = torch.tensor(sample.loss_mask)
        surrogate = -(torch.tensor(coefficients)[mask] * logprobs[mask]).sum()
        expected += torch.autograd.grad(surrogate, policy)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


def test_gspo_on_one_token_completions_is_ppos_clip():
    samples = []
    for sample in samples_for("gspo"):
        mask = np.zeros_like(sample.loss_mask)
        mask[-1] = True
        samples.append(replace(sample, loss_mask=mask, **{n: np.nan_to_num(getattr(sample, n)) for n in FIELDS}))
    clip = {"clip_low": 0.2, "clip_high": 0.2, "reduction": "token"}
    policy = new_policy()
    for name in ("gspo", "gspo_token"):
        results = []
        for block in (algorithm(name, loss=clip), algorithm("ppo", loss=clip, kl={"coef": 0.0, "estimator": "k3"})):
            weighed, denominators = weigh(samples, block)
            results.append(run(policy, weighed, denominators, block))
        assert_same(*results)


def test_dapo_with_equal_clips_and_no_filter_is_grpo_with_token_mean():
    dapo = algorithm("dapo", loss={"clip_high": 0.2}, groups={"require_signal": False, "overlong_buffer": 0.0})
    grpo = algorithm("grpo", loss={"reduction": "token"}, kl={"coef": 0.0})
    assert dapo.model_dump(exclude={"name"}) == grpo.model_dump(exclude={"name"})
    policy = new_policy()
    samples, denominators = weigh(samples_for("dapo"), dapo)
    assert_same(run(policy, samples, denominators, dapo), run(policy, samples, denominators, grpo))


def test_nothing_outside_the_mask_has_a_gradient_and_everything_inside_has():
    block = algorithm("grpo", **ALL_OPTIONS, groups={"mask_truncated": True})
    samples, denominators = weigh(samples_for("grpo"), block)
    micro_batch = pack(samples, max_tokens=10_000, num_ranks=1)[0][0]
    batch = TensorBatch.from_numpy(micro_batch, "cpu")
    logprobs = torch.full(batch.loss_mask.shape, -1.5).requires_grad_()
    entropies = torch.ones(batch.loss_mask.shape)
    loss, _ = policy_objective(logprobs, entropies, batch, block, denominators)
    loss.backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad != 0, batch.loss_mask)


def tokens_of(**fields) -> TensorBatch:
    """One sequence of two loss tokens, each worth half."""
    zeros = torch.zeros(2, dtype=torch.float64)
    return TensorBatch(
        token_ids=torch.zeros(2, dtype=torch.int64),
        position_ids=torch.arange(2),
        loss_mask=torch.ones(2, dtype=torch.bool),
        loss_weights=zeros + 0.5,
        sequence_ids=torch.zeros(2, dtype=torch.int64),
        labels=torch.zeros(1),
        margins=torch.zeros(1),
        **{name: torch.log(torch.tensor(v, dtype=torch.float64)) for name, v in fields.items() if name != "advantages"},
        advantages=torch.tensor(fields["advantages"], dtype=torch.float64),
    )


ONE_SEQUENCE = Denominators(num_tokens=2, num_sequences=1, num_groups=1)


def test_the_engines_logprobs_are_the_denominator_unless_the_trainers_are_asked_for():
    # Now 0.6 and 0.3; the engine said 0.4 and 0.3, the trainer 0.5 and 0.2 before the first update.
    logprobs = torch.log(torch.tensor([0.6, 0.3], dtype=torch.float64))
    batch = tokens_of(old_logprobs=[0.4, 0.3], proximal_logprobs=[0.5, 0.2], advantages=[1.0, -1.0])
    wide = {"clip_low": 0.9, "clip_high": 9.0, "reduction": "token"}
    engine, metrics = policy_objective(logprobs, None, batch, algorithm("dapo", loss=wide), ONE_SEQUENCE)
    assert float(engine) == pytest.approx(0.5 * (-0.6 / 0.4 + 0.3 / 0.3))
    assert float(metrics["ratio/mean"]) == pytest.approx((1.5 + 1.0) / 2)
    trainer = algorithm("dapo", loss=wide, correction={"old_policy": "trainer"})
    loss, metrics = policy_objective(logprobs, None, batch, trainer, ONE_SEQUENCE)
    assert float(loss) == pytest.approx(0.5 * (-0.6 / 0.5 + 0.3 / 0.2))
    # The mismatch is the engine's against the trainer's of the same parameters, whatever the ratio is of.
    assert float(metrics["mismatch/kl"]) == pytest.approx((np.log(0.4 / 0.5) + np.log(0.3 / 0.2)) / 2)
    assert float(metrics["mismatch/logprob_abs_diff"]) == pytest.approx((np.log(0.5 / 0.4) + np.log(0.3 / 0.2)) / 2)
    assert float(metrics["mismatch/logprob_abs_diff_max"]) == pytest.approx(np.log(1.5))


@pytest.mark.parametrize(
    ("correction", "weights", "bounded"),
    [
        # pi_trainer / pi_engine: 0.5 / 0.2 = 2.5 and 0.3 / 0.3 = 1; product 2.5, geometric mean sqrt(2.5).
        ({"mode": "truncate", "level": "token"}, [2.0, 1.0], 0.5),
        ({"mode": "mask", "level": "token"}, [0.0, 1.0], 0.5),
        ({"mode": "truncate", "level": "sequence"}, [2.0, 2.0], 1.0),
        ({"mode": "mask", "level": "sequence"}, [0.0, 0.0], 1.0),
        ({"mode": "mask", "level": "sequence_mean"}, [2.5**0.5, 2.5**0.5], 0.0),
        ({"mode": "truncate", "level": "token", "high": 3.0}, [2.5, 1.0], 0.0),
    ],
)
def test_the_correction_weighs_the_policy_loss_and_not_the_kl(correction, weights, bounded):
    logprobs = torch.log(torch.tensor([0.5, 0.3], dtype=torch.float64))
    batch = tokens_of(
        old_logprobs=[0.2, 0.3], proximal_logprobs=[0.5, 0.3], ref_logprobs=[0.25, 0.3], advantages=[1.0, -4.0]
    )
    block = algorithm(
        "grpo",
        kl={"coef": 0.1, "estimator": "k2"},
        correction={"old_policy": "trainer", **correction},
    )
    loss, metrics = policy_objective(logprobs, None, batch, block, ONE_SEQUENCE)
    policy_loss = 0.5 * (-1.0 * weights[0] + 4.0 * weights[1])
    kl = np.log(2) ** 2 / 2 / 2
    assert float(metrics["loss/policy"]) == pytest.approx(policy_loss)
    assert float(metrics["kl/ref"]) == pytest.approx(kl)
    assert float(loss) == pytest.approx(policy_loss + 0.1 * kl)
    assert float(metrics["correction/weight_mean"]) == pytest.approx(np.mean(weights))
    assert float(metrics["correction/bounded_fraction"]) == pytest.approx(bounded)


def test_the_entropy_bonus_and_clip_fractions_by_hand():
    logprobs = torch.log(torch.tensor([0.6, 0.1], dtype=torch.float64))
    entropies = torch.tensor([1.0, 2.0], dtype=torch.float64)
    batch = tokens_of(old_logprobs=[0.4, 0.2], advantages=[1.0, -1.0])
    block = algorithm("dapo", loss={"entropy_coef": 0.1})
    loss, metrics = policy_objective(logprobs, entropies, batch, block, ONE_SEQUENCE)
    # Ratios 1.5 -> 1.28 and 0.5 -> 0.8; entropy mean 1.5.
    assert float(metrics["loss/policy"]) == pytest.approx(0.5 * (-1.28 + 0.8))
    assert float(loss) == pytest.approx(0.5 * (-1.28 + 0.8) - 0.1 * 1.5)
    assert float(metrics["entropy"]) == pytest.approx(1.5)
    assert float(metrics["clip/low_fraction"]) == pytest.approx(0.5)
    assert float(metrics["clip/high_fraction"]) == pytest.approx(0.5)
    assert float(metrics["ratio/value_max"]) == pytest.approx(1.5)
    assert float(metrics["kl/old"]) == pytest.approx((0.5 - np.log(1.5) + -0.5 - np.log(0.5)) / 2)


def test_kl_in_the_reward_leaves_the_loss_alone_and_is_still_measured():
    logprobs = torch.log(torch.tensor([0.5, 0.5], dtype=torch.float64))
    batch = tokens_of(old_logprobs=[0.5, 0.5], ref_logprobs=[0.25, 0.25], advantages=[1.0, -1.0])
    loss, metrics = policy_objective(logprobs, None, batch, algorithm("ppo"), ONE_SEQUENCE)
    assert float(loss) == pytest.approx(0.0)
    assert float(metrics["kl/ref"]) == pytest.approx(np.log(2))


def pair_batch(**fields) -> TensorBatch:
    """A chosen answer of two tokens and a rejected one of one."""
    return TensorBatch(
        token_ids=torch.zeros(3, dtype=torch.int64),
        position_ids=torch.tensor([0, 1, 0]),
        loss_mask=torch.ones(3, dtype=torch.bool),
        loss_weights=torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64),
        sequence_ids=torch.tensor([0, 0, 1]),
        labels=torch.tensor([1.0, -1.0], dtype=torch.float64),
        margins=torch.zeros(2, dtype=torch.float64),
        ref_logprobs=torch.log(torch.tensor([0.5, 0.25, 0.5], dtype=torch.float64)),
    )


PAIR = Denominators(num_tokens=3, num_sequences=2, num_groups=1)
PAIR_LOGPROBS = torch.log(torch.tensor([0.75, 0.5, 0.5], dtype=torch.float64))


def test_dpo_sums_log_ratios_and_adds_the_chosen_answers_likelihood():
    # Chosen: ln(0.75 * 0.5 / (0.5 * 0.25)) = ln 3; rejected: 0. beta 1: -log sigmoid(ln 3) = ln(4/3).
    block = algorithm("dpo", preference={"beta": 1.0, "sft_coef": 2.0})
    loss, metrics = preference_objective(PAIR_LOGPROBS, None, pair_batch(), block, PAIR)
    likelihood = -0.5 * np.log(0.75 * 0.5)
    assert float(metrics["loss/preference"]) == pytest.approx(np.log(4 / 3))
    assert float(loss) == pytest.approx(np.log(4 / 3) + 2 * likelihood)
    assert float(metrics["preference/margin"]) == pytest.approx(np.log(3))
    assert float(metrics["preference/accuracy"]) == 1.0
    assert float(metrics["preference/chosen_logprob"]) == pytest.approx(np.log(0.375))


def test_simpo_takes_means_without_a_reference():
    block = algorithm("simpo")
    loss, _ = preference_objective(PAIR_LOGPROBS, None, pair_batch(), block, PAIR)
    z = 2.0 * (np.log(0.375) / 2 - np.log(0.5)) - 1.0
    assert float(loss) == pytest.approx(np.log1p(np.exp(-z)))


def test_a_missing_reference_is_named():
    with pytest.raises(AssertionError, match="ref_logprobs"):
        preference_objective(PAIR_LOGPROBS, None, replace(pair_batch(), ref_logprobs=None), algorithm("dpo"), PAIR)
