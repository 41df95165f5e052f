"""Stored rollouts through the rewards and advantages as they are now, in the processes that training uses.

records -- groups of a prompt --> RewardServer.score --> combined as in training --> advantages of the step
                                        |                                                |
                                        +---------- then and now, of every rollout <-----+
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from rlflow.actors.reward_server import RewardServer
from rlflow.data.errors import DataError
from rlflow.driver import assemble
from rlflow.recipe import OnlineBlock, RewardBlock, RewardServerBlock
from rlflow.recipe.advantage_blocks import BaselineBlock, GAEBlock
from rlflow.recipe.distill_blocks import AdvantageDistillBlock
from rlflow.rewards import RewardError
from rlflow.rewards.score_batch import GroupTexts
from rlflow.tracking.rollouts import RolloutRecord
from rlflow.types import Group, Prompt, Rollout

TOLERANCE = 1e-5
"""Relative; stored numbers are float32."""
CALLS_AT_A_TIME = 32
"""So many calls of a function are scored between two reports of progress."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """What the rollouts are scored with."""

    rewards: Sequence[RewardBlock]
    server: RewardServerBlock
    algorithm: OnlineBlock
    max_new_tokens: int
    advantages: bool = True
    """Whether they are wanted beside the rewards."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one rollout."""

    record: RolloutRecord
    rewards: Mapping[str, float]
    """By function, now; NaN where it abstained or failed."""
    error: str
    """Which functions fail on it now, and why."""
    reward: float
    """All functions together."""
    advantage: float | None
    """None where it was not computed."""


@dataclass(slots=True)
class Replay:
    outcomes: list[Outcome] = field(default_factory=list)
    """In the order of the records."""
    notes: list[str] = field(default_factory=list)
    """What people should know before they trust it."""


def replay(
    records: Sequence[RolloutRecord], scorer: Scorer, tell: Callable[[int, int], None] = lambda done, total: None
) -> Replay:
    """Scores rollouts once more.

    Args:
        records: With tokens; whole steps where advantages are wanted, for these depend on a group's other rollouts.
        tell: Called with how many rollouts are scored, and of how many.

    Raises:
        DataError: A function cannot be loaded, or its process cannot be started.
    """
    result = Replay(notes=list(_notes(records, scorer)))
    steps = [list(of_step) for _, of_step in groupby(records, key=lambda record: record.step)]
    server = RewardServer(
        scorer.rewards,
        scorer.server.children,
        memory_gib=scorer.server.memory_gib,
        environment=scorer.server.environment,
    )
    done = 0
    try:
        server.ready()
        for of_step in steps:
            groups: list[Group] = []
            for chunk in _chunks(groups_of(of_step), scorer.rewards):
                groups += _scored(chunk, scorer, server)
                done += sum(len(group) for _, group in chunk)
                tell(done, len(records))
            result.outcomes += _outcomes(of_step, groups, scorer)
    except RewardError as error:
        raise DataError(str(error)) from error
    finally:
        server.close()
    return result


def groups_of(records: Sequence[RolloutRecord]) -> list[tuple[Prompt, list[RolloutRecord]]]:
    """The rollouts of a step by prompt, as they were trained: those of a group stand next to each other."""
    groups = []
    for _, same in groupby(records, key=lambda record: (record.prompt_id, record.epoch)):
        group = list(same)
        first = group[0]
        given = (first.prompt_id, first.prompt_token_ids, first.messages, first.columns)
        prompt = Prompt(*given, opened=first.opened, images=first.images)
        groups.append((prompt, group))
    return groups


def companions(
    chosen: Sequence[RolloutRecord], records: Sequence[RolloutRecord], algorithm: OnlineBlock
) -> list[RolloutRecord]:
    """Those of the records that advantages of the chosen ones depend on, themselves included: their groups, or their
    whole steps."""
    advantage, keys = algorithm.advantage, _group_of
    over_batch = isinstance(advantage, BaselineBlock) and "batch" in advantage.estimator + advantage.scale
    if over_batch or advantage.whiten or algorithm.groups.reward_scaling == "normalize_sum":
        keys = _step_of
    wanted = {keys(record) for record in chosen}
    return [record for record in records if keys(record) in wanted]


