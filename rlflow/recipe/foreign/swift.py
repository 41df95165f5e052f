"""ms-swift 4: the flags of `swift sft|pt|rlhf`, and of `megatron sft|pt|rlhf` where they map.

Facts are of its documentation (Instruction/Command-line-parameters.md); older names stand beside the new.
"""

from __future__ import annotations

from typing import Any

from rlflow.recipe.foreign.hugging_face import ACCUMULATED, PACKED, PER_DEVICE, TRAINING_ARGUMENTS, positive
from rlflow.recipe.foreign.rows import Table, each, fold, key, missing, unneeded


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(text) for text in value]


def _top_k(value: int) -> int:
    return max(0, value)


def _sharing(value: Any) -> str | None:
    return "last_assistant" if "last_round" in str(value) else "all" if str(value).startswith("all") else None


_SIDE_BY_SIDE = "trainers and engines have GPUs of their own; nothing is put to sleep"
_FROZEN = "all weights are trained, or an adapter's"
_TUNERS = "of tuners there are LoRA with its kin and PEFT's (docs/adapters.md)"
_REGISTERED = "models, templates and data sets are not registered: name a directory, a Jinja template, a file"
_TEACHER = "a teacher is a whole model, asked as algorithm.distill says"
_TURNS = "what answers the policy is a class of yours here: environment: {plugin: file.py:Class}"
_EVALSCOPE = "`rlflow eval RUN` measures named sets"
_MEGATRON = "Megatron's own parallelism and kernels: trainer.engine fsdp or deepspeed shards over trainer.workers"
_CACHED = "pre-tokenised sets of ms-swift are not read: name the set itself"

