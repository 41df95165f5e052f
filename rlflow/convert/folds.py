"""What several flags are together, the same for all frameworks that are built on transformers' Trainer."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlflow.convert.given import Draft, Given
from rlflow.recipe.foreign.hugging_face import DTYPES, LORA_DROPOUT, trackers
from rlflow.recipe.foreign.rows import as_list


@dataclass(frozen=True, slots=True)
class Machines:
    """What a command was started on."""

    gpus: int
    """Processes, each with a GPU."""
    source: str
    """Where that was said."""


def on_cpu(given: Given, machines: Machines) -> Machines:
    """The machines of a command that may ask for none of the GPUs."""
    return Machines(0, given.text("use_cpu")) if given["use_cpu"] else machines


def set_machines(draft: Draft, machines: Machines, *, generates: bool, shared: bool, engine_gpus: int = 1) -> None:
    """Ranks of the trainer, and rollout workers, critic and reference beside them.

    Args:
        generates: The algorithm has rollouts.
        shared: There, engines, critic and reference take turns on the trainers' GPUs.
        engine_gpus: GPUs of one engine.
    """
    gpus, tokens = machines.gpus, draft.values.get("trainer.sequence_parallel", 1)
    if not gpus:
        draft.note("unneeded", f"{machines.source}: no GPU, as is the default")
        return
    engines, critics, references, halves = 0, 0, 0, False
    has_critic = any(name.startswith("algorithm.critic.") for name in draft.values)
    if generates:
        engines = max(1, gpus // 2 // engine_gpus) if shared else 1
        halves = shared and gpus == 1 and tokens == 1 and not has_critic
        draft.set("rollout.workers", engines, machines.source)
        draft.set("rollout.gpus_per_worker", 0.5 if halves else engine_gpus)
        draft.set("rollout.tensor_parallel_size", engine_gpus)
    left = max(1, gpus - engines * engine_gpus) if shared else gpus
    if draft.values.get("algorithm.kl.coef") and "model.adapter.rank" not in draft.values and left > 2:
        references = 1
        draft.set("reference.gpus_per_worker", 1)
    if has_critic:
        critics = max(tokens, (left - references) // 2 // tokens * tokens)
        draft.set("algorithm.critic.workers", critics)
        draft.set("algorithm.critic.gpus_per_worker", 1)
    trainers = max(tokens, (left - references - critics) // tokens * tokens)
    draft.set("trainer.workers", trainers, machines.source)
    draft.set("trainer.gpus_per_worker", 0.5 if halves else 1)
    if halves:
        most = min(0.45, draft.values.get("rollout.gpu_memory_fraction", 0.45))
        draft.set("rollout.gpu_memory_fraction", most, "the trainer keeps its weights on the same GPU")
        draft.note("to do", "one GPU for trainer and engine: each reserves half of it (gpus_per_worker: 0.5)")
    elif generates:
        others = {"engines": engines * engine_gpus, "the critic": critics, "the reference": references}
        said = ", ".join(f"{number} for {who}" for who, number in others.items() if number)
        shares = "which all shared in turns" if shared else "beside those of the engine's server"
        draft.note(
            "to do",
            f"{machines.source}: {gpus} GPUs, {shares}. Here each has its own: {trainers} for the trainer, {said}; "
            "deal them out as they fit. What a step trains on does not depend on it",
        )


def set_quantized_base(draft: Draft) -> None:
    """A base in few bits is trained by engine fsdp, on GPUs."""
    if "model.adapter.quantize" in draft.values:
        draft.set("trainer.gpus_per_worker", 1, "a base in few bits is trained on GPUs")
        for name in ("trainer.engine", "trainer.deepspeed.stage", "trainer.deepspeed.offload", "trainer.fsdp.offload"):
            draft.values.pop(name, None)
        if "rollout.gpus_per_worker" in draft.values:
            draft.set("rollout.gpus_per_worker", 1, draft.why["rollout.gpus_per_worker"])


def set_precision(given: Given, draft: Draft, dtype: str, default: str) -> None:
    """The model's dtype. ``dtype`` is the flag that names it, ``default`` what it is without."""
    named = given[dtype] or default
    draft.set("model.dtype", DTYPES.get(str(named), "bfloat16"), given.texts(dtype, "bf16", "fp16"))
    if named == "float16" or given["fp16"]:
        draft.set("model.dtype", "bfloat16", given.texts(dtype, "fp16"))
        draft.note("missing", "float16 is not trained here (no loss scaling): bfloat16 in its stead")


