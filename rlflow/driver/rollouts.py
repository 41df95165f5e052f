"""Prompts out to the workers, whole scored groups back, in prompt order.

    sampler --prompts--> RolloutWorker.generate --object reference--> RewardServer.score
                                  \\______________________ take() ______________________/

``fill(step)`` waits for nothing: it sends out every step's prompts that staleness allows. ``take(step)`` waits for
that step's chunks. A chunk is what one worker generates in one call; which prompts it holds depends on their order
alone, never on who is faster.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from rlflow.actors.actor_group import ActorGroup
from rlflow.actors.reward_server import RewardServer
from rlflow.actors.rollout_worker import RolloutWorker, decode_completions
from rlflow.algorithms.advantages import has_signal
from rlflow.data.sampler import Sampler
from rlflow.data.tokenizer import stop_token_ids
from rlflow.data.vocabulary import token_table
from rlflow.driver.clock import Clock
from rlflow.driver.errors import RunError
from rlflow.recipe import ModelBlock, Recipe, RewardBlock
from rlflow.rollout_checks import layout_problem, text_problem, token_problem, version_problem
from rlflow.tracking.tracker import Tracker
from rlflow.types import GenerationRequest, Group, Prompt, RolloutBatch, SamplingParams, ScoreBatch

SHOWN_ERRORS = 3

Item = tuple[int, Prompt]
"""(epoch, prompt)."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One worker's share of a step, on its way."""

    items: tuple[Item, ...]
    num_samples: int
    """Of each prompt."""
    params: SamplingParams
    worker: int
    server: int
    rollouts: ray.ObjectRef
    scores: ray.ObjectRef


@dataclass(frozen=True, slots=True)
class ScoredChunk:
    """What came back."""

    items: tuple[Item, ...]
    rollouts: RolloutBatch
    scores: ScoreBatch


@dataclass(slots=True)
class Ledger:
    """issued = trained + filtered + in flight: nothing is lost or counted twice."""

    issued: int = 0
    trained: int = 0
    filtered: int = 0

    @property
    def in_flight(self) -> int:
        return self.issued - self.trained - self.filtered

    def metrics(self) -> dict[str, float]:
        """Groups, counted since this process began."""
        return {
            "group/issued": float(self.issued),
            "group/trained": float(self.trained),
            "group/filtered": float(self.filtered),
            "group/in_flight": float(self.in_flight),
        }


def sample_seed(run_seed: int, prompt_id: str, epoch: int, index: int) -> int:
    """63-bit seed of one sample, from names alone: who generates it, and when, cannot matter."""
    text = f"{run_seed}/{prompt_id}/{epoch}/{index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def sampling_params(recipe: Recipe, tokenizer: Any, model: ModelBlock) -> SamplingParams:
    """How completions are drawn that are trained."""
    rollout = recipe.rollout
    return SamplingParams(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop_token_ids=stop_token_ids(tokenizer, model),
    )


@dataclass(slots=True)
class Generation:
    """Who generates and who scores, and what they need to know of the run."""

    rollout: ActorGroup[RolloutWorker]
    rewards: ActorGroup[RewardServer]
    tokenizer: Any
    params: SamplingParams
    seed: int
    """The run's."""
    tracker: Tracker
    clock: Clock
    version: int = 0
    """Of the weights that the workers were given last."""

    def publish(self, weights: ray.ObjectRef, version: int) -> None:
        """Gives weights to every rollout worker; they are version ``version`` from then on."""
        self.version = version
        with self.clock("sync"):
            self.rollout.call_all(RolloutWorker.load_weights, weights)


def generate_and_score(
    generation: Generation,
    items: Sequence[Item],
    num_samples: int,
    params: SamplingParams,
    rewards_wanted: Sequence[RewardBlock],
    purpose: str = "",
) -> list[Chunk]:
    """Starts generation of ``num_samples`` completions a prompt, and their scoring. Waits for nothing."""
    labels = tuple(block.label for block in rewards_wanted)
    rollout, rewards = generation.rollout, generation.rewards
    chunks = []
    for worker, share in enumerate(np.array_split(np.arange(len(items)), len(rollout))):
        if not len(share):
            continue
        chosen = tuple(items[i] for i in share)
        requests = [
            GenerationRequest(
                prompt.token_ids,
                tuple(
                    sample_seed(generation.seed, f"{purpose}{prompt.id}", epoch, index) for index in range(num_samples)
                ),
            )
            for epoch, prompt in chosen
        ]
        rollouts_ref = rollout.start(worker, RolloutWorker.generate, requests, params)
        server = worker % len(rewards)
        prompts = tuple(prompt for _, prompt in chosen)
        scores_ref = rewards.start(server, RewardServer.score, rollouts_ref, prompts, labels)
        chunks.append(Chunk(chosen, num_samples, params, worker, server, rollouts_ref, scores_ref))
    return chunks


