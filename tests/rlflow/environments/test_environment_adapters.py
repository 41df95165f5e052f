"""Adapters: against stand-ins of the interfaces they are written for, and against the packages where they are there."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rlflow.data.environment_rows import dataset_of, environment_of, reasoning_gym, verifiers
from rlflow.data.errors import DataError
from rlflow.environments import loading
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
    assert session.answer("describe") == {"tools": [], "columns": []}
    assert session.answer("reset", row, 1) == {"messages": None}
    heard = session.answer("step", said("3"))
    assert (heard["messages"], heard["done"]) == ([{"role": "user", "content": "No, 1."}], False)
    assert session.answer("step", said("7"))["done"]
    assert session.answer("finish") == {"reward": 0.5, "state": {"metrics": {"turns": 2}, "stop_condition": None}}


class CountingTask:
    """verifiers' Task of its later versions, as far as it is used: rewarded for each turn that says the next number."""

    NEEDS_CONTAINER = False
    key = hash = "k"

    def __init__(self, data: Any, config: Any) -> None:
        self.data = data

    @staticmethod
    def data_type() -> Any:
        return SimpleNamespace(model_validate=lambda row: Told(**row))

    @staticmethod
    def toolsets(config: Any) -> list[Any]:
        return []

    def hooks(self, kind: str) -> list[Any]:
        return [self.gives_up] if kind == "stop" else []

    def gives_up(self, trace: Any) -> bool:
        return trace.said[-1] == "bye"

    def setup(self) -> None: ...

    def finalize(self) -> None: ...

    async def score(self, trace: Any, runtime: Any) -> None:
        right = sum(said == str(self.data.start + 2 * turn + 1) for turn, said in enumerate(trace.said))
        trace.rewards, trace.reward = {"right": SimpleNamespace(value=right / 3)}, right / 3


class Told(SimpleNamespace):
    """A pydantic model."""

    def model_dump(self, exclude_none: bool = False, **_: Any) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None or not exclude_none}


class PlayedThrice:
    """verifiers' Env: three numbers in turn, the policy says the ones between."""

    def __init__(self, seats: tuple[str, ...] = ("player",)) -> None:
        self.config = SimpleNamespace(task=None, **dict.fromkeys(seats))
        self.taskset = self
        self.bounded = True

    task_type = staticmethod(lambda: CountingTask)
    toolsets = staticmethod(lambda config: [])

    def __iter__(self) -> Any:
        prompt = "Count. I say 4."
        yield CountingTask(Told(start=4, prompt=prompt, system_prompt="Play.", image=None), None)

    async def finalize(self) -> None: ...

    async def run(self, task: Any, agents: Any) -> None:
        async with agents.player.interaction(task) as interaction:
            segment = await interaction.turn()
            for index in range(2):
                if segment.terminated:
                    break
                segment = await interaction.turn(f"I say {task.data.start + 2 * index + 2}.")


