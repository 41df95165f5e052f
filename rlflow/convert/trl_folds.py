"""A command of TRL -> a recipe: what its flags are together."""

from __future__ import annotations

from typing import Any

from rlflow.convert import folds, grouped
from rlflow.convert.given import Draft, Given, apply_rows
from rlflow.convert.trl_distillation import generates, set_distillation, set_gkd
from rlflow.recipe.foreign.rows import as_list
from rlflow.recipe.foreign.trl import ALGORITHM_OF, PAIR_LOSSES, REWARDS
from rlflow.recipe.presets import ALGORITHMS


def draft_of(verb: str, given: Given, machines: folds.Machines, engine: str) -> Draft:
    """The recipe of ``trl VERB``. ``engine``: the file that accelerate was configured by, where there is one."""
    draft, name, machines = Draft(), ALGORITHM_OF[verb], folds.on_cpu(given, machines)
    family = ALGORITHMS[name].family
    draft.set("algorithm.name", name, f"trl {verb}")
    apply_rows(given, draft, family)
    _set_model(given, draft, family)
    sources = _sources(given)
    folds.set_sources(draft, sources, given.texts("dataset_name", "dataset_config", "dataset_train_split", "datasets"))
    if not sources:
        draft.note("to do", "no data set is named: set data.train.path")
    world = max(1, machines.gpus)
    per_device, accumulation = given["per_device_train_batch_size"], given["gradient_accumulation_steps"]
    if "num_generations" in given.table:
        batch = grouped.set_batch(given, draft, world, per_device, accumulation)
    else:
        batch = grouped.Batch(per_device * accumulation * world, 1)
        draft.set(
            "data.prompts_per_step", batch.prompts, f"{per_device} x {accumulation} accumulated x {world} processes"
        )
    folds.set_schedule(given, draft, batch.updates, folds.rows_of(sources), batch.prompts)
    folds.set_evaluation(given, draft, batch.updates, *_held_out(given))
    folds.set_intervals(given, draft, batch.updates, best_counts=False)
    folds.set_tracking(given, draft)
    setters = {"grpo": _set_grpo, "rloo": _set_rloo, "dpo": _set_dpo, "kto": _set_kto, "sft": _set_sft}
    setters |= {"gkd": set_gkd, "distillation": set_distillation}
    setters.get(verb, lambda *_: None)(given, draft)
    if "truncation_mode" in given.table and given["truncation_mode"] != "keep_start":
        draft.note("missing", f"{given.text('truncation_mode')}: examples are cut at their end")
    draft.set(
        "data.overlong",
        "truncate",
        "(keep_start, the default)" if family != "online" else "prompts have no limit there",
    )
    if "vllm_mode" in given.table:
        _set_rollouts(given, draft, machines)
    else:
        folds.set_machines(draft, machines, generates=generates(draft), shared=generates(draft))
    if draft.values["algorithm.name"] == "gkd" and machines.gpus:
        draft.set("teacher.gpus_per_worker", 1, "a GPU of its own, beside those of the others")
    folds.set_engine(given, draft, str(given["deepspeed"] or engine))
    folds.set_quantized_base(draft)
    _set_autocast(given, draft)
    return draft


def _set_autocast(given: Given, draft: Draft) -> None:
    """TRL computes in bfloat16 unless it is told not to, whatever the weights' dtype."""
    on_gpu = "trainer.gpus_per_worker" in draft.values
    if not (on_gpu and given["bf16"]) or given["fp16"] or draft.values["model.dtype"] != "float32":
        return
    if "trainer.deepspeed.stage" in draft.values or "model.adapter.quantize" in draft.values:
        draft.set("model.dtype", "bfloat16", f"{given.text('bf16')}: float32 weights behind the bfloat16 ones")
    else:
        draft.set("trainer.fsdp.mixed_precision", True, given.text("bf16"))


