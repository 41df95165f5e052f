"""ActorGroup in this process and on Ray: whatever ends a call or an actor ends in the same answer or the same error."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlflow.actors.actor_group import ActorFailure, ActorGroup, Pending, Transport
from rlflow.in_process import LocalTransport

WAIT_S = 60.0
BROKEN = 99
"""The rank whose actor cannot be made."""


class Worker:
    def __init__(self, rank: int) -> None:
        if rank == BROKEN:
            raise ValueError("no such model")
        self.rank, self.words = rank, []

    def add(self, number: int, more: int = 0) -> int:
        return 10 * self.rank + number + more

    def note(self, word: str) -> list[str]:
        self.words.append(word)
        return list(self.words)

    def hold(self, gate: Path) -> str:
        """Waits until a file is there."""
        deadline = time.monotonic() + WAIT_S
        while not gate.exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return gate.name

    def hold_one(self, rank: int, gate: Path) -> str:
        return self.hold(gate) if rank == self.rank else "fine"

    def fail(self, rank: int, kind: str) -> str:
        if rank == self.rank:
            raise {"value": ValueError, "type": TypeError}[kind](f"rank {rank} does not like it")
        return "fine"

    def leave(self, rank: int) -> str:
        if rank == self.rank:
            sys.exit(1)
        return "fine"

    def pid(self) -> int:
        return os.getpid()


def construct(rank: int) -> tuple[type, dict[str, Any]]:
    return Worker, {"rank": rank}


Make = Callable[..., ActorGroup[Worker]]


@pytest.fixture
def here() -> Iterator[Make]:
    """``here(size, calls_at_once)``: a group of workers in this process."""
    with groups_on(lambda calls_at_once: LocalTransport(Worker, calls_at_once)) as make:
        yield make


@pytest.fixture(params=["in_process", pytest.param("ray", marks=pytest.mark.ray)])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """``make(size, calls_at_once)``: a group of workers, in this process or on Ray."""
    if request.param == "in_process":
        yield request.getfixturevalue("here")
        return
    transport_of = request.getfixturevalue("on_ray")
    with groups_on(transport_of) as make:
        yield make


@pytest.fixture(scope="module")
def on_ray(ray_session: None) -> Iterator[Callable[[int], Transport]]:
    """The transport of a group whose first two actors share a placement group with those of the other tests."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    from rlflow.placement import RayTransport

    # Ray's processes cannot import a test.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    shared = placement_group([{"CPU": 0.1}, {"CPU": 0.1}])

    def transport(calls_at_once: int = 1) -> Transport:
        options = {"num_cpus": 0.1, "num_gpus": 0, "max_concurrency": calls_at_once}
        return RayTransport(construct, options, [(shared, 0), (shared, 1)])

    yield transport
    remove_placement_group(shared)


@contextmanager
def groups_on(transport_of: Callable[[int], Transport]) -> Iterator[Make]:
    made: list[ActorGroup[Worker]] = []

    def make(size: int = 2, calls_at_once: int = 1) -> ActorGroup[Worker]:
        made.append(ActorGroup("worker", transport_of(calls_at_once), size, WAIT_S))
        return made[-1]

    yield make
    for group in made:
        group.kill()


def wait_for_all(group: ActorGroup[Worker], refs: list[Any]) -> None:
    """Each round at least one ends."""
    while refs:
        done, refs = group.wait(refs, WAIT_S)
        assert done


def test_results_come_in_the_order_of_the_ranks(make):
    group = make()
    assert group.call_all(Worker.add, 1, more=2) == [3, 13]
    assert group.call_each(Worker.add, [1, 2], more=4) == [5, 16]
    assert group.get(1, Worker.add, group.start(1, Worker.add, 5)) == 15


def test_the_calls_of_one_actor_run_in_order_and_those_of_others_beside_them(here, tmp_path):
    group = here(2)
    held, later = group.start(0, Worker.hold, tmp_path / "gate"), group.start(0, Worker.note, "second")
    assert group.get(1, Worker.note, group.start(1, Worker.note, "other")) == ["other"]
    assert group.wait([held, later], 0.0) == ([], [held, later])
    (tmp_path / "gate").touch()
    assert group.get(0, Worker.note, later) == ["second"]
    assert group.wait([held], 0.0) == ([held], [])