def install_later_verifiers(monkeypatch, made: PlayedThrice) -> None:
    def message(role: str) -> Any:
        return lambda **said: Told(role=role, **said)

    def prepare_turn(trace: Any, messages: list[Any]) -> Any:
        return SimpleNamespace(commit=lambda response: trace.said.append(response.message.content))

    class Trace:
        def __init__(self, **_: Any) -> None:
            self.id, self.said, self.metrics, self.stop_condition = "t", [], {}, None

        def stop(self, condition: str) -> None:
            self.stop_condition = condition

    async def invoke(hook: Any, given: dict[str, Any]) -> None:
        hook()

    async def call_hook(hook: Any, given: dict[Any, Any]) -> bool:
        return hook(given[Trace])

    @asynccontextmanager
    async def provision_runtime(config: Any, name: str) -> AsyncIterator[None]:
        yield None

    record = SimpleNamespace
    install(monkeypatch, "verifiers")
    vf = {"Segment": partial(record, terminated=False), "SubprocessConfig": record, "Env": PlayedThrice}
    install(monkeypatch, "verifiers.v1", **vf)
    types = {f"{role.title()}Message": message(role) for role in ("system", "user", "assistant")}
    install(monkeypatch, "verifiers.v1.types", Response=record, **types)
    install(monkeypatch, "verifiers.v1.graph", prepare_turn=prepare_turn)
    install(monkeypatch, "verifiers.v1.trace", Trace=Trace, TraceTask=record, AgentInfo=record)
    install(monkeypatch, "verifiers.v1.state", state_cls=lambda kind: record)
    install(monkeypatch, "verifiers.v1.runtimes", provision_runtime=provision_runtime)
    install(monkeypatch, "verifiers.v1.session", Trace=Trace, call_hook=call_hook, hook_boundary=lambda *_, **__: Trace)
    install(monkeypatch, "verifiers.v1.utils.decorators", invoke=invoke)
    install(
        monkeypatch, "verifiers.v1.configs.agent", agent_config_fields=lambda config: vars(config).keys() - {"task"}
    )
    loaders = {"load_environment": lambda config: made, "resolve_env_config": lambda given: given}
    install(monkeypatch, "verifiers.v1.utils.loaders", **loaders)
    # `install` makes the parents anew.
    install(monkeypatch, "verifiers.v1", **vf)
    monkeypatch.setitem(sys.modules, "verifiers", ModuleType("verifiers"))


def test_a_taskset_of_the_later_verifiers_is_played_by_its_own_environment(monkeypatch):
    install_later_verifiers(monkeypatch, PlayedThrice())
    (row,) = verifiers("count-up")
    assert [message["content"] for message in row["messages"]] == ["Play.", "Count. I say 4."]
    session = session_of("verifiers", id="count-up")
    assert session.answer("reset", row, 1) == {"messages": None}
    assert session.answer("step", said("5"))["messages"] == [{"role": "user", "content": "I say 6."}]
    assert not session.answer("step", said("8"))["done"]
    assert session.answer("step", said("9"))["done"]
    assert session.answer("finish") == {
        "reward": 2 / 3,
        "state": {"rewards": {"right": 2 / 3}, "metrics": {}, "stop_condition": None},
    }


@pytest.mark.parametrize(("says", "stopped"), [(["5"], "user_closed"), (["5", "bye"], "gives_up")])
def test_an_episode_of_it_that_is_cut_or_stops_is_scored_as_far_as_it_went(monkeypatch, says, stopped):
    install_later_verifiers(monkeypatch, PlayedThrice())
    (row,) = verifiers("count-up")
    session = session_of("verifiers", id="count-up")
    session.answer("reset", row, 1)
    answers = [session.answer("step", said(text)) for text in says]
    assert answers[-1]["done"] == (stopped == "gives_up")
    assert session.answer("finish")["reward"] == 1 / 3
    assert session.answer("finish")["state"]["stop_condition"] == stopped


def test_a_verifiers_environment_of_several_agents_is_refused(monkeypatch):
    install_later_verifiers(monkeypatch, PlayedThrice(("user", "assistant")))
    assert "has the agents" in session_of("verifiers", id="x").answer("describe")["error"]


@pytest.mark.parametrize(
    ("name", "args", "imported"),
    [
        ("reasoning_gym", {"task": "sums"}, {"reasoning_gym"}),
        ("verifiers", {"id": "someone/count-up@0.1"}, {"verifiers", "verifiers.v1.utils.loaders", "count_up"}),
    ],
)
def test_what_an_adapter_needs_is_imported_before_the_first_episode(monkeypatch, name, args, imported):
    asked = []
    importing = SimpleNamespace(import_module=asked.append)
    monkeypatch.setattr(loading, "importlib", importing)
    monkeypatch.setattr(loading, "_load", lambda spec, kind: dict)
    load_environment(name, None, (), args)
    assert imported <= set(asked)


@pytest.mark.parametrize(("name", "package"), [("reasoning_gym", "reasoning-gym"), ("verifiers", "verifiers")])
def test_a_package_that_is_not_installed_is_named_with_how_to_get_it(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=f"needs {package}.*pip install"):
        {"reasoning_gym": reasoning_gym, "verifiers": verifiers}[name]("x")
