"""Whole runs in which an engine breaks after the first step: they stop, and the checkpoint before is intact."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rlflow
from rlflow import checkpoint
from rlflow.actors.rollout_worker import RolloutWorker
from rlflow.actors.weight_intake import WeightsTaken
from rlflow.driver.errors import RunError
from tests.local_actors import use_local_actors

RECIPE = """
run: {{output_dir: {out}, seed: 3, steps: 3, save_every: 1}}
model: {{path: {model}}}
algorithm: {{name: grpo, group_size: 2, kl: {{coef: 0.0}}}}
data: {{train: {{path: {rows}}}, prompts_per_step: 4, max_prompt_tokens: 32}}
rewards: [{{plugin: "{plugin}:length"}}]
rollout: {{engine: torch, max_new_tokens: 6, workers: 2}}
trainer: {{learning_rate: 1.0e-3}}
tracking: [jsonl]
"""
PLUGIN = """
def length(prompts, completions, **columns):
    return [float(len(c)) for c in completions]
"""


@pytest.fixture
def run(monkeypatch, tmp_path, tiny_model_dir):
    """Runs, expects the error, and says what it said; the first step must have been saved."""
    use_local_actors(monkeypatch)

    def run(expected: type[Exception], **overrides: Any) -> str:
        rows, plugin, recipe = tmp_path / "rows.jsonl", tmp_path / "rewards.py", tmp_path / "recipe.yaml"
        rows.write_text("".join(json.dumps({"prompt": f"Say {word}."}) + "\n" for word in "abcdefgh"))
        plugin.write_text(PLUGIN)
        given = {"out": tmp_path / "run", "model": tiny_model_dir, "rows": rows, "plugin": plugin}
        recipe.write_text(RECIPE.format(**given))
        with pytest.raises(expected) as raised:
            rlflow.run(recipe, overrides=overrides)
        assert newest(tmp_path / "run").name.startswith("step_")
        return str(raised.value)

    return run


def newest(directory: Path) -> Path:
    path = checkpoint.newest_valid(directory / "checkpoints", print)
    assert path is not None
    return path


@pytest.fixture
def broken(monkeypatch):
    """Changes what a worker returns, once it has other weights than the first."""

    def broken(change: Callable[[Any], Any]) -> None:
        collect = RolloutWorker.collect

        @wraps(collect)
        def changed(self, *args, **kwargs):
            collected = collect(self, *args, **kwargs)
            if collected.batch is None or collected.status.version < 1:
                return collected
            return replace(collected, batch=change(collected.batch))

        monkeypatch.setattr(RolloutWorker, "collect", changed)

    return broken


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: replace(b, texts=("?", *b.texts[1:])), "the text of row 0 is"),
        (lambda b: replace(b, texts=b.texts[:-1]), "texts for"),
        (lambda b: replace(b, logprobs=np.where(b.is_sampled, np.inf, 0.0)), "logprobs are none, the first inf"),
        (lambda b: replace(b, token_ids=b.token_ids + 1000 * b.is_sampled), "token ids are none, the first 10"),
        (lambda b: replace(b, token_ids=b.token_ids[::-1]), "goes on from another prompt"),
        (lambda b: replace(b, versions=b.versions + 5), "the newest is 1"),
    ],
)
def test_what_cannot_be_trained_stops_the_run_with_the_workers_name(run, broken, change, says):
    broken(change)
    said = run(RunError)
    assert re.match(r"rollout\[[01]\] returned what cannot be trained or measured: ", said)
    assert says in said
    assert "Nothing of it was used" in said


@pytest.mark.slow
def test_a_worker_that_keeps_its_old_weights_stops_the_run(run, monkeypatch):
    load_weights = RolloutWorker.load_weights

    @wraps(load_weights)
    def stuck(self, snapshot, *args):
        if self.rank == 0 or snapshot.version == 0:
            return load_weights(self, snapshot, *args)
        return WeightsTaken(are_here=True)

    monkeypatch.setattr(RolloutWorker, "load_weights", stuck)
    said = run(RunError)
    assert said.startswith("rollout[1] was given policy version 1, and its engine still has 0")


@pytest.mark.slow
def test_an_engine_whose_weights_are_not_numbers_says_so_itself(run, monkeypatch):
    load_weights = RolloutWorker.load_weights

    @wraps(load_weights)
    def poisoned(self, snapshot, *args):
        taken = load_weights(self, snapshot, *args)
        if snapshot.version >= 1:
            next(self.engine.engine.engine.model.parameters()).data.fill_(float("nan"))
        return taken

    monkeypatch.setattr(RolloutWorker, "load_weights", poisoned)
    said = run(RunError)
    assert "collect: ValueError: the engine, at policy version 1, returned what is no rollout: " in said
    assert "logprobs are none, the first nan" in said