def no_advantages(scorer: Scorer) -> str | None:
    """Why advantages cannot be computed from what is stored; None where they can."""
    algorithm = scorer.algorithm
    if isinstance(algorithm.advantage, GAEBlock):
        return "they need the critic's values, which rollout files do not hold"
    if algorithm.kl.placement == "reward" and algorithm.kl.coef:
        return "their KL needs the reference's logprobs, which rollout files do not hold"
    if isinstance(algorithm.distill, AdvantageDistillBlock):
        return "a part of them is the teacher's logprobs, which rollout files do not hold"
    return None


def _group_of(record: RolloutRecord) -> tuple[int, int, str]:
    return record.step, record.epoch, record.prompt_id


def _step_of(record: RolloutRecord) -> tuple[int, int, str]:
    return record.step, 0, ""


def _notes(records: Sequence[RolloutRecord], scorer: Scorer) -> Iterator[str]:
    inexact = sorted({name for record in records for name in record.inexact_columns})
    if inexact:
        yield f"the columns {', '.join(inexact)} are not stored as rewards saw them: what reads them may say otherwise"
    if records and not any(record.columns for record in records):
        yield "these files hold no columns of the data (an earlier version wrote them, or there were none)"
    if scorer.advantages and (reason := no_advantages(scorer)):
        yield f"advantages are not computed: {reason}"


def _chunks(
    groups: Sequence[tuple[Prompt, list[RolloutRecord]]], rewards: Sequence[RewardBlock]
) -> Iterator[Sequence[tuple[Prompt, list[RolloutRecord]]]]:
    """Some groups at a time, in whole calls of every function."""
    size = math.lcm(*(block.prompts_per_call for block in rewards)) * CALLS_AT_A_TIME
    for first in range(0, len(groups), size):
        yield groups[first : first + size]


def _scored(
    groups: Sequence[tuple[Prompt, list[RolloutRecord]]], scorer: Scorer, server: RewardServer
) -> Iterator[Group]:
    """The groups as training would have them now."""
    unscored = [_unscored(prompt, records) for prompt, records in groups]
    scores = server.score([GroupTexts.of(group) for group in unscored])
    of_groups = scores.split(unscored)
    for group, of_group in zip(unscored, of_groups, strict=True):
        yield assemble.scored_group(group, of_group, scorer.rewards, scorer.algorithm)


def _unscored(prompt: Prompt, records: Sequence[RolloutRecord]) -> Group:
    """The records as a worker gave them back."""
    rollouts = []
    for record in records:
        # An environment may have begun it with a prompt of its own.
        before = record.prompt_token_ids if record.episode else prompt.token_ids
        zeros = np.zeros(len(before))
        rollouts.append(
            Rollout(
                token_ids=np.concatenate([before, record.token_ids]),
                is_sampled=np.concatenate([zeros.astype(bool), record.is_sampled]),
                logprobs=np.concatenate([zeros.astype(np.float32), record.logprobs]),
                versions=np.concatenate([zeros.astype(np.int32) - 1, record.versions]),
                finish_reason=record.finish_reason,
                text=record.completion,
                episode=record.episode,
                is_baseline=record.state == "baseline",
            )
        )
    return Group(prompt, records[0].epoch, tuple(rollouts))


def _outcomes(records: Sequence[RolloutRecord], groups: Sequence[Group], scorer: Scorer) -> Iterator[Outcome]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = [rollout.reward for rollout in rollouts]
    advantages: list[float | None] = [None] * len(records)
    if scorer.advantages and no_advantages(scorer) is None:
        batch = assemble.assemble(groups, scorer.algorithm, scorer.max_new_tokens)
        samples = assemble.with_advantages(batch, batch.samples, scorer.algorithm)
        advantages = list(np.concatenate(assemble.rollout_advantages(batch, samples, scorer.algorithm)).tolist())
    for record, rollout, reward, advantage in zip(records, rollouts, rewards, advantages, strict=True):
        yield Outcome(record, rollout.rewards, rollout.error, reward, advantage)