def test_an_actor_of_several_calls_at_a_time_answers_while_one_of_them_waits(make, tmp_path):
    group = make(1, calls_at_once=2)
    held = group.start(0, Worker.hold, tmp_path / "gate")
    assert group.get(0, Worker.note, group.start(0, Worker.note, "meanwhile")) == ["meanwhile"]
    assert group.wait([held], 0.0) == ([], [held])
    (tmp_path / "gate").touch()
    assert group.get(0, Worker.hold, held) == "gate"


def test_what_an_actor_raises_is_told_with_its_name_and_call(make):
    group = make()
    for kind, refused in [("value", True), ("type", False)]:
        with pytest.raises(ActorFailure, match=r"^worker\[1\]\.fail: \w+Error: rank 1 does not like it$") as caught:
            group.call_all(Worker.fail, 1, kind)
        failure = caught.value
        assert (failure.actor, failure.call, failure.died, failure.refused) == ("worker[1]", "fail", False, refused)
    assert group.call_all(Worker.add, 0) == [0, 10], "the actors live on"


def test_a_failure_is_told_while_others_are_still_at_work(here, tmp_path):
    group = here(2)
    begun = [group.start(0, Worker.hold, tmp_path / "gate"), group.start(1, Worker.fail, 1, "type")]
    with pytest.raises(ActorFailure, match=r"worker\[1\]"):
        Pending(["worker[0]", "worker[1]"], "hold", begun, group.transport).get(WAIT_S)
    assert group.wait(begun[:1], 0.0) == ([], begun[:1])
    (tmp_path / "gate").touch()


def test_an_actor_that_dies_is_told_as_dead(make):
    group = make()
    with pytest.raises(ActorFailure, match=r"worker\[1\]\.leave: the actor died") as caught:
        group.call_all(Worker.leave, 1)
    assert caught.value.died and not caught.value.refused
    with pytest.raises(ActorFailure, match=r"worker\[1\]\.add: the actor died"):
        group.call_all(Worker.add, 0)


def test_an_actor_that_cannot_be_made_is_a_dead_one_and_says_why(make, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "BROKEN", 0)
    group = make(1)
    with pytest.raises(
        ActorFailure, match=r"worker\[0\]\.add: it could not be started: ValueError: no such m"
    ) as caught:
        group.call_all(Worker.add, 1)
    assert caught.value.died


@pytest.mark.slow
def test_an_actor_that_misses_the_deadline_is_the_one_that_is_named(here, tmp_path):
    group = here()
    group.call_all(Worker.add, 0)
    group.timeout_s = 1.0
    with pytest.raises(ActorFailure, match=r"^worker\[1\]\.hold_one: no answer within 1 s$") as caught:
        group.call_all(Worker.hold_one, 1, tmp_path / "gate")
    assert not caught.value.died
    assert Pending.current() is None
    (tmp_path / "gate").touch()


def test_who_still_owes_an_answer_is_known_to_whoever_interrupts_the_wait(here, tmp_path, monkeypatch):
    group = here()
    group.call_all(Worker.add, 0)
    seen: list[tuple[str, list[str]]] = []
    wait = group.transport.wait

    def watched_wait(refs: list[Any], timeout_s: float) -> Any:
        current = Pending.current()
        assert current is not None
        seen.append((current.call, current.owing))
        if current.owing == ["worker[0]"]:
            (tmp_path / "gate").touch()
        return wait(refs, timeout_s)

    monkeypatch.setattr(group.transport, "wait", watched_wait)
    group.call_all(Worker.hold_one, 0, tmp_path / "gate")
    names = ["worker[0]", "worker[1]"]
    assert seen[0] == ("hold_one", names) and seen[-1] == ("hold_one", ["worker[0]"])
    assert Pending.current() is None


