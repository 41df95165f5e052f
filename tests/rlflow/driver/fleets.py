"""A fleet without models: workers that write by script, servers that score by script, in threads of this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlflow.actor_groups import CALLS_AT_ONCE
from rlflow.actors.actor_group import ActorGroup
from rlflow.actors.engine_thread import EngineThread
from rlflow.actors.rollout_engines.scripted_engine import ScriptedEngine
from rlflow.actors.rollout_worker import RolloutWorker, WorkerReady
from rlflow.actors.weight_intake import WeightIntake
from rlflow.actors.weight_sync import WeightSnapshot
from rlflow.data.tokenizer import build_character_tokenizer
from rlflow.driver.pool import RolloutPool
from rlflow.driver.scoring import Scoring
from rlflow.in_process import LocalTransport
from rlflow.recipe import RewardBlock, RolloutBlock
from rlflow.rewards.score_batch import GroupTexts, ScoreBatch
from rlflow.types import Prompt

TOKENIZER = build_character_tokenizer("abc")
TOKEN = int(TOKENIZER.convert_tokens_to_ids("a"))
IS_TOKEN = np.ones(len(TOKENIZER), dtype=bool)


class ScriptedWorker(RolloutWorker):
    def __init__(self, rank: int, max_num_seqs: int = 64, **script: Any) -> None:
        self.rank, self.tokenizer, self.is_token = rank, TOKENIZER, IS_TOKEN
        self.engine = EngineThread(ScriptedEngine(max_num_seqs, token=TOKEN, **script), max_num_seqs)
        self.intake = WeightIntake(self.engine, "continue", "recompute")
        self._ready = WorkerReady("scripted", 0.0)


class ScriptedServer:
    """Scores a rollout by its number in its group, counted from 0, or as ``score`` says."""

    def __init__(
        self, score: Callable[[Prompt, int], float] = lambda prompt, index: float(index), seconds: float = 0.0
    ) -> None:
        self.of, self.seconds = score, seconds
        self.calls: list[list[str]] = []
        """Prompt ids of each call."""

    def score(self, groups: Sequence[GroupTexts], labels: tuple[str, ...]) -> ScoreBatch:
        self.calls.append([group.prompt.id for group in groups])
        if self.seconds:
            time.sleep(self.seconds)
        rewards = [self.of(group.prompt, index) for group in groups for index in range(len(group.texts))]
        values = np.array(rewards, dtype=np.float32)
        return ScoreBatch(
            rewards=dict.fromkeys(labels, values),
            failed={label: np.zeros(len(values), dtype=bool) for label in labels},
            causes={},
            errors=(),
            seconds=self.seconds,
        )


def _on_ray(cls: type, arguments: Mapping[str, Any], *, has_rank: bool) -> Any:
    import ray

    from rlflow.placement import RayTransport

    if not ray.is_initialized():
        ray.init(num_cpus=128, include_dashboard=False, log_to_driver=False, object_store_memory=2**30)
    options = {"num_cpus": 1, "num_gpus": 0, "max_concurrency": CALLS_AT_ONCE["rollout"] if has_rank else 1}
    return RayTransport(lambda rank: (cls, {**arguments, **({"rank": rank} if has_rank else {})}), options, [])


def snapshot(version: int) -> WeightSnapshot:
    """Weights of nothing."""
    return WeightSnapshot(version)


class Fleet:
    """A pool over scripted workers and one scripted server."""

    def __init__(
        self,
        num_workers: int = 2,
        *,
        score: Callable[[Prompt, int], float] = lambda prompt, index: float(index),
        rollout: Mapping[str, Any] | None = None,
        reward: Mapping[str, Any] | None = None,
        script: Mapping[str, Any] | None = None,
        script_of: Callable[[int], Mapping[str, Any]] | None = None,
        score_s: float = 0.0,
        on_ray: bool = False,
    ) -> None:
        """
        Args:
            script: Of every worker's engine; or ``script_of`` of each.
            on_ray: In processes of Ray's rather than in threads of this one: they cannot be looked into.
        """
        self.workers_made: list[ScriptedWorker] = []
        self.servers_made: list[ScriptedServer] = []
        self.told: list[str] = []

        def make_worker(rank: int) -> ScriptedWorker:
            self.workers_made.append(ScriptedWorker(rank, **(script_of(rank) if script_of else script or {})))
            return self.workers_made[-1]

        def make_server(rank: int) -> ScriptedServer:
            self.servers_made.append(ScriptedServer(score, score_s))
            return self.servers_made[-1]

        self.rollout = RolloutBlock(**{"max_new_tokens": 8, **(rollout or {})})
        if on_ray:
            workers: Any = _on_ray(ScriptedWorker, script or {}, has_rank=True)
            servers: Any = _on_ray(ScriptedServer, {}, has_rank=False)
        else:
            workers, servers = LocalTransport(make_worker, CALLS_AT_ONCE["rollout"]), LocalTransport(make_server)
        self.workers = ActorGroup("rollout", workers, num_workers, 120.0)
        self.servers = ActorGroup("rewards", servers, 1, 120.0)
        self.workers.call_all(RolloutWorker.ready)
        self.pool = RolloutPool(
            self.workers,
            Scoring(self.servers, [RewardBlock(name="length", **(reward or {}))], tell=self.told.append),
            self.rollout,
            tokenizer=TOKENIZER,
            is_token=IS_TOKEN,
            startup_timeout_s=30.0,
            tell=self.told.append,
        )
        self.publish(0)

    def publish(self, version: int) -> None:
        self.pool.publish(self.workers.put(snapshot(version)), version)

    def engine_of(self, rank: int) -> Any:
        """The script of the worker that has this rank now."""
        return [worker for worker in self.workers_made if worker.rank == rank][-1].engine.engine

    def close(self) -> None:
        self.pool.close()
        self.workers.kill()
        self.servers.kill()
