"""``args.json``: beside a checkpoint and in ``final/``, what was trained how, in ms-swift's words.

`swift infer --adapters DIR` and `swift export --adapters DIR` read it for the base, dtype, system message and kind of
training (swift/arguments/base_args/base_args.py, version 4, ``load_args_from_ckpt``), and so do ours. Of its template
names there is none: ms-swift then takes the model's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlflow.recipe import AdapterBlock, AlgorithmBlock, ClassificationBlock, Recipe
from rlflow.recipe.peft_methods import method_of
from rlflow.tracking.redact import redact

ARGS = "args.json"
_TRUNCATION = {"error": "raise", "drop": "delete", "truncate": "right"}
"""ms-swift's ``truncation_strategy``, of ``data.overlong``."""
_TASKS = {
    "reward_model": "seq_cls",
    "classification": "seq_cls",
    "embedding": "embedding",
    "reranking": "reranker",
    "yes_no": "generative_reranker",
}
"""ms-swift's ``task_type``, of a row's ``objective``; of others causal_lm."""


def write_args(directory: Path, recipe: Recipe, run_directory: Path) -> None:
    """Writes the file into a directory that exists.

    Args:
        run_directory: Of the stage, which holds the start of a model with random weights.
    """
    values = _arguments(recipe, recipe.model.path or str(run_directory / "initial_model"))
    (directory / ARGS).write_text(json.dumps(redact(values), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_merged_args(source: Path, directory: Path) -> None:
    """Writes what is left of an adapter's ``args.json`` once it is part of a model; nothing where there is none."""
    values = {key: value for key, value in read_args(source).items() if not key.startswith(("quant_", "bnb_"))}
    if values:
        values |= {"tuner_type": "full", "adapters": []}
        (directory / ARGS).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_args(directory: Path) -> Mapping[str, Any]:
    """What an ``args.json`` says, ours or ms-swift's; empty where there is none that can be read."""
    try:
        values = json.loads((directory / ARGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _arguments(recipe: Recipe, start: str) -> dict[str, Any]:
    model, data, rollout, trainer = recipe.model, recipe.data, recipe.rollout, recipe.trainer
    learning = recipe.algorithm.learning
    name, is_online = recipe.algorithm.name, learning.family == "online"
    values: dict[str, Any] = {
        "model": start,
        "model_revision": model.revision,
        "torch_dtype": model.dtype,
        "task_type": _TASKS.get(learning.objective, "causal_lm"),
        "num_labels": _num_labels(recipe.algorithm),
        "rlhf_type": None if learning.family == "sft" else {"reward_model": "rm"}.get(name, name),
        "template": None,
        "system": data.system,
        "truncation_strategy": _TRUNCATION[data.overlong],
        "max_length": data.max_prompt_tokens + rollout.max_new_tokens if is_online else data.max_tokens,
        "max_completion_length": rollout.max_new_tokens if is_online else None,
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "top_k": rollout.top_k or None,
        "repetition_penalty": recipe.sampling.repetition_penalty,
        "stop_words": recipe.sampling.stop,
        "learning_rate": trainer.learning_rate,
        "max_steps": recipe.run.steps,
        "num_train_epochs": recipe.run.epochs,
        "seed": recipe.run.seed,
        "output_dir": recipe.run.output_dir,
        "adapters": [],
        "tuner_type": "full",
    }
    return values if model.adapter is None else values | _of_adapter(model.adapter, model.dtype)


def _num_labels(algorithm: AlgorithmBlock) -> int | None:
    if isinstance(algorithm, ClassificationBlock):
        return algorithm.classification.num_outputs
    return 1 if algorithm.learning.head == "scalar" else None


def _of_adapter(adapter: AdapterBlock, dtype: str) -> dict[str, Any]:
    if adapter.peft is not None:
        config = adapter.config
        return {"tuner_type": method_of(config).lower(), "target_modules": config.get("target_modules")}
    values: dict[str, Any] = {
        "tuner_type": "lora",
        "adapters": [] if adapter.path is None else [adapter.path],
        "lora_rank": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": adapter.target_modules,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.kind == "dora",
        "lorap_lr_ratio": adapter.lora_plus_ratio,
    }
    if adapter.quantize == "nf4":
        values |= {
            "quant_method": "bnb",
            "quant_bits": 4,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
    elif adapter.quantize == "int8":
        values |= {"quant_method": "bnb", "quant_bits": 8}
    return values
