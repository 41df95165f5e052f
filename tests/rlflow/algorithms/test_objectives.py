from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_policy import logprobs_of, new_policy, preference_block, run, samples_for, weigh

from rlflow.algorithms.batch import TensorBatch
from rlflow.algorithms.policy_objectives import policy_objective, value_objective
from rlflow.algorithms.preference_objectives import PREFERENCE_LOSSES
from rlflow.batching import pack
from rlflow.recipe import ALGORITHMS, algorithm_of
from rlflow.types import Denominators

ONLINE = [name for name, row in ALGORITHMS.items() if row.task == "online"]
OF_TOKENS = [name for name, row in ALGORITHMS.items() if row.objective != "none" and not row.learning.held_out]
"""Those of whole sequences: tests/actors/test_gradient_cache.py."""
FIELDS = ("advantages", "old_logprobs", "proximal_logprobs", "ref_logprobs")
SPLITS = [(40, 1), (1, 1), (10_000, 2), (40, 3), (1, 3), (10_000, 17)]
ALL_OPTIONS = {
    "kl": {"coef": 0.1, "estimator": "k3", "placement": "loss", "unbiased_gradient": True},
    "correction": {"mode": "mask", "level": "sequence_mean", "low": 0.5},
    "loss": {"entropy_coef": 0.05},
}


def assert_same(actual, expected):
    (loss, gradient, metrics), (loss_0, gradient_0, metrics_0) = actual, expected
    assert loss == pytest.approx(loss_0, rel=1e-6, abs=1e-9)
    torch.testing.assert_close(gradient, gradient_0, rtol=1e-6, atol=1e-9)
    assert metrics == pytest.approx(metrics_0, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", OF_TOKENS)
def test_no_split_into_micro_batches_or_ranks_changes_loss_gradient_or_metrics(name):
    policy, block = new_policy(), algorithm_of(name)
    samples, denominators = weigh(samples_for(name), block)
    whole = run(policy, samples, denominators, block)
    assert whole[1].abs().max() > 1e-4
    for max_tokens, num_ranks in SPLITS:
        assert_same(run(policy, samples, denominators, block, max_tokens=max_tokens, num_ranks=num_ranks), whole)


@pytest.mark.parametrize("reduction", ["token", "sequence", "prompt", "fixed_length"])
@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_token", "sequence_product"])
def test_no_split_matters_with_every_option_on(reduction, ratio):
    options = {**ALL_OPTIONS, "loss": {**ALL_OPTIONS["loss"], "reduction": reduction, "ratio": ratio, "dual_clip": 3.0}}
    policy, block = new_policy(), algorithm_of("grpo", **options)
    samples, denominators = weigh(samples_for("grpo"), block)
    whole = run(policy, samples, denominators, block)
    for max_tokens, num_ranks in SPLITS:
        assert_same(run(policy, samples, denominators, block, max_tokens=max_tokens, num_ranks=num_ranks), whole)


@pytest.mark.parametrize("loss", [loss for loss in PREFERENCE_LOSSES if loss != "function"])
def test_no_split_matters_for_any_pairwise_loss(loss):
    fields = {**preference_block(loss), "sft_coef": 0.5}
    policy, block = new_policy(), algorithm_of("dpo", preference=fields)
    samples, denominators = weigh(samples_for("dpo"), block)
    if loss == "orpo":
        samples = [replace(sample, ref_logprobs=np.zeros_like(sample.ref_logprobs)) for sample in samples]
    whole = run(policy, samples, denominators, block)
    assert np.isfinite(whole[0])
    for max_tokens, num_ranks in SPLITS:
        assert_same(run(policy, samples, denominators, block, max_tokens=max_tokens, num_ranks=num_ranks), whole)


def test_no_split_matters_for_the_critic():
    values, block = new_policy(), algorithm_of("ppo")
    samples, denominators = weigh(samples_for("ppo"), block)
    whole = run(values, samples, denominators, block, objective=value_objective)
    for max_tokens, num_ranks in SPLITS:
        split = run(
            values, samples, denominators, block, max_tokens=max_tokens, num_ranks=num_ranks, objective=value_objective
        )
        assert_same(split, whole)


@pytest.mark.parametrize("name", OF_TOKENS)
def test_a_batch_of_filler_has_loss_and_gradient_zero(name):
    policy, block = new_policy(), algorithm_of(name)
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
    correction = {"mode": "none", "old_policy": "trainer"}
    policy, block = new_policy(), algorithm_of(name, kl={"coef": 0.0}, correction=correction)
    nothing = {"proximal_logprobs": None}
    plain = [replace(s, **nothing, selected=np.zeros_like(s.selected)) for s in samples_for(name)]
    samples, denominators = weigh(plain, block)
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
        if block.loss.ratio in ("sequence", "sequence_product") or name == "gmpo":
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
        for block in (
            algorithm_of(name, loss=clip),
            algorithm_of("ppo", loss=clip, kl={"coef": 0.0, "estimator": "k3"}),
        ):
            weighed, denominators = weigh(samples, block)
            results.append(run(policy, weighed, denominators, block))
        assert_same(*results)


def test_dapo_with_equal_clips_and_no_filter_is_grpo_with_token_mean():
    dapo = algorithm_of("dapo", loss={"clip_high": 0.2}, groups={"require_signal": False, "overlong_buffer": 0.0})
    grpo = algorithm_of("grpo", loss={"reduction": "token"}, kl={"coef": 0.0})
    assert dapo.model_dump(exclude={"name"}) == grpo.model_dump(exclude={"name"})
    policy = new_policy()
    samples, denominators = weigh(samples_for("dapo"), dapo)
    assert_same(run(policy, samples, denominators, dapo), run(policy, samples, denominators, grpo))


def test_nothing_outside_the_mask_has_a_gradient_and_everything_inside_has():
    block = algorithm_of("grpo", **ALL_OPTIONS, groups={"mask_truncated": True})
    samples, denominators = weigh(samples_for("grpo"), block)
    micro_batch = pack(samples, max_tokens=10_000, num_ranks=1)[0][0]
    batch = TensorBatch.from_numpy(micro_batch, "cpu")
    logprobs = torch.full(batch.loss_mask.shape, -1.5).requires_grad_()
    entropies = torch.ones(batch.loss_mask.shape)
    loss, _ = policy_objective(logprobs, entropies, batch, block, denominators)
    loss.backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad != 0, batch.loss_mask)
