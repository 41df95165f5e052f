"""TRL's GRPO and RLOO trainers on a tiny random model, as oracles of advantages and online losses.

Not compared: vespo, which the table does not have; entropy bonuses other than with a token mean (TRL's is
always one, ours reduces like the policy loss); the KL's importance weight at sequence level (TRL takes the sequence's
ratio, ours is the token's, as in arXiv 2512.02556).
"""

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.gmpo import GMPOTrainer
from trl_models import CPU, assert_same_loss_and_gradient, causal_model, logprobs, tensor_batch, tokenizer

from rlflow.algorithms.advantages import combine_rewards, compute_advantages
from rlflow.algorithms.policy_objectives import policy_objective
from rlflow.algorithms.reductions import count_denominators, loss_weights
from rlflow.recipe import algorithm_of
from rlflow.recipe.advantage_blocks import BaselineBlock

MAX_NEW_TOKENS = 8
PROMPT_LENGTHS, LENGTHS = [3, 1, 2, 3, 3, 2], [4, 8, 1, 6, 3, 5]
GROUP_SIZE = 3
NAN = float("nan")
REWARDS = [[1.0, 0.0, None, 2.0, 2.0, 5.0], [0.5, None, None, -1.0, 3.0, 0.0]]
"""What two reward functions say of two prompts' three completions."""
ROWS = [{"prompt": "w1 w2"}] * GROUP_SIZE + [{"prompt": "w3"}] * GROUP_SIZE


def uncorrected(name, **changes):
    """A row without a correction between engine and trainer, unless one is given."""
    return algorithm_of(name, **{"correction": {"mode": "none"}, **changes})


def _score(index):
    def reward(completions, **_):
        return REWARDS[index]

    reward.__name__ = f"reward_{index}"
    return reward


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    def build(trainer, config):
        args = config(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            num_generations=GROUP_SIZE,
            per_device_train_batch_size=2 * GROUP_SIZE,
            max_completion_length=MAX_NEW_TOKENS,
            reward_weights=[1.0, 2.0],
            beta=0.0,
            **CPU,
        )
        rows = Dataset.from_list([{"prompt": "w1 w2"}, {"prompt": "w3"}])
        rewards = [_score(0), _score(1)]
        return trainer(
            model=causal_model(0), args=args, train_dataset=rows, reward_funcs=rewards, processing_class=tokenizer()
        )

    return {
        "grpo": build(GRPOTrainer, GRPOConfig),
        "rloo": build(RLOOTrainer, RLOOConfig),
    }


@pytest.fixture
def grpo(trainers, monkeypatch):
    trainer = trainers["grpo"]
    trainer.model.eval()

    def configure(**values):
        for name, value in values.items():
            owner = trainer if hasattr(trainer, name) else trainer.args
            monkeypatch.setattr(owner, name, value)

    configure(beta=0.0, epsilon_low=0.2, epsilon_high=0.28, loss_type="grpo", importance_sampling_level="token")
    return trainer, configure


@pytest.fixture(scope="module")
def inputs():
    """A batch as GRPOTrainer makes it: prompts padded on the left, completions on the right, one tool's output."""
    generator = torch.Generator().manual_seed(0)
    rows, width = len(LENGTHS), max(PROMPT_LENGTHS)
    prompt_mask = torch.stack([(torch.arange(width) >= width - n).long() for n in PROMPT_LENGTHS])
    completion_mask = torch.stack([(torch.arange(MAX_NEW_TOKENS) < n).long() for n in LENGTHS])
    tool_mask = torch.ones_like(completion_mask)
    tool_mask[3, 2:4] = 0

    def near(scale):
        return scale * torch.randn(rows, MAX_NEW_TOKENS, generator=generator)

    values = {
        "prompt_ids": torch.randint(3, 33, (rows, width), generator=generator) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(3, 33, (rows, MAX_NEW_TOKENS), generator=generator) * completion_mask,
        "completion_mask": completion_mask,
        "tool_mask": tool_mask,
        "advantages": torch.tensor([1.0, -0.5, 0.3, -2.0, 0.8, -1.1]),
        "num_items_in_batch": (completion_mask * tool_mask).sum(),
    }
    with torch.no_grad():
        current, _ = ours_on(causal_model(0), values)
        ref, _ = ours_on(causal_model(1), values)
    current, ref = (x.reshape(rows, -1)[:, width:] for x in (current, ref))
    # Far enough from the current policy that every clip holds somewhere.
    values["old_per_token_logps"] = current + near(0.4)
    values["sampling"] = values["old_per_token_logps"] + near(0.3)
    values["ref_per_token_logps"] = ref
    return values


