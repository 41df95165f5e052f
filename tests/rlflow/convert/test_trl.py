"""Commands of TRL, by its CLI, its scripts, a launcher and a YAML configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlflow.convert import convert
from rlflow.data.errors import DataError

BASE = "--model_name_or_path m --dataset_name o/d"


def test_defaults_of_grpo_are_trls(converted):
    recipe, conversion = converted(
        f"trl grpo {BASE} --reward_funcs accuracy_reward --use_vllm --beta 0.01 --num_processes 4"
    )
    online = recipe.online
    assert (online.kl.coef, online.kl.unbiased_gradient, online.loss.reduction, recipe.rollout.temperature) == (
        0.01,
        True,
        "token",
        1.0,
    )
    assert (online.correction.mode, online.correction.level, online.correction.high) == (
        "weighted_mask",
        "sequence",
        3.0,
    )
    assert recipe.data.prompts_per_step == 4  # 8 x 1 x 4 completions / 8
    assert (recipe.trainer.learning_rate, recipe.trainer.schedule, recipe.trainer.gradient_checkpointing) == (
        1e-6,
        "linear",
        True,
    )
    assert (recipe.model.dtype, recipe.trainer.fsdp.mixed_precision) == ("float32", True)
    assert recipe.trainer.optimizer.betas == (0.9, 0.999)
    assert "--use_vllm" in conversion.recipe


def test_a_configuration_file_is_read_under_the_flags_of_the_command(converted, tmp_path: Path):
    config = tmp_path / "grpo.yaml"
    config.write_text(
        "model_name_or_path: m\ndatasets:\n  - {path: o/a, name: main, split: train}\n  - {path: "
        "o/b}\nloss_type: dr_grpo\n"
        "num_generations: 4\nreward_funcs: [my_lib.rewards.fn, think_format_reward]\nreward_weights: [1.0, 0.2]\n"
        "learning_rate: 1e-5\nlora_r: 8\nuse_peft: true\nwarmup_steps: 0.1\nmax_steps: 50\n"
    )
    recipe, _ = converted(f"trl grpo --config {config} --learning_rate 2e-5")
    assert (recipe.algorithm.name, recipe.online.loss.reduction, recipe.online.group_size) == (
        "dr_grpo",
        "fixed_length",
        4,
    )
    assert recipe.online.advantage.scale == "group_std"
    assert recipe.trainer.learning_rate == 2e-5
    assert isinstance(recipe.data.train, list)
    assert [(source.path, source.subset) for source in recipe.data.train] == [("o/a", "main"), ("o/b", None)]
    first, second = recipe.rewards
    assert first.plugin is not None
    assert first.plugin.endswith("my_lib/rewards.py:fn")
    assert (second.name, second.weight) == ("format", 0.2)
    assert (recipe.run.steps, recipe.trainer.warmup_steps) == (50, 5)


@pytest.mark.parametrize(
    "launcher",
    [
        "accelerate launch --config_file deepspeed_zero3.yaml --num_processes 8 examples/scripts/dpo.py",
        "torchrun --nproc_per_node 8 trl/scripts/dpo.py --deepspeed ds_zero3.json",
        "deepspeed --num_gpus=8 dpo.py --deepspeed zero3.json",
        "CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 trl dpo --accelerate_config zero3",
    ],
)
def test_launchers_are_taken_off_and_say_how_many_ranks_there_are(converted, launcher: str):
    recipe, _ = converted(
        f"{launcher} {BASE} --per_device_train_batch_size 2 --gradient_accumulation_steps 4 --loss_type ipo"
    )
    assert recipe.algorithm.name == "dpo"
    assert (recipe.trainer.workers, recipe.trainer.engine, recipe.trainer.deepspeed.stage) == (8, "deepspeed", 3)
    assert (recipe.data.prompts_per_step, recipe.data.max_tokens) == (64, 1024)
    assert recipe.algorithm.model_dump()["preference"]["length_normalized"] is True


def test_supervised_training_and_what_its_loss_is_on(converted):
    recipe, conversion = converted(
        f"trl sft {BASE} --packing --use_peft --load_in_4bit --eval_strategy steps --eval_steps 50"
    )
    assert recipe.model.adapter is not None
    assert (recipe.model.adapter.quantize, recipe.model.adapter.target_modules) == ("nf4", ["q_proj", "v_proj"])
    assert recipe.model.adapter.dropout == 0.05
    assert recipe.evaluation is not None
    assert (recipe.evaluation.data.split, recipe.evaluation.every) == ("test", 50)
    traps = [note.text for note in conversion.notes if note.kind == "trap"]
    assert any("all tokens of `messages`" in text for text in traps)
    assert any("packed rows" in text for text in traps)
    recipe, _ = converted(f"trl sft {BASE} --assistant_only_loss --learning_rate 3e-5 --max_length 4096")
    assert (recipe.data.loss_on, recipe.trainer.learning_rate, recipe.data.max_tokens) == ("all_assistant", 3e-5, 4096)


def test_labels_rewards_and_leave_one_out(converted):
    kto, _ = converted(f"trl kto {BASE} --desirable_weight 1.5")
    assert (kto.algorithm.name, kto.algorithm.model_dump()["preference"]["desirable_weight"]) == ("kto", 1.5)
    reward, _ = converted(f"python -m trl.scripts.reward {BASE}")
    assert (reward.algorithm.name, reward.trainer.learning_rate) == ("reward_model", 1e-4)
    rloo, _ = converted(f"trl rloo {BASE} --reward_funcs accuracy_reward --num_processes 2")
    assert (rloo.algorithm.name, rloo.online.group_size, rloo.online.kl.coef) == ("rloo", 2, 0.05)


def test_tokens_are_not_repeated(converted):
    _, conversion = converted(f"trl sft {BASE} --hub_token hf_verysecret --push_to_hub --eos_token '<|im_end|>'")
    assert "verysecret" not in conversion.recipe
    assert "--eos_token <|im_end|>" in conversion.recipe
    assert "rlflow export RUN --push" in conversion.recipe


def test_a_configuration_that_is_not_here_is_an_error_that_names_it():
    with pytest.raises(DataError, match=r"trl grpo names nowhere\.yaml, which cannot be read"):
        convert("trl grpo --config nowhere.yaml")


def test_divergences_of_dpo_and_ktos_loss_without_a_kl_have_their_names_here(converted):
    recipe, _ = converted(f"trl dpo {BASE} --f_divergence_type js_divergence --max_steps 5")
    assert recipe.algorithm.preference.divergence == "js"
    recipe, conversion = converted(f"trl dpo {BASE} --f_divergence_type alpha_divergence --max_steps 5")
    assert recipe.algorithm.preference.divergence == "reverse_kl"
    assert any("there are reverse_kl, forward_kl, js_divergence" in note.text for note in conversion.notes)
    recipe, _ = converted(f"trl kto {BASE} --loss_type apo_zero_unpaired --max_steps 5")
    assert recipe.algorithm.name == "apo_zero_unpaired"


def test_a_teacher_and_the_share_of_the_policys_own_answers(converted):
    launched = "accelerate launch --num_processes 4 examples/scripts/gkd.py"
    teacher = "--teacher_model_name_or_path big"
    recipe, conversion = converted(f"{launched} {BASE} {teacher} --lmbda 0.7 --beta 0.1 --max_new_tokens 64")
    distill = recipe.online.distill
    assert (recipe.algorithm.name, recipe.teacher.path, recipe.rollout.max_new_tokens) == ("gkd", "big", 64)
    assert (distill.on_policy, distill.beta, distill.temperature, recipe.rollout.temperature) == (0.7, 0.1, 1.0, 0.9)
    assert (recipe.data.prompts_per_step, recipe.trainer.learning_rate, recipe.rollout.engine) == (32, 2e-5, "torch")
    assert any("each row is" in note.text for note in conversion.notes)
    offline, _ = converted(f"{launched} {BASE} {teacher} --lmbda 0 --seq_kd")
    assert offline.online.distill.on_policy == 0 and not offline.needs_rollouts
    stable, _ = converted(f"trl distillation {BASE} {teacher} --temperature 0.8 --use_vllm --num_processes 2")
    distill = stable.online.distill
    assert (distill.on_policy, distill.beta, distill.temperature, stable.rollout.temperature) == (1.0, 1.0, 0.8, 0.8)
    assert (stable.data.prompts_per_step, stable.rollout.engine) == (16, "vllm")
