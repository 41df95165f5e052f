"""Adapters: against stand-ins of the interfaces they are written for, and against the packages where they are there."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rlflow.data.environment_rows import dataset_of, environment_of, reasoning_gym, verifiers
from rlflow.data.errors import DataError
from rlflow.environments.loading import load_environment
from rlflow.environments.session import Session


@pytest.fixture(autouse=True)
def _forget():
    dataset_of.cache_clear()
    environment_of.cache_clear()


def session_of(name: str, **args: Any) -> Session:
    return Session(load_environment(name, None, (), args))


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def install(monkeypatch, name: str, **names: Any) -> None:
    """A module of this name, with its parents."""
    parts = name.split(".")
    for size in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:size]), ModuleType(".".join(parts[:size])))
    module = ModuleType(name)
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, name, module)


class Sums:
    """reasoning-gym's ProceduralDataset, as far as it is used."""

    def __init__(self, size: int, seed: int, step: int = 1) -> None:
        self.size, self.seed, self.step = size, seed, step

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"question": f"{index} + {self.seed * self.step}?", "answer": str(index + self.seed), "metadata": {}}

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return float(answer == entry["answer"]) or 0.01


@pytest.mark.parametrize(
    ("text", "reward"),
    [("7", 1.0), ("<think>9</think> <answer>3</answer> or <answer> 7 </answer>", 1.0), ("It is 7", 0.01)],
)
def test_a_reasoning_gym_task_scores_the_answer_to_its_own_question(monkeypatch, text, reward):
    install(monkeypatch, "reasoning_gym", create_dataset=lambda task, **config: Sums(**config))
    row = reasoning_gym("sums", size=6, seed=5, instruction="Answer with a number.")[2]
    assert row["prompt"] == "2 + 5?\nAnswer with a number."
    session = session_of("reasoning_gym", task="sums")
    row |= {"messages": [{"role": "user", "content": row["prompt"]}]}
    assert session.answer("reset", row, 1) == {"messages": None}
    assert session.answer("step", said(text)) == {"messages": [], "reward": reward, "done": True, "counts": {}}
    assert session.answer("finish")["state"] == {"answer": "7"}


def test_a_row_of_another_configuration_of_a_reasoning_gym_task_is_refused(monkeypatch):
    install(monkeypatch, "reasoning_gym", create_dataset=lambda task, **config: Sums(**config))
    row = reasoning_gym("sums", size=6, seed=5, config={"step": 2})[2]
    row |= {"messages": [{"role": "user", "content": row["prompt"]}]}
    assert "another configuration of sums" in session_of("reasoning_gym", task="sums").answer("reset", row, 1)["error"]


def test_a_real_reasoning_gym_task_gives_its_own_answer_the_full_reward():
    pytest.importorskip("reasoning_gym")
    row = reasoning_gym("leg_counting", size=3, seed=1)[1]
    row |= {"messages": [{"role": "user", "content": row["prompt"]}]}
    session = session_of("reasoning_gym", task="leg_counting")
    assert session.answer("reset", row, 1) == {"messages": None}
    assert session.answer("step", said(f"<answer>{row['answer']}</answer>"))["reward"] == 1.0


class EchoClient:
    """OpenEnv's GenericEnvClient, as far as it is used, before a server that says back what it hears."""

    def __init__(self, base_url: str, message_timeout_s: float) -> None:
        self.url, self.actions, self.is_closed = base_url, [], False

    async def reset(self) -> Any:
        return SimpleNamespace(observation={"echoed_message": "ready"}, reward=None, done=False)

    async def step(self, action: dict[str, Any]) -> Any:
        self.actions.append(action)
        done = len(self.actions) == 2
        return SimpleNamespace(observation={"echoed_message": str(action)}, reward=0.5, done=done)

    async def state(self) -> dict[str, Any]:
        return {"step_count": len(self.actions)}

    async def close(self) -> None:
        self.is_closed = True


