"""The flags of transformers' TrainingArguments, which TRL and ms-swift share, and what reads their values."""

from __future__ import annotations

import typing
from typing import Any

from rlflow.recipe.foreign.rows import Table, as_list, fold, key, missing, unneeded
from rlflow.recipe.tracking_blocks import TrackerName

SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
}
OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit",
    "muon": "muon",
}
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16", "auto": "bfloat16"}


def optimizer(name: str) -> str:
    """Raises ValueError: there is none of this name."""
    if name not in OPTIMIZERS:
        raise ValueError("adamw, adamw_8bit and muon are there, and your own by file.py:function")
    return OPTIMIZERS[name]


def schedule(name: str) -> str:
    """Raises ValueError: there is none of this name."""
    if name not in SCHEDULES:
        raise ValueError("linear, cosine and constant are there")
    return SCHEDULES[name]


def positive(value: float) -> float | None:
    """None for 0, -1 and their like, which stand for nothing."""
    return value if isinstance(value, int | float) and value > 0 else None


def trackers(value: Any) -> list[str] | None:
    """The trackers that there are here; the recipe's own default where there is none of them."""
    there = [name for name in typing.get_args(TrackerName) if name not in ("console", "jsonl")]
    known = [name for name in as_list(value) if name in there]
    return ["console", "jsonl", *known] if known else None


PER_DEVICE = "is of all ranks together, whatever their number"
ACCUMULATED = "is of a whole step; memory is bounded by trainer.tokens_per_micro_batch"
PACKED = "bounds micro-batches, which are packed always"
_LOGGED = "every step is logged, to metrics.jsonl, the console and report.html"
_LOADER = "the data is read and tokenised once, before the first step"
_RANKS = "rlflow starts its own processes, by Ray"
_EXPORT = "after the run: `rlflow export RUN --push hf:ORGANISATION/NAME`; the token is read from HF_TOKEN"

