"""A call's scores to its groups."""

from __future__ import annotations

import numpy as np

from rlflow.rewards.score_batch import ScoreBatch, ScoringError
from rlflow.types import Group, Prompt, Rollout


def group(prompt: str, size: int) -> Group:
    rollout = Rollout(np.zeros(1, np.int32), np.ones(1, bool), np.zeros(1), np.zeros(1, np.int32), "stop", "")
    return Group(Prompt(prompt, np.zeros(1, np.int32), [], {}), 0, (rollout,) * size)


def test_each_group_of_a_call_has_its_own_scores_and_errors():
    values = np.arange(6, dtype=np.float32)
    failed = np.array([False, False, True, False, True, True])
    errors = (ScoringError("f", "b", 2, 2, "raised", (2, 4)), ScoringError("f", "c", 5, 1, "hung", (5,)))
    scores = ScoreBatch({"f": values}, {"f": failed}, {2: "two", 4: "four", 5: "five"}, errors, 0.1)
    of = list(scores.split([group("a", 2), group("b", 1), group("c", 3)]))
    assert [each.rewards["f"].tolist() for each in of] == [[0, 1], [2], [3, 4, 5]]
    assert [each.failed["f"].tolist() for each in of] == [[False] * 2, [True], [False, True, True]]
    assert [each.causes for each in of] == [{}, {0: "two"}, {1: "four", 2: "five"}]
    assert [each.errors for each in of] == [
        (),
        (ScoringError("f", "b", 0, 1, "raised", (0,)),),
        (ScoringError("f", "c", 1, 1, "raised", (1,)), ScoringError("f", "c", 2, 1, "hung", (2,))),
    ]