def _set_model(given: Given, draft: Draft, family: str) -> None:
    draft.set(
        "trainer.optimizer.betas", [given["adam_beta1"], given["adam_beta2"]], given.texts("adam_beta1", "adam_beta2")
    )
    folds.set_precision(given, draft, "torch_dtype" if "torch_dtype" in given else "dtype", "float32")
    if given["use_liger_kernel"]:
        draft.set("model.liger", True, given.text("use_liger_kernel"))
    if not given["use_peft"]:
        return
    folds.set_adapter(given, draft, family, rank="lora_r")
    targets = as_list(given["lora_target_modules"])
    if targets and targets != ["all-linear"]:
        draft.set("model.adapter.target_modules", targets, given.text("lora_target_modules"))
    elif not targets:
        draft.set("model.adapter.target_modules", ["q_proj", "v_proj"], "PEFT's choice for most models, as there")
    if given["load_in_4bit"]:
        draft.set("model.adapter.quantize", "nf4", given.text("load_in_4bit"))


def _sources(given: Given) -> list[dict[str, Any]]:
    mixture = [
        source
        for source in as_list(given["datasets"])
        if isinstance(source, dict) and (source.get("path") or source.get("data_files"))
    ]
    if not mixture and given["dataset_name"]:
        mixture = [
            {"path": given["dataset_name"], "name": given["dataset_config"], "split": given["dataset_train_split"]}
        ]
    sources = []
    for one in mixture:
        path = one.get("data_files") or one["path"]
        found = {
            "path": str(path),
            "subset": one.get("name") or one.get("data_dir"),
            "split": one.get("split", "train"),
        }
        sources.append({name: value for name, value in found.items() if value not in (None, "train")})
    return sources


def _held_out(given: Given) -> tuple[dict[str, Any] | None, str]:
    if given["eval_strategy"] in (None, "no") or not given["dataset_name"]:
        return None, ""
    found = {
        "path": str(given["dataset_name"]),
        "subset": given["dataset_config"],
        "split": given["dataset_test_split"],
    }
    return {name: value for name, value in found.items() if value is not None}, given.texts(
        "dataset_test_split", "eval_strategy"
    )


def _set_grpo(given: Given, draft: Draft) -> None:
    grouped.set_loss(given, draft, high="epsilon_high")
    each = given["multi_objective_aggregation"] == "normalize_then_sum"
    grouped.set_scale(given, draft, "group", normalize_each=each)
    if draft.values["algorithm.kl.coef"]:
        draft.set("algorithm.kl.estimator", "k3", given.text("beta"))
        draft.set(
            "algorithm.kl.unbiased_gradient", given["use_bias_correction_kl"], given.text("use_bias_correction_kl")
        )
    if given["loss_type"] == "sapo":
        draft.set("algorithm.loss.tau_positive", given["sapo_temperature_pos"], given.text("sapo_temperature_pos"))
        draft.set("algorithm.loss.tau_negative", given["sapo_temperature_neg"], given.text("sapo_temperature_neg"))
    corrects = given["use_vllm"] and given["vllm_importance_sampling_correction"]
    mode = given["vllm_importance_sampling_mode"] if corrects else None
    high = given["vllm_importance_sampling_cap"] or given["vllm_importance_sampling_clip_max"]
    why = given.texts(
        "vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max"
    )
    why = why if given["use_vllm"] else "one model generates and trains there, without vLLM"
    grouped.set_correction(draft, mode, why, low=given["vllm_importance_sampling_clip_min"], high=high)
    _set_rewards(given, draft)


def _set_rloo(given: Given, draft: Draft) -> None:
    for bound, flag in (("clip_low", "epsilon"), ("clip_high", "epsilon_high")):
        draft.set(f"algorithm.loss.{bound}", given[flag] or given["epsilon"], given.texts(flag, "epsilon"))
    draft.set("algorithm.correction.mode", "none", "not corrected there")
    _set_rewards(given, draft)


