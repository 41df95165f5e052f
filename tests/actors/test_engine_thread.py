"""The thread around an engine: groups come back whole, weights come between steps, and every call ends."""

from __future__ import annotations

import threading
import time
from itertools import pairwise

import numpy as np
import pytest

from rlflow.actors.engine_thread import EngineThread
from rlflow.actors.rollout_engines.engine import WeightsLost
from rlflow.actors.rollout_engines.scripted_engine import ScriptedEngine
from rlflow.types import GroupRequest, Prompt, SamplingParams

PROMPT = Prompt("p", np.array([5, 6, 7], dtype=np.int32), (), {})


class SteppedEngine(ScriptedEngine):
    """Each step waits until the test lets it go."""

    def __init__(self, max_num_seqs: int) -> None:
        super().__init__(max_num_seqs, length=lambda request: request.seed)
        self.may_step = threading.Semaphore(0)
        self.began = threading.Semaphore(0)

    def step(self):
        self.began.release()
        assert self.may_step.acquire(timeout=10)
        return super().step()

    def steps(self, number: int) -> None:
        """Lets so many steps happen, and waits until they have."""
        for _ in range(number):
            assert self.began.acquire(timeout=10)
            self.may_step.release()


@pytest.fixture
def engine():
    return SteppedEngine(max_num_seqs=8)


@pytest.fixture
def thread(engine):
    thread = EngineThread(engine, 8)
    thread.load_weights(lambda: [], 0).result(10)
    yield thread
    for _ in range(1000):
        engine.may_step.release()
    thread.close(10)


def group(id: int, *lengths: int, min_version: int = 0) -> GroupRequest:
    """The script takes a rollout's seed for its length."""
    return GroupRequest(id, PROMPT, lengths, SamplingParams(max_new_tokens=100), min_version=min_version)


def versions(finished) -> list[list[int]]:
    return [completion.versions.tolist() for completion in finished.completions]


def test_what_the_thread_did_and_waited_for_is_told_in_order(engine, thread):
    thread.take_spans()
    thread.submit([group(0, 2)])
    engine.steps(1)
    assert engine.began.acquire(timeout=10)
    loaded = thread.load_weights(lambda: [], 1)
    engine.may_step.release()
    loaded.result(10)
    assert thread.take_finished(1, 10)
    thread.do(lambda: None).result(10)
    spans = thread.take_spans()
    assert [name for name, _, _ in spans] == ["wait", "generate", "load_weights", "wait"]
    assert all(ended <= began for (_, _, ended), (_, began, _) in pairwise(spans))


def test_a_group_comes_back_as_soon_as_its_longest_is_done(engine, thread):
    asked = thread.submit([group(1, 1, 4), group(2, 2, 2)])
    engine.steps(2)
    asked.result(10)
    (first,) = thread.take_finished(16, 10)
    assert first.request.id == 2
    assert thread.take_finished(16, 0.01) == []
    engine.steps(2)
    (second,) = thread.take_finished(16, 10)
    assert [len(c.token_ids) for c in second.completions] == [1, 4]


def test_weights_come_between_two_steps_and_what_is_under_way_goes_on(engine, thread):
    thread.submit([group(1, 4, 2)])
    engine.steps(1)
    loaded = thread.load_weights(lambda: [], 1)
    engine.steps(3)
    loaded.result(10)
    (finished,) = thread.take_finished(1, 10)
    first, second = versions(finished)
    # The order of weights and of the step that was under way is the thread's; from then on it is fixed.
    assert first in ([0, 1, 1, 1], [0, 0, 1, 1]) and second == first[:2]
    assert thread.version == 1 and thread.counts.loads == 2 and thread.counts.reread_tokens > 0


