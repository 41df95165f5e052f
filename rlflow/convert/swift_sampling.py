"""`swift sample` -> a recipe of one stage, whose rows another one trains on."""

from __future__ import annotations

from typing import Any

from rlflow.convert import folds
from rlflow.convert.given import Draft, Given, apply_rows
from rlflow.convert.swift_rewards import REWARDS
from rlflow.convert.swift_sources import sources_of
from rlflow.recipe.foreign.rows import as_list

_ENGINES = {"vllm": "vllm", "pt": "torch", "transformers": "torch"}
_OUTCOMES = {"math": "math_accuracy", **REWARDS}
"""ms-swift's names of what judges an outcome -> ours."""


def draft_of(given: Given, machines: folds.Machines) -> Draft | None:
    """The recipe of a command; None where it searches instead of drawing answers."""
    draft = Draft()
    if given["sampler_type"] not in ("sample", "distill"):
        return None
    draft.set("algorithm.name", "sample", "swift sample")
    apply_rows(given, draft, "")
    sources = [source for text in as_list(given["dataset"]) for source in sources_of(str(text), given)]
    folds.set_sources(draft, sources, given.text("dataset"), given.text("columns"))
    if not sources:
        draft.note("to do", "no --dataset is given: set data.train.path")
    draft.set("run.epochs", 1, "each prompt once")
    if adapters := as_list(given["adapters"]):
        draft.set("model.adapter.path", adapters[0], given.text("adapters"))
    if "torch_dtype" not in given:
        draft.set("model.dtype", "bfloat16", "read from the model's config.json there, bfloat16 as of nearly all")
    _set_engine(given, draft, machines)
    _set_rewards(given, draft)
    return draft


def _set_engine(given: Given, draft: Draft, machines: folds.Machines) -> None:
    engine = given["sampler_engine"]
    if engine == "client":
        draft.set("rollout.engine", "http", given.text("sampler_engine"))
        draft.note(
            "to do",
            f"{given.texts('base_url', 'api_key')}: a server of vLLM's or SGLang's that takes token ids and gives "
            "logprobs: name it in rollout_server.urls (docs/engines.md)",
        )
        return
    draft.set("rollout.engine", _ENGINES.get(engine, "vllm"), given.text("sampler_engine"))
    if machines.gpus:
        split = draft.values.get("rollout.tensor_parallel_size", 1)
        draft.set("rollout.gpus_per_worker", split, machines.source)
        draft.set("rollout.workers", max(1, machines.gpus // split), machines.source)


def _set_rewards(given: Given, draft: Draft) -> None:
    """What judges answers; there each prompt then leaves its best ones, each with the worst."""
    rewards: list[dict[str, Any]] = []
    if outcome := given["orm_model"]:
        name = _OUTCOMES.get(str(outcome))
        rewards.append({"name": name} if name else {"plugin": f"rewards.py:{outcome}"})
        if name is None:
            draft.note("to do", f"{given.text('orm_model')}: write it as a function, rewards.plugin: file.py:function")
    if process := given["prm_model"]:
        rewards.append({"name": "reward_model", "args": {"path": str(process)}, "timeout_s": 60})
        draft.note("default", f"{given.text('prm_model')}: scores whole answers, as a classifier of one label")
    if not rewards:
        return
    draft.set("rewards", rewards, given.texts("orm_model", "prm_model"))
    draft.set("algorithm.keep.form", "pairs", "with an ORM or a PRM rows have a rejected_response there")
    draft.set("algorithm.keep.at_most", given["n_best_to_keep"], given.text("n_best_to_keep"))
    conditions = [f"reward/{rewards[0].get('name', outcome)} > 0"] if outcome else []
    if process:
        conditions.append(f"reward/reward_model >= {given['prm_threshold']}")
    why = given.texts("orm_model", "prm_threshold")
    draft.set("algorithm.keep.where", " and ".join(conditions), f"{why}; algorithm.keep.form: answers is for SFT")
