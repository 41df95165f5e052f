"""TRL 1.16: the flags of `trl sft|dpo|kto|reward|grpo|rloo|distillation`, its scripts (gkd.py too) and YAML
configurations.

The tables have every field of SFTConfig, DPOConfig, KTOConfig, RewardConfig, GRPOConfig, RLOOConfig, GKDConfig,
DistillationConfig, ModelConfig and ScriptArguments.
"""

from __future__ import annotations

from typing import Any

from rlflow.recipe.foreign.hugging_face import PACKED, TRAINING_ARGUMENTS
from rlflow.recipe.foreign.rows import Table, each, fold, key, missing, unneeded

_COMMON: Table = {
    **TRAINING_ARGUMENTS,
    "learning_rate": key("trainer.learning_rate", default=1e-6),
    "bf16": fold("trainer.fsdp.mixed_precision", default=True),
    # ModelConfig
    "model_name_or_path": key("model.path", read=str),
    "model_revision": key("model.revision", read=lambda name: None if name == "main" else str(name)),
    "dtype": fold("model.dtype", default="float32"),
    "torch_dtype": fold("model.dtype"),
    "attn_implementation": unneeded(
        "variable-length FlashAttention on GPUs in 16 bits, exact everywhere", "model.dtype"
    ),
    "use_peft": fold("model.adapter"),
    "lora_r": fold("model.adapter.rank", default=16),
    "lora_alpha": fold("model.adapter.alpha", default=32),
    "lora_dropout": fold("model.adapter.dropout", default=0.05),
    "lora_target_modules": fold("model.adapter.target_modules"),
    "lora_target_parameters": missing("adapters are on linear layers that are named"),
    "lora_modules_to_save": missing("adapters are on linear layers that are named"),
    "lora_task_type": unneeded("the algorithm decides"),
    "use_rslora": fold("model.adapter.rslora"),
    "use_dora": fold("model.adapter.kind"),
    "load_in_8bit": missing("a base is trained in 4 bits (nf4) or whole"),
    "load_in_4bit": fold("model.adapter.quantize"),
    **each(
        "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage",
        unneeded("bitsandbytes' usual settings", "model.adapter.quantize"),
    ),
    # ScriptArguments
    "dataset_name": fold("data.train.path"),
    "dataset_config": fold("data.train.subset"),
    "dataset_train_split": fold("data.train.split", default="train"),
    "dataset_test_split": fold("evaluation.data.split", default="test"),
    "dataset_streaming": missing("all rows are read before the first step"),
    "streaming": missing("all rows are read before the first step"),
    "test_split_size": missing('rows are not split off by themselves: `split: "train[:95%]"`', name="evaluation.data"),
    "datasets": fold("data.train"),
    "ignore_bias_buffers": unneeded("Ray starts the ranks"),
    # in every configuration
    "model_init_kwargs": missing("options of transformers' loading cannot be given"),
    "trust_remote_code": key("model.trust_remote_code"),
    "disable_dropout": unneeded("models train without dropout; an adapter's is for sft"),
    "pad_to_multiple_of": unneeded("padding does not exist: micro-batches are packed"),
    **each("pad_token eos_token", missing("the tokenizer's own are used")),
    "chat_template_path": key("model.chat_template", read=str),
    "activation_offloading": missing("see trainer.gradient_checkpointing", name="trainer.gradient_checkpointing"),
    "dataset_num_proc": unneeded("the data is read and tokenised once, before the first step"),
    "padding_free": unneeded("always: micro-batches are packed", "trainer.tokens_per_micro_batch"),
}