_BASE: Table = {
    **TRAINING_ARGUMENTS,
    "per_device_train_batch_size": fold("data.prompts_per_step", PER_DEVICE, default=1),
    "gradient_accumulation_steps": fold("data.prompts_per_step", ACCUMULATED),
    "learning_rate": fold("trainer.learning_rate"),
    "lr_scheduler_type": key(
        "trainer.schedule",
        default="cosine",
        read=TRAINING_ARGUMENTS["lr_scheduler_type"].read,
    ),
    "weight_decay": key("trainer.optimizer.weight_decay", default=0.1),
    "adam_beta2": fold("trainer.optimizer.betas", default=0.95),
    "save_steps": fold("run.save_every", default=500),
    "resume_only_model": missing("name the old run's final/ as model.path", name="model.path"),
    # the model
    "model": key("model.path", read=str),
    "model_id_or_path": key("model.path", read=str),
    "model_revision": key("model.revision", read=str),
    "torch_dtype": fold("model.dtype"),
    "attn_impl": unneeded("variable-length FlashAttention on GPUs in 16 bits, exact everywhere", "model.dtype"),
    "experts_impl": unneeded("experts run as one grouped matrix product"),
    "model_kwargs": missing("options of transformers' loading cannot be given"),
    "rope_scaling": missing("set it in the model's config.json"),
    "max_model_len": missing("set it in the model's config.json"),
    "new_special_tokens": missing("the tokenizer stays as it is"),
    "task_type": fold("algorithm.name", default="causal_lm"),
    **each("num_labels problem_type", fold("algorithm.classification.problem")),
    "mrl_dims": fold("algorithm.embedding.matryoshka_dims"),
    **each("device_map max_memory", unneeded("FSDP2 or ZeRO shards a model over trainer.workers", "trainer.workers")),
    **each(
        "model_type template template_type agent_template local_repo_path custom_dataset_info", missing(_REGISTERED)
    ),
    "init_strategy": missing("weights that are missing are an error"),
    "use_hf": fold("model.path"),
    "check_model": unneeded("models are looked at before a run"),
    # tuners
    "tuner_type": fold("model.adapter", default="lora"),
    "train_type": fold("model.adapter"),
    "sft_type": fold("model.adapter"),
    "tuner_backend": unneeded("adapters are PEFT's own format"),
    "adapters": fold("model.adapter.path"),
    "lora_rank": fold("model.adapter.rank", default=8),
    "lora_alpha": fold("model.adapter.alpha", default=32),
    "lora_dropout": fold("model.adapter.dropout", default=0.05),
    "target_modules": fold("model.adapter.target_modules"),
    "lora_target_modules": fold("model.adapter.target_modules"),
    "use_dora": fold("model.adapter.kind"),
    "use_rslora": fold("model.adapter.rslora"),
    "lorap_lr_ratio": fold("model.adapter.lora_plus_ratio"),
    "quant_bits": fold("model.adapter.quantize"),
    "quant_method": fold("model.adapter.quantize"),
    "bnb_4bit_quant_type": fold("model.adapter.quantize", default="nf4"),
    **each(
        "bnb_4bit_compute_dtype bnb_4bit_use_double_quant bnb_4bit_quant_storage",
        unneeded("bitsandbytes' usual settings"),
    ),
    "lora_bias": missing("biases are not trained with an adapter"),
    "lora_dtype": unneeded("adapters are float32", "model.dtype"),
    **each("init_weights target_parameters", fold("model.adapter.peft")),
    **each(
        "vera_rank vera_projection_prng_key vera_d_initial boft_block_size boft_block_num fourier_n_frequency "
        "fourier_scaling adalora_target_r adalora_init_r adalora_tinit adalora_tfinal adalora_deltaT adalora_beta1 "
        "adalora_beta2 adalora_orth_reg_weight",
        fold("model.adapter.peft"),
    ),
    "llamapro_num_new_blocks": fold("model.expand.new_layers", default=4),
    "llamapro_num_groups": fold("model.expand.groups"),
    **each("target_regex modules_to_save", missing("adapters are on layers that are named")),
    **each(
        "hqq_axis reft_layers reft_rank "
        "reft_intervention_type reft_args vera_dropout boft_dropout use_galore "
        "galore_target_modules galore_rank galore_update_proj_gap galore_scale galore_proj_type "
        "galore_optim_per_parameter galore_with_embedding galore_quantization galore_proj_quant galore_proj_bits "
        "galore_proj_group_size galore_cos_threshold galore_gamma_proj galore_queue_size lisa_activated_layers "
        "lisa_step_interval",
        missing(_TUNERS),
    ),
    **each("lora_ga_direction lora_ga_scale lora_ga_stable_gamma", fold("model.adapter.peft")),
    **each(
        "lora_ga_batch_size lora_ga_iters lora_ga_max_length",
        unneeded("gradients are of 64 rows of at most 512 tokens", "data.train"),
    ),
    **each(
        "freeze_parameters freeze_parameters_regex freeze_parameters_ratio trainable_parameters "
        "trainable_parameters_regex",
        missing(_FROZEN),
    ),
    # pictures
    "max_pixels": key("model.max_pixels"),
    **each("freeze_vit freeze_aligner", fold("model.train", default=True)),
    "freeze_llm": fold("model.train", default=False),
    **each("vit_lr aligner_lr", fold("model.learning_rates")),
    "vit_gradient_checkpointing": unneeded("the tower recomputes with the rest", "trainer.gradient_checkpointing"),
    "norm_bbox": missing("boxes are text: write them as the model has them"),
    "vllm_limit_mm_per_prompt": unneeded("prompts have as many pictures as their rows"),
    "vllm_mm_processor_cache_gb": unneeded("1 GiB of prepared pictures is kept"),
    # data
    "dataset": fold("data.train"),
    "val_dataset": fold("evaluation.data"),
    "split_dataset_ratio": fold("evaluation.data"),
    "columns": fold("data.train.columns"),
    "max_length": fold("data.max_prompt_tokens"),
    "truncation_strategy": fold("data.overlong"),
    "system": fold("data.system"),
    "loss_scale": key("data.loss_on", read=_sharing, of="sft"),
    "ignore_empty_think": key("data.ignore_empty_think", of="sft"),
    "enable_thinking": key("model.chat_template_kwargs.enable_thinking", "templates that do not read it refuse it"),
    "dataset_shuffle": key("data.shuffle", default=True),
    "train_dataloader_shuffle": key("data.shuffle"),
    "strict": unneeded("always: data.train.max_bad_rows says how many rows may be left out", "data.train.max_bad_rows"),
    **each(
        "dataset_num_proc load_from_cache_file lazy_tokenize val_dataset_shuffle shuffle_buffer_size download_mode "
        "packing_num_proc packing_strategy packing_length",
        unneeded("the data is read and tokenised once, before the first step"),
    ),
    "packing": fold("trainer.tokens_per_micro_batch", PACKED),
    "padding_free": unneeded(
        "always: micro-batches are packed, and a sequence sees no other", "trainer.tokens_per_micro_batch"
    ),
    "streaming": missing("all rows are read before the first step"),
    **each("interleave_prob stopping_strategy", missing("several sets are concatenated", name="data.train")),
    **each(
        "model_name model_author",
        missing("of swift/self-cognition alone: write {{NAME}} and {{AUTHOR}} into a file of your own"),
    ),
    **each("cached_dataset cached_val_dataset", missing(_CACHED)),
    "disable_auto_column_mapping": unneeded(
        "data.train.columns names columns that are called otherwise", "data.train.columns"
    ),
    "use_chat_template": fold("data.train.format"),
    **each(
        "padding_side template_backend use_logits_to_keep acc_strategy is_binary_loss_scale disable_ignore_empty_think",
        unneeded("padding does not exist, and labels are masks"),
    ),
    "add_non_thinking_prefix": missing("examples are what the chat template makes of them", True),
    "preserve_thinking": missing("the chat template decides which thoughts stay", name="model.chat_template_kwargs"),
    "response_prefix": missing("the chat template's generation prompt decides"),
    "sequence_parallel_size": key("trainer.sequence_parallel"),
    # training
    "optimizer": missing("trainer.optimizer has AdamW, AdamW in 8 bits and Muon"),
    "external_plugins": fold("rewards"),
    "custom_register_path": fold("rewards"),
    "max_epochs": fold("run.epochs"),
    "early_stop_interval": missing("run.stop_at_score ends a run early", name="run.stop_at_score"),
    "callbacks": missing("callbacks are Python's: rlflow.run(recipe, callbacks=[...])"),
    **each("zero_hpz_partition_size", missing("see trainer.fsdp.replicas", name="trainer.fsdp.replicas")),
    "deepspeed_autotp_size": missing("weights are sharded, not split"),
    **each("enable_dft_loss enable_channel_loss eval_metric", missing("sft is cross-entropy on the loss tokens")),
    **each("eval_use_evalscope eval_dataset eval_dataset_args eval_limit eval_generation_config", missing(_EVALSCOPE)),
    **each("predict_with_generate", missing("an evaluation block with a reward generates", name="evaluation.reward")),
    **each("swanlab_project wandb_project", key("experiment.project", read=str)),
    **each("swanlab_exp_name wandb_exp_name", key("experiment.name", read=str)),
    "swanlab_workspace": key("experiment.entity", read=str),
    **each(
        "swanlab_token swanlab_notification_method swanlab_webhook_url swanlab_secret swanlab_mode",
        unneeded("a tracker is set up by its own variables (SWANLAB_API_KEY)"),
    ),
    **each(
        "add_version create_checkpoint_symlink safe_serialization max_shard_size ignore_args_error load_args "
        "load_data_args use_flash_ckpt enable_npu_model_patch use_ray ray_exp_name device_groups logprobs "
        "top_logprobs num_beams stream infer_backend merge_lora custom_dataset_path gpu_memory",
        unneeded("not of training here"),
    ),
    "structured_outputs_regex": missing("completions are free"),
}

