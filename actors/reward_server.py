"""RewardServer: completions in, rewards out. Functions run in child processes that can be killed.

    score: group 0 x function 0, group 1 x function 0, ...   calls of `prompts_per_call` groups, over the children
               |
               +-- scores          -> the rows' rewards
               +-- raised, hung, died -> the same rows one by one; those that fail alone are marked failed
               +-- no list of one score a row -> its rows are marked failed: alone they would get one by accident

A failed row is NaN and marked, never 0; the other rows of its group keep their scores.
"""

from __future__ import annotations

import os
import pickle
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlflow.actors.reward_pool import START_TIMEOUT_S, Answer, Call, RewardPool
from rlflow.actors.reward_process import child_environment
from rlflow.actors.reward_wire import Request, Setup
from rlflow.recipe import RewardBlock
from rlflow.rewards import RewardError
from rlflow.rewards.episodes import episode_columns, last_said
from rlflow.rewards.score_batch import GroupTexts, ScoreBatch, ScoringError
from rlflow.tracking.redact import remember_secrets
from rlflow.types import Prompt

MAX_ERRORS = 8
LARGEST = float(np.finfo(np.float32).max)
WASTED_CALLS = 6
RESTART_S = 1.0
"""A function whose failed calls have cost ``WASTED_CALLS * (deadline + RESTART_S)`` a child in one `score` is not
called again in it."""


class RewardServer:
    def __init__(
        self,
        rewards: Sequence[RewardBlock],
        children: int,
        *,
        memory_gib: float = 0.9,
        environment: Sequence[str] = (),
    ) -> None:
        """Starts the children; `ready` waits for them.

        Args:
            rewards: The recipe's, each with a label of its own.
            children: Processes, so many calls at a time.
            memory_gib: What a child may allocate; beyond it the function gets a MemoryError.
            environment: Names of variables that children get beside those that hold no secret.

        Raises:
            RewardError: Two rewards have one label.
        """
        self._rewards = tuple(rewards)
        labels = [block.label for block in rewards]
        if repeated := {label for label in labels if labels.count(label) > 1}:
            raise RewardError(
                f"two rewards are called {', '.join(sorted(repeated))}: metrics could not tell them apart"
            )
        setup = Setup(
            functions=tuple((block.name, block.plugin, dict(block.args), block.completions) for block in rewards),
            parent_pid=os.getpid(),
            memory_bytes=int(memory_gib * 2**30),
        )
        remember_secrets([dict(block.args) for block in rewards])
        remember_secrets({"secret": [os.environ[name] for name in environment if name in os.environ]})
        self._missing_variables = [name for name in environment if name not in os.environ]
        self._children = children
        self._pool = RewardPool(
            pickle.dumps(setup), children, child_environment(os.environ, environment), setup.memory_bytes
        )

    def ready(self, timeout_s: float = START_TIMEOUT_S) -> float:
        """Waits until every child has loaded every function; returns the seconds it took.

        Raises:
            RewardError: A function cannot be found or loaded, or lacks a variable that the recipe names.
        """
        if self._missing_variables:
            raise RewardError(
                f"reward_server.environment names {', '.join(self._missing_variables)}, which this reward server has "
                "not: export it where it runs (on a cluster: on the nodes, before Ray starts), or remove the name"
            )
        started = time.perf_counter()
        self._pool.ready(timeout_s)
        return time.perf_counter() - started

    def ping(self) -> list[int]:
        """Returns the process ids of the children."""
        return self._pool.pids

    def score(self, groups: Sequence[GroupTexts], labels: tuple[str, ...] | None = None) -> ScoreBatch:
        """Calls every function, or those of ``labels``, with the rollouts of ``prompts_per_call`` prompts at a time.

        Takes at most, for each function, the time of its good calls and ``WASTED_CALLS + 1`` times its deadline plus
        the restart of a child: after that its remaining rows fail without a call.

        Args:
            groups: Their rollouts are the rows, group after group.

        Returns:
            A reward a row, NaN where the function abstained or failed; why each failed row did, and at most
            `MAX_ERRORS` sentences on it.

        Raises:
            RewardError: No child can be started any more.
        """
        chosen = [i for i, block in enumerate(self._rewards) if labels is None or block.label in labels]
        return self._score(chosen, groups)

    def self_check(self) -> None:
        """Scores a right and a wrong answer through the path that training uses, where math_accuracy is used.

        Raises:
            RewardError: The verdicts are not 1 and 0: the rewards of this installation cannot be trusted.
        """
        functions = [index for index, block in enumerate(self._rewards) if block.name == "math_accuracy"]
        texts = (r"One half is \boxed{\frac12}", r"The answer is \boxed{3}")
        prompt = Prompt("self-check", np.zeros(1, np.int32), [{"role": "user", "content": "1/2?"}], {"solution": "0.5"})
        scores = self._score(functions, [GroupTexts(prompt, texts, (b"", b""))])
        for label, verdicts in scores.rewards.items():
            if verdicts.tolist() != [1.0, 0.0]:
                raise RewardError(
                    f"{label} gave a right and a wrong answer {verdicts.tolist()}, not [1.0, 0.0]: "
                    f"{' '.join(map(str, scores.errors)) or 'its installation is broken'}"
                )

    def close(self) -> None:
        """Kills the children. Safe to call twice."""
        self._pool.close()

    def _score(self, functions: Sequence[int], groups: Sequence[GroupTexts]) -> ScoreBatch:
        started = time.perf_counter()
        scoring = _Scoring({index: self._rewards[index] for index in functions}, groups, self._children)
        for call, answer in self._pool.run(scoring.queue, scoring.encode):
            scoring.settle(call, answer)
        return ScoreBatch(
            rewards={block.label: scoring.rewards[index] for index, block in scoring.blocks.items()},
            failed={block.label: scoring.failed[index] for index, block in scoring.blocks.items()},
            causes=scoring.causes,
            errors=scoring.errors,
            seconds=time.perf_counter() - started,
        )


