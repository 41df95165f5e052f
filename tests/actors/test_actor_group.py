"""ActorGroup with processes that really fail, die and fall silent: each ends in one error that names the actor."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

import pytest
import ray

from rlflow.actors.actor_group import ActorFailure, ActorGroup, Pending

pytestmark = pytest.mark.ray


class Worker:
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def add(self, number: int, more: int = 0) -> int:
        return 10 * self.rank + number + more

    def fail(self, rank: int, kind: str) -> str:
        if rank == self.rank:
            raise {"value": ValueError, "type": TypeError}[kind](f"rank {rank} does not like it")
        return "fine"

    def die(self, rank: int) -> str:
        if rank == self.rank:
            os._exit(1)
        return "fine"

    def sleep(self, rank: int, seconds: float) -> str:
        if rank == self.rank:
            time.sleep(seconds)
        return "fine"


@pytest.fixture
def group(ray_session: None) -> Iterator[ActorGroup[Worker]]:
    # Ray's processes cannot import a test.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    made = ActorGroup[Worker]("worker", [ray.remote(Worker).remote(rank) for rank in range(3)], timeout_s=60.0)
    made.call_all(Worker.add, 0)
    yield made
    made.kill()


def test_results_come_in_the_order_of_the_ranks(group: ActorGroup[Worker]):
    assert group.call_all(Worker.add, 1, more=2) == [3, 13, 23]
    assert group.call_each(Worker.add, [1, 2, 3], more=4) == [5, 16, 27]
    assert group.get(2, Worker.add, group.start(2, Worker.add, 5)) == 25


@pytest.mark.parametrize(("kind", "refused"), [("value", True), ("type", False)])
def test_what_an_actor_raises_is_told_with_its_name_and_call(group: ActorGroup[Worker], kind: str, refused: bool):
    with pytest.raises(ActorFailure, match=r"^worker\[1\]\.fail: \w+Error: rank 1 does not like it$") as caught:
        group.call_all(Worker.fail, 1, kind)
    failure = caught.value
    assert (failure.actor, failure.call, failure.died, failure.refused) == ("worker[1]", "fail", False, refused)
    assert group.call_all(Worker.add, 0) == [0, 10, 20], "the actors live on"


def test_a_failure_is_told_while_others_are_still_at_work(group: ActorGroup[Worker]):
    begun = [group.start(0, Worker.sleep, 0, 600.0), group.start(1, Worker.fail, 1, "type")]
    with pytest.raises(ActorFailure, match=r"worker\[1\]"):
        Pending(["worker[0]", "worker[1]"], "sleep", begun).get(300.0)


def test_an_actor_that_dies_is_told_as_dead(group: ActorGroup[Worker]):
    with pytest.raises(ActorFailure, match=r"worker\[2\]\.die: the actor died") as caught:
        group.call_all(Worker.die, 2)
    assert caught.value.died and not caught.value.refused
    with pytest.raises(ActorFailure, match=r"worker\[2\]\.add: the actor died"):
        group.call_all(Worker.add, 0)


def test_an_actor_that_misses_the_deadline_is_the_one_that_is_named(group: ActorGroup[Worker]):
    group.timeout_s = 3.0
    with pytest.raises(ActorFailure, match=r"^worker\[1\]\.sleep: no answer within 3 s$") as caught:
        group.call_all(Worker.sleep, 1, 600.0)
    assert not caught.value.died
    assert Pending.current() is None


def test_who_still_owes_an_answer_is_known_to_whoever_interrupts_the_wait(group: ActorGroup[Worker], monkeypatch):
    seen: list[tuple[str, list[str]]] = []
    wait = ray.wait

    def watched_wait(*args, **kwargs):
        current = Pending.current()
        assert current is not None
        seen.append((current.call, current.owing))
        return wait(*args, **kwargs)

    monkeypatch.setattr(ray, "wait", watched_wait)
    group.call_all(Worker.sleep, 0, 1.0)
    names = ["worker[0]", "worker[1]", "worker[2]"]
    assert seen[0] == ("sleep", names) and seen[-1] == ("sleep", ["worker[0]"])
    assert Pending.current() is None