def test_restart_begins_again_what_is_under_way(engine, thread):
    thread.submit([group(1, 4)])
    engine.steps(2)
    assert engine.began.acquire(timeout=10)
    loaded = thread.load_weights(lambda: [], 1, running="restart")
    engine.may_step.release()
    loaded.result(10)
    engine.steps(4)
    (finished,) = thread.take_finished(1, 10)
    assert versions(finished) == [[1, 1, 1, 1]]


def test_weights_that_wait_are_loaded_when_all_has_ended_and_nothing_is_begun_meanwhile(engine, thread):
    thread.submit([group(1, 3)])
    assert engine.began.acquire(timeout=10)
    loaded = thread.load_weights(lambda: [], 1, running="wait")
    later = thread.submit([group(2, 1)])
    engine.may_step.release()
    engine.steps(2)
    loaded.result(10)
    later.result(10)
    engine.steps(1)
    first, second = thread.take_finished(1, 10), thread.take_finished(1, 10)
    assert versions(first[0]) == [[0, 0, 0]] and versions(second[0]) == [[1]]


def test_weights_that_come_in_behind_newer_ones_are_left_out(thread):
    thread.load_weights(lambda: [], 3).result(10)
    thread.load_weights(lambda: [], 2).result(10)
    assert thread.version == 3


@pytest.mark.parametrize("versions", [(2, 1), (1, 3, 2), (3,)])
def test_of_weights_that_wait_the_newest_are_loaded_and_every_call_ends(engine, thread, versions):
    thread.submit([group(1, 2)])
    assert engine.began.acquire(timeout=10)
    waiting = [thread.load_weights(lambda: [], version, running="wait") for version in versions]
    engine.may_step.release()
    engine.steps(1)
    for loaded in waiting:
        loaded.result(10)
    assert thread.version == max(versions)


def test_nothing_is_written_with_weights_that_were_loaded_in_part():
    class Breaks(ScriptedEngine):
        def load_weights(self, weights, version, cache="recompute"):
            if version == 1:
                raise RuntimeError("no memory for the second half")
            return super().load_weights(weights, version, cache)

    thread = EngineThread(Breaks(4, length=lambda request: 100, step_s=0.001), 4)
    thread.load_weights(lambda: [], 0).result(10)
    thread.submit([group(1, 100)]).result(10)
    with pytest.raises(RuntimeError, match="second half"):
        thread.load_weights(lambda: [], 1).result(10)
    with pytest.raises(RuntimeError, match="the engine has failed: RuntimeError: no memory for the second half"):
        thread.take_finished(1, 10)
    thread.close(10)


@pytest.mark.parametrize("running", ["continue", "restart"])
def test_an_engine_whose_weights_stopped_coming_writes_nothing_until_all_of_some_version_are_there(running):
    class Stops(ScriptedEngine):
        def load_weights(self, weights, version, cache="recompute"):
            if version == 1:
                raise WeightsLost("the trainer is gone")
            return super().load_weights(weights, version, cache)

    thread = EngineThread(Stops(4, length=lambda request: 50, step_s=0.001), 4)
    thread.load_weights(lambda: [], 0).result(10)
    thread.submit([group(1, 50)]).result(10)
    while not thread.counts.steps:
        time.sleep(0.001)
    with pytest.raises(WeightsLost):
        thread.load_weights(lambda: [], 1, running).result(10)
    thread.submit([group(2, 50)]).result(10)
    steps = thread.counts.steps
    assert thread.take_finished(1, 0.1) == [] and thread.counts.steps == steps and thread.version == 0
    thread.load_weights(lambda: [], 2).result(10)
    finished = [done for _ in range(2) for done in thread.take_finished(1, 10)]
    assert {done.request.id for done in finished} == {1, 2}
    of_first = next(versions(done)[0] for done in finished if done.request.id == 1)
    assert set(of_first) == ({0, 2} if running == "continue" else {2})
    thread.close(10)


