"""Workers that are too late for weights which went past the object store: they are sent again, or the run says so."""

from __future__ import annotations

import json
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from finished_runs import NEW_MODEL, RunRecipe, metrics_of, same_weights
from fleets import Fleet, snapshot

from rlflow.actors import weight_carriers, weight_lines
from rlflow.actors.rollout_worker import RolloutWorker
from rlflow.actors.weight_sync import WeightSnapshot
from rlflow.driver.errors import RunError
from rlflow.driver.learner import Learner
from rlflow.driver.pool import RolloutPool
from rlflow.driver.weight_supply import WeightSupply
from rlflow.recipe import RolloutBlock


@pytest.fixture
def streamed():
    """Two workers whose engines got version 1 without a snapshot."""
    made = Fleet(2)
    for worker in made.workers_made:
        worker.engine.load_weights(lambda: [], 1).result(10)
    made.pool.publish(made.workers.put(WeightSnapshot(1, is_streamed=True)), 1)
    yield made
    made.close()


def lose(fleet: Fleet, *ranks: int) -> None:
    """Kills workers, and waits until the pool has heard of each fresh one that it has no weights."""
    for rank in ranks:
        fleet.workers.transport.kill(fleet.workers.handles[rank])
    with fleet.pool.lock:
        assert fleet.pool.lock.wait_for(lambda: all(fleet.pool.members[rank].lacks_weights for rank in ranks), 20)


def test_a_worker_that_is_started_again_is_asked_for_nothing_before_it_has_the_weights_that_went_past_it(streamed):
    pool, asked = streamed.pool, []
    lose(streamed, 0)
    assert pool.members[0].room(64) == 0 and pool.members[1].room(64) == 64

    def again() -> Any:
        asked.append(pool.version)
        return None if len(asked) == 1 else streamed.workers.put(snapshot(1))

    pool.supply.again = again
    pool.wait_until(lambda: pool.members[0].version == 1, lambda: None)
    assert asked == [1, 1] and pool.members[0].room(64) == 64
    # What was sent again is there for the next one too.
    streamed.workers.transport.kill(streamed.workers.handles[1])
    pool.wait_until(lambda: pool.members[1].incarnation == 1 and pool.members[1].version == 1, lambda: None)
    assert asked == [1, 1]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_newer_weights_reach_a_worker_that_the_last_ones_went_past_though_nobody_waits(streamed, is_streamed):
    lose(streamed, 0)
    streamed.pool.supply.again = lambda: streamed.workers.put(snapshot(2))
    streamed.workers_made[1].engine.load_weights(lambda: [], 2).result(10)
    streamed.pool.publish(streamed.workers.put(WeightSnapshot(2, is_streamed=is_streamed)), 2)
    with streamed.pool.lock:
        assert streamed.pool.lock.wait_for(lambda: streamed.pool.members[0].version == 2, 20)
    assert streamed.pool.members[0].room(64) == 64


def test_when_nobody_has_the_weights_that_work_waits_for_the_run_says_so(streamed):
    lose(streamed, 0, 1)
    with pytest.raises(RunError, match=r"every rollout worker was lost, and with them policy version 1, .* --resume"):
        streamed.pool.wait_until(lambda: False, lambda: None)


def test_trainers_are_asked_for_what_a_worker_lacks_alone():
    supply = WeightSupply(RolloutBlock().at_update, lambda rank, said: None)
    supply.again = lambda: pytest.fail("nobody lacks anything")
    supply.supply([], lambda member: None)


REWARD = "def evenness(completions, **columns):\n    return [sum(map(ord, text)) % 7 for text in completions]\n"


@pytest.fixture
def run(run_recipe: RunRecipe, tmp_path: Path):
    """Runs six synchronous steps of GRPO with two workers; keywords are keys of the recipe."""
    rows, reward = tmp_path / "rows.jsonl", tmp_path / "evenness.py"
    rows.write_text("".join(json.dumps({"prompt": f"{i}+1=", "response": str(i + 1)}) + "\n" for i in range(12)))
    reward.write_text(REWARD)
    recipe: dict[str, Any] = {
        "algorithm": {"name": "grpo", "group_size": 2},
        "model": NEW_MODEL,
        "data": {"train": {"path": str(rows)}, "prompts_per_step": 4, "max_prompt_tokens": 32},
        "rewards": [{"plugin": f"{reward}:evenness"}],
        "rollout": {"max_new_tokens": 4, "workers": 2},
        "trainer": {"learning_rate": 1e-2},
        "run": {"steps": 6},
    }
    return lambda name, **overrides: run_recipe(recipe, name, **overrides)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[WeightSnapshot]:
    """What workers are told of each version."""
    told: list[WeightSnapshot] = []
    load_weights = RolloutWorker.load_weights

    @wraps(load_weights)
    def noting(self: RolloutWorker, snapshot: WeightSnapshot, *args: Any) -> Any:
        told.append(snapshot)
        return load_weights(self, snapshot, *args)

    monkeypatch.setattr(RolloutWorker, "load_weights", noting)
    return told


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[RolloutPool]:
    """Those of the runs, in their order."""
    made: list[RolloutPool] = []
    init = RolloutPool.__init__

    @wraps(init)
    def noting(self: RolloutPool, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(RolloutPool, "__init__", noting)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["ipc", "collective"])
def test_a_run_ends_with_the_same_bits_however_its_weights_travel_and_whoever_dies(
    run, sent, pools, monkeypatch, transport
):
    monkeypatch.setattr(weight_lines.Line.hear, "__kwdefaults__", {"timeout_s": 5.0})
    monkeypatch.setattr(weight_carriers, "ANSWER_S", 5.0)
    objects = run("objects", rollout__at_update__transport="objects")
    assert not any(snapshot.is_streamed or snapshot.meetings for snapshot in sent)
    sent.clear()
    assert same_weights(objects, run(transport, rollout__at_update__transport=transport))
    assert any(snapshot.is_streamed for snapshot in sent)
    weights = Learner.weights

    def killing(learner: Learner, version: int, *, whole: bool = False) -> Any:
        workers = pools[-1].workers
        if version == 3 and not whole:
            workers.transport.kill(workers.handles[0])
        snapshot = weights(learner, version, whole=whole)
        if version == 5 and not whole:
            workers.transport.kill(workers.handles[1])
        return snapshot

    monkeypatch.setattr(Learner, "weights", killing)
    disturbed = run("disturbed", rollout__at_update__transport=transport)
    assert same_weights(objects, disturbed) and metrics_of(disturbed)[-1]["fleet/restarts"] == 2
