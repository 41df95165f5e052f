"""A command of verl -> a recipe: what its keys are together."""

from __future__ import annotations

import math
import re
from typing import Any

from rlflow.convert import folds, grouped
from rlflow.convert.given import Draft, Given, apply_rows
from rlflow.convert.verl_losses import KINDS, set_kind
from rlflow.recipe.foreign.hugging_face import trackers
from rlflow.recipe.foreign.rows import as_list
from rlflow.recipe.foreign.verl import ACTOR, MODEL, ROLLOUT

ESTIMATORS = {
    "gae": "ppo",
    "grpo": "grpo",
    "rloo": "rloo",
    "reinforce_plus_plus": "reinforce++",
    "reinforce_plus_plus_baseline": "reinforce++_baseline",
    "grpo_vectorized": "grpo",
    "rloo_vectorized": "rloo",
    "opo": "opo",
    "remax": "remax",
}
REDUCTIONS = {
    "token-mean": "token",
    "seq-mean-token-mean": "sequence",
    "seq-mean-token-sum-norm": "fixed_length",
}
LOSSES = {"vanilla": "", "gspo": "gspo", "sapo": "sapo", "cispo": "cispo", **KINDS}
"""``loss_mode`` -> the row whose loss it is; grpo's and ppo's are the row's own."""
KL = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3", "abs": "abs"}


def draft_of(verb: str, given: Given, machines: folds.Machines) -> Draft:
    """The recipe of main_ppo (``ppo``) or of the SFT trainer (``sft``)."""
    draft = Draft()
    family = "online" if verb == "ppo" else "sft"
    estimator = "sft" if verb == "sft" else str(given["algorithm.adv_estimator"])
    name = ESTIMATORS.get(estimator, "sft" if verb == "sft" else "grpo")
    draft.set("algorithm.name", name, "verl's SFT trainer" if verb == "sft" else given.text("algorithm.adv_estimator"))
    if verb == "ppo" and estimator not in ESTIMATORS:
        draft.note(
            "missing", f"{given.text('algorithm.adv_estimator')}: there is no such estimator; grpo's stands for it"
        )
    apply_rows(given, draft, family)
    model = MODEL if verb == "ppo" else "model"
    if rank := given[f"{model}.lora_rank"]:
        draft.set("model.adapter.rank", rank, given.text(f"{model}.lora_rank"))
        draft.set("model.adapter.alpha", given[f"{model}.lora_alpha"], given.text(f"{model}.lora_alpha"))
        targets = as_list(given[f"{model}.target_modules"])
        if targets and targets != ["all-linear"]:
            draft.set("model.adapter.target_modules", targets, given.text(f"{model}.target_modules"))
    draft.set("model.dtype", "bfloat16", "weights in float32, computed with in bfloat16")
    prompts = draft.values["data.prompts_per_step"]
    sources = _set_data(given, draft, verb)
    if verb == "ppo":
        _set_updates(given, draft, prompts)
        _set_policy(given, draft, name)
        _set_kl(given, draft)
        _set_correction(given, draft)
        _set_rewards(given, draft)
        _set_resources(given, draft)
    else:
        draft.set("data.loss_on", "all_assistant" if given["data.multiturn.enable"] else "last_assistant", "")
    _set_duration(given, draft, verb, folds.rows_of(sources), prompts)
    if (found := trackers(given["trainer.logger"])) is not None:
        draft.set("tracking", found, given.text("trainer.logger"))
    others = [name for name in as_list(given["trainer.logger"]) if name not in ("console", *(found or ()))]
    if others:
        draft.note("missing", f"{given.text('trainer.logger')}: no tracker is called {', '.join(map(str, others))}")
    gpus = _machines(given, draft, machines)
    if given["trainer.device"] == "cpu":
        gpus = folds.Machines(0, given.text("trainer.device"))
    tensor = given[f"{ROLLOUT}.tensor_model_parallel_size"] if verb == "ppo" else 1
    folds.set_machines(draft, gpus, generates=verb == "ppo", shared=True, engine_gpus=min(tensor, max(1, gpus.gpus)))
    return draft


