"""A stage that loses an actor whose state its checkpoints hold: whole runs of a tiny model, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finished_runs import NEW_MODEL, RunRecipe, metrics_of, same_weights, steps_of

from rlflow.driver.errors import RunError
from rlflow.driver.learner import Learner

SFT: dict[str, Any] = {
    "algorithm": {"name": "sft"},
    "model": NEW_MODEL,
    "data": {"prompts_per_step": 4, "max_tokens": 32},
    "trainer": {"learning_rate": 1e-2, "schedule": "cosine"},
    "run": {"steps": 5, "save_every": 2},
}
PPO: dict[str, Any] = {
    **SFT,
    "algorithm": {"name": "ppo", "group_size": 2, "kl": {"coef": 0.05}},
    "data": {"prompts_per_step": 4, "max_prompt_tokens": 32},
    "rollout": {"max_new_tokens": 4},
}
REWARD = "def evenness(completions, **columns):\n    return [sum(map(ord, text)) % 7 for text in completions]\n"


@pytest.fixture
def run(run_recipe: RunRecipe, tmp_path: Path) -> Callable[..., Path]:
    """Runs five steps, saved after every second one, into ``tmp_path / name``; keywords are keys of the recipe."""
    rows, reward = tmp_path / "rows.jsonl", tmp_path / "evenness.py"
    rows.write_text("".join(json.dumps({"prompt": f"{i}+1=", "response": str(i + 1)}) + "\n" for i in range(12)))
    reward.write_text(REWARD)
    online = {**PPO, "rewards": [{"plugin": f"{reward}:evenness"}]}

    def run(name: str, family: str = "sft", **overrides: Any) -> Path:
        recipe = SFT if family == "sft" else online
        return run_recipe(recipe, name, **{"data__train__path": str(rows), **overrides})

    return run


@pytest.fixture
def lose(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Kills an actor of a role at the beginning of those updates, counted from 1 over all restarts. Returns the steps,
    counted from 0, whose updates have begun."""

    def lose(role: str, *updates: int) -> list[int]:
        begun: list[int] = []
        update = Learner.update

        def killing(learner: Learner, *args: Any) -> dict[str, float]:
            begun.append(args[1])
            if len(begun) in updates:
                group = learner._models[role].actors
                group.transport.kill(group.handles[0])
            return update(learner, *args)

        monkeypatch.setattr(Learner, "update", killing)
        return begun

    return lose


@pytest.mark.slow
@pytest.mark.parametrize(("family", "role"), [("sft", "trainer"), ("ppo", "trainer"), ("ppo", "critic")])
def test_a_stage_that_loses_a_trainer_goes_on_from_its_newest_checkpoint_to_the_same_weights(run, lose, family, role):
    undisturbed = run("undisturbed", family)
    begun = lose(role, 4)
    disturbed = run("disturbed", family)
    assert begun == [0, 1, 2, 3, 2, 3, 4]
    assert same_weights(undisturbed, disturbed)
    assert steps_of(disturbed) == steps_of(undisturbed)
    assert [line.get("fleet/stage_restarts", 0) for line in metrics_of(disturbed) if line["step"]] == [0, 0, 1, 1, 1]
    said = (disturbed / "logs" / "run.log").read_text()
    assert f"{role}[0]" in said and "the stage goes on with fresh actors (restart 1 of 3)" in said


@pytest.mark.slow
def test_a_lost_reference_costs_no_step_that_had_ended(run, lose):
    undisturbed = run("undisturbed", "ppo")
    begun = lose("reference", 3)
    disturbed = run("disturbed", "ppo")
    assert begun == [0, 1, 2, 3, 4] and same_weights(undisturbed, disturbed)


def test_too_many_losses_end_the_run_and_name_the_last(run, lose):
    begun = lose("trainer", 3, 4, 5)
    with pytest.raises(RunError, match=r"trainer\[0\]"):
        run("run", run__max_restarts=2)
    assert begun == [0, 1, 2, 2, 2]


def test_without_a_checkpoint_a_loss_ends_the_run(run, lose):
    begun = lose("trainer", 2)
    with pytest.raises(RunError, match=r"trainer\[0\]"):
        run("run")
    assert begun == [0, 1]
