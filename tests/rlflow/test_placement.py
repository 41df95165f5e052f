"""What an actor's process is told of the machine that it runs on."""

from __future__ import annotations

import os

import pytest

from rlflow.actors.actor_group import ActorFailure
from rlflow.placement import Actors, _constructor, environment
from rlflow.plan import Role, roles
from rlflow.recipe import load_recipe


@pytest.mark.parametrize("name", ["trainer", "critic", "rollout", "rewards", "reference"])
def test_a_role_that_reserves_no_gpu_sees_none(name):
    assert environment(Role(name, workers=1, cpus=1.0, gpus=0.0), has_gpus=True)["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("name", ["trainer", "rollout"])
def test_which_gpus_a_role_sees_is_left_to_ray_where_it_reserves_some(name):
    assert environment(Role(name, workers=1, cpus=1.0, gpus=0.5), has_gpus=True) == {}


def test_nothing_is_hidden_where_there_are_no_gpus():
    assert environment(Role("rollout", workers=1, cpus=1.0, gpus=0.0), has_gpus=False) == {}


@pytest.mark.ray
def test_an_actor_without_a_gpu_has_an_empty_list_of_them_and_so_have_its_children(ray_session):
    import ray

    def seen() -> list[str]:
        child = os.popen("echo [$CUDA_VISIBLE_DEVICES]").read().strip()
        return [os.environ["CUDA_VISIBLE_DEVICES"], child]

    variables = environment(Role("rollout", workers=1, cpus=1.0, gpus=0.0), has_gpus=True)
    task = ray.remote(seen).options(num_gpus=0, runtime_env={"env_vars": variables})
    assert ray.get(task.remote(), timeout=60) == ["", "[]"]


RECIPE = """
algorithm: {name: ppo, critic: {path: org/critic}, kl: {coef: 0.1}}
run: {output_dir: run, steps: 1}
data: {train: {path: rows.jsonl}}
rewards: [{name: math_accuracy}]
model: {path: org/policy, dtype: bfloat16}
reference: {path: org/reference}
"""


@pytest.mark.parametrize("trusted", [True, False])
def test_a_recipe_that_trusts_its_models_code_trusts_that_of_critic_and_reference(tmp_path, trusted):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (recipe,) = load_recipe(tmp_path / "recipe.yaml", {"model.trust_remote_code": trusted})
    arguments = {
        role.name: _constructor(role, 0, recipe, recipe.model, tmp_path, max_model_len=8)[1] for role in roles(recipe)
    }
    for role, path in {"trainer": "org/policy", "critic": "org/critic", "reference": "org/reference"}.items():
        block = arguments[role]["model"]
        assert (block.path, block.dtype, block.trust_remote_code) == (path, "bfloat16", trusted)


class Group:
    """In the place of an ActorGroup: writes down what happens to it."""

    def __init__(self, name: str, calls: list[str], failure: Exception | None = None) -> None:
        self.name, self.calls, self.failure = name, calls, failure

    def start_all(self, method) -> Group:
        self.calls.append(f"{self.name}.{method.__name__}")
        return self

    def get(self, timeout_s: float) -> None:
        assert timeout_s <= 5
        if self.failure is not None:
            raise self.failure

    def kill(self) -> None:
        self.calls.append(f"{self.name}.kill")


@pytest.mark.parametrize("failure", [None, ActorFailure("rewards[0]", "close", "no answer within 3 s")])
def test_reward_servers_end_what_functions_have_started_before_they_are_killed(monkeypatch, failure):
    monkeypatch.setattr("rlflow.placement.remove_placement_group", lambda group: calls.append("removed"))
    calls: list[str] = []
    trainer, rewards = Group("trainer", calls), Group("rewards", calls, failure)
    Actors(trainer, None, rewards, None, None, group=None).close()  # pyright: ignore[reportArgumentType]
    assert calls == ["rewards.close", "trainer.kill", "rewards.kill", "removed"]
