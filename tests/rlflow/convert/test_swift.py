"""Commands of ms-swift: what their batches, losses, rewards and data are as a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlflow.convert import convert
from rlflow.recipe.policy_loss_blocks import CISPOBlock, SAPOBlock

GRPO = (
    "NPROC_PER_NODE=8 CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 swift rlhf --rlhf_type grpo --model Qwen/Qwen3-8B "
    "--tuner_type full --dataset 'AI-MO/NuminaMath-TIR#5000' --torch_dtype bfloat16 --num_train_epochs 1 "
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 1 --learning_rate 1e-6 --warmup_ratio 0.05 "
    "--max_completion_length 4096 --vllm_max_model_len 8192 --reward_funcs accuracy --num_generations 16 "
    "--use_vllm true --vllm_gpu_memory_utilization 0.4 --deepspeed zero3 --temperature 1.0 --top_p 0.85"
)


def kinds(conversion) -> dict[str, str]:
    return {
        kind: "\n".join(note.text for note in conversion.notes if note.kind == kind)
        for kind in ("trap", "missing", "to do")
    }


def test_the_documented_run_has_one_prompt_a_step_and_says_so(converted):
    recipe, conversion = converted(GRPO)
    assert recipe.data.prompts_per_step == 1  # 2 x 1 x 8 completions / 16
    assert recipe.online.group_size == 16
    assert "16 completions with 16 a prompt is one prompt an optimizer step" in kinds(conversion)["trap"]
    assert "prompts_per_step to 16" in kinds(conversion)["trap"]
    assert recipe.trainer.warmup_steps == 250  # 5% of 5,000 steps
    assert recipe.data.max_prompt_tokens == 4096
    assert (recipe.rollout.top_p, recipe.rollout.temperature, recipe.rollout.gpu_memory_fraction) == (0.85, 1.0, 0.4)
    assert (recipe.trainer.engine, recipe.trainer.deepspeed.stage, recipe.model.dtype) == ("deepspeed", 3, "bfloat16")
    assert recipe.online.correction.mode == "none"
    assert recipe.trainer.workers + recipe.rollout.workers + recipe.reference.workers == 8


@pytest.mark.parametrize(
    ("world", "flags", "prompts", "updates", "passes"),
    [
        # 4 x 4 x 8 = 128 completions an update, which is the generation; / 8
        (8, "--per_device_train_batch_size 4 --gradient_accumulation_steps 4 --num_generations 8", 16, 1, 1),
        # 2 x 8 x 8 = 128 an update, 2 x 32 x 8 = 512 a generation; / 16
        (8, "--per_device_train_batch_size 2 --gradient_accumulation_steps 8 --steps_per_generation 32 "
            "--num_generations 16",
         32, 4, 1),
        # 8 x 2 x 4 = 64 an update, 256 a generation; / 8
        (4, "--per_device_train_batch_size 8 --gradient_accumulation_steps 2 --generation_batch_size 256 "
            "--num_generations 8",
         32, 4, 1),
        # 8 x 4 = 32 an update, twice over; / 4
        (4, "--per_device_train_batch_size 8 --num_iterations 2 --num_generations 4", 8, 1, 2),
        # 4 x 1 x 8 = 32 a generation, 4 x 4 x 8 = 128 an update that takes four generations; / 8
        (8, "--per_device_train_batch_size 4 --gradient_accumulation_steps 4 --steps_per_generation 1", 16, 1, 1),
        # ranks that share sequences: 8 / 2 = 4 processes; 4 x 4 / 8
        (8, "--per_device_train_batch_size 4 --sequence_parallel_size 2", 2, 1, 1),
    ],
)  # fmt: skip
def test_prompts_a_step_are_completions_over_generations(converted, world, flags, prompts, updates, passes):
    command = "swift rlhf --rlhf_type grpo --model m --dataset d.jsonl --reward_funcs accuracy"
    recipe, _ = converted(f"NPROC_PER_NODE={world} {command} {flags}")
    groups = recipe.online.groups
    assert (recipe.data.prompts_per_step, groups.updates_per_step, groups.epochs_per_step) == (prompts, updates, passes)


@pytest.mark.parametrize(
    ("gpus", "flags", "rows", "epochs", "updates"),
    [
        # What users of ms-swift and TRL were told: 1,320 steps of 7,920 prompts, 4,000 of 8,000 in two epochs.
        (6, "--per_device_train_batch_size 8 --gradient_accumulation_steps 2 --num_iterations 2", 7920, 1, 1320),
        (3, "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --num_generations 6", 8000, 2, 4000),
    ],
)
def test_a_run_has_as_many_optimizer_updates_as_there(converted, gpus, flags, rows, epochs, updates):
    data = f"--dataset d#{rows} --num_train_epochs {epochs}"
    command = f"swift rlhf --rlhf_type grpo --model m --reward_funcs format {data} {flags}"
    recipe, _ = converted(f"NPROC_PER_NODE={gpus} {command}")
    assert recipe.run.epochs is not None
    assert rows * recipe.run.epochs / recipe.data.prompts_per_step * recipe.algorithm.num_updates == updates


def test_optimizer_updates_are_counted_by_the_step_of_several(converted):
    flags = (
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --steps_per_generation 8 --num_iterations 2"
    )
    counts = "--max_steps 100 --save_steps 50 --warmup_steps 10 --num_generations 4"
    recipe, _ = converted(f"swift rlhf --rlhf_type grpo --model m --dataset d --reward_funcs format {flags} {counts}")
    # 16 completions a generation, 4 an update, twice over: 8 updates a step.
    assert (recipe.run.steps, recipe.run.save_every, recipe.trainer.warmup_steps) == (13, 6, 2)


def test_defaults_that_differ_are_written_out(converted):
    recipe, _ = converted(
        "swift rlhf --rlhf_type grpo --model m --dataset d.jsonl --reward_funcs accuracy --num_generations 2"
    )
    adapter = recipe.model.adapter
    assert adapter is not None
    assert (adapter.rank, adapter.alpha, recipe.trainer.learning_rate, recipe.rollout.temperature) == (
        8,
        32.0,
        1e-4,
        0.9,
    )
    assert (recipe.trainer.optimizer.weight_decay, recipe.trainer.optimizer.betas) == (0.1, (0.9, 0.95))
    assert (recipe.trainer.schedule, recipe.trainer.gradient_checkpointing, recipe.model.dtype) == (
        "cosine",
        True,
        "bfloat16",
    )
    assert (recipe.online.kl.coef, recipe.rollout.max_new_tokens, recipe.run.epochs) == (0.04, 512, 3)
    whole, _ = converted("swift sft --model m --dataset d.jsonl --tuner_type full")
    assert (whole.trainer.learning_rate, whole.model.adapter, whole.data.prompts_per_step) == (1e-5, None, 16)


LOSSES = {
    "--loss_type grpo": ("grpo", "sequence", "token", 0.2, 0.2),
    "--loss_type bnpo --epsilon_high 0.28": ("grpo", "token", "token", 0.2, 0.28),
    "--loss_type dapo": ("grpo", "token", "token", 0.2, 0.2),
    "--loss_type dr_grpo": ("dr_grpo", "fixed_length", "token", 0.2, 0.2),
    "--importance_sampling_level sequence --epsilon 3e-4 --epsilon_high 4e-4": (
        "gspo",
        "sequence",
        "sequence",
        3e-4,
        4e-4,
    ),
    "--loss_type cispo --epsilon_high 5": ("cispo", "token", "token", 1.0, 4.0),
}


@pytest.mark.parametrize("flags", LOSSES)
def test_losses_are_rows_of_the_table(converted, flags: str):
    recipe, _ = converted(
        f"NPROC_PER_NODE=8 swift rlhf --rlhf_type grpo --model m --dataset d --reward_funcs format {flags}"
    )
    loss = recipe.online.loss
    assert not isinstance(loss, SAPOBlock)
    assert (recipe.algorithm.name, loss.reduction, loss.ratio, loss.clip_low, loss.clip_high) == LOSSES[flags]
    assert isinstance(loss, CISPOBlock) == ("cispo" in flags)


def test_a_cispo_bound_that_would_cut_every_weight_is_a_trap(converted):
    recipe, conversion = converted(
        "NPROC_PER_NODE=8 swift rlhf --rlhf_type grpo --model m --dataset d --reward_funcs format --loss_type cispo"
    )
    assert isinstance(recipe.online.loss, CISPOBlock)
    assert recipe.online.loss.clip_high == 4.0
    assert "would cut every one" in kinds(conversion)["trap"]


def test_advantages_kl_and_correction(converted):
    command = "NPROC_PER_NODE=8 swift rlhf --rlhf_type grpo --model m --dataset d --reward_funcs accuracy format"
    rloo, _ = converted(f"{command} --advantage_estimator rloo --beta 0.001 --reward_weights 1 0.5")
    assert (rloo.algorithm.name, rloo.online.advantage.estimator) == ("rloo", "leave_one_out")
    assert (rloo.online.kl.coef, rloo.online.kl.placement, rloo.online.kl.estimator) == (0.001, "reward", "k1")
    assert [reward.weight for reward in rloo.rewards] == [1.0, 0.5]
    batch, _ = converted(
        f"{command} --scale_rewards batch --beta 0 --delta 3 --dynamic_sample true --max_resample_times 5"
    )
    assert batch.online.advantage.scale == "batch_std"
    assert (batch.online.kl.coef, batch.online.loss.dual_clip) == (0.0, 3.0)
    assert (batch.online.groups.require_signal, batch.online.groups.max_resamples) == (True, 5)
    corrected, _ = converted(f"{command} --rollout_importance_sampling_mode sequence_truncate --scale_rewards none")
    assert (corrected.online.correction.mode, corrected.online.correction.level) == ("truncate", "sequence")
    assert corrected.online.advantage.scale == "none"


def test_rewards_have_their_arguments_and_plugins_the_class_that_they_register(converted, tmp_path: Path):
    plugin = tmp_path / "plugin.py"
    plugin.write_text("class Mine:\n    pass\norms = {}\norms['mine'] = Mine\n")
    recipe, conversion = converted(
        "swift rlhf --rlhf_type grpo --model m --dataset d.jsonl --num_generations 2 --max_completion_length 100 "
        "--reward_funcs cosine repetition soft_overlong mine other --soft_cache_length 20 --repetition_n_grams 4 "
        f"--external_plugins {plugin} --reward_weights 1 1 1 2 1"
    )
    cosine, repetition, overlong, mine, other = recipe.rewards
    assert cosine.args == {"max_tokens": 100, "wrong_short": -0.5, "wrong_long": 0.0, "correct_short": 1.0,
                           "correct_long": 0.5, "clamp": False}  # fmt: skip
    assert repetition.args == {"ngram_size": 4, "max_penalty": -1.0}
    assert overlong.args == {"max_tokens": 100, "cache_tokens": 20}
    assert (mine.plugin, mine.weight) == (f"{plugin}:Mine", 2.0)
    assert other.label == "other"
    assert "--reward_funcs other" in kinds(conversion)["to do"]


def test_data_sets_have_hubs_subsets_and_numbers(converted):
    recipe, _ = converted(
        'swift sft --model m --dataset hf::o/a:s1/s2#501 ms::o/b#7 c.jsonl --columns \'{"q": "query"}\' '
        "--val_dataset v.jsonl "
        "--eval_steps 20 --save_steps 40 --truncation_strategy right --max_length 512 --system 'Be brief.' "
        "--save_total_limit 3"
    )
    assert isinstance(recipe.data.train, list)
    assert [(Path(s.path or "").name, s.subset, s.rows) for s in recipe.data.train] == [
        ("a", "s1", 251), ("a", "s2", 251), ("b", None, 7), ("c.jsonl", None, None)
    ]  # fmt: skip
    assert {tuple(source.columns.items()) for source in recipe.data.train} == {(("query", "q"),)}
    assert (recipe.data.overlong, recipe.data.max_tokens, recipe.data.system) == ("truncate", 512, "Be brief.")
    assert recipe.evaluation is not None
    assert (recipe.evaluation.every, recipe.run.save_every, recipe.run.keep_checkpoints) == (20, 40, 2)


PREFERENCE = {
    "dpo --rpo_alpha 0.1 --loss_type hinge": ("dpo", {"beta": 0.1, "sft_coef": 0.1, "loss": "hinge"}),
    "kto --desirable_weight 2 --beta 0.2": ("kto", {"beta": 0.2, "desirable_weight": 2.0}),
    "cpo": ("cpo", {"beta": 0.1, "sft_coef": 1.0}),
    "simpo --simpo_gamma 0.5": ("simpo", {"beta": 2.0, "sft_coef": 1.0, "gamma": 0.5}),
    "orpo --beta 0.3": ("orpo", {"beta": 0.3}),
    "rm --center_rewards_coefficient 0.01": ("reward_model", {"center_coef": 0.01}),
}


@pytest.mark.parametrize("command", PREFERENCE)
def test_preferences_are_rows_of_the_table(converted, command: str):
    recipe, _ = converted(f"swift rlhf --model m --dataset d.jsonl --rlhf_type {command} --tuner_type full")
    name, numbers = PREFERENCE[command]
    preference = recipe.algorithm.model_dump()["preference"]
    assert (recipe.algorithm.name, {key: preference[key] for key in numbers}) == (name, numbers)
    assert recipe.data.prompts_per_step == 16  # accumulated to 16 where nothing is said


def test_ppo_has_a_critic_and_its_reward_model(converted):
    recipe, _ = converted(
        "NPROC_PER_NODE=8 swift rlhf --rlhf_type ppo --model m --reward_model o/rm --tuner_type full --dataset d.jsonl "
        "--gradient_accumulation_steps 2 --num_mini_batches 2 --response_length 64 --save_steps 100 --temperature 0.7 "
        "--learning_rate 1e-6"
    )
    assert recipe.critic is not None
    assert (
        recipe.data.prompts_per_step,
        recipe.online.groups.updates_per_step,
        recipe.online.groups.epochs_per_step,
    ) == (32, 2, 4)
    assert (recipe.critic.learning_rate, recipe.critic.path, recipe.rewards[0].args["path"]) == (1e-6, "o/rm", "o/rm")
    assert (recipe.online.kl.coef, recipe.rollout.max_new_tokens, recipe.rollout.temperature) == (0.05, 64, 0.7)
    assert recipe.run.save_every == 100  # batches, whatever the updates that are made of one


def test_pretraining_and_megatron(converted):
    recipe, _ = converted("swift pt --model m --dataset t.txt --tuner_type full --learning_rate 2e-5")
    assert recipe.algorithm.name == "pretrain"
    recipe, _ = converted("NPROC_PER_NODE=2 megatron sft --model m --dataset d --global_batch_size 32 "
                          "--micro_batch_size 2 --lr 1e-5 "
                          "--tensor_model_parallel_size 2 --train_iters 50 --lr_warmup_fraction 0.1")  # fmt: skip
    assert (recipe.data.prompts_per_step, recipe.trainer.learning_rate, recipe.model.adapter) == (32, 1e-5, None)
    assert (recipe.run.steps, recipe.trainer.warmup_steps) == (50, 5)


def test_every_flag_that_is_given_is_accounted_for(converted):
    flags = ["--packing true", "--attn_impl flash_attn", "--use_liger_kernel false", "--model_author a b",
             "--neftune_noise_alpha 5",
             "--train_type full", "--made_up 3", "--lora_rank 16"]  # fmt: skip
    _, conversion = converted(f"swift sft --model m --dataset d.jsonl {' '.join(flags)}")
    text = " ".join(conversion.recipe.replace("#", " ").split())
    assert [flag for flag in flags if flag not in text] == []
    assert "made_up 3: not a flag that is known" in kinds(conversion)["missing"]
    assert "packed rows" in kinds(conversion)["trap"]


def test_what_has_no_counterpart_is_said_and_gives_no_recipe():
    [conversion] = convert("swift rlhf --rlhf_type made_up --model m --dataset d")
    assert conversion.recipe is None
    assert "no such algorithm yet" in kinds(conversion)["missing"]


@pytest.mark.parametrize(
    ("command", "ours"),
    [
        ("swift deploy --model m --host 127.0.0.1 --port 8001", "rlflow serve m --host 127.0.0.1 --port 8001"),
        ("swift export --adapters out/checkpoint-9 --merge_lora true --output_dir merged",
         "rlflow export out/checkpoint-9 --merge merged"),
        ("swift export --model m --quant_method awq --quant_bits 4 --dataset d#500 --output_dir o",
         "rlflow export m --quantize awq --calibration d o"),
        ("swift export --adapters x --quant_method fp8 --output_dir o", "rlflow export x --quantize fp8 o"),
        ("swift export --model m --quant_bits 8 --output_dir o", "rlflow export m --quantize int8 o"),
        ("swift web-ui --server_port 7860", "rlflow ui runs --port 7860"),
    ],
)  # fmt: skip
def test_commands_that_do_not_train_are_command_lines(command: str, ours: str):
    [conversion] = convert(command)
    assert conversion.command == ours


def test_a_script_of_several_commands_gives_each_its_own():
    script = (
        "M=m\nswift sft --model $M --dataset a.jsonl\nswift rlhf --rlhf_type dpo --model output/sft --dataset b.jsonl\n"
    )
    assert [found.title for found in convert(script)] == ["swift sft", "swift rlhf --rlhf_type dpo"]


@pytest.mark.parametrize(
    "flag", ["per_device_train_batch_size", "num_generations", "save_steps", "warmup_ratio", "max_length"]
)
@pytest.mark.parametrize("value", ["$UNSET", "many"])
def test_what_is_no_number_is_to_do_and_the_default_is_written(converted, flag: str, value: str):
    command = "NPROC_PER_NODE=8 swift rlhf --rlhf_type grpo --model m --dataset d.jsonl --reward_funcs accuracy"
    recipe, conversion = converted(f"{command} --{flag} {value}")
    assert f"--{flag} {value}: not a number" in kinds(conversion)["to do"]
    assert recipe == converted(command)[0]


def test_how_completions_are_drawn_is_drawn_so_here_and_nothing_is_corrected_where_that_cuts(converted):
    recipe, conversion = converted(
        "swift rlhf --rlhf_type grpo --model m --dataset d.jsonl --num_generations 2 --reward_funcs accuracy "
        "--top_p 1.0 --top_k -1 --min_p 0.1 --repetition_penalty 1.05 --stop_words '</answer>' Human: "
        "--rollout_importance_sampling_mode token_truncate"
    )
    assert (recipe.rollout.top_p, recipe.rollout.top_k) == (1.0, 0)
    sampling = recipe.sampling
    assert (sampling.min_p, sampling.repetition_penalty, sampling.stop) == (0.1, 1.05, ["</answer>", "Human:"])
    assert recipe.online.correction.mode == "none"
    assert any("sampling.min_p changes what is sampled" in note.text for note in conversion.notes)


TASK = "swift sft --model Qwen/Qwen3-Embedding-0.6B --dataset pairs.jsonl --tuner_type full"


def test_a_classifier_has_as_many_classes_as_it_says(converted):
    recipe, _ = converted(f"{TASK} --task_type seq_cls --num_labels 3")
    assert recipe.algorithm.name == "classification"
    assert recipe.algorithm.classification.labels == ["0", "1", "2"]
    recipe, _ = converted(f"{TASK} --task_type seq_cls --num_labels 2 --problem_type multi_label_classification")
    assert (recipe.algorithm.classification.problem, recipe.algorithm.classification.num_outputs) == ("multi_label", 2)
    recipe, _ = converted(f"{TASK} --task_type seq_cls --num_labels 1")
    assert (recipe.algorithm.classification.problem, recipe.algorithm.classification.targets) == ("regression", 1)


def test_embeddings_have_the_loss_and_the_temperature_that_ms_swift_has(converted):
    recipe, conversion = converted(f"{TASK} --task_type embedding --loss_type infonce")
    assert recipe.algorithm.name == "embedding" and recipe.algorithm.embedding.temperature == 0.1
    assert "all data.prompts_per_step rows" in kinds(conversion)["trap"]
    recipe, _ = converted(
        f"INFONCE_TEMPERATURE=0.02 INFONCE_USE_BATCH=False {TASK} --task_type embedding --mrl_dims 64,32"
    )
    block = recipe.algorithm.embedding
    assert (block.temperature, block.in_batch_negatives, block.matryoshka_dims) == (0.02, False, [64, 32])
    recipe, _ = converted(f"{TASK} --task_type embedding --loss_type cosine_similarity")
    assert recipe.algorithm.embedding.loss == "cosine_similarity"


def test_an_adapter_beside_a_head_has_no_dropout(converted):
    recipe, _ = converted(TASK.replace("full", "lora --lora_rank 4") + " --task_type reranker")
    assert (recipe.model.adapter.rank, recipe.model.adapter.dropout) == (4, 0.0)


def test_rerankers_are_pointwise_or_listwise(converted):
    recipe, _ = converted(f"{TASK} --task_type reranker --loss_type listwise_reranker")
    assert (recipe.algorithm.name, recipe.algorithm.reranking.loss) == ("reranker", "listwise")
    words = "GENERATIVE_RERANKER_POSITIVE_TOKEN=true GENERATIVE_RERANKER_NEGATIVE_TOKEN=false"
    recipe, _ = converted(f"{words} {TASK} --task_type generative_reranker --loss_type pointwise_reranker")
    assert (recipe.algorithm.name, recipe.algorithm.reranking.loss) == ("generative_reranker", "pointwise")
    assert (recipe.algorithm.answers.positive, recipe.algorithm.answers.negative) == ("true", "false")


def test_chord_is_demonstrations_beside_the_rollouts(converted):
    flags = (
        "--chord_sft_dataset experts.jsonl --chord_sft_per_device_train_batch_size 2 --gradient_accumulation_steps 4 "
        "--chord_mu_peak 0.9 --chord_mu_valley 0.05 --chord_mu_decay_steps 200 --chord_enable_phi_function true"
    )
    recipe, _ = converted(f"{GRPO} {flags}")
    assert recipe.algorithm.name == "chord"
    assert Path(recipe.demonstrations.train.path).name == "experts.jsonl"
    mixture = recipe.online.mixture
    assert (mixture.mu_peak, mixture.mu_valley, mixture.mu_decay_steps, mixture.phi) == (0.9, 0.05, 200, True)
    # 2 a device and micro-batch, 4 accumulated, 8 processes, of every update.
    assert recipe.demonstrations.per_step == 2 * 4 * 8 * recipe.online.groups.updates_per_step


@pytest.mark.parametrize(("theirs", "ours"), [("forward_kl", "forward_kl"), ("js_divergence", "js")])
def test_other_divergences_of_dpo(converted, theirs, ours):
    command = "swift rlhf --rlhf_type dpo --model m --dataset d.jsonl --max_steps 5"
    recipe, _ = converted(f"{command} --f_divergence_type {theirs}")
    assert recipe.algorithm.preference.divergence == ours


def test_ktos_loss_without_a_kl_is_a_row(converted):
    command = "swift rlhf --rlhf_type kto --model m --dataset d.jsonl --max_steps 5"
    recipe, _ = converted(f"{command} --loss_type apo_zero_unpaired")
    assert recipe.algorithm.name == "apo_zero_unpaired"


def test_a_teacher_is_a_block_and_its_share_of_on_policy_data_a_key(converted):
    recipe, conversion = converted(
        "swift rlhf --rlhf_type gkd --model m/a --teacher_model m/b --dataset d.jsonl --lmbda 0.7 --beta 0.3 "
        "--max_completion_length 256 --seq_kd true"
    )
    distill = recipe.online.distill
    assert (recipe.algorithm.name, recipe.teacher.path, recipe.rollout.temperature) == ("gkd", "m/b", 0.9)
    assert (distill.on_policy, distill.beta, distill.temperature) == (0.7, 0.3, 1.0)
    assert recipe.rollout.max_new_tokens == 256
    assert "--seq_kd true: have the teacher answer first" in kinds(conversion)["to do"]


def test_a_teacher_of_grpo_is_a_part_of_its_advantages(converted):
    recipe, _ = converted(f"{GRPO} --teacher_model m/b --teacher_kl_coef 0.5")
    assert (recipe.teacher.path, recipe.online.distill.kind, recipe.online.distill.coef) == ("m/b", "advantage", 0.5)