_RLHF: Table = {
    "rlhf_type": fold("algorithm.name", default="dpo"),
    "beta": fold("algorithm.kl.coef"),
    "ref_model": key("reference.path", read=str),
    "ref_adapters": fold("reference.adapter"),
    **each("ref_model_type ref_model_revision reward_model_type reward_model_revision", missing(_REGISTERED)),
    "label_smoothing": key("algorithm.preference.label_smoothing", read=positive, of="preference"),
    "rpo_alpha": key("algorithm.preference.sft_coef", read=positive, of="preference"),
    "cpo_alpha": fold("algorithm.preference.sft_coef", default=1.0),
    "simpo_gamma": fold("algorithm.preference.gamma", default=1.0),
    "desirable_weight": key("algorithm.preference.desirable_weight", of="preference"),
    "undesirable_weight": key("algorithm.preference.undesirable_weight", of="preference"),
    "center_rewards_coefficient": key("algorithm.preference.center_coef", of="preference"),
    "loss_type": fold("algorithm.loss"),
    "f_divergence_type": fold("algorithm.preference.divergence"),
    **each("ld_alpha discopop_tau loss_weights reference_free", missing("see algorithm.preference")),
    "max_completion_length": key("rollout.max_new_tokens", default=512, of="online"),
    "response_length": key("rollout.max_new_tokens", of="online"),
    "max_new_tokens": key("rollout.max_new_tokens", of="online"),
    "temperature": key("rollout.temperature", default=0.9, of="online"),
    "top_p": key("rollout.top_p", read=float, of="online"),
    "top_k": key("rollout.top_k", read=_top_k, of="online"),
    "min_p": key("sampling.min_p", read=float, of="online"),
    "repetition_penalty": key("sampling.repetition_penalty", read=float, of="online"),
    "stop_words": key("sampling.stop", read=_texts, of="online"),
    "reward_model": fold("rewards"),
    "reward_adapters": missing("merge it into the reward model"),
    "reward_model_plugin": missing("write it as a reward function", name="rewards"),
    "teacher_model": fold("teacher.path"),
    "teacher_model_server": fold("teacher.url"),
    "teacher_kl_coef": fold("algorithm.distill.coef"),
    "lmbda": fold("algorithm.distill.on_policy"),
    "gkd_logits_topk": fold("algorithm.distill.top_k"),
    **each("seq_kd sft_alpha", fold("algorithm.distill")),
    "offload_teacher_model": unneeded("the teacher is an actor of its own", "teacher"),
    **each(
        "teacher_adapters teacher_model_type teacher_model_revision teacher_tag_key teacher_deepspeed "
        "advantage_reweight rlsd_lambda rlsd_reweight_clip_range rlsd_lambda_warmup_steps "
        "rlsd_lambda_decay_steps rlsd_negative_only sdar_loss_coef sdar_gate_beta",
        missing(_TEACHER),
    ),
}