TRAINING_ARGUMENTS: Table = {
    "output_dir": key("run.output_dir", read=str),
    "per_device_train_batch_size": fold("data.prompts_per_step", PER_DEVICE, default=8),
    "gradient_accumulation_steps": fold("data.prompts_per_step", ACCUMULATED, default=1),
    "num_train_epochs": fold("run.epochs", default=3),
    "max_steps": fold("run.steps"),
    "learning_rate": key("trainer.learning_rate", default=5e-5),
    "lr_scheduler_type": key("trainer.schedule", default="linear", read=schedule),
    "lr_scheduler_kwargs": missing("the schedules here end at 0 and have no options"),
    "warmup_ratio": fold("trainer.warmup_steps", "counts steps, and is no share of them"),
    "warmup_steps": fold("trainer.warmup_steps"),
    "optim": key("trainer.optimizer.kind", read=optimizer),
    "optim_args": missing("trainer.optimizer has betas, eps and weight_decay"),
    "optim_target_modules": missing("GaLore and its kin are not there"),
    "weight_decay": key("trainer.optimizer.weight_decay", default=0.0),
    "adam_beta1": fold("trainer.optimizer.betas", default=0.9),
    "adam_beta2": fold("trainer.optimizer.betas", default=0.999),
    "adam_epsilon": key("trainer.optimizer.eps", default=1e-8),
    "max_grad_norm": key("trainer.max_grad_norm", default=1.0, read=positive),
    "label_smoothing_factor": missing("cross-entropy has no label smoothing here"),
    "average_tokens_across_devices": unneeded("always: denominators are those of the whole batch"),
    "bf16": fold("model.dtype"),
    "fp16": fold("model.dtype"),
    "bf16_full_eval": unneeded("evaluation has the precision of training"),
    "fp16_full_eval": unneeded("evaluation has the precision of training"),
    "tf32": unneeded("torch's own setting"),
    "gradient_checkpointing": key("trainer.gradient_checkpointing", default=True),
    "gradient_checkpointing_kwargs": unneeded("always without reentrance", "trainer.gradient_checkpointing"),
    "torch_compile": missing("models are not compiled"),
    "torch_compile_backend": missing("models are not compiled"),
    "torch_compile_mode": missing("models are not compiled"),
    "use_liger_kernel": fold("model.liger"),
    "liger_kernel_config": missing("Liger's kernels are chosen by rlflow"),
    "use_cache": unneeded("training keeps no cache"),
    "neftune_noise_alpha": missing("there is no noise on embeddings (NEFTune)"),
    "torch_empty_cache_steps": unneeded("memory is given back where engines and trainers need it"),
    "auto_find_batch_size": unneeded("micro-batches are bounded by tokens", "trainer.tokens_per_micro_batch"),
    "logging_strategy": unneeded(_LOGGED),
    "logging_steps": unneeded(_LOGGED, "tracking"),
    "logging_first_step": unneeded(_LOGGED),
    "logging_dir": unneeded("everything is in run.output_dir", "run.output_dir"),
    "log_on_each_node": unneeded(_LOGGED),
    "logging_nan_inf_filter": unneeded(
        "a step whose gradient is not finite is skipped and counted", "run.max_skipped_steps"
    ),
    "include_num_input_tokens_seen": unneeded("tokens are counted always"),
    "log_level": unneeded(_LOGGED),
    "log_level_replica": unneeded(_LOGGED),
    "disable_tqdm": unneeded("without a terminal there are plain lines"),
    "report_to": fold("tracking"),
    "run_name": key("experiment.name", read=str),
    "project": key("experiment.project", read=str),
    "trackio_space_id": missing("runs are tracked on this machine"),
    "trackio_bucket_id": missing("runs are tracked on this machine"),
    "trackio_static_space_id": missing("runs are tracked on this machine"),
    "eval_strategy": fold("evaluation.every"),
    "eval_steps": fold("evaluation.every"),
    "eval_delay": missing("evaluation begins before the first step"),
    "per_device_eval_batch_size": unneeded("evaluation packs by tokens as well", "evaluation"),
    "prediction_loss_only": unneeded("evaluation keeps no logits"),
    "eval_on_start": unneeded("always", "evaluation"),
    "eval_do_concat_batches": unneeded("evaluation keeps no logits"),
    "eval_use_gather_object": unneeded("evaluation keeps no logits"),
    "eval_accumulation_steps": unneeded("evaluation keeps no logits"),
    "include_for_metrics": missing("metrics of your own are rewards of the evaluation", name="evaluation.reward"),
    "batch_eval_metrics": unneeded("evaluation keeps no logits"),
    "save_only_model": unneeded("a checkpoint can always be resumed from; final/ is the model alone"),
    "save_strategy": fold("run.save_every"),
    "save_steps": fold("run.save_every"),
    "save_total_limit": fold("run.keep_checkpoints"),
    "save_on_each_node": unneeded("checkpoints are written once, to a shared directory"),
    "save_safetensors": unneeded("always"),
    "enable_jit_checkpoint": unneeded("a run that is told to stop always leaves a checkpoint"),
    "push_to_hub": missing(_EXPORT),
    "hub_token": missing("tokens are read from HF_TOKEN, and never from a file"),
    "hub_private_repo": missing("`rlflow export --push ... --private`"),
    "hub_model_id": missing(_EXPORT),
    "hub_strategy": unneeded("of a push alone"),
    "hub_always_push": unneeded("of a push alone"),
    "hub_revision": missing("`rlflow export --push ... --revision`"),
    "load_best_model_at_end": unneeded(
        "checkpoints/best stays beside the newest; `rlflow export` takes it", "run.keep_checkpoints"
    ),
    "metric_for_best_model": unneeded("pass@1 of the evaluation, or its loss, decides", "evaluation"),
    "greater_is_better": unneeded("pass@1 of the evaluation, or its loss, decides"),
    "resume_from_checkpoint": missing("`rlflow run RECIPE --resume` goes on from rlflow's own checkpoints alone"),
    "ignore_data_skip": unneeded("a resumed run goes on with the row after the last"),
    "restore_callback_states_from_checkpoint": unneeded("there are no callbacks to restore"),
    "seed": key("run.seed"),
    "data_seed": unneeded("run.seed is of the data too", "run.seed"),
    "full_determinism": unneeded("the same recipe and seed give the same parameters to the bit"),
    "use_cpu": fold("trainer.gpus_per_worker"),
    "accelerator_config": unneeded(_RANKS),
    "parallelism_config": missing("of parallel training there are trainer.workers and trainer.sequence_parallel"),
    "dataloader_drop_last": unneeded("an epoch's last batch goes on into the next"),
    "dataloader_num_workers": unneeded(_LOADER),
    "dataloader_pin_memory": unneeded(_LOADER),
    "dataloader_persistent_workers": unneeded(_LOADER),
    "dataloader_prefetch_factor": unneeded(_LOADER),
    "dataloader_multiprocessing_context": unneeded(_LOADER),
    "dataloader_in_order": unneeded(_LOADER),
    "remove_unused_columns": unneeded("reward functions get every column"),
    "label_names": unneeded("labels are made from the chat template"),
    "train_sampling_strategy": unneeded("a new order every epoch; batches are balanced by tokens", "data.shuffle"),
    "group_by_length": unneeded("batches are packed and balanced by tokens", "trainer.tokens_per_micro_batch"),
    "length_column_name": unneeded("lengths are counted"),
    "ddp_find_unused_parameters": unneeded(_RANKS),
    "ddp_bucket_cap_mb": unneeded(_RANKS),
    "ddp_broadcast_buffers": unneeded(_RANKS),
    "ddp_static_graph": unneeded(_RANKS),
    "ddp_backend": unneeded("nccl with GPUs, gloo without"),
    "ddp_timeout": key("trainer.timeout_s", read=lambda seconds: float(seconds) if seconds < 1e6 else None),
    "local_rank": unneeded(_RANKS),
    "fsdp": fold("trainer.fsdp"),
    "fsdp_config": fold("trainer.fsdp"),
    "deepspeed": fold("trainer.deepspeed.stage"),
    "debug": missing("of transformers' own trainer"),
    "skip_memory_metrics": unneeded("memory is measured always"),
    "do_train": unneeded("`rlflow run` trains"),
    "do_eval": unneeded("an evaluation block is what evaluates", "evaluation"),
    "do_predict": missing("`rlflow infer RUN` writes a set's answers"),
    "router_aux_loss_coef": missing(
        "times the experts a token takes: set model.router.balance_coef", name="model.router.balance_coef"
    ),
}
"""A default is given where it has a bearing on what is trained and may differ from rlflow's."""

LORA_DROPOUT = "dropout of an adapter is for sft and pretrain: elsewhere logprobs are compared"