class _Scoring:
    """One batch on its way: calls still to make, and what is known of each row."""

    def __init__(self, blocks: Mapping[int, RewardBlock], groups: Sequence[GroupTexts], children: int) -> None:
        sizes = [len(group.texts) for group in groups]
        ends = np.concatenate([[0], np.cumsum(sizes)]).astype(int).tolist()
        num_rows = ends[-1]
        self.blocks = blocks
        self.rewards = {index: np.full(num_rows, np.nan, np.float32) for index in blocks}
        self.failed = {index: np.zeros(num_rows, np.bool_) for index in blocks}
        self.causes: dict[int, str] = {}
        """Row -> why functions failed on it."""
        self._failures: dict[tuple[int, str], list[int]] = {}
        """(function, cause) -> rows."""
        self._texts = [text for group in groups for text in group.texts]
        self._episodes = [episode for group in groups for episode in group.episodes]
        self._completion_ids = [ids for group in groups for ids in group.completion_ids]
        self._prompts = [group.prompt for group in groups for _ in group.texts]
        self._children = children
        self._wasted_s = dict.fromkeys(blocks, 0.0)
        calls = [
            Call(index, range(ends[first], ends[min(first + block.prompts_per_call, len(groups))]), block.timeout_s)
            for index, block in blocks.items()
            for first in range(0, len(groups), block.prompts_per_call)
        ]
        self.queue = deque(sorted(calls, key=lambda call: call.rows.start))
        self._leave_out_failed()

    @property
    def errors(self) -> tuple[ScoringError, ...]:
        """One a cause."""
        return tuple(
            ScoringError(self.blocks[function].label, self._prompts[rows[0]].id, rows[0], len(rows), cause, tuple(rows))
            for (function, cause), rows in list(self._failures.items())[:MAX_ERRORS]
        )

    def encode(self, call: Call) -> bytes:
        """Returns the request of a call."""
        prompts = [self._prompts[row] for row in call.rows]
        names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        columns: dict[str, list[Any]] = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
        messages = [list(prompt.messages) for prompt in prompts]
        completions = [prompt.opened + self._texts[row] for prompt, row in zip(prompts, call.rows, strict=True)]
        if self._episodes:
            episodes = [self._episodes[row] for row in call.rows]
            messages = [list(e.prompt) if e.prompt else said for e, said in zip(episodes, messages, strict=True)]
            completions = [last_said(episode) for episode in episodes]
            columns |= episode_columns(episodes)
        return pickle.dumps(
            Request(
                function=call.function,
                prompts=messages,
                completions=completions,
                completion_ids=[self._completion_ids[row] for row in call.rows],
                columns=columns,
                images=[prompt.images for prompt in prompts] if any(prompt.images for prompt in prompts) else (),
            )
        )

    def settle(self, call: Call, answer: Answer) -> None:
        """Takes the answer to a call; a failed one of several rows is queued again, row by row, where that helps."""
        if answer.scores is not None:
            for row, score in zip(call.rows, answer.scores, strict=True):
                self._settle_row(call.function, row, score)
            return
        if len(call.rows) == 1 or not answer.retry:
            for row in call.rows:
                self._fail(call.function, row, answer.error)
        else:
            self.queue.extend(Call(call.function, range(row, row + 1), call.timeout_s) for row in call.rows)
        self._wasted_s[call.function] += answer.seconds
        if self._wasted_s[call.function] > WASTED_CALLS * (call.timeout_s + RESTART_S) * self._children:
            self._give_up(call.function)

    def _settle_row(self, function: int, row: int, score: float | str | None) -> None:
        if isinstance(score, str):
            self._fail(function, row, f"returned {score}: return a number, or None to abstain")
        elif score is not None and not abs(score) <= LARGEST:
            self._fail(function, row, f"returned {score:g}: return a number within float32, or None to abstain")
        elif score is not None:
            self.rewards[function][row] = score

    def _leave_out_failed(self) -> None:
        """A rollout whose environment failed is no rollout of its task: no function is asked for its score."""
        failed = {row for row, episode in enumerate(self._episodes) if episode.error}
        if not failed:
            return
        calls = list(self.queue)
        self.queue.clear()
        for call in calls:
            if failed.isdisjoint(call.rows):
                self.queue.append(call)
                continue
            for row in call.rows:
                if row in failed:
                    self._fail(call.function, row, f"was not asked: {self._episodes[row].error}")
                else:
                    self.queue.append(Call(call.function, range(row, row + 1), call.timeout_s))

    def _give_up(self, function: int) -> None:
        waiting = list(self.queue)
        self.queue.clear()
        self.queue.extend(call for call in waiting if call.function != function)
        cause = f"was not called: its failures had already taken {self._wasted_s[function]:.1f} s"
        for call in waiting:
            if call.function == function:
                for row in call.rows:
                    self._fail(function, row, cause)

    def _fail(self, function: int, row: int, cause: str) -> None:
        self.failed[function][row] = True
        self._failures.setdefault((function, cause), []).append(row)
        sentence = f"{self.blocks[function].label}: it {cause}"
        self.causes[row] = f"{self.causes[row]}; {sentence}" if row in self.causes else sentence