def test_an_engine_that_cannot_abort_has_failed(engine, thread):
    engine.abort = lambda ids: 1 / 0
    thread.submit([group(1, 3)])
    assert engine.began.acquire(timeout=10)
    thread.abort([1])
    engine.may_step.release()
    with pytest.raises(RuntimeError, match="the engine has failed: ZeroDivisionError"):
        thread.take_finished(1, 10)


def test_who_waits_for_an_order_is_told_when_the_thread_ends(engine):
    thread = EngineThread(engine, 8)
    thread.load_weights(lambda: [], 0).result(10)
    thread.submit([group(1, 3)])
    assert engine.began.acquire(timeout=10)
    weights = thread.load_weights(lambda: [], 1, running="wait")
    engine.may_step.release()
    assert engine.began.acquire(timeout=10)
    later = thread.submit([group(2, 1)])
    closing = threading.Thread(target=thread.close, args=(10,))
    closing.start()
    while not thread._is_closed:
        closing.join(0.001)
    engine.may_step.release()
    for call in (weights, later):
        with pytest.raises(RuntimeError, match="the engine is closed"):
            call.result(10)
    closing.join(10)


def test_a_hurry_that_comes_between_two_waits_ends_the_next(thread):
    thread.hurry()
    ended = threading.Event()
    threading.Thread(target=lambda: (thread.take_finished(1, 30), ended.set()), daemon=True).start()
    assert ended.wait(10)


def test_a_group_waits_for_the_weights_that_it_asks_for(engine, thread):
    thread.submit([group(1, 2, min_version=1), group(2, 1)]).result(10)
    assert thread.num_held == 1 and thread.counts.samples == 2
    engine.steps(1)
    assert [g.request.id for g in thread.take_finished(9, 10)] == [2]
    thread.load_weights(lambda: [], 1).result(10)
    engine.steps(2)
    (finished,) = thread.take_finished(9, 10)
    assert versions(finished) == [[1, 1]] and thread.num_held == 0 and thread.counts.samples == 2


def test_what_is_aborted_never_comes_back(engine, thread):
    thread.submit([group(1, 1), group(2, 3), group(3, 3), group(4, 1, min_version=9)])
    engine.steps(1)
    assert engine.began.acquire(timeout=10)
    gone = thread.abort([1, 2, 4, 77])
    engine.may_step.release()
    gone.result(10)
    engine.steps(1)
    assert [g.request.id for g in thread.take_finished(9, 10)] == [3]
    assert (engine.num_running, engine.num_waiting, thread.num_held) == (0, 0, 0)


def test_a_request_that_is_refused_is_told_to_who_asked_and_changes_nothing():
    class Refuses(ScriptedEngine):
        def add(self, requests):
            if len(requests[0].token_ids) > 2:
                raise ValueError("too long")
            super().add(requests)

    thread = EngineThread(Refuses(4, length=lambda request: 1), 4)
    thread.load_weights(lambda: [], 0).result(10)
    with pytest.raises(ValueError, match="too long"):
        thread.submit([group(1, 1)]).result(10)
    short = GroupRequest(2, Prompt("p", PROMPT.token_ids[:1], (), {}), (1,), SamplingParams(max_new_tokens=3))
    thread.submit([short]).result(10)
    assert [g.request.id for g in thread.take_finished(9, 10)] == [2]
    thread.close(10)


@pytest.mark.parametrize("call", ["submit", "take_finished"])
def test_an_engine_that_fails_is_what_every_later_call_says(call):
    class Fails(ScriptedEngine):
        def step(self):
            raise MemoryError("no blocks left")

    thread = EngineThread(Fails(4), 4)
    thread.load_weights(lambda: [], 0).result(10)
    thread.submit([group(1, 1)])
    with pytest.raises(RuntimeError, match="the engine has failed: MemoryError: no blocks left"):
        thread.take_finished(1, 10)
    with pytest.raises(RuntimeError, match="no blocks left"):
        thread.submit([group(2, 1)]) if call == "submit" else thread.take_finished(1, 0.01)
    thread.close(10)