def collect(generation: Generation, chunks: Sequence[Chunk], max_staleness: int = 0) -> list[ScoredChunk]:
    """Waits for chunks, in order.

    Args:
        max_staleness: Versions by which the weights that sampled may lag behind those that the workers have now.

    Raises:
        RunError: What a worker returned cannot be what was asked for: which worker, and what it returned.
    """
    rollout, rewards = generation.rollout, generation.rewards
    collected = []
    for number, chunk in enumerate(chunks):
        generation.tracker.progress("generating", number, len(chunks))
        batch = rollout.get(chunk.worker, RolloutWorker.generate, chunk.rollouts)
        problem = _problem_of(generation, chunk, batch, max_staleness)
        if problem is not None:
            raise RunError(
                f"{rollout.name_of(chunk.worker)}.generate returned what cannot be trained or measured: {problem}. "
                "Nothing of it was used"
            )
        scores = rewards.get(chunk.server, RewardServer.score, chunk.scores)
        collected.append(ScoredChunk(chunk.items, batch, scores))
    return collected


def _problem_of(generation: Generation, chunk: Chunk, batch: RolloutBatch, max_staleness: int) -> str | None:
    """What keeps a batch from being what its chunk asked for; None where nothing does."""

    def decode(completions: Sequence[np.ndarray]) -> Sequence[str]:
        return decode_completions(generation.tokenizer, completions, chunk.params.stop_token_ids)

    return (
        layout_problem(batch, len(chunk.items) * chunk.num_samples, chunk.params.max_new_tokens)
        or version_problem(batch, generation.version, max_staleness)
        or token_problem(batch, token_table(generation.tokenizer))
        or text_problem(batch, decode)
    )


class RolloutPipeline:
    """The step's groups, generated at most ``max_staleness`` policy versions before they are trained."""

    def __init__(
        self,
        recipe: Recipe,
        generation: Generation,
        prompts: Sequence[Prompt],
        num_steps: int,
        build_groups: Callable[[ScoredChunk], list[Group]],
    ) -> None:
        self.recipe, self.generation, self.prompts, self.num_steps = recipe, generation, prompts, num_steps
        self.sampler = Sampler(len(prompts), seed=recipe.run.seed, shuffle=recipe.data.shuffle)
        self.build_groups = build_groups
        self.ledger = Ledger()
        self.at_hand: tuple[int, list[Group]] = (0, [])
        """The step, counted from 0, that was taken last, and what of it has come back."""
        self._next = 0
        self._drawn: dict[int, list[tuple[int, int]]] = {}
        """Of steps that are not yet trained: the (epoch, row) of what was drawn for them first."""
        self._chunks: dict[int, list[Chunk]] = {}
        self._unscored_in_a_row = 0

    def fill(self, step: int) -> None:
        """Issues the prompts of every step up to ``step + max_staleness``."""
        while self._next <= min(step + self.recipe.run.max_staleness, self.num_steps - 1):
            if self._next not in self._drawn:
                self._drawn[self._next] = self.sampler.take(self.recipe.data.prompts_per_step)
            self._chunks[self._next] = self._issue(self._drawn[self._next])
            self._next += 1

    def take(self, step: int) -> tuple[list[Group], dict[str, float]]:
        """The groups of ``step``, whole and scored, and the metrics of making them.

        Groups without signal are replaced when the algorithm asks for it: new prompts take their place, at most
        ``max_resamples`` times, and every group that has signal is kept. Where that is not enough, the first ones
        without fill up; all are in the order in which they were drawn.
        """
        block = self.recipe.algorithm.groups
        wanted = self.recipe.data.prompts_per_step
        groups: list[Group] = []
        self.at_hand = (step, groups)
        is_kept: list[bool] = []
        missing = wanted
        timing = RolloutTiming()
        chunks = self._chunks.pop(step)
        for attempt in range(block.max_resamples + 1):
            timing.next_round()
            for chunk in collect(self.generation, chunks, self.recipe.run.max_staleness):
                timing.add(chunk)
                groups += self.build_groups(chunk)
            is_kept = [not block.require_signal or has_signal(group.rewards) for group in groups]
            missing = wanted - sum(is_kept)
            if not missing or attempt == block.max_resamples:
                break
            chunks = self._issue(self.sampler.take(missing))
        require_few_errors(timing, self.recipe.reward_server.max_error_fraction)
        if timing.failed:
            self.generation.tracker.message(f"step {step + 1}: {timing.account}")
        self._count_unscored(timing, step + 1)
        left_out = set(np.flatnonzero(~np.array(is_kept))[missing:])
        trained = [group for index, group in enumerate(groups) if index not in left_out]
        self.ledger.trained += len(trained)
        self.ledger.filtered += len(left_out)
        del self._drawn[step]
        return trained, timing.metrics() | self.ledger.metrics() | {"group/resampled": float(len(left_out))}

    def _count_unscored(self, timing: RolloutTiming, step: int) -> None:
        """Says that nothing of a step was scored; raises RunError when that is so in too many steps in a row."""
        self._unscored_in_a_row = 0 if timing.scored else self._unscored_in_a_row + 1
        if timing.scored:
            return
        limit = self.recipe.run.max_skipped_steps
        said = f"step {step}: none of its {timing.rows} rollouts has a reward: {timing.silence}"
        if self._unscored_in_a_row < limit:
            self.generation.tracker.message(f"{said}. Nothing is trained in this step")
            return
        raise RunError(
            f"{said}. So it was in {limit} steps in a row (run.max_skipped_steps), and nothing was trained. A reward "
            "abstains (None) where it finds nothing to compare with: look at the columns that it reads, e.g. with "
            "data.train.columns: {solution: answer}"
        )

    def state(self) -> dict:
        """What a resumed run needs: what was drawn and not yet trained is generated again."""
        return {"sampler": self.sampler.state(), "drawn": list(self._drawn.items())}

    def restore(self, step: int, state: dict) -> None:
        self._next = step
        self.sampler.restore(state["sampler"])
        self._drawn = {of_step: [(epoch, row) for epoch, row in rows] for of_step, rows in state.get("drawn", [])}

    def _issue(self, rows: Sequence[tuple[int, int]]) -> list[Chunk]:
        self.ledger.issued += len(rows)
        items = [(epoch, self.prompts[row]) for epoch, row in rows]
        recipe, params = self.recipe, self.generation.params
        return generate_and_score(self.generation, items, recipe.algorithm.group_size, params, recipe.rewards)