PPO: Table = {
    "num_ppo_epochs": key("algorithm.groups.epochs_per_step", default=4, of="online"),
    "num_mini_batches": key("algorithm.groups.updates_per_step", of="online"),
    "whiten_rewards": missing("advantages are whitened, rewards are not", name="algorithm.advantage.whiten"),
    "kl_coef": fold("algorithm.kl.coef", default=0.05),
    "cliprange": fold("algorithm.loss.clip_low", default=0.2),
    "cliprange_value": key("algorithm.critic.clip", default=0.2, of="online"),
    "vf_coef": unneeded("the critic has its own optimizer", "algorithm.critic.learning_rate"),
    "gamma": key("algorithm.advantage.gamma", default=1.0, of="online"),
    "lam": key("algorithm.advantage.gae_lambda", default=0.95, of="online"),
    "local_rollout_forward_batch_size": unneeded("bounded by tokens", "trainer.tokens_per_micro_batch"),
    "num_sample_generations": unneeded("every step's rollouts are written to RUN/rollouts", "run.log_rollouts_every"),
    "missing_eos_penalty": missing("see algorithm.groups.overlong_buffer", name="algorithm.groups.overlong_buffer"),
}

GRPO: Table = {
    "steps_per_generation": fold("algorithm.groups.updates_per_step"),
    "generation_batch_size": fold("data.prompts_per_step"),
    "num_generations": fold("algorithm.group_size", default=8),
    "num_iterations": fold("algorithm.groups.epochs_per_step", default=1),
    "num_generations_eval": key("evaluation.samples", "needs evaluation.temperature above 0", read=lambda _: None),
    "reward_funcs": fold("rewards"),
    "reward_weights": fold("rewards"),
    "epsilon": fold("algorithm.loss.clip_low", default=0.2),
    "epsilon_high": fold("algorithm.loss.clip_high"),
    "delta": key("algorithm.loss.dual_clip", of="online"),
    "tau_pos": fold("algorithm.loss.tau_positive", default=1.0),
    "tau_neg": fold("algorithm.loss.tau_negative", default=1.05),
    "importance_sampling_level": fold("algorithm.loss.ratio", default="token"),
    "advantage_estimator": fold("algorithm.advantage.estimator", default="grpo"),
    "kl_in_reward": fold("algorithm.kl.placement"),
    "scale_rewards": fold("algorithm.advantage.scale"),
    "dynamic_sample": key("algorithm.groups.require_signal", of="online"),
    "max_resample_times": fold("algorithm.groups.max_resamples", default=3),
    "overlong_filter": fold("algorithm.groups.mask_truncated"),
    "rollout_importance_sampling_mode": fold("algorithm.correction.mode"),
    "rollout_importance_sampling_threshold": fold("algorithm.correction.high", default=2.0),
    "off_policy_sequence_mask_delta": missing("see algorithm.correction.level", name="algorithm.correction.level"),
    "top_entropy_quantile": missing("all tokens of a completion are trained", 1, 1.0),
    **each("sync_ref_model ref_model_mixup_alpha ref_model_sync_steps", missing("the reference stays what it is")),
    "async_generate": key(
        "run.max_staleness", "generation runs a step ahead", read=lambda value: 1 if value else None, of="online"
    ),
    "use_vllm": fold("rollout.engine", default=False),
    "vllm_mode": fold("rollout.gpus_per_worker"),
    "vllm_gpu_memory_utilization": key("rollout.gpu_memory_fraction", default=0.9, of="online"),
    "vllm_tensor_parallel_size": fold("rollout.tensor_parallel_size", default=1),
    "tensor_parallel_size": fold("rollout.tensor_parallel_size"),
    "vllm_max_num_seqs": key("rollout.max_num_seqs", of="online"),
    "vllm_max_model_len": fold("data.max_prompt_tokens"),
    "num_infer_workers": key("rollout.workers", of="online"),
    **each(
        "vllm_server_host vllm_server_port vllm_server_base_url vllm_server_timeout vllm_server_group_port "
        "vllm_server_pass_dataset vllm_client_timeout",
        fold("rollout_server.urls"),
    ),
    **each(
        "sleep_level offload_model offload_optimizer gc_collect_after_offload move_model_batches",
        unneeded(_SIDE_BY_SIDE, "rollout.gpus_per_worker"),
    ),
    **each(
        "vllm_enforce_eager vllm_enable_prefix_caching vllm_disable_custom_all_reduce vllm_disable_cascade_attn "
        "vllm_use_async_engine vllm_enable_lora vllm_max_lora_rank vllm_device vllm_engine_kwargs "
        "vllm_pipeline_parallel_size vllm_data_parallel_size vllm_enable_expert_parallel vllm_speculative_config "
        "vllm_quantization vllm_reasoning_parser enable_flattened_weight_sync ds3_gather_for_generation",
        unneeded("rlflow sets its engines up", "rollout.engine"),
    ),
    **each(
        "lmdeploy_tp lmdeploy_session_len lmdeploy_cache_max_entry_count lmdeploy_quant_policy "
        "lmdeploy_vision_batch_size sglang_tp_size sglang_pp_size sglang_dp_size sglang_ep_size sglang_enable_ep_moe "
        "sglang_mem_fraction_static sglang_context_length sglang_disable_cuda_graph sglang_quantization "
        "sglang_kv_cache_dtype sglang_enable_dp_attention sglang_disable_custom_all_reduce "
        "sglang_speculative_algorithm sglang_speculative_num_steps sglang_speculative_eagle_topk "
        "sglang_speculative_num_draft_tokens",
        missing("engines are torch, vllm and http", name="rollout.engine"),
    ),
    **each("log_completions", unneeded("every rollout is in RUN/rollouts", "run.log_rollouts_every")),
    **each("log_entropy log_rollout_offpolicy_metrics", unneeded("always measured")),
    **each(
        "multi_turn_scheduler multi_turn_func max_turns completion_length_limit_scope gym_env use_gym_env",
        missing(_TURNS),
    ),
    **each(
        "cosine_min_len_value_wrong cosine_max_len_value_wrong cosine_min_len_value_correct "
        "cosine_max_len_value_correct cosine_max_len repetition_n_grams repetition_max_penalty soft_max_length "
        "soft_cache_length",
        fold("rewards"),
    ),
    **each(
        "fipo_decay_rate fipo_clip_range fipo_clip_high_only fipo_safety_threshold real_tau",
        missing("of losses that are not there"),
    ),
    **each(
        "chord_sft_dataset chord_sft_per_device_train_batch_size chord_enable_phi_function "
        "chord_mu_warmup_steps chord_mu_decay_steps chord_mu_peak chord_mu_valley",
        fold("demonstrations"),
    ),
    "router_replay_mode": missing("not there"),
}