def _set_rewards(given: Given, draft: Draft) -> None:
    rewards: list[dict[str, Any]] = []
    for name in map(str, as_list(given["reward_funcs"])):
        module, _, function = name.rpartition(".")
        known = REWARDS.get(name)
        rewards.append(dict(known) if known else {"plugin": f"{module.replace('.', '/') or 'rewards'}.py:{function}"})
        if known is None and not module:
            draft.note("to do", f"--reward_funcs {name}: write its file before the colon of rewards.plugin")
    if path := given["reward_model_name_or_path"]:
        rewards.append({"name": "reward_model", "args": {"path": str(path)}, "timeout_s": 60})
    weights = as_list(given["reward_weights"])
    grouped.set_rewards(draft, rewards, weights, given.texts("reward_funcs", "reward_model_name_or_path"))


def _set_dpo(given: Given, draft: Draft) -> None:
    losses, weights = as_list(given["loss_type"]), as_list(given["loss_weights"])
    if "sft" in losses and len(losses) > 1:
        share = weights[losses.index("sft")] if weights else 1.0
        draft.set("algorithm.preference.sft_coef", share, given.texts("loss_type", "loss_weights"))
        losses = [name for name in losses if name != "sft"]
    if losses[0] in PAIR_LOSSES:
        draft.set("algorithm.preference.loss", PAIR_LOSSES[losses[0]], given.text("loss_type"))
    if len(losses) > 1 or losses[0] not in PAIR_LOSSES:
        draft.note(
            "missing", f"{given.text('loss_type')}: one loss of a pair is trained (docs/algorithms.md lists them)"
        )
    if losses[0] in ("ipo", "sigmoid_norm"):
        draft.set("algorithm.preference.length_normalized", True, given.text("loss_type"))
    folds.set_divergence(given, draft)


def _set_kto(given: Given, draft: Draft) -> None:
    if given["loss_type"] == "apo_zero_unpaired":
        draft.set("algorithm.name", "apo_zero_unpaired", given.text("loss_type"))
    elif given["loss_type"] != "kto":
        draft.note("missing", f"{given.text('loss_type')}: there are kto and apo_zero_unpaired; kto's stands for it")


def _set_sft(given: Given, draft: Draft) -> None:
    if given["assistant_only_loss"]:
        draft.set("data.loss_on", "all_assistant", given.text("assistant_only_loss"))
    elif given["completion_only_loss"]:
        draft.set("data.loss_on", "last_assistant", given.text("completion_only_loss"))
    else:
        draft.note(
            "trap",
            "TRL trains on all tokens of `messages`, and on the completion of prompt and completion; rlflow trains on "
            "answers. For TRL's: data.loss_on: all",
        )
    if given["packing"]:
        draft.note(
            "trap",
            f"{given.text('packing')}: there a batch counts packed rows of {given['max_length']} tokens, here "
            "data.prompts_per_step counts examples; micro-batches are packed always",
        )


def _set_rollouts(given: Given, draft: Draft, machines: folds.Machines) -> None:
    is_server = given["vllm_mode"] == "server" and given["use_vllm"]
    if is_server:
        where = given.texts("vllm_server_host", "vllm_server_port", "vllm_server_base_url")
        draft.note(
            "to do",
            f"{where}: rlflow starts its own engines, on GPUs beside the trainers'; servers of yours are engine http "
            "(rollout_server, docs/engines.md)",
        )
    tensor = given["vllm_tensor_parallel_size"]
    folds.set_machines(draft, machines, generates=True, shared=not is_server, engine_gpus=tensor)
    if "max_prompt_length" not in given:
        draft.note("default", "prompts have no limit there; here data.max_prompt_tokens, 1024")
    if given["use_vllm"] and machines.gpus:
        draft.set("rollout.engine", "vllm", given.text("use_vllm"))
    elif not given["use_vllm"]:
        draft.set("rollout.engine", "torch", "without use_vllm transformers generates")
    if "model.adapter.quantize" in draft.values:
        draft.set("rollout.engine", "torch", "the base in few bits is generated with by the torch engine")
