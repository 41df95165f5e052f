"""reasoning-gym: a question with an answer that its task scores. One turn, which may come after others' tools.

environment: {name: reasoning_gym, args: {task: leg_counting, config: {max_animals: 3}}}
data: {train: {generator: reasoning_gym, args: {task: leg_counting, size: 500, config: {max_animals: 3}}}}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rlflow.data.environment_rows import dataset_of
from rlflow.environments.protocol import EnvironmentFault, Reply
from rlflow.types import Message

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
THOUGHT_ENDS = "</think>"


class ReasoningGymEnvironment:
    """Scores the text between the last ``<answer>`` tags, or all that is said behind a thought."""

    def __init__(self, task: str, config: Mapping[str, Any] | None = None) -> None:
        self._task, self._config = task, dict(config or {})

    def reset(self, row: Mapping[str, Any]) -> None:
        self._dataset = dataset_of(self._task, int(row["seed"]), int(row["size"]), tuple(sorted(self._config.items())))
        self._entry = self._dataset[int(row["index"])]
        asked = [message["content"] for message in row["messages"] if message["role"] == "user"]
        if not asked or self._entry["question"] not in asked[-1]:
            raise EnvironmentFault(
                f"the row is of another configuration of {self._task}: give environment.args.config and the "
                "generator's args.config alike"
            )

    def step(self, message: Message) -> Reply:
        said = message["content"].rpartition(THOUGHT_ENDS)[2]
        answers = ANSWER.findall(said)
        answer = (answers[-1] if answers else said).strip()
        return Reply(done=True, reward=float(self._dataset.score_answer(answer, self._entry)))

    @property
    def state(self) -> dict[str, Any]:
        return {"answer": self._entry["answer"]}
