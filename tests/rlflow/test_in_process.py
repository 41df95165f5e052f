"""What actors of this process need and Ray's do not: their calls cannot be interrupted, and killing them is no end."""

from __future__ import annotations

import threading

import pytest

from rlflow.actors.actor_group import ActorFailure, ActorGroup
from rlflow.in_process import LocalTransport, place
from rlflow.recipe import load_recipe

WAIT_S = 30.0


class Worker:
    """Its call `hold` is held up from outside."""

    def __init__(self, gate: threading.Event) -> None:
        self.gate, self.is_closed = gate, threading.Event()
        self.has_begun, self.has_ended = threading.Event(), threading.Event()

    def myself(self) -> Worker:
        return self

    def hold(self) -> str:
        self.has_begun.set()
        assert self.gate.wait(WAIT_S)
        self.has_ended.set()
        return "too late"

    def close(self) -> None:
        self.is_closed.set()


def test_an_actor_is_closed_when_it_is_killed_and_what_its_call_says_later_is_not_heard():
    gate = threading.Event()
    group = ActorGroup[Worker]("worker", LocalTransport(lambda rank: Worker(gate)), 1, WAIT_S)
    worker = group.call_all(Worker.myself)[0]
    held, behind = group.start(0, Worker.hold), group.start(0, Worker.myself)
    assert worker.has_begun.wait(WAIT_S)
    group.kill()
    assert worker.is_closed.is_set()
    gate.set()
    assert worker.has_ended.wait(WAIT_S)
    for ref in (held, behind):
        with pytest.raises(ActorFailure, match="the actor died") as caught:
            group.result(0, Worker.hold, ref)
        assert caught.value.died


def test_an_actor_that_is_killed_while_it_is_made_is_closed_once_it_is_there():
    gate, made = threading.Event(), Worker(threading.Event())

    def make(rank: int) -> Worker:
        assert gate.wait(WAIT_S)
        return made

    group = ActorGroup[Worker]("worker", LocalTransport(make), 1, WAIT_S)
    owed = group.start(0, Worker.myself)
    group.kill()
    with pytest.raises(ActorFailure, match="the actor died"):
        group.result(0, Worker.myself, owed)
    assert not made.is_closed.is_set()
    gate.set()
    assert made.is_closed.wait(WAIT_S)


def test_actors_that_share_a_lock_take_turns():
    turn, workers = threading.Lock(), [Worker(threading.Event()) for _ in range(2)]
    group = ActorGroup[Worker]("worker", LocalTransport(workers.__getitem__, turn=turn), 2, WAIT_S)
    first = group.start(0, Worker.hold)
    assert workers[0].has_begun.wait(WAIT_S)
    second = group.start(1, Worker.hold)
    assert not workers[1].has_begun.wait(0.05)
    workers[1].gate.set()
    workers[0].gate.set()
    assert [group.get(0, Worker.hold, first), group.get(1, Worker.hold, second)] == ["too late"] * 2
    group.kill()


RECIPE = """
algorithm: {name: sft}
run: {output_dir: run, steps: 1}
data: {train: {path: rows.jsonl}}
model: {path: org/policy}
trainer: {workers: 2}
"""


def test_several_ranks_of_a_trainer_are_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (recipe,) = load_recipe(tmp_path / "recipe.yaml", {})
    with pytest.raises(ValueError, match="2 ranks of the trainer need processes of their own: start it with Ray"):
        place(recipe, recipe.model, tmp_path, 8)