def _machines(given: Given, draft: Draft, machines: folds.Machines) -> folds.Machines:
    """GPUs a node times nodes, unless the user says otherwise; verl starts its processes itself."""
    names = ("trainer.n_gpus_per_node", "trainer.nnodes")
    if machines.source.startswith("--gpus"):
        return machines
    counts = [given[name] for name in names]
    for name, count in zip(names, counts, strict=True):
        if not isinstance(count, int):
            draft.note("to do", f"{given.text(name)}: not a number; 1 is taken (rlflow convert --gpus N)")
    numbers = [count if isinstance(count, int) else 1 for count in counts]
    return folds.Machines(numbers[0] * numbers[1], given.texts(*names))


def _set_data(given: Given, draft: Draft, verb: str) -> list[dict[str, Any]]:
    columns: dict[str, str] = {}
    if verb == "ppo":
        prompt = given["data.prompt_key"] or "prompt"
        columns = {"solution": "reward_model", **({"prompt": prompt} if prompt != "prompt" else {})}
    elif given["data.multiturn.enable"]:
        named = given["data.multiturn.messages_key"]
        columns = {} if named == "messages" else {"messages": named}
    else:
        columns = {"prompt": given["data.prompt_key"], "response": given["data.response_key"]}
        inner = {name: as_list(given[f"data.{name}_dict_keys"]) for name in ("prompt", "response")}
        if any(inner.values()):
            draft.note(
                "to do",
                f"{given.texts('data.prompt_dict_keys', 'data.response_dict_keys')}: the text is in an object of the "
                "column; write a file with plain columns, or read it by a generator",
            )
    sources = []
    for path in as_list(given["data.train_files"]):
        rows = given["data.train_max_samples"]
        sources.append({"path": str(path), **({"rows": rows} if rows and rows > 0 else {}), "columns": columns})
    if verb == "ppo":
        draft.note(
            "default", "the answer is the ground_truth of the column reward_model, as verl's preprocessing writes it"
        )
    sources = [{name: value for name, value in source.items() if value} for source in sources]
    folds.set_sources(draft, sources, given.texts("data.train_files", "data.train_max_samples"), "as verl's rows are")
    held_out = as_list(given["data.val_files"])
    if held_out and held_out != ["null"]:
        draft.set("evaluation.data.path", str(held_out[0]), given.text("data.val_files"))
        draft.set("evaluation.data.columns", columns or None, "as the training data's")
        if (rows := given["data.val_max_samples"]) and rows > 0:
            draft.set("evaluation.data.rows", rows, given.text("data.val_max_samples"))
        if len(held_out) > 1:
            draft.note(
                "to do",
                f"{given.text('data.val_files')}: the first is measured; make `evaluation` a list of a block for each",
            )
    else:
        for name in [name for name in draft.values if name.startswith("evaluation.")]:
            del draft.values[name]
    truncation = given["data.truncation"]
    is_filtered = verb == "ppo" and given["data.filter_overlong_prompts"]
    how = "drop" if is_filtered else "error" if truncation == "error" else "truncate"
    draft.set(
        "data.overlong",
        how,
        given.texts("data.filter_overlong_prompts", "data.truncation")
        if verb == "ppo"
        else given.text("data.truncation"),
    )
    return sources