def test_an_openenv_environment_hears_actions_and_says_observations(monkeypatch):
    install(monkeypatch, "openenv.core.generic_client", GenericEnvClient=EchoClient)
    session = session_of("openenv", url="http://localhost:1", action="message", observation="echoed_message")
    begins = session.answer("reset", {"messages": [{"role": "user", "content": "Play."}]}, 1)["messages"]
    assert [message["content"] for message in begins] == ["Play.", "ready"]
    first = session.answer("step", said("hi"))
    assert first["messages"] == [{"role": "user", "content": "{'message': 'hi'}"}]
    assert (first["reward"], first["done"]) == (0.5, False)
    assert session.answer("step", said("ho"))["done"]
    assert session.answer("finish") == {"reward": 0.0, "state": {"step_count": 2}}


def test_an_openenv_action_of_several_fields_is_json(monkeypatch):
    install(monkeypatch, "openenv.core.generic_client", GenericEnvClient=EchoClient)
    session = session_of("openenv", url="http://localhost:1")
    session.answer("reset", {"messages": []}, 1)
    assert session.answer("step", said("go"))["messages"][0]["content"].startswith("This is no JSON")
    assert session.answer("step", said('{"row": 1, "column": 2}'))["reward"] == 0.5


class Guessing:
    """verifiers' MultiTurnEnv, as far as it is used: over when it hears a 7."""

    tool_defs = None

    def __init__(self) -> None:
        self.rubric = self

    def get_dataset(self, n: int) -> list[dict[str, Any]]:
        return [{"prompt": [{"role": "user", "content": "Guess."}], "answer": "7", "example_id": 0, "task": "t"}]

    async def init_state(self, given, client, model):
        return {**given, "trajectory": [], "trajectory_id": "t", "reward": None, "metrics": None}

    async def setup_state(self, state):
        state["asked"] = 0

    async def get_prompt_messages(self, state):
        if not state["trajectory"]:
            return state["prompt"]
        last = state["trajectory"][-1]
        state["asked"] += 1
        return [*last["prompt"], *last["completion"], {"role": "user", "content": f"No, {state['asked']}."}]

    async def add_trajectory_step(self, state, step):
        state["trajectory"].append(step)

    async def is_completed(self, state):
        return state["trajectory"][-1]["completion"][0]["content"] == state["answer"]

    async def render_completion(self, state):
        state["completion"] = state["trajectory"][-1]["completion"]

    async def score_rollout(self, state):
        state["reward"], state["metrics"] = 1.0 / len(state["trajectory"]), {"turns": len(state["trajectory"])}

    async def cleanup(self, state):
        pass


def test_a_verifiers_environment_is_played_turn_by_turn_and_scored_by_its_rubric(monkeypatch):
    install(monkeypatch, "verifiers.utils.message_utils", normalize_messages=lambda messages, field_name: messages)
    install(monkeypatch, "verifiers.clients", Client=type("Client", (), {"__abstractmethods__": frozenset()}))
    install(monkeypatch, "verifiers", load_environment=lambda id: Guessing())
    (row,) = verifiers("guessing")
    session = session_of("verifiers", id="guessing")
    assert session.answer("describe") == {"tools": []}
    assert session.answer("reset", row, 1) == {"messages": None}
    heard = session.answer("step", said("3"))
    assert (heard["messages"], heard["done"]) == ([{"role": "user", "content": "No, 1."}], False)
    assert session.answer("step", said("7"))["done"]
    assert session.answer("finish") == {"reward": 0.5, "state": {"metrics": {"turns": 2}, "stop_condition": None}}


@pytest.mark.parametrize(("name", "package"), [("reasoning_gym", "reasoning-gym"), ("verifiers", "verifiers")])
def test_a_package_that_is_not_installed_is_named_with_how_to_get_it(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=f"needs {package}.*pip install"):
        {"reasoning_gym": reasoning_gym, "verifiers": verifiers}[name]("x")