def ours_on(model, inputs):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    return logprobs(model, ids, attention)


def our_loss(model, inputs, block):
    width = inputs["prompt_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["completion_mask"] * inputs["tool_mask"], (width, 0))
    counts = mask.sum(1).numpy()
    groups = np.arange(len(counts)) // GROUP_SIZE
    denominators = count_denominators(counts, groups)
    weights = loss_weights(block.loss.reduction, counts, groups, denominators, MAX_NEW_TOKENS)

    def aligned(values):
        return torch.nn.functional.pad(values, (width, 0), value=NAN)

    batch = tensor_batch(
        mask,
        torch.tensor(weights, dtype=torch.float32),
        advantages=aligned(inputs["advantages"][:, None].expand(-1, MAX_NEW_TOKENS)),
        old_logprobs=aligned(inputs["sampling"]),
        proximal_logprobs=aligned(inputs["old_per_token_logps"]),
        ref_logprobs=aligned(inputs["ref_per_token_logps"]),
    )
    taken, entropies = ours_on(model, inputs)
    return policy_objective(taken, entropies, batch, block, denominators)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(
    ("theirs", "reduction"),
    [("grpo", "sequence"), ("bnpo", "token"), ("dr_grpo", "fixed_length"), ("dapo", "token")],
)
def test_clipped_losses_agree_with_trl_by_loss_type_and_level(grpo, inputs, theirs, reduction, level, beta):
    trainer, configure = grpo
    # Narrow clips, so that a sequence's ratio meets them.
    configure(loss_type=theirs, importance_sampling_level=level, epsilon_low=0.03, epsilon_high=0.04)
    configure(beta=beta, use_bias_correction_kl=False)
    narrow = {"clip_low": 0.03, "clip_high": 0.04}
    block = uncorrected("dapo", loss={"reduction": reduction, "ratio": level, **narrow}, kl={"coef": beta})
    actual, metrics = our_loss(trainer.model, inputs, block)
    assert metrics["clip/low_fraction"].value + metrics["clip/high_fraction"].value > 0
    assert_same_loss_and_gradient(actual, trainer.compute_loss(trainer.model, inputs), trainer.model)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("row", ["gspo", "gspo_token"])
def test_both_gspos_agree_with_trl_when_a_sequence_has_one_advantage(grpo, inputs, row, beta):
    # arXiv 2507.18071, section 4.3: the token variant then has GSPO's value and gradient.
    trainer, configure = grpo
    configure(importance_sampling_level="sequence", epsilon_low=0.03, epsilon_high=0.04)
    configure(beta=beta, use_bias_correction_kl=False)
    block = uncorrected(row, loss={"clip_low": 0.03, "clip_high": 0.04}, kl={"coef": beta})
    actual, metrics = our_loss(trainer.model, inputs, block)
    assert metrics["clip/low_fraction"].value > 0 and metrics["clip/high_fraction"].value > 0
    assert_same_loss_and_gradient(actual, trainer.compute_loss(trainer.model, inputs), trainer.model)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("row", ["gspo", "gspo_token"])
def test_gspo_over_a_fixed_length_is_trls_luspo_divided_by_that_length(grpo, inputs, row, beta):
    # LUSPO (arXiv 2602.05261) multiplies GSPO's loss of a sequence by its length.
    trainer, configure = grpo
    configure(loss_type="luspo", importance_sampling_level="sequence", epsilon_low=0.03, epsilon_high=0.04)
    configure(beta=beta, use_bias_correction_kl=False)
    narrow = {"clip_low": 0.03, "clip_high": 0.04}
    block = uncorrected(row, loss={"reduction": "fixed_length", **narrow}, kl={"coef": beta})
    actual, metrics = our_loss(trainer.model, inputs, block)
    assert metrics["clip/low_fraction"].value + metrics["clip/high_fraction"].value > 0
    expected = trainer.compute_loss(trainer.model, inputs)
    assert_same_loss_and_gradient(actual * MAX_NEW_TOKENS, expected, trainer.model)


def test_the_unbiased_kl_agrees_with_trl(grpo, inputs):
    trainer, configure = grpo
    configure(beta=0.1, use_bias_correction_kl=True)
    block = uncorrected("dapo", loss={"reduction": "sequence"}, kl={"coef": 0.1, "unbiased_gradient": True})
    actual, _ = our_loss(trainer.model, inputs, block)
    assert_same_loss_and_gradient(actual, trainer.compute_loss(trainer.model, inputs), trainer.model)


def test_dual_clip_agrees_with_trls_two_sided_clip(grpo, inputs):
    trainer, configure = grpo
    configure(delta=1.5)
    block = uncorrected("dapo", loss={"reduction": "sequence", "dual_clip": 1.5})
    actual, metrics = our_loss(trainer.model, inputs, block)
    assert metrics["clip/dual_fraction"].value > 0
    assert_same_loss_and_gradient(actual, trainer.compute_loss(trainer.model, inputs), trainer.model)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_cispo_agrees_with_trl(grpo, inputs, level):
    # TRL's epsilon_high is the bound itself, ours what is above 1.
    trainer, configure = grpo
    configure(loss_type="cispo", epsilon_high=1.1, importance_sampling_level=level)
    actual, metrics = our_loss(trainer.model, inputs, uncorrected("cispo", loss={"clip_high": 0.1, "ratio": level}))
    assert metrics["clip/high_fraction"].value > 0
    assert_same_loss_and_gradient(actual, trainer.compute_loss(trainer.model, inputs), trainer.model)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sapo_agrees_with_trl(grpo, inputs, level):
    trainer, configure = grpo
    levels = {"importance_sampling_level": level}
    configure(loss_type="sapo", sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, **levels)
    actual, _ = our_loss(trainer.model, inputs, uncorrected("sapo", loss={"ratio": level}))
    assert_same_loss_and_gradient(actual, trainer.compute_loss(trainer.model, inputs), trainer.model)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_gmpo_agrees_with_trl(grpo, inputs, beta):
    trainer, configure = grpo
    configure(epsilon_low=0.3, epsilon_high=0.4, beta=beta)
    loss = {"clip_low": 0.3, "clip_high": 0.4}
    actual, metrics = our_loss(trainer.model, inputs, uncorrected("gmpo", loss=loss, kl={"coef": beta}))
    assert metrics["clip/low_fraction"].value > 0 and metrics["clip/high_fraction"].value > 0
    expected = GMPOTrainer._compute_loss(trainer, trainer.model, inputs)
    assert_same_loss_and_gradient(actual, expected, trainer.model)


def test_the_entropy_bonus_agrees_with_trl_under_a_token_mean(grpo, inputs):
    trainer, configure = grpo
    configure(loss_type="dapo", _entropy_bonus_enabled=True, use_adaptive_entropy=False, entropy_coef=0.05)
    actual, _ = our_loss(trainer.model, inputs, uncorrected("dapo", loss={"entropy_coef": 0.05}))
    assert_same_loss_and_gradient(actual, trainer.compute_loss(trainer.model, inputs), trainer.model)


@pytest.mark.parametrize(
    ("theirs", "mode", "level"),
    [
        ("token_truncate", "truncate", "token"),
        ("sequence_truncate", "truncate", "sequence"),
        ("token_mask", "weighted_mask", "token"),
        ("sequence_mask", "weighted_mask", "sequence"),
    ],
)
@pytest.mark.parametrize("low", [None, 0.8])
def test_the_engine_correction_is_trls(grpo, inputs, monkeypatch, theirs, mode, level, low):
    trainer, configure = grpo
    lengths, prompts = inputs["completion_mask"].sum(1), inputs["prompt_mask"].bool()
    written, sampling = (
        [row[:length].tolist() for row, length in zip(inputs[name], lengths, strict=True)]
        for name in ("completion_ids", "sampling")
    )
    given = [row[mask].tolist() for row, mask in zip(inputs["prompt_ids"], prompts, strict=True)]
    completions = ["w4"] * len(written)
    generated = (given, written, None, completions, sampling, {}, None, None)
    monkeypatch.setattr(trainer, "_generate", lambda prompts: generated)
    configure(use_vllm=True, vllm_importance_sampling_correction=True, vllm_importance_sampling_mode=theirs)
    configure(vllm_importance_sampling_clip_max=1.2, vllm_importance_sampling_clip_min=low)
    trainer.model.train()
    scored = trainer._generate_and_score_completions([dict(row) for row in ROWS])
    trainer.model.eval()
    ours = scored | {
        "sampling": scored["sampling_per_token_logps"],
        "tool_mask": torch.ones_like(scored["completion_mask"]),
        "ref_per_token_logps": torch.zeros_like(scored["old_per_token_logps"]),
    }
    correction = {"mode": mode, "level": level, "low": low or 0.0, "high": 1.2}
    block = uncorrected("dapo", loss={"reduction": "sequence"}, correction=correction)
    actual, metrics = our_loss(trainer.model, ours, block)
    assert 0 < metrics["correction/bounded_fraction"].value < 1
    assert_same_loss_and_gradient(actual, trainer.compute_loss(trainer.model, scored), trainer.model)


def test_the_correction_of_later_updates_is_of_before_the_first_and_leaves_the_kl_alone(grpo, inputs):
    # By TRL's formula: its own ratios are of the moment when it generates.
    trainer, configure = grpo
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    ratio = torch.exp((inputs["old_per_token_logps"] - inputs["sampling"]) * mask).clamp(max=1.2)
    configure(use_vllm=True, vllm_importance_sampling_correction=True, beta=0.1, use_bias_correction_kl=False)
    expected = trainer.compute_loss(trainer.model, inputs | {"importance_sampling_ratio": ratio})
    block = algorithm_of("dapo", loss={"reduction": "sequence"}, kl={"coef": 0.1}, correction={"high": 1.2})
    actual, metrics = our_loss(trainer.model, inputs, block)
    assert metrics["correction/bounded_fraction"].value > 0
    assert_same_loss_and_gradient(actual, expected, trainer.model)


def test_rloo_agrees_with_trl(trainers, inputs):
    trainer = trainers["rloo"]
    trainer.model.eval()
    mask = inputs["completion_mask"]
    plain = inputs | {"tool_mask": torch.ones_like(mask), "old_logps": (inputs["old_per_token_logps"] * mask).sum(1)}
    actual, metrics = our_loss(trainer.model, plain, uncorrected("rloo", kl={"coef": 0.0}))
    assert metrics["clip/low_fraction"].value + metrics["clip/high_fraction"].value > 0
    assert_same_loss_and_gradient(actual, trainer.compute_loss(trainer.model, plain), trainer.model)


def combined(scaling="sum"):
    rewards = np.array(REWARDS, dtype=np.float64).reshape(2, 2, GROUP_SIZE)
    return combine_rewards(rewards, np.zeros_like(rewards, dtype=bool), np.array([1.0, 2.0]), scaling)


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_group_advantages_agree_with_trl(grpo, scale):
    trainer, configure = grpo
    configure(scale_rewards=scale, multi_objective_aggregation="sum_then_normalize")
    trainer.model.train()
    expected = trainer._generate_and_score_completions([dict(row) for row in ROWS])["advantages"]
    block = BaselineBlock(scale="none" if scale == "none" else f"{scale}_std")
    np.testing.assert_allclose(compute_advantages(combined(), block).ravel(), expected, rtol=1e-6, atol=1e-6)


def test_rewards_normalised_one_by_one_agree_with_trls_gdpo(grpo):
    trainer, configure = grpo
    configure(multi_objective_aggregation="normalize_then_sum")
    trainer.model.train()
    expected = trainer._generate_and_score_completions([dict(row) for row in ROWS])["advantages"]
    block = BaselineBlock(estimator="batch_mean", scale="batch_std")
    actual = compute_advantages(combined("normalize_each"), block).ravel()
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_leave_one_out_advantages_agree_with_trl(trainers):
    trainer = trainers["rloo"]
    trainer.model.train()
    expected = trainer._generate_and_score_completions([dict(row) for row in ROWS])["advantages"]
    actual = compute_advantages(combined(), BaselineBlock(estimator="leave_one_out")).ravel()
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
