"""Runs of a window over a fleet without models, and what they must have trained."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from rlflow.data.sampler import Sampler
from rlflow.driver.window import Window
from rlflow.recipe import Recipe
from rlflow.tracking.tracker import Trackers
from rlflow.types import Group, Prompt, SamplingParams
from tests.rlflow.driver.fleets import Fleet

DYNAMIC = {"require_signal": True, "max_resamples": 20}
PROMPTS = [Prompt(f"p:{i}", np.array([i % 3], dtype=np.int32), [], {}) for i in range(40)]


def recipe_of(prompts_per_step: int = 4, **blocks: Any) -> Recipe:
    given: dict[str, Any] = {
        "run": {"output_dir": "unused", "steps": 6, **blocks.pop("run", {})},
        "model": {"path": "unused"},
        "algorithm": {"name": "grpo", "group_size": 2, "kl": {"coef": 0.0}, **blocks.pop("algorithm", {})},
        "data": {"train": {"path": "unused"}, "prompts_per_step": prompts_per_step},
        "rewards": [{"name": "length", **blocks.pop("reward", {})}],
        "rollout": {"max_new_tokens": 8, **blocks.pop("rollout", {})},
    }
    return Recipe.model_validate(given | blocks)


def window_of(fleet: Fleet, recipe: Recipe, num_steps: int = 6) -> Window:
    return Window(
        fleet.pool,
        recipe,
        PROMPTS,
        SamplingParams(max_new_tokens=8),
        num_steps,
        Trackers(),
    )


def train(fleet: Fleet, window: Window, num_steps: int = 6, first: int = 0) -> list[list[Group]]:
    """Steps without training: what each would have trained."""
    taken = []
    for step in range(first, num_steps):
        window.release(step)
        taken.append(window.take(step)[0])
        fleet.publish(step + 1)
    return taken


def names(groups: list[Group]) -> list[str]:
    return [f"{group.epoch}/{group.prompt.id}" for group in groups]


def drawn(recipe: Recipe, number: int) -> list[str]:
    rows = Sampler(len(PROMPTS), seed=recipe.run.seed, shuffle=True).take(number)
    return [f"{epoch}/{PROMPTS[row].id}" for epoch, row in rows]


def run_schedule(seed: int, make_fleet: Callable[..., Fleet]) -> None:
    """Five steps of a random recipe while workers are killed at random times: what must hold is looked at."""
    chance = random.Random(seed)
    k = chance.choice([0, 1, 2, 4])
    workers = chance.randint(1, 3)
    groups = DYNAMIC if chance.random() < 0.4 else {}
    recipe = recipe_of(run={"max_staleness": k}, algorithm={"groups": groups})
    script = {"max_num_seqs": chance.choice([2, 8, 64]), "tokens_per_step": 4, "step_s": 0.0005}
    made = make_fleet(
        workers,
        score=lambda prompt, index: float(index * (int(prompt.id[2:]) % 4 > 0)),
        rollout={
            "max_num_seqs": script["max_num_seqs"],
            "recovery": {"max_restarts": 50},
            "at_update": {"running": chance.choice(["continue", "restart", "wait"])},
        },
        script_of=lambda rank: script,
    )
    window = window_of(made, recipe)
    trained: list[str] = []
    for step in range(5):
        window.release(step)
        for _ in range(chance.choice([0, 0, 1, 2])):
            victim = chance.choice(made.workers.ranks)
            threading.Timer(chance.random() * 0.01, kill, (made, victim)).start()
        taken, metrics = window.take(step)
        trained += names(taken)
        made.publish(step + 1)
        versions = np.concatenate([r.versions[r.is_sampled] for group in taken for r in group.rollouts])
        assert step - k <= versions.min() and versions.max() <= step
        issued = metrics["group/trained"] + metrics["group/filtered"] + metrics["group/in_flight"]
        assert metrics["group/issued"] == issued
    assert len(trained) == len(set(trained)) == 20


def kill(made: Fleet, rank: int) -> None:
    made.workers.transport.kill(made.workers.handles[rank])