class RolloutTiming:
    """Times and token counts of a step's chunks. Workers run side by side: the slowest is what a round waited for."""

    def __init__(self) -> None:
        self.generate_s: list[float] = []
        """Of each round: the first, and one for every time that groups were replaced."""
        self.tokens = 0
        self.score_s = 0.0
        self.rows = 0
        self.failed = 0
        self.scored = 0
        """Rows with a reward of any function."""
        self.errors: list[str] = []
        self._without: dict[str, tuple[int, int]] = {}
        """Function -> rows on which it abstained, rows on which it failed."""

    def next_round(self) -> None:
        self.generate_s.append(0.0)

    def add(self, chunk: ScoredChunk) -> None:
        self.generate_s[-1] = max(self.generate_s[-1], chunk.rollouts.seconds)
        self.tokens += len(chunk.rollouts.token_ids)
        self.score_s = max(self.score_s, chunk.scores.seconds)
        self.rows += len(chunk.rollouts.texts)
        failed = np.zeros(len(chunk.rollouts.texts), dtype=bool)
        scored = np.zeros(len(chunk.rollouts.texts), dtype=bool)
        for label, rewards in chunk.scores.rewards.items():
            failed_here = chunk.scores.failed[label]
            failed |= failed_here
            scored |= ~np.isnan(rewards)
            abstained, failures = self._without.get(label, (0, 0))
            abstained += int((np.isnan(rewards) & ~failed_here).sum())
            self._without[label] = abstained, failures + int(failed_here.sum())
        self.failed += int(failed.sum())
        self.scored += int((scored & ~failed).sum())
        self.errors += chunk.scores.errors

    @property
    def account(self) -> str:
        """How many rollouts a function failed on, and why the first of them."""
        return f"{self.failed} of {self.rows} rollouts could not be scored:{listed(self.errors)}"

    @property
    def silence(self) -> str:
        """Where no rollout has a reward: what each function did instead."""
        parts = []
        for label, (abstained, failed) in self._without.items():
            done = [f"abstained on {abstained}"] if abstained else []
            done += [f"failed on {failed}"] if failed else []
            parts.append(f"{label} {' and '.join(done) or 'scored none that the others did not fail on'}")
        return ", ".join(parts)

    def metrics(self) -> dict[str, float]:
        slowest = sum(self.generate_s)
        return {
            "time/generate_s": slowest,
            "time/reward_s": self.score_s,
            "perf/generated_tokens_per_s": self.tokens / slowest,
            "reward/error_fraction": self.failed / self.rows,
        }


def require_few_errors(timing: RolloutTiming, limit: float) -> None:
    """Raises RunError when more than ``limit`` of the rollouts are unscored because a reward function failed."""
    if timing.failed > limit * timing.rows:
        raise RunError(
            f"{timing.failed} of {timing.rows} rollouts could not be scored, more than "
            f"reward_server.max_error_fraction = {limit:g}:{listed(timing.errors)}"
        )


def listed(errors: Sequence[str]) -> str:
    """The first of a step's errors, a line each."""
    return "".join(f"\n  {error}" for error in list(dict.fromkeys(errors))[:SHOWN_ERRORS])