def test_a_wait_tells_who_has_ended_in_whatever_way_and_a_result_tells_how(make, tmp_path):
    group = make(calls_at_once=2)
    held, failed = group.start(0, Worker.hold, tmp_path / "gate"), group.start(0, Worker.fail, 0, "value")
    left = group.start(1, Worker.leave, 1)
    wait_for_all(group, [failed, left])
    done, waiting = group.wait([held, failed, left], 0.0)
    assert set(done) == {failed, left} and waiting == [held]
    with pytest.raises(ActorFailure, match=r"^worker\[0\]\.fail: ValueError: rank 0 does not like it$"):
        group.result(0, Worker.fail, failed)
    with pytest.raises(ActorFailure, match=r"^worker\[1\]\.leave: the actor died") as caught:
        group.result(1, Worker.leave, left)
    assert caught.value.died
    (tmp_path / "gate").touch()
    wait_for_all(group, [held])
    assert group.result(0, Worker.hold, held) == "gate"
    assert group.wait([], 0.01) == ([], []), "of no calls none has ended when the time is up"


def test_references_stand_for_what_they_hold_and_for_its_failure(make):
    group = make(2)
    kept, made = group.put(30), group.start(0, Worker.add, 4)
    assert group.call_all(Worker.add, kept, more=made) == [34, 44]
    failed = group.start(0, Worker.fail, 0, "value")
    with pytest.raises(ActorFailure, match=r"^worker\[1\]\.add: ValueError: rank 0 does not like it$") as caught:
        group.get(1, Worker.add, group.start(1, Worker.add, failed))
    assert not caught.value.died
    lost = group.start(0, Worker.leave, 0)
    with pytest.raises(ActorFailure, match=r"^worker\[1\]\.add: ActorDiedError: .*died") as caught:
        group.get(1, Worker.add, group.start(1, Worker.add, lost))
    assert not caught.value.died, "the one that was asked lives"


def test_a_replaced_actor_is_a_fresh_one_and_the_others_are_as_they_were(make, tmp_path):
    group = make()
    assert group.call_all(Worker.note, "before") == [["before"]] * 2
    held = group.start(1, Worker.hold, tmp_path / "gate")
    group.replace(1)
    assert group.call_all(Worker.note, "after") == [["before", "after"], ["after"]]
    assert group.ranks == (0, 1) and group.call_all(Worker.add, 0) == [0, 10]
    wait_for_all(group, [held])
    (tmp_path / "gate").touch()
    with pytest.raises(ActorFailure, match=r"^worker\[1\]\.hold: the actor died") as caught:
        group.result(1, Worker.hold, held)
    assert caught.value.died


def test_a_dead_actor_can_be_replaced(here):
    group = here(2)
    wait_for_all(group, [group.start(1, Worker.leave, 1)])
    group.replace(1)
    assert group.call_all(Worker.note, "again") == [["again"], ["again"]]


def test_actors_join_and_leave_and_no_rank_is_given_twice(make):
    group = make(2)
    assert group.add() == 2 and group.call_all(Worker.add, 1) == [1, 11, 21]
    group.remove(1)
    assert group.ranks == (0, 2) and len(group) == 2
    assert group.call_each(Worker.add, [5, 6]) == [5, 26]
    group.remove(2)
    assert group.add() == 3 and group.call_all(Worker.add, 1) == [1, 31]
    assert [group.name_of(rank) for rank in group.ranks] == ["worker[0]", "worker[3]"]


def test_killed_actors_answer_no_more(here, tmp_path):
    group = here(2)
    held = group.start(0, Worker.hold, tmp_path / "gate")
    group.kill()
    wait_for_all(group, [held])
    for rank, method, ref in [(0, Worker.hold, held), (1, Worker.pid, group.start(1, Worker.pid))]:
        with pytest.raises(ActorFailure, match="the actor died") as caught:
            group.get(rank, method, ref)
        assert caught.value.died
    (tmp_path / "gate").touch()


@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_killed_or_stopped_is_replaced_where_it_was(on_ray, tmp_path, number: int):
    group = ActorGroup[Worker]("worker", on_ray(), 2, WAIT_S)
    try:
        before = group.call_all(Worker.pid)
        held = group.start(1, Worker.hold, tmp_path / "gate")
        os.kill(before[1], number)
        if number == signal.SIGKILL:
            wait_for_all(group, [held])
        group.replace(1)
        after = group.call_all(Worker.pid)
        assert after[0] == before[0] and after[1] != before[1]
        wait_for_all(group, [held])
        with pytest.raises(ActorFailure) as caught:
            group.result(1, Worker.hold, held)
        assert caught.value.died
    finally:
        group.kill()