_LENGTHS: Table = {
    "max_length": key("data.max_tokens", default=1024),
    "truncation_mode": fold("data.overlong", default="keep_start"),
}
_REFERENCE: Table = {
    "precompute_ref_log_probs": key("reference.precompute", of="preference"),
    "precompute_ref_batch_size": unneeded("bounded by tokens", "trainer.tokens_per_micro_batch"),
    **each(
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps", missing("the reference stays what it is", 0.6, 512)
    ),
}
SFT: Table = {
    **_COMMON,
    **_LENGTHS,
    "max_seq_length": key("data.max_tokens"),
    "learning_rate": key("trainer.learning_rate", default=2e-5),
    "dataset_text_field": key("data.train.columns.text", read=lambda name: None if name == "text" else str(name)),
    "dataset_kwargs": missing("see data.train", name="data.train"),
    "shuffle_dataset": unneeded("a new order every epoch", "data.shuffle"),
    "packing": fold("trainer.tokens_per_micro_batch", PACKED),
    "packing_strategy": unneeded("a sequence is never cut, and sees no other"),
    "eval_packing": unneeded("evaluation packs by tokens as well"),
    "completion_only_loss": fold("data.loss_on"),
    "assistant_only_loss": fold("data.loss_on"),
    "loss_type": missing("sft is cross-entropy", "nll", "chunked_nll"),
}
DPO: Table = {
    **_COMMON,
    **_LENGTHS,
    **_REFERENCE,
    "loss_type": fold("algorithm.preference.loss", default="sigmoid"),
    "loss_weights": fold("algorithm.preference.sft_coef"),
    "label_smoothing": key("algorithm.preference.label_smoothing", read=lambda value: value or None),
    "beta": key("algorithm.preference.beta", default=0.1),
    "ld_alpha": missing("all tokens of an answer count alike"),
    "f_divergence_type": fold("algorithm.preference.divergence", default="reverse_kl"),
    "f_alpha_divergence_coef": missing("the alpha divergence is not there", 0.5),
    "use_weighting": missing("pairs count alike (WPO is not there)"),
    "discopop_tau": missing("0.05, the paper's", 0.05),
}
KTO: Table = {
    **_COMMON,
    **_REFERENCE,
    "max_length": _LENGTHS["max_length"],
    "loss_type": fold("algorithm.name", default="kto"),
    "beta": key("algorithm.preference.beta", default=0.1),
    "desirable_weight": key("algorithm.preference.desirable_weight", default=1.0),
    "undesirable_weight": key("algorithm.preference.undesirable_weight", default=1.0),
}
REWARD: Table = {
    **_COMMON,
    "learning_rate": key("trainer.learning_rate", default=1e-4),
    "max_length": _LENGTHS["max_length"],
    "center_rewards_coefficient": key("algorithm.preference.center_coef"),
}
_ROLLOUTS: Table = {
    **_COMMON,
    "max_prompt_length": key("data.max_prompt_tokens"),
    "num_generations_eval": missing("see evaluation.samples", name="evaluation.samples"),
    "max_completion_length": key("rollout.max_new_tokens", default=512),
    "shuffle_dataset": key("data.shuffle", default=True),
    "generation_batch_size": fold("data.prompts_per_step"),
    "steps_per_generation": fold("algorithm.groups.updates_per_step"),
    "num_iterations": fold("algorithm.groups.epochs_per_step", default=1),
    "temperature": key("rollout.temperature", default=1.0),
    "top_p": key("rollout.top_p", default=1.0, read=float),
    "top_k": key("rollout.top_k", default=0, read=lambda value: max(0, value or 0)),
    "min_p": key("sampling.min_p", read=float),
    "repetition_penalty": key("sampling.repetition_penalty", default=1.0, read=float),
    "generation_kwargs": missing(
        "of sampling there are rollout.temperature, top_p and top_k, and sampling.min_p, repetition_penalty and stop",
        name="sampling",
    ),
    "chat_template_kwargs": key("model.chat_template_kwargs"),
    **each(
        "cache_implementation use_transformers_continuous_batching transformers_continuous_batching_config "
        "use_transformers_paged ds3_gather_for_generation vllm_model_impl vllm_enable_sleep_mode",
        unneeded("rlflow sets its engines up", "rollout.engine"),
    ),
    "use_vllm": fold("rollout.engine"),
    "vllm_mode": fold("rollout.gpus_per_worker", default="colocate"),
    "vllm_structured_outputs_regex": missing("completions are free"),
    "vllm_guided_decoding_regex": missing("completions are free"),
    **each(
        "vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port",
        fold("rollout_server.urls"),
    ),
    "vllm_gpu_memory_utilization": key("rollout.gpu_memory_fraction", default=0.3),
    "vllm_max_model_length": unneeded("longest prompt and completion together", "data.max_prompt_tokens"),
    "vllm_max_model_len": unneeded("longest prompt and completion together", "data.max_prompt_tokens"),
    "vllm_tensor_parallel_size": fold("rollout.tensor_parallel_size", default=1),
    "epsilon": fold("algorithm.loss.clip_low", default=0.2),
    "epsilon_high": fold("algorithm.loss.clip_high"),
    "reward_weights": fold("rewards"),
    "mask_truncated_completions": key("algorithm.groups.mask_truncated"),
    **each(
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps", missing("the reference stays what it is", 0.6, 512)
    ),
    **each(
        "log_completions log_multimodal num_completions_to_print log_unique_prompts",
        unneeded("every rollout is in RUN/rollouts", "run.log_rollouts_every"),
    ),
    "log_completions_hub_repo": missing("rollouts stay on this machine"),
    "reward_funcs": fold("rewards"),
    "reward_model_name_or_path": fold("rewards"),
}
GRPO: Table = {
    **_ROLLOUTS,
    "num_generations": fold("algorithm.group_size", default=8),
    "beta": key("algorithm.kl.coef", default=0.0),
    "use_bias_correction_kl": fold("algorithm.kl.unbiased_gradient", default=True),
    "delta": key("algorithm.loss.dual_clip"),
    "sapo_temperature_neg": fold("algorithm.loss.tau_negative", default=1.05),
    "sapo_temperature_pos": fold("algorithm.loss.tau_positive", default=1.0),
    **each("vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg", missing("there is no loss vespo")),
    "importance_sampling_level": fold("algorithm.loss.ratio", default="token"),
    "multi_objective_aggregation": fold("algorithm.groups.reward_scaling", default="sum_then_normalize"),
    "scale_rewards": fold("algorithm.advantage.scale"),
    "loss_type": fold("algorithm.loss.reduction", default="dapo"),
    "cast_lm_head_to_fp32": unneeded("logprobs are float32"),
    "top_entropy_quantile": missing("all tokens of a completion are trained", 1, 1.0),
    "entropy_coef": key("algorithm.loss.entropy_coef", default=0.0),
    "use_adaptive_entropy": missing("the entropy bonus has one weight", name="algorithm.loss.entropy_coef"),
    **each(
        "entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target",
        missing("of the adaptive entropy bonus alone"),
    ),
    "max_tool_calling_iterations": missing("write environment: {tools: [file.py:function], max_turns: n}"),
    "vllm_importance_sampling_correction": fold("algorithm.correction.mode", default=True),
    "vllm_importance_sampling_mode": fold("algorithm.correction.level", default="sequence_mask"),
    "vllm_importance_sampling_clip_max": fold("algorithm.correction.high", default=3.0),
    "vllm_importance_sampling_cap": fold("algorithm.correction.high"),
    "vllm_importance_sampling_clip_min": fold("algorithm.correction.low"),
    "off_policy_mask_threshold": missing("see algorithm.correction.level", name="algorithm.correction.level"),
}
RLOO: Table = {
    **_ROLLOUTS,
    "num_generations": fold("algorithm.group_size", default=2),
    "beta": key("algorithm.kl.coef", default=0.05),
    "normalize_advantages": key("algorithm.advantage.whiten"),
    "reward_clip_range": missing("rewards are not clipped"),
}
_TEACHER: Table = {
    "teacher_model_name_or_path": key("teacher.path", read=str),
    "teacher_model_init_kwargs": missing("of its loading there are teacher.dtype and gpus_per_worker", name="teacher"),
    "disable_dropout": unneeded("models train without dropout; an adapter's is for sft"),
}
GKD: Table = {
    **SFT,
    **_TEACHER,
    "temperature": key("rollout.temperature", default=0.9),
    "lmbda": key("algorithm.distill.on_policy", default=0.5, read=float),
    "beta": key("algorithm.distill.beta", default=0.5, read=float),
    "max_new_tokens": key("rollout.max_new_tokens", default=128),
    "seq_kd": fold("data.train.stage"),
}
_NOT_OF_DISTILLATION = {
    *("reward_funcs", "reward_weights", "reward_model_name_or_path", "epsilon", "epsilon_high"),
    *("num_iterations", "steps_per_generation", "generation_batch_size"),
}
DISTILLATION: Table = {
    **{name: row for name, row in _ROLLOUTS.items() if name not in _NOT_OF_DISTILLATION},
    **_TEACHER,
    "teacher_model_revision": missing("the newest is read: download another, and name its directory"),
    "beta": key("algorithm.distill.beta", default=1.0, read=float),
    "temperature": fold("rollout.temperature", default=1.0),
    "max_tool_calling_iterations": missing("write environment: {tools: [file.py:function], max_turns: n}"),
}
TABLES: dict[str, Table] = {
    "sft": SFT,
    "dpo": DPO,
    "kto": KTO,
    "reward": REWARD,
    "grpo": GRPO,
    "rloo": RLOO,
    "gkd": GKD,
    "distillation": DISTILLATION,
}
ALGORITHM_OF = {
    "sft": "sft",
    "dpo": "dpo",
    "kto": "kto",
    "reward": "reward_model",
    "grpo": "grpo",
    "rloo": "rloo",
    "gkd": "gkd",
    "distillation": "gkd",
}
REWARDS: dict[str, dict[str, Any]] = {
    "accuracy_reward": {"name": "math_accuracy", "args": {"explicit": True}},
    "reasoning_accuracy_reward": {"name": "math_accuracy", "args": {"explicit": True}, "label": "reasoning_accuracy"},
    "think_format_reward": {"name": "format", "args": {"pattern": "<think>(?!.*<think>).*?</think>.*"}},
    "get_soft_overlong_punishment": {"name": "soft_overlong", "args": {"max_tokens": 1280, "cache_tokens": 256}},
}
"""TRL's functions -> ours, with the arguments that its command gives them."""
PAIR_LOSSES = {
    "sigmoid": "sigmoid",
    "sigmoid_norm": "sigmoid",
    "exo_pair": "exo_pair",
    "nca_pair": "nca_pair",
    "hinge": "hinge",
    "ipo": "ipo",
    "robust": "robust",
    "bco_pair": "bco_pair",
    "sppo_hard": "sppo",
    "aot": "aot",
    "aot_unpaired": "aot_unpaired",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
}
