"""A rollout worker's process is killed with episodes under way: none is lost, none counts twice, all end the same."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlflow.actor_groups import CALLS_AT_ONCE
from rlflow.actors.actor_group import ActorGroup
from rlflow.actors.engine_thread import EngineThread
from rlflow.actors.environment_episodes import Episodes
from rlflow.actors.rollout_worker import RolloutWorker, WorkerReady
from rlflow.actors.weight_intake import WeightIntake
from rlflow.driver.pool import RolloutPool
from rlflow.driver.scoring import Scoring
from rlflow.placement import RayTransport
from rlflow.recipe import EnvironmentBlock, RewardBlock, RolloutBlock
from rlflow.rewards.score_batch import ScoreBatch
from rlflow.types import Group, GroupRequest
from tests.actors import talking
from tests.actors.talking import EOS, TOKENIZER, TalkingEngine, prompt_of, request_of
from tests.rlflow.driver import fleets

ENVIRONMENT = """
import os, time
from rlflow.environments import Reply

class Slow:
    def __init__(self, log):
        self.log, self.turns = log, 0
    def reset(self, row): ...
    def step(self, message):
        with open(self.log, "a") as log:
            log.write(f"{os.getpid()} {os.getppid()}\\n")
        time.sleep(0.4)
        self.turns += 1
        return Reply(message["content"] * self.turns, reward=1.0, done=self.turns == 3)
"""
NUM_GROUPS, SIZE = 4, 2
WAIT_S = 30.0


class SeededEngine(TalkingEngine):
    """Says a letter that the turn's seed decides."""

    def _tokens(self, request: Any) -> list[int]:
        return [*TOKENIZER("abcdefgh"[request.seed % 8], add_special_tokens=False)["input_ids"], EOS]


class TalkingWorker(RolloutWorker):
    def __init__(self, rank: int, block: EnvironmentBlock) -> None:
        self.rank, self.tokenizer, self.is_token = rank, TOKENIZER, np.ones(len(TOKENIZER), dtype=bool)
        self.engine = engine = EngineThread(SeededEngine(lambda before: ""), 64)
        engine.episodes = Episodes(
            block, TOKENIZER, None, go_on=engine.go_on, over=engine.end_episode, fail=engine.fail, at_once=64
        )
        self.intake = WeightIntake(engine, "continue", "recompute")
        self._ready = WorkerReady("talking", 0.0)

    def pid(self) -> int:
        return os.getpid()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A line of each turn of an environment: its process and the one that it was forked from."""
    (tmp_path / "slow.py").write_text(ENVIRONMENT)
    (tmp_path / "log").touch()
    return tmp_path / "log"


@pytest.fixture
def workers(ray_session: None, log: Path) -> Iterator[ActorGroup[TalkingWorker]]:
    import ray

    # Ray's processes cannot import a test.
    for module in (sys.modules[__name__], talking, fleets):
        ray.cloudpickle.register_pickle_by_value(module)
    block = EnvironmentBlock(plugin=f"{log.parent / 'slow.py'}:Slow", args={"log": str(log)})
    options = {"num_cpus": 0.1, "num_gpus": 0, "max_concurrency": CALLS_AT_ONCE["rollout"]}
    transport = RayTransport(lambda rank: (TalkingWorker, {"rank": rank, "block": block}), options, [])
    group = ActorGroup[TalkingWorker]("rollout", transport, 2, WAIT_S)
    yield group
    group.kill()


@pytest.fixture
def pool(workers: ActorGroup[TalkingWorker]) -> Iterator[RolloutPool]:
    workers.call_all(RolloutWorker.ready)
    options = {"num_cpus": 0.1, "num_gpus": 0}
    servers = ActorGroup[Any]("rewards", RayTransport(lambda rank: (fleets.ScriptedServer, {}), options, []), 1, WAIT_S)
    pool = RolloutPool(
        workers,
        Scoring(servers, [RewardBlock(name="length")], tell=print),
        RolloutBlock(max_new_tokens=8),
        tokenizer=TOKENIZER,
        is_token=np.ones(len(TOKENIZER), dtype=bool),
        startup_timeout_s=WAIT_S,
        tell=print,
    )
    pool.publish(workers.put(fleets.snapshot(0)), 0)
    yield pool
    pool.close()
    servers.kill()


def ask(pool: RolloutPool) -> dict[int, Group]:
    """Groups of two episodes, with the same seeds each time; where they arrive, by their number."""
    arrived: dict[int, Group] = {}

    numbers: dict[int, int] = {}

    def deliver(request: GroupRequest, group: Group, scores: ScoreBatch) -> None:
        arrived[numbers.pop(request.id)] = group

    requests = []
    for number in range(NUM_GROUPS):
        seeds = tuple(range(number * SIZE, (number + 1) * SIZE))
        request = request_of(pool.next_id(), prompt_of({}), seeds=seeds)
        numbers[request.id] = number
        requests.append(replace(request, labels=("length",), is_pinned=True))
    pool.ask(requests, deliver)
    return arrived


def wait_until(pool: RolloutPool, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        pool.check()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def told(groups: dict[int, Group]) -> list[tuple[Any, ...]]:
    """All that is trained of the groups."""
    return [
        (
            rollout.token_ids.tolist(),
            rollout.is_sampled.tolist(),
            rollout.episode and (rollout.episode.reward, rollout.episode.num_turns),
        )
        for number in range(NUM_GROUPS)
        for rollout in groups[number].rollouts
    ]


def lines_of(log: Path) -> list[list[int]]:
    return [[int(pid) for pid in line.split()] for line in log.read_text().splitlines()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.ray
def test_episodes_of_a_worker_that_is_killed_are_played_again_with_the_same_result(pool, workers, log):
    undisturbed = ask(pool)
    wait_until(pool, lambda: len(undisturbed) == NUM_GROUPS)
    assert len(lines_of(log)) == 3 * NUM_GROUPS * SIZE
    log.write_text("")
    pids = workers.call_all(TalkingWorker.pid)
    groups = ask(pool)
    wait_until(pool, lambda: len(lines_of(log)) > NUM_GROUPS * SIZE)
    assert not groups
    os.kill(pids[0], signal.SIGKILL)
    under_way = lines_of(log)
    wait_until(pool, lambda: len(groups) == NUM_GROUPS)
    assert told(groups) == told(undisturbed)
    assert {len(turns) for *_, turns in told(groups)} == {SIZE}
    sources = {source for _, source in under_way}
    assert len(sources) == 2
    wait_until(pool, lambda: sum(map(is_alive, sources)) == 1)
    (gone,) = (source for source in sources if not is_alive(source))
    wait_until(pool, lambda: not any(is_alive(pid) for pid, source in under_way if source == gone))
    assert workers.call_all(TalkingWorker.pid)[0] != pids[0]
