"""A command of ms-swift -> a recipe: what its flags are together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rlflow.convert import folds, grouped, swift_distillation, swift_pictures, swift_sequences, swift_tuners
from rlflow.convert.given import Draft, Given, apply_rows
from rlflow.convert.swift_mixture import set_mixture
from rlflow.convert.swift_rewards import reward_models, reward_of
from rlflow.convert.swift_sources import sources_of
from rlflow.recipe.foreign.rows import as_list
from rlflow.recipe.foreign.swift import GRPO, PPO
from rlflow.recipe.model_blocks import OF_THE_ADAPTER
from rlflow.recipe.presets import ALGORITHMS

ALGORITHM_OF = {
    "gkd": "gkd",
    "dpo": "dpo",
    "kto": "kto",
    "ppo": "ppo",
    "rm": "reward_model",
    "cpo": "cpo",
    "simpo": "simpo",
    "orpo": "orpo",
}
_PAIR_LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
)


def draft_of(verb: str, given: Given, machines: folds.Machines, environment: dict[str, str]) -> Draft | None:
    """The recipe of ``swift VERB``; None where rlflow has nothing of the kind.

    Args:
        environment: What is set before the command; variables that are read are taken out.
    """
    draft, machines = Draft(), folds.on_cpu(given, machines)
    kind = given["rlhf_type"] if verb == "rlhf" else {"sft": "sft", "pt": "pretrain"}[verb]
    name = {"grpo": "grpo", "sft": "sft", "pretrain": "pretrain"}.get(kind) or ALGORITHM_OF.get(kind)
    if verb == "sft":
        name = swift_sequences.ALGORITHM_OF.get(given["task_type"], name)
    if name is None:
        draft.note("missing", f"--rlhf_type {kind}: there is no such algorithm here yet")
        return None
    draft.set("algorithm.name", name, given.text("rlhf_type") if verb == "rlhf" else f"swift {verb}")
    family = ALGORITHMS[name].family
    for flag in (name for name in _of_others(kind) if name in given):
        draft.note("unneeded", f"{given.text(flag)}: nothing to {kind}")
    apply_rows(_without(given, _of_others(kind)), draft, family)
    _set_model(given, draft, family)
    sources = [source for text in as_list(given["dataset"]) for source in sources_of(str(text), given)]
    folds.set_sources(draft, sources, given.text("dataset"), given.text("columns"))
    if not sources:
        draft.note("to do", "no --dataset is given: set data.train.path")
    _set_lengths(given, draft, verb, family)
    batch = _set_batch(given, draft, kind, machines)
    rows = folds.rows_of(sources)
    folds.set_schedule(_renamed(given), draft, batch.updates, rows, batch.prompts)
    folds.set_evaluation(given, draft, batch.updates, *_held_out(given, draft, sources))
    has_evaluation = any(name.startswith("evaluation.") for name in draft.values)
    folds.set_intervals(given, draft, batch.updates, best_counts=has_evaluation)
    folds.set_tracking(given, draft)
    if kind == "grpo":
        _set_grpo(given, draft)
        set_mixture(given, draft, machines)
    elif kind == "ppo":
        _set_ppo(given, draft)
    elif family == "preference":
        _set_preference(given, draft, kind)
    elif family == "sft":
        swift_sequences.set_sequences(given, draft, environment)
    if family == "online":
        swift_distillation.set_teacher(given, draft, kind, machines)
        shared = kind != "grpo" or given["vllm_mode"] != "server"
        tensor = (
            given["vllm_tensor_parallel_size"]
            if "vllm_tensor_parallel_size" in given
            else given["tensor_parallel_size"] or 1
        )
        folds.set_machines(draft, machines, generates=True, shared=shared, engine_gpus=tensor)
        _set_rollouts(given, draft, machines)
    else:
        folds.set_machines(draft, machines, generates=False, shared=False)
    folds.set_engine(given, draft, str(given["deepspeed"] or ""))
    folds.set_quantized_base(draft)
    return draft


def _of_others(kind: str) -> set[str]:
    """The flags of the other algorithms that have rollouts."""
    of_grpo = set(GRPO) - _SHARED
    return {"grpo": set(PPO), "ppo": of_grpo, "gkd": set(PPO) | of_grpo}.get(kind, set())


_SHARED = {
    "use_vllm",
    "vllm_gpu_memory_utilization",
    "vllm_tensor_parallel_size",
    "tensor_parallel_size",
    "vllm_mode",
    "vllm_max_model_len",
    "log_completions",
    "reward_funcs",
    "reward_weights",
    "rollout_importance_sampling_mode",
}


def _without(given: Given, names: set[str]) -> Given:
    values = {name: value for name, value in given.values.items() if name not in names}
    return Given(values, {n: row for n, row in given.table.items() if n not in names}, given.spelled, given.looked_at)


def _renamed(given: Given) -> Given:
    """Megatron's names of the schedule as the Trainer's."""
    names = {"train_iters": "max_steps", "lr_warmup_fraction": "warmup_ratio", "lr_warmup_iters": "warmup_steps"}
    values = {names.get(name, name): value for name, value in given.values.items()}
    back = {new: old for old, new in names.items() if old in given}
    return Given(values, given.table, lambda name, value: given.spelled(back.get(name, name), value), given.looked_at)


_SETTLED = tuple(f"model.adapter.{name}" for name in OF_THE_ADAPTER)
"""What an adapter on disk has settled."""


def _set_model(given: Given, draft: Draft, family: str) -> None:
    draft.set(
        "trainer.optimizer.betas", [given["adam_beta1"], given["adam_beta2"]], given.texts("adam_beta1", "adam_beta2")
    )
    folds.set_precision(given, draft, "torch_dtype", "bfloat16")
    if "torch_dtype" not in given:
        draft.note(
            "default",
            "torch_dtype is read from the model's config.json there: bfloat16, as of nearly all, is written here",
        )
    if given["use_liger_kernel"]:
        draft.set("model.liger", True, given.text("use_liger_kernel"))
    tuners = [name for name in ("tuner_type", "train_type", "sft_type") if name in given] or ["tuner_type"]
    tuner = given[tuners[0]]
    is_adapted = swift_tuners.is_adapted(tuner)
    rate = given["lr"] if "lr" in given else given["learning_rate"]
    default = f"(the default with {tuner})"
    draft.set(
        "trainer.learning_rate",
        rate or (1e-4 if is_adapted or tuner == "llamapro" else 1e-5),
        given.texts("learning_rate", "lr") if rate else default,
    )
    swift_tuners.note_tuner(given, draft, tuners[0])
    swift_pictures.set_parts(given, draft)
    has_head = ALGORITHMS[draft.values["algorithm.name"]].learning.head != "token"
    if is_adapted:
        swift_tuners.set_tuner(given, draft, "head" if has_head else family, tuners[0])
    elif tuner == "llamapro":
        swift_tuners.set_expansion(given, draft)
    if adapters := as_list(given["adapters"]):
        settled = [key for key in draft.values if key.startswith(_SETTLED)]
        for key in settled:
            draft.values.pop(key)
        draft.set("model.adapter.path", adapters[0], given.text("adapters"))
    _set_reference(given, draft, adapters)
    if draft.values.get("model.path") is None and not adapters:
        draft.note("to do", "no --model is given: set model.path")
    if not given["use_hf"] and not Path(str(given["model"])).exists():
        draft.note(
            "to do",
            "ms-swift takes ids from ModelScope, rlflow from the Hugging Face hub: the same id may be missing "
            "there, or be called otherwise (LLM-Research, AI-ModelScope); a downloaded directory works too",
        )


def _set_reference(given: Given, draft: Draft, adapters: list[Any]) -> None:
    """Writes what a policy is compared with: there the base, unless ``ref_adapters`` says otherwise; here the adapter
    that it goes on from."""
    if "ref_adapters" not in given.table:
        return  # it trains by itself
    base = given["ref_model"] or draft.values.get("model.path")
    if named := as_list(given["ref_adapters"]):
        if named != adapters or given["ref_model"]:
            draft.set("reference.adapter", named[0], given.text("ref_adapters"))
    elif adapters and base is not None:
        draft.set("reference.path", base, "(the base, without ref_adapters)")
    elif adapters:
        draft.note("to do", "the reference is the base there, without ref_adapters: set reference.path to model.path")


def _held_out(given: Given, draft: Draft, sources: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, str]:
    if held_out := as_list(given["val_dataset"]):
        if len(held_out) > 1:
            draft.note("to do", f"{given.text('val_dataset')}: one set is measured; `rlflow eval` takes several")
        return sources_of(str(held_out[0]), given)[0], given.text("val_dataset")
    ratio = given["split_dataset_ratio"] or 0
    if ratio:
        draft.note(
            "to do",
            f"{given.text('split_dataset_ratio')}: rows are not split off by themselves; write two files, or of a "
            f'hub data set `split: "train[:{100 - math.ceil(ratio * 100)}%]"` and the rest in evaluation.data',
        )
    return None, ""


def _set_lengths(given: Given, draft: Draft, verb: str, family: str) -> None:
    where = "data.max_prompt_tokens" if family == "online" else "data.max_tokens"
    longest, window = given["max_length"], given["vllm_max_model_len"]
    if longest:
        draft.set(where, longest, given.text("max_length"))
    elif window and family == "online" and (left := window - draft.values.get("rollout.max_new_tokens", 512)) > 0:
        draft.set(where, left, f"{given.text('vllm_max_model_len')} less the completion")
    else:
        draft.note("default", f"without --max_length the model's own maximum holds there; here {where}'s default")
    if longest and window:
        draft.note(
            "unneeded",
            f"{given.text('vllm_max_model_len')}: longest prompt and completion together are the engine's window",
        )
    strategy = given["truncation_strategy"] or ("left" if family == "online" else "delete")
    if strategy == "split":
        draft.note("missing", f"{given.text('truncation_strategy')}: longer texts are cut or left out, not split")
    why = given.text("truncation_strategy") if "truncation_strategy" in given else f"({strategy}, the default)"
    draft.set("data.overlong", "drop" if strategy == "delete" else "truncate", why)
    if system := given["system"]:
        file = Path(str(system))
        is_file = str(system).endswith(".txt")
        if is_file and not file.is_file():
            draft.note("to do", f"{given.text('system')}: there is no such file here; put its text into data.system")
        else:
            draft.set("data.system", file.read_text(encoding="utf-8").strip() if is_file else str(system), "--system")
    if "ignore_empty_think" in str(given["loss_scale"]):
        draft.set("data.ignore_empty_think", True, given.text("loss_scale"))
    if given["packing"]:
        draft.note(
            "trap",
            f"{given.text('packing')}: there a batch counts packed rows of {longest or 'max_length'} tokens, here "
            "data.prompts_per_step counts examples. Micro-batches are packed always; for as many tokens a step "
            "raise data.prompts_per_step by the examples that one packed row held",
        )
    if verb == "pt" and given["use_chat_template"]:
        draft.note(
            "to do",
            f"{given.text('use_chat_template')}: pretrain takes texts; set algorithm.name: sft and data.loss_on: all",
        )
    elif verb == "sft" and given["use_chat_template"] is False:
        draft.set("data.train.format", "text", given.text("use_chat_template"))


def _set_batch(given: Given, draft: Draft, kind: str, machines: folds.Machines) -> grouped.Batch:
    """Rows a step, worked out of batches a device."""
    world = max(1, machines.gpus) // max(1, given["sequence_parallel_size"] or 1) or 1
    per_device, accumulation = given["per_device_train_batch_size"], given["gradient_accumulation_steps"]
    if accumulation is None:
        accumulation = 1 if kind == "grpo" else max(1, math.ceil(16 / per_device / world))
    if "global_batch_size" in given.table:
        per_device, accumulation, world = given["global_batch_size"], 1, 1
    if kind == "grpo":
        return grouped.set_batch(given, draft, world, per_device, accumulation)
    rows = per_device * accumulation * world
    why = f"{per_device} x {accumulation} accumulated x {world} processes"
    if kind == "ppo":
        mini = given["num_mini_batches"] or 1
        rows, why = rows * mini, f"{why} x {mini} mini-batches"  # what a step is there too
    draft.set("data.prompts_per_step", rows, why)
    return grouped.Batch(rows, 1)


def _set_grpo(given: Given, draft: Draft) -> None:
    grouped.set_loss(given, draft, high="epsilon_high")
    estimator = given["advantage_estimator"]
    by_default = {"grpo": "group", "rloo": "none", "reinforce_plus_plus": "batch"}.get(estimator, "group")
    if estimator == "rloo":
        draft.set("algorithm.name", "rloo", given.text("advantage_estimator"))
        draft.set("algorithm.advantage.estimator", "leave_one_out", given.text("advantage_estimator"))
    elif estimator == "reinforce_plus_plus":
        draft.set("algorithm.name", "reinforce++_baseline", given.text("advantage_estimator"))
        draft.set("algorithm.advantage.whiten", False, given.text("advantage_estimator"))
    if estimator != "rloo" or given["scale_rewards"] not in (None, "none", False):
        grouped.set_scale(given, draft, by_default, normalize_each=False)
    draft.set("algorithm.kl.coef", 0.04 if given["beta"] is None else given["beta"], given.text("beta"))
    in_reward = given["kl_in_reward"]
    in_reward = estimator != "grpo" if in_reward is None else in_reward
    draft.set("algorithm.kl.placement", "reward" if in_reward else "loss", given.text("kl_in_reward"))
    draft.set("algorithm.kl.estimator", "k1" if in_reward else "k3", given.text("kl_in_reward"))
    if given["loss_type"] == "sapo":
        draft.set("algorithm.loss.tau_positive", given["tau_pos"], given.text("tau_pos"))
        draft.set("algorithm.loss.tau_negative", given["tau_neg"], given.text("tau_neg"))
    if given["overlong_filter"]:
        draft.set("algorithm.groups.mask_truncated", True, given.text("overlong_filter"))
        draft.set(
            "algorithm.groups.count_masked", given["loss_type"] in ("dapo", "cispo"), given.text("overlong_filter")
        )
    if given["dynamic_sample"]:
        draft.set("algorithm.groups.max_resamples", given["max_resample_times"], given.text("max_resample_times"))
    why = given.texts("rollout_importance_sampling_mode", "rollout_importance_sampling_threshold")
    high = given["rollout_importance_sampling_threshold"]
    grouped.set_correction(draft, given["rollout_importance_sampling_mode"], why, low=None, high=high)
    names = [str(name) for name in as_list(given["reward_funcs"])]
    rewards = [reward_of(name, given, draft) for name in names] + reward_models(given)
    grouped.set_rewards(draft, rewards, as_list(given["reward_weights"]), given.texts("reward_funcs", "reward_model"))


def _set_ppo(given: Given, draft: Draft) -> None:
    draft.set("algorithm.kl.coef", given["kl_coef"], given.text("kl_coef"))
    for bound in ("clip_low", "clip_high"):
        draft.set(f"algorithm.loss.{bound}", given["cliprange"], given.text("cliprange"))
    draft.set(
        "algorithm.critic.learning_rate", draft.values["trainer.learning_rate"], given.texts("learning_rate", "lr")
    )
    models = reward_models(given)
    if models:
        draft.set("algorithm.critic.path", models[0]["args"]["path"], "the critic begins as the reward model, as there")
    grouped.set_rewards(draft, models, None, given.text("reward_model"))
    draft.set("algorithm.correction.mode", "none", "the engine is not corrected there")


def _set_preference(given: Given, draft: Draft, kind: str) -> None:
    default = 2.0 if kind == "simpo" else 0.1
    if kind != "rm":
        draft.set("algorithm.preference.beta", default if given["beta"] is None else given["beta"], given.text("beta"))
    losses = as_list(given["loss_type"])
    if kind == "dpo" and losses and losses[0] in _PAIR_LOSSES:
        draft.set("algorithm.preference.loss", losses[0], given.text("loss_type"))
    if kind == "kto" and losses == ["apo_zero_unpaired"]:
        draft.set("algorithm.name", "apo_zero_unpaired", given.text("loss_type"))
    if kind == "dpo":
        folds.set_divergence(given, draft)
    if len(losses) > 1 or (losses and losses[0] not in (*_PAIR_LOSSES, "kto", "simpo", "apo_zero_unpaired")):
        draft.note(
            "missing", f"{given.text('loss_type')}: one loss of a pair is trained (docs/algorithms.md lists them)"
        )
    if kind in ("cpo", "simpo"):
        alpha = given["cpo_alpha"]
        draft.set("algorithm.preference.sft_coef", alpha, given.text("cpo_alpha"))
    if kind == "simpo":
        draft.set("algorithm.preference.gamma", given["simpo_gamma"], given.text("simpo_gamma"))


def _set_rollouts(given: Given, draft: Draft, machines: folds.Machines) -> None:
    if given["vllm_mode"] == "server":
        where = given.texts("vllm_server_host", "vllm_server_port", "vllm_server_base_url")
        draft.note(
            "to do",
            f"{where}: rlflow starts its own engines, on GPUs beside the trainers'; servers of yours are engine http "
            "(rollout_server, docs/engines.md)",
        )
    if "use_vllm" in given and not given["use_vllm"]:
        draft.set("rollout.engine", "torch", given.text("use_vllm"))
    elif given["use_vllm"]:
        draft.set("rollout.engine", "vllm" if machines.gpus else "auto", given.text("use_vllm"))
    if "model.adapter.quantize" in draft.values:
        draft.set("rollout.engine", "torch", "the base in few bits is generated with by the torch engine")