DIVERGENCES = {"reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "js_divergence": "js"}
"""``f_divergence_type`` of TRL and ms-swift -> ``preference.divergence``."""


def set_divergence(given: Given, draft: Draft) -> None:
    """What is between policy and reference in DPO, where the command says it."""
    named = given["f_divergence_type"]
    if named is None or named == "reverse_kl":
        return
    if named in DIVERGENCES:
        draft.set("algorithm.preference.divergence", DIVERGENCES[named], given.text("f_divergence_type"))
    else:
        there = ", ".join(DIVERGENCES)
        draft.note("missing", f"{given.text('f_divergence_type')}: there are {there}; the reverse KL stands for it")


def set_adapter(given: Given, draft: Draft, family: str, *, rank: str) -> None:
    """LoRA and its kin, under the names that both frameworks have."""
    draft.set("model.adapter.rank", given[rank], given.text(rank))
    draft.set("model.adapter.alpha", given["lora_alpha"], given.text("lora_alpha"))
    dropout = given["lora_dropout"]
    if dropout and family == "sft":
        draft.set("model.adapter.dropout", dropout, given.text("lora_dropout"))
    elif dropout:
        kind = "missing" if "lora_dropout" in given else "default"
        draft.note(kind, f"{given.text('lora_dropout')}: {LORA_DROPOUT}")
    if given["use_dora"]:
        draft.set("model.adapter.kind", "dora", given.text("use_dora"))
    if given["use_rslora"]:
        draft.set("model.adapter.rslora", True, given.text("use_rslora"))


def set_schedule(given: Given, draft: Draft, updates: int, rows: int | None, prompts_per_step: int) -> None:
    """How long, with which warm-up. ``updates``: optimizer updates a step, which the others call a step.

    Args:
        rows: Of the data, where it is known.
    """
    of_step = f" / {updates} optimizer updates a step" if updates > 1 else ""
    max_steps, steps = given["max_steps"], None
    if max_steps and max_steps > 0:
        steps = max(1, math.ceil(max_steps / updates))
        draft.set("run.steps", steps, given.text("max_steps") + of_step)
        if "num_train_epochs" in given:
            draft.note("unneeded", f"{given.text('num_train_epochs')}: max_steps decides")
    else:
        epochs = given["num_train_epochs"]
        draft.set("run.epochs", epochs, given.text("num_train_epochs"))
        steps = rows and max(1, math.ceil(rows * epochs / prompts_per_step))
    warmup = given["warmup_steps"] or 0
    ratio = given["warmup_ratio"] or 0.0
    if 0 < warmup < 1:
        ratio, warmup = warmup, 0
    if warmup:
        draft.set("trainer.warmup_steps", math.ceil(warmup / updates), given.text("warmup_steps") + of_step)
    elif ratio and steps:
        why = f"{given.texts('warmup_ratio', 'warmup_steps')} of {steps} steps"
        draft.set("trainer.warmup_steps", math.ceil(ratio * steps), why)
    elif ratio:
        text = given.texts("warmup_ratio", "warmup_steps")
        draft.note("to do", f"{text}: set trainer.warmup_steps to that share of the steps that `rlflow plan` prints")


def set_intervals(given: Given, draft: Draft, updates: int, *, best_counts: bool) -> None:
    """Checkpoints. ``best_counts``: the best one is among save_total_limit."""
    of_step = f" / {updates} optimizer updates a step" if updates > 1 else ""
    strategy = given["save_strategy"]
    if strategy == "epoch":
        draft.note("to do", f"{given.text('save_strategy')}: set run.save_every to the steps of an epoch")
    elif strategy == "no":
        draft.note("unneeded", f"{given.text('save_strategy')}: a checkpoint every 15 minutes costs little")
    elif "save_steps" in given and given["save_steps"] >= 1:
        every = max(1, round(given["save_steps"] / updates))
        draft.set("run.save_every", every, given.text("save_steps") + of_step)
    elif "save_steps" in given:
        draft.note("to do", f"{given.text('save_steps')}: a share of all steps; set run.save_every")
    if (limit := given["save_total_limit"] or 0) > 0:
        kept = max(1, limit - 1) if best_counts else limit
        draft.set(
            "run.keep_checkpoints",
            kept,
            given.text("save_total_limit") + (": the best one stays besides" if best_counts else ""),
        )


def set_evaluation(given: Given, draft: Draft, updates: int, source: Mapping[str, Any] | None, why: str) -> None:
    """The evaluation block, where there is held-out data."""
    if source is None:
        for name in ("eval_steps", "eval_strategy"):
            if name in given:
                draft.note("unneeded", f"{given.text(name)}: there is no held-out data")
        return
    for name, value in source.items():
        draft.set(f"evaluation.data.{name}", value, why)
    every = given["eval_steps"] or given["save_steps"]
    if given["eval_strategy"] == "epoch":
        draft.note("to do", f"{given.text('eval_strategy')}: set evaluation.every to the steps of an epoch")
    elif every and every >= 1:
        draft.set("evaluation.every", max(1, round(every / updates)), given.texts("eval_steps", "save_steps"))


def set_tracking(given: Given, draft: Draft) -> None:
    wanted = [name for name in as_list(given["report_to"]) if name not in ("none", "all")]
    found = trackers(wanted)
    draft.set("tracking", found, given.text("report_to"))
    for name in wanted:
        if name not in (found or ()):
            text = f"{given.text('report_to')}: no tracker is called {name}; metrics.jsonl and report.html have it all"
            draft.note("missing" if "report_to" in given else "unneeded", text)


def set_engine(given: Given, draft: Draft, name: str) -> None:
    """DeepSpeed's ZeRO by a name such as zero3_offload or a configuration file, or FSDP."""
    if (fsdp := given["fsdp"]) or given["fsdp_config"]:
        draft.set("trainer.engine", "fsdp", given.texts("fsdp", "fsdp_config"))
        if "offload" in str(fsdp):
            draft.set("trainer.fsdp.offload", True, given.text("fsdp"))
    if not name:
        return
    stage, offload = zero_of(name)
    why = given.text("deepspeed") if "deepspeed" in given else name
    if stage is None:
        draft.note("to do", f"{why}: its stage cannot be told from here; set trainer.engine and trainer.deepspeed")
    elif stage == 0:
        draft.set(
            "trainer.engine", "fsdp", f"{why}: ZeRO 0 shards nothing; FSDP2 needs less memory, with the same steps"
        )
    elif "model.adapter.quantize" in draft.values:
        draft.note("missing", f"{why}: a base in few bits is trained by engine fsdp")
    else:
        draft.set("trainer.engine", "deepspeed", why)
        draft.set("trainer.deepspeed.stage", stage, why)
        if offload != "none":
            draft.set("trainer.deepspeed.offload", offload, why)


def zero_of(name: str) -> tuple[int | None, str]:
    """Stage and offload of a built-in name (zero2_offload), a configuration file, or one whose name says it."""
    text = name if name.strip().startswith("{") else ""
    if name.endswith((".json", ".yaml", ".yml")) and Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    if isinstance(config, dict):
        config = config.get("deepspeed_config") or config
        zero = config.get("zero_optimization") or config
        places = {
            part: (zero.get(f"offload_{part}") or {}).get("device", "none")
            if isinstance(zero.get(f"offload_{part}"), dict)
            else zero.get(f"offload_{part}_device", "none")
            for part in ("param", "optimizer")
        }
        offload = "all" if places["param"] == "cpu" else "optimizer" if places["optimizer"] == "cpu" else "none"
        return zero.get("stage", zero.get("zero_stage")), offload
    lowered = os.path.basename(name).lower().replace("_", "").replace("-", "").replace("stage", "")
    stage = next((number for number in (3, 2, 1, 0) if f"zero{number}" in lowered), None)
    return stage, ("all" if stage == 3 else "optimizer") if "offload" in lowered else "none"


def rows_of(sources: list[dict[str, Any]]) -> int | None:
    """How many rows there are, where the sources say so or are text files that are here."""
    total = 0
    for source in sources:
        path = Path(str(source.get("path", "")))
        if "rows" in source:
            total += source["rows"]
        elif path.suffix in (".jsonl", ".ndjson") and path.is_file():
            with path.open("rb") as file:
                total += sum(1 for line in file if line.strip())
        else:
            return None
    return total


def set_sources(draft: Draft, sources: list[dict[str, Any]], why: str, columns: str = "") -> None:
    """The training data. ``columns``: where their names come from."""
    if len(sources) == 1:
        for name, value in sources[0].items():
            draft.set(f"data.train.{name}", value, columns if name == "columns" else why)
    elif sources:
        draft.set("data.train", sources, why)
