"""Which groups are trained, how old they are, and that none is lost: over workers without models, which come and go."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rlflow.driver.errors import RunError
from rlflow.driver.scoring import Scoring
from tests.rlflow.driver.fleets import Fleet
from tests.rlflow.driver.schedules import DYNAMIC, drawn, names, recipe_of, run_schedule, train, window_of


@pytest.fixture
def fleet(request) -> Iterator[Any]:
    fleets: list[Fleet] = []

    def make(num_workers: int = 2, **options: Any) -> Fleet:
        fleets.append(Fleet(num_workers, **options))
        return fleets[-1]

    yield make
    for made in fleets:
        made.close()


@pytest.mark.parametrize("max_staleness", [0, 1, 4])
def test_steps_train_the_prompts_in_the_order_of_the_draw_and_no_token_is_too_old(fleet, max_staleness):
    recipe = recipe_of(run={"max_staleness": max_staleness})
    made = fleet(3)
    window = window_of(made, recipe)
    taken = train(made, window)
    assert [name for groups in taken for name in names(groups)] == drawn(recipe, 24)
    for step, groups in enumerate(taken):
        versions = np.concatenate([r.versions[r.is_sampled] for group in groups for r in group.rollouts])
        assert step - max_staleness <= versions.min() and versions.max() <= step
    assert (window.ledger.issued, window.ledger.trained, window.ledger.in_flight) == (24, 24, 0)


def test_what_is_released_is_what_may_be_under_way_and_no_more(fleet):
    window = window_of(fleet(1), recipe_of(run={"max_staleness": 2}), num_steps=4)
    window.release(0)
    assert sorted(window.steps) == [0, 1, 2] and window.ledger.in_flight == 12
    window.take(0)
    assert sorted(window.steps) == [1, 2]
    window.release(1)
    assert sorted(window.steps) == [1, 2, 3]


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_groups_without_signal_are_replaced_and_none_is_counted_twice(fleet, max_staleness):
    # Prompts whose number is even get the same reward for both rollouts.
    recipe = recipe_of(run={"max_staleness": max_staleness}, algorithm={"groups": DYNAMIC})
    made = fleet(2, score=lambda prompt, index: float(index * (int(prompt.id[2:]) % 2)))
    window = window_of(made, recipe)
    taken = train(made, window)
    trained = [name for groups in taken for name in names(groups)]
    assert len(trained) == 24 and all(int(name.partition(":")[2]) % 2 for name in trained)
    assert len(set(trained)) == 24
    assert window.ledger.trained == 24 and window.ledger.filtered > 0 and window.ledger.in_flight == 0
    if max_staleness == 0:
        # Rounds draw in order: the odd ones among what was drawn.
        order = [name for name in drawn(recipe, window.ledger.issued) if int(name.partition(":")[2]) % 2]
        assert trained == order[:24]


def test_where_signal_is_rare_the_first_groups_without_fill_up(fleet):
    recipe = recipe_of(algorithm={"groups": {"require_signal": True, "max_resamples": 1}})
    made = fleet(2, score=lambda prompt, index: 0.0)
    groups, metrics = (lambda w: (w.release(0), w.take(0))[1])(window_of(made, recipe))
    assert names(groups) == drawn(recipe, 4)
    assert (metrics["group/resampled"], metrics["group/filtered"], metrics["group/issued"]) == (4, 4, 8)


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_worker_that_dies_loses_no_group_and_changes_none(fleet, max_staleness):
    def run(dies: bool) -> list[list[str]]:
        made = fleet(2, rollout={"max_num_seqs": 4}, script_of=lambda rank: {"max_num_seqs": 4, "step_s": 0.002})
        window = window_of(made, recipe_of(run={"max_staleness": max_staleness}))
        if dies:
            threading.Timer(0.02, lambda: made.workers.transport.kill(made.workers.handles[1])).start()
        taken = train(made, window)
        assert len(made.workers_made) == 2 + dies and len(made.told) == dies
        assert window.ledger.in_flight == 0
        return [[r.token_ids.tolist() for group in groups for r in group.rollouts] for groups in taken]

    assert run(dies=True) == run(dies=False)


def test_a_worker_that_dies_again_and_again_ends_the_run_with_its_name(fleet):
    def script(rank: int) -> dict[str, Any]:
        return {"length": lambda request: 1 / 0} if rank == 1 else {}

    made = fleet(2, rollout={"recovery": {"max_restarts": 2}}, script_of=script)
    window = window_of(made, recipe_of())
    window.release(0)
    with pytest.raises(RunError, match=r"rollout\[1\].*ZeroDivisionError.*started 2 times again before"):
        window.take(0)


@pytest.mark.slow
def test_a_worker_whose_engine_hangs_is_replaced(fleet):
    hangs = [{"step_s": 2.0}, {}]
    # The first worker 0 hangs; the one in its place does not.
    made = fleet(2, rollout={"timeout_s": 0.7}, script_of=lambda rank: {} if rank or not hangs else hangs.pop(0))
    window = window_of(made, recipe_of())
    window.release(0)
    groups, _ = window.take(0)
    assert len(groups) == 4 and "no step of its engine within 1 s" in made.told[0]


@pytest.mark.slow
def test_a_worker_that_loads_for_long_is_heard_however_much_is_asked_of_it_meanwhile(fleet):
    made = fleet(1)
    window = window_of(made, recipe_of(run={"max_staleness": 4}))
    window.release(0)
    window.take(0)
    member, goes_on = made.pool.members[0], threading.Event()
    made.engine_of(0).load_weights = lambda weights, version, cache: goes_on.wait(30)
    made.publish(1)
    # As every step of the window does that asks for replacements.
    for _ in range(5):
        made.pool.ask([window._request(window.steps[1], 0, 0)], lambda request, group, scores: None)
    with made.pool.lock:
        for _ in range(3):
            heard_at = member.heard_at
            assert made.pool.lock.wait_for(lambda: member.heard_at > heard_at, 10)  # noqa: B023
    goes_on.set()


def test_a_reward_server_that_hangs_is_replaced_and_its_groups_are_scored_once(fleet, monkeypatch):
    monkeypatch.setattr(Scoring, "limit_s", lambda self, groups: 0.3)
    goes_on, hung = threading.Event(), []

    def score(prompt: Any, index: int) -> float:
        if not hung:
            hung.append(prompt.id)
            goes_on.wait(20)
        return float(index)

    made = fleet(2, score=score)
    window = window_of(made, recipe_of())
    taken = train(made, window, 2)
    goes_on.set()
    assert [name for groups in taken for name in names(groups)] == drawn(recipe_of(), 8)
    assert len(made.servers_made) == 2 and len(made.told) == 1
    assert made.told[0].startswith("rewards[0] is started again")
    assert made.told[0].endswith("rewards[0].score: no answer within 0 s")


@pytest.mark.slow
def test_a_reward_server_that_always_hangs_ends_the_run_with_its_name(fleet, monkeypatch):
    monkeypatch.setattr(Scoring, "limit_s", lambda self, groups: 0.05)
    goes_on = threading.Event()
    made = fleet(1, score=lambda prompt, index: float(goes_on.wait(20)))
    window = window_of(made, recipe_of())
    window.release(0)
    with pytest.raises(RunError, match=r"rewards\[0\].score: no answer within 0 s; it was started 3 times again"):
        window.take(0)
    goes_on.set()


def test_workers_may_join_and_leave_while_a_run_goes_on(fleet):
    made = fleet(1, rollout={"max_num_seqs": 2}, script_of=lambda rank: {"max_num_seqs": 2, "step_s": 0.002})
    window = window_of(made, recipe_of(run={"max_staleness": 1}))
    window.release(0)
    rank = made.pool.add_worker()
    window.take(0)
    made.publish(1)
    window.release(1)
    made.pool.remove_worker(0)
    window.take(1)
    assert rank == 1 and made.workers.ranks == (1,)
    with pytest.raises(ValueError, match="the last worker"):
        made.pool.remove_worker(1)


def test_what_an_idle_worker_was_asked_for_too_is_not_asked_again_when_the_slow_one_leaves(fleet):
    made = fleet(2, rollout={"max_num_seqs": 1})
    window = window_of(made, recipe_of(run={"max_staleness": 1}), num_steps=1)
    for worker in made.workers_made:
        worker.engine.engine.step_s = 0.5
    with made.pool.lock:
        window.release(0)
        slow, idle = made.pool.members.values()
        job = next(iter(slow.leases.values()))
        made.pool._submit(idle, [job])
        made.pool.remove_worker(0)
        assert job in idle.leases.values() and job not in made.pool._queue
        assert made.pool.counts()["running"] == len(idle.leases)


def test_workers_that_could_not_be_heard_while_this_process_stood_still_are_not_replaced(fleet, monkeypatch):
    made = fleet(4)
    window = window_of(made, recipe_of())
    train(made, window, 1)

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return time.monotonic() + 1000.0

    monkeypatch.setattr("rlflow.driver.pool.time", Clock)
    train(made, window, 6, first=1)
    assert made.told == []


@pytest.mark.slow
def test_what_has_been_given_back_is_not_kept_by_the_pool(fleet):
    made = fleet(2)
    window = window_of(made, recipe_of(), num_steps=1)
    asked, kept = made.pool.ask, []

    def ask(requests: Any, deliver: Any) -> None:
        kept.append(weakref.ref(deliver))
        asked(requests, deliver)

    made.pool.ask = ask
    window.release(0)
    window.take(0)
    with made.pool.lock:
        assert made.pool.lock.wait_for(lambda: gc.collect() >= 0 and not any(ref() for ref in kept), 10)
    assert len(kept) == 1


def test_a_worker_that_says_it_is_full_and_owes_nothing_is_not_believed(fleet):
    made = fleet(1)
    type(made.engine_of(0)).num_running = property(lambda engine: 1000)
    try:
        taken = train(made, window_of(made, recipe_of(run={"max_staleness": 1})))
    finally:
        type(made.engine_of(0)).num_running = property(lambda engine: len(engine._running))
    assert [len(groups) for groups in taken] == [4] * 6


@pytest.mark.parametrize("too_old", ["redo", "drop"])
def test_tokens_that_are_too_old_are_redone_or_dropped_and_counted(fleet, too_old):
    recipe = recipe_of(rollout={"at_update": {"too_old": too_old}})
    made = fleet(2)
    window = window_of(made, recipe)
    # Worker 1 says of one group that older weights sampled it than it was asked for.
    lied = []
    engine = made.engine_of(1)
    honest = engine._completion

    def completion(row: Any, reason: Any = None) -> Any:
        said = honest(row, reason)
        if len(lied) < 1 and engine.version == 2:
            lied.append(row)
            said.versions[:] = 0
        return said

    engine._completion = completion
    taken = train(made, window, 4)
    assert [len(groups) for groups in taken] == [4, 4, 4 if too_old == "redo" else 3, 4]
    assert window.too_old == 1 and window.ledger.in_flight == 0
    assert window.ledger.filtered == (too_old == "drop")


def test_weights_that_never_arrive_end_the_run(fleet):
    made = fleet(1)
    window = window_of(made, recipe_of())
    engine = made.engine_of(0)
    honest = engine.load_weights
    engine.load_weights = lambda weights, version, cache="recompute": honest(weights, 0, cache)
    with pytest.raises(RunError, match="step 2: a group was sampled by policy version 0, and none older than 1"):
        train(made, window)


def test_a_resumed_window_goes_on_where_the_ledger_stood(fleet):
    recipe = recipe_of(run={"max_staleness": 1})
    made = fleet(2)
    whole = [names(groups) for groups in train(made, window_of(made, recipe))]
    made = fleet(2)
    window = window_of(made, recipe)
    before = train(made, window, 3)
    state = window.state()
    made = fleet(2)
    made.publish(3)
    again = window_of(made, recipe)
    again.restore(3, state)
    after = train(made, again, first=3)
    assert [names(groups) for groups in before + after] == whole
    assert (again.ledger.issued, again.ledger.trained, again.ledger.in_flight) == (24, 24, 0)


def test_a_resumed_window_trains_the_replacements_that_had_been_drawn(fleet):
    # Prompts whose number is even have no signal.
    recipe = recipe_of(run={"max_staleness": 2}, algorithm={"groups": DYNAMIC})
    script: dict[str, Any] = {"score": lambda prompt, index: float(index * (int(prompt.id[2:]) % 2))}
    made = fleet(2, **script)
    window = window_of(made, recipe)
    trained = [name for groups in train(made, window, 2) for name in names(groups)]
    window.release(2)
    made.pool.wait_until(lambda: all(groups.is_whole for groups in window.steps.values()), lambda: None)
    state = window.state()
    assert len(state["spare"]) > 2
    # A run that is stopped again before it has asked for all of them forgets none.
    again = window_of(fleet(1), recipe, 4)
    again.restore(2, state)
    assert {key: sorted(value) for key, value in again.state().items() if key in ("drawn", "spare")} == {
        key: sorted(state[key]) for key in ("drawn", "spare")
    }
    made = fleet(2, **script)
    made.publish(2)
    again = window_of(made, recipe)
    again.restore(2, state)
    trained += [name for groups in train(made, again, first=2) for name in names(groups)]
    wanted = [name for name in drawn(recipe, 80) if int(name.partition(":")[2]) % 2]
    assert sorted(trained) == sorted(wanted[:24])


def test_rewards_that_want_several_prompts_in_a_call_are_called_in_the_order_of_the_draw(fleet):
    recipe = recipe_of(reward={"prompts_per_call": 3})
    made = fleet(2, reward={"prompts_per_call": 3})
    train(made, window_of(made, recipe), 2)
    expected = [name.partition("/")[2] for name in drawn(recipe, 8)]
    assert made.servers_made[0].calls == [expected[:4], expected[4:]]


@pytest.mark.parametrize("seed", range(40))
def test_whatever_dies_and_whenever_the_ledger_is_exact_and_no_token_too_old(fleet, seed):
    run_schedule(seed, fleet)
