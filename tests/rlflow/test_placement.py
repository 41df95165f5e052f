"""What an actor's process is told of the machine that it runs on."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import ObjectLostError

from rlflow.actor_groups import Actors, constructor_of, start_actors
from rlflow.actors.actor_group import ActorFailure, ActorGroup
from rlflow.in_process import LocalTransport
from rlflow.placement import ActorLogs, RayTransport, environment, options_of
from rlflow.ray_cluster import warnings_kept
from rlflow.recipe import load_recipe
from rlflow.roles import Role, roles
from rlflow.tracking.logs import last_words


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
        role.name: constructor_of(role, recipe, recipe.model, tmp_path, 8, rank=0)[1] for role in roles(recipe)
    }
    for role, path in {"trainer": "org/policy", "critic": "org/critic", "reference": "org/reference"}.items():
        block = arguments[role]["model"]
        assert (block.path, block.dtype, block.trust_remote_code) == (path, "bfloat16", trusted)


class Server:
    """In the place of a reward server and of a trainer: writes down what happens to it."""

    def __init__(self, name: str, calls: list[str], failure: Exception | None = None) -> None:
        self.name, self.calls, self.failure = name, calls, failure

    def close(self) -> None:
        self.calls.append(f"{self.name}.close")
        if self.failure is not None and len(self.calls) == 1:
            raise self.failure


class Watched(LocalTransport):
    def __init__(self, server: Server) -> None:
        super().__init__(lambda rank: server)
        self.server = server

    def kill(self, handle: Any) -> None:
        self.server.calls.append(f"{self.server.name}.kill")


def groups_of(calls: list[str], failure: Exception | None = None) -> dict[str, ActorGroup]:
    servers = {"trainer": Server("trainer", calls), "rewards": Server("rewards", calls, failure)}
    return {name: ActorGroup(name, Watched(server), 1, 30.0) for name, server in servers.items()}


@pytest.mark.parametrize("failure", [None, ValueError("a child that would not end")])
def test_reward_servers_end_what_functions_have_started_before_they_are_killed(failure):
    calls: list[str] = []
    Actors.of(groups_of(calls, failure), release=lambda: calls.append("released")).close()
    assert calls == ["rewards.close", "trainer.kill", "rewards.kill", "released"]


def test_a_ray_that_answers_no_more_does_not_hold_the_end_up(monkeypatch):
    monkeypatch.setattr("rlflow.actor_groups.RELEASE_TIMEOUT_S", 0.05)
    never = threading.Event()
    Actors.of(groups_of([]), release=lambda: None if never.wait(60) else pytest.fail("was waited for")).close()
    never.set()


def test_of_actors_that_cannot_all_be_started_none_is_left(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (recipe,) = load_recipe(tmp_path / "recipe.yaml", {"rollout.workers": 2})
    calls: list[str] = []

    class Full(Watched):
        def create(self, rank: int) -> Any:
            if rank == 1:
                raise OSError("no room")
            return super().create(rank)

    def transport_for(role: Role, construct: Any) -> LocalTransport:
        return Full(Server(role.name, calls))

    with pytest.raises(OSError, match="no room"):
        start_actors(recipe, recipe.model, tmp_path, 8, transport_for, lambda: calls.append("released"))
    assert calls == ["rollout.kill", "trainer.kill", "released"]


def test_what_goes_wrong_while_actors_are_ended_is_raised():
    def release() -> None:
        raise RuntimeError("no such group")

    with pytest.raises(RuntimeError, match="no such group"):
        Actors.of(groups_of([]), release).close()


def test_a_rollout_worker_takes_calls_while_one_waits_and_no_actor_is_restarted_by_ray():
    options = {name: options_of(Role(name, 1, 1.0, 0.0), has_gpus=False) for name in ("trainer", "rollout", "rewards")}
    assert options["rollout"]["max_concurrency"] == 16
    assert all("max_concurrency" not in options[name] for name in ("trainer", "rewards"))
    assert all("max_restarts" not in of_role for of_role in options.values())


def test_an_answer_that_is_lost_is_the_failure_of_the_actor_that_gave_it(monkeypatch):
    # A node that goes takes with it what its actors had answered.
    def get(ref: Any, timeout: float) -> None:
        raise ObjectLostError("00ff", None, "")

    monkeypatch.setattr("rlflow.placement.ray.get", get)
    transport = RayTransport(lambda rank: (object, {}), {}, [])
    with pytest.raises(
        ActorFailure, match=r"rollout\[1\]\.collect: what it answered is lost \(ObjectLostError"
    ) as caught:
        transport.fetch("a reference", "rollout[1]", "collect")  # type: ignore[arg-type]
    assert caught.value.died


class Talkative:
    """An actor that says something, and so does its child."""

    def __init__(self, rank: int) -> None:
        print(f"rank {rank} is made; token=hunter2-secret")

    def speak(self, words: str) -> str:
        os.system(f"echo {words} of a child")
        return words

    def die(self) -> None:
        os.write(2, b"last words\n")
        os.kill(os.getpid(), signal.SIGKILL)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.ray
def test_what_an_actor_prints_is_in_its_log_and_the_failure_of_a_dead_one_ends_with_it(ray_session, tmp_path, capfd):
    import ray

    # Ray's processes cannot import a test.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    logs = ActorLogs("talker", tmp_path / "logs", ["hunter2-secret"])
    transport = RayTransport(lambda rank: (Talkative, {"rank": rank}), {"num_cpus": 0.1, "num_gpus": 0}, [], logs)
    group: ActorGroup[Talkative] = ActorGroup("talker", transport, 2, 60.0)
    try:
        assert group.call_all(Talkative.speak, "hello") == ["hello", "hello"]
        with warnings_kept(tmp_path / "logs" / "ray.log"):
            with pytest.raises(ActorFailure) as caught:
                group.get(1, Talkative.die, group.start(1, Talkative.die))
            wait_until((tmp_path / "logs" / "ray.log").exists)
        group.replace(1)
        assert group.get(1, Talkative.speak, group.start(1, Talkative.speak, "again")) == "again"
    finally:
        group.kill()
    path = tmp_path / "logs" / "talker-1.log"
    said = "\n    rank 1 is made; token=***\n    hello of a child\n    last words"
    assert str(caught.value).endswith(f"; {path} ends with:{said}")
    assert caught.value.died
    last_words(path, wait_s=20)
    words = [line for line in path.read_text().splitlines() if not line.startswith("===")]
    assert words == [*said.replace("    ", "").splitlines()[1:], "rank 1 is made; token=***", "again of a child"]
    assert "A worker died" in (tmp_path / "logs" / "ray.log").read_text() and capfd.readouterr().out == ""
    assert "rank 0 is made" in last_words(tmp_path / "logs" / "talker-0.log", wait_s=20)