def _set_updates(given: Given, draft: Draft, prompts: int) -> None:
    mini = given[f"{ACTOR}.ppo_mini_batch_size"]
    why = f"{prompts} prompts a step / {given.text(f'{ACTOR}.ppo_mini_batch_size')}"
    draft.set("algorithm.groups.updates_per_step", max(1, prompts // mini), why)
    if mini > prompts or prompts % mini:
        draft.note(
            "trap", f"{given.text(f'{ACTOR}.ppo_mini_batch_size')} does not divide {prompts} prompts: verl refuses it"
        )
    if given[f"{ACTOR}.use_dynamic_bsz"] and (tokens := given[f"{ACTOR}.ppo_max_token_len_per_gpu"]):
        draft.set("trainer.tokens_per_micro_batch", tokens, given.text(f"{ACTOR}.ppo_max_token_len_per_gpu"))


def _set_policy(given: Given, draft: Draft, name: str) -> None:
    mode = str(given[f"{ACTOR}.policy_loss.loss_mode"])
    why = given.text(f"{ACTOR}.policy_loss.loss_mode")
    if mode not in LOSSES:
        draft.note("missing", f"{why}: there is no such loss; the clip stands for it")
    if LOSSES.get(mode) and name == "grpo":
        draft.set("algorithm.name", LOSSES[mode], why)
    aggregation = str(given[f"{ACTOR}.loss_agg_mode"])
    if aggregation not in REDUCTIONS:
        draft.note("missing", f"{given.text(f'{ACTOR}.loss_agg_mode')}: token means and fixed lengths are there")
    draft.set("algorithm.loss.reduction", REDUCTIONS.get(aggregation, "token"), given.text(f"{ACTOR}.loss_agg_mode"))
    draft.set("algorithm.loss.ratio", "sequence" if mode == "gspo" else "token", why)
    _set_clip(given, draft, mode, why)
    if mode in KINDS:
        set_kind(given, draft, mode, name)
    if name == "ppo":
        draft.set("algorithm.advantage.gamma", given["algorithm.gamma"], given.text("algorithm.gamma"))
        draft.set("algorithm.advantage.gae_lambda", given["algorithm.lam"], given.text("algorithm.lam"))
        draft.set("algorithm.critic.learning_rate", given["critic.optim.lr"], given.text("critic.optim.lr"))
        draft.set("algorithm.critic.clip", given["critic.cliprange_value"], given.text("critic.cliprange_value"))
        draft.set("algorithm.critic.path", given["critic.model.path"], given.text("critic.model.path"))
        draft.set(
            "algorithm.critic.warmup_steps", given["trainer.critic_warmup"] or None, given.text("trainer.critic_warmup")
        )
    elif name == "reinforce++":
        draft.set("algorithm.advantage.gamma", given["algorithm.gamma"], given.text("algorithm.gamma"))
    elif name == "grpo":
        scale = "group_std" if given["algorithm.norm_adv_by_std_in_grpo"] else "none"
        draft.set("algorithm.advantage.scale", scale, given.text("algorithm.norm_adv_by_std_in_grpo"))
        draft.set("algorithm.advantage.eps", 1e-6, "verl's")
    if draft.values.get("algorithm.groups.require_signal"):
        drawn = given["algorithm.filter_groups.max_num_gen_batches"]
        draft.set(
            "algorithm.groups.max_resamples",
            drawn if drawn and drawn > 0 else None,
            given.text("algorithm.filter_groups.max_num_gen_batches"),
        )
    _set_overlong(given, draft)


def _set_clip(given: Given, draft: Draft, mode: str, why: str) -> None:
    if mode in ("dppo_tv", "dppo_kl", "kl_cov"):
        return
    plain = given[f"{ACTOR}.clip_ratio"]
    bounds = {f"clip_{side}": given[f"{ACTOR}.clip_ratio_{side}"] for side in ("low", "high")}
    if mode == "sapo":
        for ours, theirs in (("tau_positive", "tau_pos"), ("tau_negative", "tau_neg")):
            draft.set(f"algorithm.loss.{ours}", given[f"{ACTOR}.{theirs}"], given.text(f"{ACTOR}.{theirs}"))
        return
    for bound, value in bounds.items():
        flag = f"{ACTOR}.{bound.replace('clip', 'clip_ratio')}"
        draft.set(
            f"algorithm.loss.{bound}", plain if value is None else value, given.texts(flag, f"{ACTOR}.clip_ratio")
        )
    if mode == "vanilla":
        draft.set("algorithm.loss.dual_clip", given[f"{ACTOR}.clip_ratio_c"], given.text(f"{ACTOR}.clip_ratio_c"))


def _set_overlong(given: Given, draft: Draft) -> None:
    for block in ("reward_model.reward_kwargs.overlong_buffer_cfg", "reward_model.overlong_buffer"):
        if given[f"{block}.enable"] and given[f"{block}.len"]:
            longest = draft.values["rollout.max_new_tokens"]
            draft.set(
                "algorithm.groups.overlong_buffer",
                given[f"{block}.len"] / longest,
                f"{given.text(f'{block}.len')} of {longest}",
            )
            draft.set(
                "algorithm.groups.overlong_penalty",
                given[f"{block}.penalty_factor"],
                given.text(f"{block}.penalty_factor"),
            )


def _set_kl(given: Given, draft: Draft) -> None:
    if given["algorithm.use_kl_in_reward"]:
        draft.set("algorithm.kl.coef", given["algorithm.kl_ctrl.kl_coef"], given.text("algorithm.kl_ctrl.kl_coef"))
        draft.set("algorithm.kl.placement", "reward", given.text("algorithm.use_kl_in_reward"))
        estimator, why = str(given["algorithm.kl_penalty"]), given.text("algorithm.kl_penalty")
        if given["algorithm.kl_ctrl.type"] == "adaptive":
            draft.set(
                "algorithm.kl.target", given["algorithm.kl_ctrl.target_kl"], given.text("algorithm.kl_ctrl.target_kl")
            )
            draft.set(
                "algorithm.kl.horizon", given["algorithm.kl_ctrl.horizon"], given.text("algorithm.kl_ctrl.horizon")
            )
        if given[f"{ACTOR}.use_kl_loss"]:
            draft.note(
                "missing", f"{given.text(f'{ACTOR}.use_kl_loss')}: the KL is in the reward or in the loss, not in both"
            )
    elif given[f"{ACTOR}.use_kl_loss"]:
        draft.set("algorithm.kl.coef", given[f"{ACTOR}.kl_loss_coef"], given.text(f"{ACTOR}.kl_loss_coef"))
        draft.set("algorithm.kl.placement", "loss", given.text(f"{ACTOR}.use_kl_loss"))
        estimator, why = str(given[f"{ACTOR}.kl_loss_type"]), given.text(f"{ACTOR}.kl_loss_type")
    else:
        draft.set("algorithm.kl.coef", 0.0, given.texts(f"{ACTOR}.use_kl_loss", "algorithm.use_kl_in_reward"))
        return
    draft.set("algorithm.kl.estimator", KL.get(estimator.rstrip("+"), "k3"), why)
    if estimator.rstrip("+") not in KL:
        draft.note("missing", f"{why}: estimators are k1, k2, k3 and abs")


def _set_correction(given: Given, draft: Draft) -> None:
    block = "algorithm.rollout_correction"
    level, rejection = given[f"{block}.rollout_is"], given[f"{block}.rollout_rs"]
    why = given.texts(f"{block}.rollout_is", f"{block}.rollout_rs")
    if level in ("token", "sequence"):
        high = given[f"{block}.rollout_is_threshold"]
        grouped.set_correction(draft, f"{level}_truncate", why, low=None, high=high)
    else:
        draft.set("algorithm.correction.mode", "none", why)
    if rejection:
        draft.note(
            "missing", f"{given.text(f'{block}.rollout_rs')}: one correction at a time; mode: mask rejects alone"
        )
    if given[f"{block}.bypass_mode"]:
        draft.set("algorithm.correction.mode", "none", given.text(f"{block}.bypass_mode"))
        draft.set("algorithm.correction.old_policy", "engine", given.text(f"{block}.bypass_mode"))
        for name in ("level", "low", "high"):
            draft.values.pop(f"algorithm.correction.{name}", None)


def _set_rewards(given: Given, draft: Draft) -> None:
    rewards: list[dict[str, Any]] = []
    why = given.texts("custom_reward_function.path", "reward_model.enable")
    if path := given["custom_reward_function.path"]:
        function = given["custom_reward_function.name"]
        rewards.append({"plugin": f"{path}:{function}"})
        draft.note(
            "to do",
            f"{path}:{function} has verl's signature (data_source, solution_str, ground_truth, extra_info) for one "
            "completion; rlflow's takes lists: docs/from_verl.md has the three lines that wrap it",
        )
    elif given["reward_model.enable"] is not True:
        rewards.append({"name": "math_accuracy"})
        draft.note(
            "to do",
            "verl chooses a function by the rows' data_source; math_accuracy is right for gsm8k, MATH and DAPO's set",
        )
    if given["reward_model.enable"]:
        path = given["reward_model.model.path"] or "~/models/FsfairX-LLaMA3-RM-v0.1"
        rewards.append({"name": "reward_model", "args": {"path": str(path)}, "timeout_s": 60})
    grouped.set_rewards(draft, rewards, None, why)


def _set_resources(given: Given, draft: Draft) -> None:
    engine = given[f"{ROLLOUT}.name"]
    if engine == "vllm":
        draft.set("rollout.engine", "vllm", given.text(f"{ROLLOUT}.name"))
    elif engine:
        draft.note(
            "missing", f"{given.text(f'{ROLLOUT}.name')}: engines are vllm, torch and http; vllm is taken with GPUs"
        )
    offload = [
        name
        for name in ("param_offload", "optimizer_offload", "offload_policy")
        if given[f"{ACTOR}.fsdp_config.{name}"]
    ]
    flags = [f"{ACTOR}.fsdp_config.{name}" for name in offload]
    if "offload_policy" in offload:
        draft.set("trainer.fsdp.offload", True, given.texts(*flags))
    elif offload:
        draft.note(
            "unneeded",
            f"{given.texts(*flags)}: makes room for the engine between its turns; here each has its own GPUs "
            "(trainer.fsdp.offload keeps weights and moments in the host's memory for good)",
        )
    if given[f"{ACTOR}.strategy"] == "megatron":
        draft.note("missing", f"{given.text(f'{ACTOR}.strategy')}: trainer.engine is fsdp or deepspeed")


def _set_duration(given: Given, draft: Draft, verb: str, rows: int | None, prompts: int) -> None:
    steps = given["trainer.total_training_steps"]
    if steps and steps > 0:
        draft.set("run.steps", steps, given.text("trainer.total_training_steps"))
    else:
        epochs = given["trainer.total_epochs"]
        draft.set("run.epochs", epochs, given.text("trainer.total_epochs"))
        steps = rows and math.ceil(rows * epochs / prompts)
    block = f"{ACTOR}.optim" if verb == "ppo" else "optim"
    warmup, ratio = given[f"{block}.lr_warmup_steps"], given[f"{block}.lr_warmup_steps_ratio"]
    if verb == "sft" and "optim.warmup_steps_ratio" in given:
        ratio = given["optim.warmup_steps_ratio"]
    if warmup and warmup > 0:
        draft.set("trainer.warmup_steps", warmup, given.text(f"{block}.lr_warmup_steps"))
    elif ratio and steps:
        draft.set(
            "trainer.warmup_steps",
            math.ceil(ratio * steps),
            f"{given.text(f'{block}.lr_warmup_steps_ratio')} of {steps} steps",
        )
    elif ratio:
        text = given.text(f"{block}.lr_warmup_steps_ratio")
        draft.note("to do", f"{text}: set trainer.warmup_steps to that share of the steps that `rlflow plan` prints")


def with_references(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a resolved or hand-written YAML, ``${data.seed}`` and its kin replaced by what they name."""

    def resolved(value: Any) -> Any:
        found = re.fullmatch(r"\$\{(?:oc\.select:)?([\w.]+)(?:,\s*(.*))?\}", value) if isinstance(value, str) else None
        if found is None:
            return value
        return resolved(values[found[1]]) if found[1] in values else (found[2] or None)

    return {name: resolved(value) for name, value in values.items()}