MEGATRON: Table = {
    "micro_batch_size": unneeded("bounded by tokens", "trainer.tokens_per_micro_batch"),
    "global_batch_size": fold("data.prompts_per_step", default=16),
    "lr": fold("trainer.learning_rate"),
    "lr_warmup_fraction": fold("trainer.warmup_steps"),
    "lr_warmup_iters": fold("trainer.warmup_steps"),
    "lr_decay_style": key("trainer.schedule", read=TRAINING_ARGUMENTS["lr_scheduler_type"].read),
    "min_lr": missing("the schedules here end at 0"),
    "train_iters": fold("run.steps"),
    "clip_grad": key("trainer.max_grad_norm", read=positive),
    "context_parallel_size": key("trainer.sequence_parallel"),
    "recompute_granularity": key("trainer.gradient_checkpointing", read=lambda value: value != "none"),
    "moe_aux_loss_coeff": missing(
        "times the experts a token takes: set model.router.balance_coef", name="model.router.balance_coef"
    ),
    "save_interval": fold("run.save_every"),
    "save": key("run.output_dir", read=str),
    "load": missing("name a Hugging Face directory or id", name="model.path"),
    **each("fp8_recipe fp8_format fp8_param_gather fp4_format", missing("weights are not in 8 bits")),
    "mtp_num_layers": missing("layers that predict further tokens are not trained"),
    "moe_expert_capacity_factor": missing("no token is dropped"),
    "mcore_model": missing("name a Hugging Face directory or id", name="model.path"),
    "optimizer_cpu_offload": missing("see trainer.fsdp.offload", name="trainer.fsdp.offload"),
    **each(
        "tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size "
        "expert_tensor_parallel_size sequence_parallel recompute_method recompute_num_layers recompute_modules "
        "finetune num_workers save_safetensors no_save_optim no_save_rng no_load_optim no_load_rng "
        "cross_entropy_loss_fusion "
        "cross_entropy_fusion_impl attention_backend use_distributed_optimizer moe_permute_fusion moe_grouped_gemm "
        "moe_shared_expert_overlap moe_token_dispatcher_type overlap_grad_reduce overlap_param_gather "
        "decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers num_virtual_stages_per_pipeline_rank "
        "use_precision_aware_optimizer gradient_accumulation_fusion masked_softmax_fusion optimizer_offload_fraction "
        "offload_bridge exp_avg_dtype exp_avg_sq_dtype main_grads_dtype main_params_dtype linear_decoupled_in_proj "
        "moe_router_dtype load_safetensors merge_lora log_interval eval_interval eval_iters",
        unneeded(_MEGATRON, "trainer.workers"),
    ),
}

SWIFT: Table = {**_BASE, **_RLHF, **PPO, **GRPO}
MEGATRON_SWIFT: Table = {**SWIFT, **MEGATRON, "tuner_type": fold("model.adapter", default="full")}
