"""Hydra overrides and configurations of verl."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlflow.recipe.policy_loss_blocks import ClipBlock, PolicyLossBlock, SAPOBlock

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
PPO = (
    "python3 -m verl.trainer.main_ppo data.train_files=/d/train.parquet data.val_files=/d/test.parquet "
    "actor_rollout_ref.model.path=m"
)


def test_a_grpo_run_keeps_its_batches_in_prompts(converted):
    recipe, _ = converted(
        f"{PPO} algorithm.adv_estimator=grpo data.train_batch_size=1024 {ACTOR}.ppo_mini_batch_size=256 {ROLLOUT}.n=5 "
        f"data.max_prompt_length=512 data.max_response_length=1024 {ACTOR}.use_kl_loss=True {ACTOR}.kl_loss_coef=0.001 "
        f"{ROLLOUT}.name=vllm {ROLLOUT}.tensor_model_parallel_size=2 data.filter_overlong_prompts=True "
        f"trainer.test_freq=5 "
        "trainer.n_gpus_per_node=8 trainer.nnodes=1 trainer.save_freq=20 trainer.total_epochs=15 "
        '\'trainer.logger=["console","wandb"]\''
    )
    online = recipe.online
    assert (recipe.data.prompts_per_step, online.group_size, online.groups.updates_per_step) == (1024, 5, 4)
    assert (online.kl.coef, online.kl.estimator, online.kl.placement) == (0.001, "k3", "loss")
    assert (online.loss.reduction, online.correction.mode, online.advantage.scale) == ("token", "none", "group_std")
    assert isinstance(online.loss, ClipBlock)
    assert online.loss.dual_clip == 3.0
    assert (recipe.rollout.tensor_parallel_size, recipe.rollout.workers, recipe.rollout.gpus_per_worker) == (2, 2, 2.0)
    assert (recipe.data.overlong, recipe.run.epochs, recipe.run.save_every, recipe.trainer.optimizer.weight_decay) == (
        "drop",
        15,
        20,
        0.01,
    )
    assert recipe.evaluation is not None
    assert (recipe.evaluation.every, recipe.evaluation.data.columns) == (5, {"solution": "reward_model"})
    assert "wandb" in recipe.tracking


def test_dapo_is_dynamic_sampling_clip_higher_and_an_overlong_buffer(converted):
    recipe, _ = converted(
        f"{PPO} algorithm.adv_estimator=grpo {ROLLOUT}.n=16 {ACTOR}.clip_ratio_low=0.2 {ACTOR}.clip_ratio_high=0.28 "
        "algorithm.filter_groups.enable=True algorithm.filter_groups.max_num_gen_batches=10 "
        "data.max_response_length=20480 "
        "+reward_model.reward_kwargs.overlong_buffer_cfg.enable=True "
        "+reward_model.reward_kwargs.overlong_buffer_cfg.len=4096 "
        "reward_model.reward_manager=dapo trainer.total_training_steps=100"
    )
    groups = recipe.online.groups
    assert (groups.require_signal, groups.max_resamples, groups.overlong_buffer, groups.overlong_penalty) == (
        True,
        10,
        0.2,
        1.0,
    )
    assert isinstance(recipe.online.loss, ClipBlock)
    assert (recipe.online.loss.clip_low, recipe.online.loss.clip_high, recipe.run.steps) == (0.2, 0.28, 100)


def test_ppo_has_verls_own_lambda_and_critic(converted):
    recipe, _ = converted(f"{PPO} critic.model.path=c critic.optim.lr=2e-5 trainer.critic_warmup=3 "
                          f"algorithm.use_kl_in_reward=True "
                          "algorithm.kl_ctrl.kl_coef=0.01")  # fmt: skip
    assert recipe.critic is not None
    assert (recipe.critic.path, recipe.critic.learning_rate, recipe.critic.clip, recipe.critic.warmup_steps) == (
        "c",
        2e-5,
        0.5,
        3,
    )
    assert recipe.online.advantage.model_dump()["gae_lambda"] == 1.0
    assert (recipe.online.kl.coef, recipe.online.kl.placement, recipe.online.kl.estimator) == (0.01, "reward", "k1")


def test_losses_estimators_and_corrections(converted):
    gspo, _ = converted(f"{PPO} algorithm.adv_estimator=grpo {ROLLOUT}.n=8 {ACTOR}.policy_loss.loss_mode=gspo "
                        f"{ACTOR}.loss_agg_mode=seq-mean-token-mean {ACTOR}.clip_ratio_low=3e-4 "
                        f"{ACTOR}.clip_ratio_high=4e-4")  # fmt: skip
    assert (gspo.algorithm.name, gspo.online.loss.ratio, gspo.online.loss.reduction) == ("gspo", "sequence", "sequence")
    sapo, _ = converted(
        f"{PPO} algorithm.adv_estimator=grpo {ROLLOUT}.n=8 {ACTOR}.policy_loss.loss_mode=sapo {ACTOR}.tau_neg=1.1"
    )
    assert isinstance(sapo.online.loss, SAPOBlock)
    assert sapo.online.loss.tau_negative == 1.1
    rloo, _ = converted(
        f"{PPO} algorithm.adv_estimator=rloo {ROLLOUT}.n=4 algorithm.rollout_correction.rollout_is=token"
    )
    assert (rloo.algorithm.name, rloo.online.correction.mode, rloo.online.correction.level) == (
        "rloo",
        "truncate",
        "token",
    )
    assert rloo.online.loss.ratio == "token"


def test_a_reward_function_is_named_with_what_to_do(converted):
    recipe, conversion = converted(
        f"{PPO} algorithm.adv_estimator=grpo {ROLLOUT}.n=4 custom_reward_function.path=r.py "
        f"custom_reward_function.name=score"
    )
    assert recipe.rewards[0].plugin is not None
    assert recipe.rewards[0].plugin.endswith("r.py:score")
    assert any("verl's signature" in note.text for note in conversion.notes)


def test_a_configuration_file_with_references_is_read(converted, tmp_path: Path):
    (tmp_path / "run.yaml").write_text(
        "data: {train_files: /d/t.parquet, max_response_length: 64, train_batch_size: 32}\n"
        "actor_rollout_ref:\n  model: {path: m}\n  actor: {ppo_mini_batch_size: 16, optim: {lr: 5.0e-7}}\n"
        "  rollout: {n: 4, response_length: '${data.max_response_length}', name: vllm}\n"
        "algorithm: {adv_estimator: grpo}\n"
    )
    recipe, _ = converted(
        f"python -m verl.trainer.main_ppo --config-path {tmp_path} --config-name run data.train_batch_size=64"
    )
    assert (recipe.data.prompts_per_step, recipe.online.groups.updates_per_step, recipe.online.group_size) == (64, 4, 4)
    assert (recipe.trainer.learning_rate, recipe.rollout.max_new_tokens, recipe.evaluation) == (5e-7, 64, None)


def test_supervised_training(converted):
    recipe, _ = converted(
        "torchrun --standalone --nnodes=1 --nproc_per_node=4 -m verl.trainer.fsdp_sft_trainer "
        "data.train_files=/d/t.parquet "
        "data.prompt_key=question data.response_key=answer model.partial_pretrain=m trainer.n_gpus_per_node=4 "
        "optim.lr=1e-4 "
        "model.lora_rank=32 trainer.total_training_steps=40"
    )
    assert isinstance(recipe.data.train, object)
    assert recipe.data.train.columns == {"prompt": "question", "response": "answer"}  # type: ignore[union-attr]
    assert (recipe.algorithm.name, recipe.data.prompts_per_step, recipe.data.max_tokens) == ("sft", 256, 1024)
    assert (recipe.trainer.learning_rate, recipe.trainer.schedule, recipe.trainer.warmup_steps) == (1e-4, "cosine", 4)
    assert recipe.model.adapter is not None
    assert recipe.model.adapter.rank == 32


@pytest.mark.parametrize(
    ("flags", "name", "loss"),
    [
        ("policy_loss.loss_mode=geo_mean {a}.clip_ratio_low=0.4 {a}.clip_ratio_high=0.5", "gmpo", (0.4, 0.5)),
        (
            "policy_loss.loss_mode=dppo_tv {a}.clip_ratio_low=0.1 {a}.clip_ratio_high=0.15",
            "dppo",
            ("tv", 0.1, 0.15, 3.0),
        ),
        ("policy_loss.loss_mode=dppo_kl {a}.clip_ratio=0.05 {a}.clip_ratio_c=20", "dppo", ("kl", 0.05, 0.05, 20.0)),
        ("policy_loss.loss_mode=clip_cov {a}.policy_loss.clip_cov_ub=9", "clip_cov", (2e-4, 1.0, 9.0, 0.2, 0.2)),
        ("policy_loss.loss_mode=kl_cov {a}.policy_loss.kl_cov_ratio=0.002", "kl_cov", (0.002, 0.1)),
    ],
)
def test_losses_with_numbers_of_their_own_keep_them(converted, flags, name, loss):
    command = f"{PPO} algorithm.adv_estimator=grpo {ACTOR}.{flags.format(a=ACTOR)} trainer.total_training_steps=9"
    recipe, _ = converted(f"{command} data.train_batch_size=64 {ACTOR}.ppo_mini_batch_size=16 {ROLLOUT}.n=4")
    assert recipe.algorithm.name == name
    shared = PolicyLossBlock.model_fields
    assert tuple(value for key, value in recipe.online.loss if key not in shared) == loss


def test_a_loss_beside_another_estimator_is_its_kind(converted):
    command = (
        f"{PPO} algorithm.adv_estimator=rloo {ACTOR}.policy_loss.loss_mode=geo_mean trainer.total_training_steps=9"
    )
    recipe, _ = converted(f"{command} {ROLLOUT}.n=4")
    assert (recipe.algorithm.name, recipe.online.loss.kind) == ("rloo", "gmpo")


@pytest.mark.parametrize(("estimator", "baseline"), [("opo", "length_weighted_mean"), ("remax", "greedy")])
def test_estimators_with_another_baseline_are_rows(converted, estimator, baseline):
    recipe, _ = converted(f"{PPO} algorithm.adv_estimator={estimator} {ROLLOUT}.n=4 trainer.total_training_steps=9")
    assert (recipe.algorithm.name, recipe.online.advantage.estimator) == (estimator, baseline)


def test_the_size_of_the_log_ratio_is_an_estimator(converted):
    flags = f"{ACTOR}.use_kl_loss=True {ACTOR}.kl_loss_type=abs"
    recipe, _ = converted(f"{PPO} algorithm.adv_estimator=grpo {ROLLOUT}.n=4 {flags} trainer.total_training_steps=9")
    assert recipe.online.kl.estimator == "abs"


def test_one_update_a_step_is_a_trap_of_kl_cov(converted):
    command = f"{PPO} algorithm.adv_estimator=grpo {ACTOR}.policy_loss.loss_mode=kl_cov trainer.total_training_steps=9"
    recipe, conversion = converted(f"{command} data.train_batch_size=16 {ACTOR}.ppo_mini_batch_size=16 {ROLLOUT}.n=4")
    assert recipe.online.num_updates == 2
    assert any("its KL does nothing there" in note.text for note in conversion.notes if note.kind == "trap")
