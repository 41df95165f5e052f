"""How many threads actors compute with: by hand, on eight cores."""

from __future__ import annotations

from typing import Any

import pytest

from rlflow import machine
from rlflow.recipe import load_recipe
from rlflow.roles import roles

RECIPE: dict[str, Any] = {
    "algorithm": {"name": "ppo", "kl": {"coef": 0.1}},
    "model": {"path": "made/up"},
    "data": {"train": {"generator": "arithmetic"}, "prompts_per_step": 4},
    "rewards": [{"name": "exact_match"}],
    "run": {"steps": 10},
}


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def threads(**changes: Any) -> dict[str, int]:
    (recipe,) = load_recipe(RECIPE, {key.replace("__", "."): value for key, value in changes.items()})
    return {role.name: role.threads for role in roles(recipe)}


def test_actors_that_take_turns_have_all_cores_and_those_that_compute_at_once_share_them():
    # Trainer and critic learn at the same time.
    assert threads() == {"trainer": 4, "rollout": 8, "rewards": 1, "critic": 4, "reference": 8}
    assert threads(rollout__workers=3)["rollout"] == 2
    assert threads(trainer__workers=3) == {"trainer": 2, "rollout": 8, "rewards": 1, "critic": 2, "reference": 8}
    assert threads(trainer__workers=16)["trainer"] == 1


def test_with_staleness_generation_and_training_share_the_cores():
    # 8 // (trainer + critic + 2 workers), and 8 // (reference + 2 workers).
    found = threads(run__max_staleness=1, rollout__workers=2)
    assert (found["trainer"], found["critic"], found["rollout"], found["reference"]) == (2, 2, 2, 2)
    assert threads(run__max_staleness=1)["reference"] == 4


def test_who_says_how_many_cpus_says_how_many_threads():
    found = threads(trainer__cpus_per_worker=3, rollout__cpus_per_worker=0.5)
    assert (found["trainer"], found["rollout"]) == (3, 1)


def test_beside_a_gpu_one_thread_is_enough():
    assert threads(trainer__gpus_per_worker=1)["trainer"] == 1


def test_a_cluster_has_its_cores_for_others_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert set(threads().values()) == {1}


def test_the_cores_are_those_that_the_process_and_its_container_may_use(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    assert machine.usable_cores() == 6
    monkeypatch.setattr(machine, "cpu_quota", lambda: 2.5)
    assert machine.usable_cores() == 2
    monkeypatch.setattr(machine, "cpu_quota", lambda: 0.5)
    assert machine.usable_cores() == 1
