"""Every recipe that is shipped runs: two steps in this process, on a tiny model and a few rows like its data's."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

import rlflow
from rlflow.data.new_model import sees
from rlflow.recipe import ALGORITHMS, GenerativeRerankerBlock, Recipe, SampleBlock, SourceBlock, load_recipe
from tests.local_actors import use_local_actors

DIRECTORY = Path(__file__).resolve().parent.parent / "recipes"
LATER = ("\nextends: ", "\nstages:")
RECIPES = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * any(key in path.read_text() for key in LATER))
    for path in sorted(DIRECTORY.glob("*.yaml"))
]
"""Those that change little of another one, its algorithm for the most, and those of several stages are not of the quick
round."""

PLUGIN = """
def code(completions):
    return [sum(map(ord, text)) % 7 / 7 for text in completions]
"""
"""A reward that differs between the answers of an untrained model, so that there is something to learn."""

HUMAN = "\n\nHuman: Say {}.\n\nAssistant:"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")

ROWS: dict[str, list[dict[str, Any]]] = {
    "openai/gsm8k": [{"question": f"What is {n} + 1?", "answer": f"It is one more.\nA: {n + 1}"} for n in range(8)],
    "Anthropic/hh-rlhf": [
        {"chosen": f"{HUMAN.format(n)} {n}", "rejected": f"{HUMAN.format(n)} no, not {n}"} for n in range(8)
    ],
    "llamafactory/alpaca_en": [
        {"instruction": f"Say {n}.", "input": "Be short." if n % 2 else "", "output": f"{n}."} for n in range(8)
    ],
    "gsm8k_retrieval.py": [{"question": f"What is {n} + 1?", "answer": f"It is one more, {n + 1}."} for n in range(8)],
    "gsm8k_solutions.py": [
        {
            "question": f"What is {n} + 1?",
            "ground_truth": f"A: {n + 1}",
            **{model: {"is_correct": k < 2, "solution": f"A: {n + k // 2}"} for k, model in enumerate(MODELS, 1)},
        }
        for n in range(40)
    ],
}
"""A few rows with the columns of each data set that a recipe names."""


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES)
def test_two_steps_of_a_recipe_leave_finite_metrics_and_a_model(
    path, monkeypatch, tiny_model_dir, tiny_teacher_dir, tmp_path
):
    use_local_actors(monkeypatch)
    stages = load_recipe(path)
    overrides = {"model.path": str(tiny_model_dir), "model.architecture": None, "model.characters": None}
    if sees(stages[0].model) and not all(map(importlib.util.find_spec, ("torchvision", "sklearn"))):
        pytest.skip("needs torchvision and scikit-learn")
    if stages[0].environment is not None or sees(stages[0].model):
        # What it says, how calls are written, and what it sees with, is of the recipe's own small model.
        overrides = {}
    overrides |= {"run.output_dir": str(tmp_path / "run"), "tracking": ["jsonl"]}
    for recipe in stages:
        prefix = f"stages.{recipe.stage}." if recipe.stage else ""
        overrides |= {prefix + key: value for key, value in small(recipe, tmp_path, tiny_teacher_dir).items()}
    rlflow.run(path, overrides=overrides)
    for recipe in stages:
        directory = tmp_path / "run" / (recipe.stage or "")
        written = "config.json" if recipe.model.adapter is None else "adapter_config.json"
        assert (directory / "final" / (written if recipe.trains else "rows.jsonl")).exists()
        check_metrics(recipe, directory / "metrics.jsonl")


def check_metrics(recipe: Recipe, path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines:
        # The file has null for NaN and infinity.
        assert [key for key, value in line.items() if value is None or not math.isfinite(value)] == []
    for line in lines[1:] if recipe.trains else []:
        assert line["trainer/skipped"] == 0
        assert line["trainer/grad_norm"] > 0
    if recipe.evaluation is not None:
        for line in (lines[0], lines[-1]) if recipe.trains else lines[:1]:
            assert any(key.startswith("eval/") for key in line)


def small(recipe: Recipe, directory: Path, teacher_dir: Path) -> dict[str, Any]:
    """What makes a stage short: keys and values to override."""
    assert isinstance(recipe.data.train, SourceBlock)
    changes: dict[str, Any] = {}
    if recipe.data.train.stage is None:
        changes |= source_of_few_rows("data.train", recipe.data.train, directory)
    if recipe.environment is None:
        changes |= {"data.max_prompt_tokens": 192, "data.max_tokens": 192, "rollout.max_new_tokens": 8}
    changes |= {
        "data.prompts_per_step": 4,
        "rollout.engine": "torch",
        "trainer.tokens_per_micro_batch": 512,
        "run.steps": 2,
        "run.epochs": None,
        "run.stop_at_score": None,
    }
    changes |= {f"{role}.cpus_per_worker": 1 for role in ("rollout", "trainer", "reference")}
    if recipe.data.system is not None:
        changes["data.system"] = "Be short."
    if recipe.demonstrations is not None:
        assert isinstance(recipe.demonstrations.train, SourceBlock)
        changes |= source_of_few_rows("demonstrations.train", recipe.demonstrations.train, directory)
        changes["demonstrations.per_step"] = 2
    if recipe.critic is not None:
        changes |= {"algorithm.critic.warmup_steps": 0, "algorithm.critic.cpus_per_worker": 1}
    if isinstance(recipe.algorithm, GenerativeRerankerBlock):
        # Words of one token each.
        changes |= {"algorithm.answers.positive": "y", "algorithm.answers.negative": "n"}
    if isinstance(recipe.algorithm, SampleBlock):
        changes |= {"algorithm.keep.where": None, "rewards": [code_reward(directory)]}
    if recipe.family == "online":
        changes["algorithm.group_size"] = min(recipe.online.group_size, 2)
        if recipe.rewards:
            changes["rewards"] = [*own_rewards(recipe, directory), code_reward(directory)]
    if recipe.needs_teacher:
        changes |= {"teacher.path": str(teacher_dir), "teacher.cpus_per_worker": 1}
    if recipe.evaluation is not None:
        changes |= source_of_few_rows("evaluation.data", recipe.evaluation.data, directory)
        changes["evaluation.data.rows"] = 4
    return changes


def source_of_few_rows(key: str, source: SourceBlock, directory: Path) -> dict[str, Any]:
    """The same source with its path put to a file of our own; what needs no file stays as it is."""
    if source.generator is not None and "path" not in source.args:
        return {}
    name = source.path or Path((source.generator or "").rpartition(":")[0]).name
    file = directory / f"{Path(name).stem}_{key}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    return {f"{key}.path" if source.path else f"{key}.args.path": str(file)}


def own_rewards(recipe: Recipe, directory: Path) -> list[dict[str, Any]]:
    """The recipe's rewards; a path in the run's directory follows it."""
    rewards = [reward.model_dump(exclude_defaults=True) for reward in recipe.rewards]
    for reward in rewards:
        if "path" in reward.get("args", {}):
            stage, final = Path(reward["args"]["path"]).parts[-2:]
            reward["args"]["path"] = str(directory / "run" / stage / final)
    return rewards


def code_reward(directory: Path) -> dict[str, Any]:
    (directory / "code_reward.py").write_text(PLUGIN)
    return {"plugin": f"{directory / 'code_reward.py'}:code"}


def test_every_row_of_the_table_has_a_recipe_that_bears_its_name():
    for name in ALGORITHMS:
        prefix = name.replace("+", "p")
        named = DIRECTORY.glob(f"{prefix}_*.yaml")
        assert any(stage.algorithm.name == name for path in named for stage in load_recipe(path)), name
