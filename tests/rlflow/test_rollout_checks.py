"""What an engine returns: every kind of it that cannot be trained is named, with the row and the value."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlflow.rollout_checks import ROWS_DECODED, layout_problem, text_problem, token_problem, version_problem
from rlflow.types import RolloutBatch

GOOD = RolloutBatch(
    token_ids=np.array([3, 4, 5, 3, 1], dtype=np.int32),
    logprobs=np.array([-0.5, -1.0, 0.0, 5e-7, -30.0], dtype=np.float32),
    offsets=np.array([0, 2, 3, 5]),
    finish_reasons=("length", "length", "stop"),
    texts=("de", "f", "d"),
    policy_version=7,
    seconds=0.1,
)
# Ids 0 and 1 are padding and eos, 2 is a row of the embedding that no token has.
IS_TOKEN = np.array([True, True, False, True, True, True])


def decode(completions) -> list[str]:
    return ["".join("de f"[i - 3] if i < 5 else "f" for i in ids if i > 2) for ids in completions]


def problem(batch: RolloutBatch) -> str | None:
    return (
        layout_problem(batch, num_rows=3, max_new_tokens=2)
        or version_problem(batch, newest=8, max_staleness=1)
        or token_problem(batch, IS_TOKEN)
        or text_problem(batch, decode)
    )


def test_a_good_batch_has_no_problem():
    assert problem(GOOD) is None
    assert problem(replace(GOOD, policy_version=8)) is None


def logprobs(value: float) -> np.ndarray:
    changed = GOOD.logprobs.copy()
    changed[3] = value
    return changed


def ids(value: int) -> np.ndarray:
    changed = GOOD.token_ids.copy()
    changed[2] = value
    return changed


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"logprobs": logprobs(np.nan)}, "1 of 5 logprobs are none, the first nan (row 2, token 0)"),
        ({"logprobs": logprobs(np.inf)}, "1 of 5 logprobs are none, the first inf (row 2, token 0)"),
        ({"logprobs": logprobs(-np.inf)}, "1 of 5 logprobs are none, the first -inf"),
        ({"logprobs": logprobs(0.01)}, "1 of 5 logprobs are none, the first 0.01"),
        ({"logprobs": np.full(5, 5.0, np.float32)}, "5 of 5 logprobs are none, the first 5.0 (row 0, token 0)"),
        ({"token_ids": ids(6)}, "1 of 5 token ids are none, the first 6 (row 1, token 0)"),
        ({"token_ids": ids(-1)}, "1 of 5 token ids are none, the first -1"),
        ({"token_ids": ids(1234567890)}, "1 of 5 token ids are none, the first 1234567890 (row 1, token 0)"),
        ({"token_ids": ids(2)}, "1 of 5 token ids are none, the first 2"),
        ({"texts": GOOD.texts[:2]}, "it has 2 texts for 3 completions that were asked for"),
        ({"finish_reasons": ("stop",) * 4}, "it has 4 finish reasons for 3"),
        ({"offsets": GOOD.offsets[:3]}, "it has 2 offsets less one for 3"),
        ({"finish_reasons": ("stop", "stop", "eaten")}, "finished for 'eaten', which is none of stop, length, abort"),
        ({"offsets": np.array([0, 2, 3, 4])}, "5 tokens, 5 logprobs and offsets from 0 to 4 do not agree"),
        ({"offsets": np.array([1, 2, 3, 5])}, "offsets from 1 to 5 do not agree"),
        ({"logprobs": GOOD.logprobs[:4]}, "5 tokens, 4 logprobs and offsets from 0 to 5 do not agree"),
        ({"offsets": np.array([0, 2, 2, 5])}, "row 1 has 0 tokens, and a completion has 1 to 2"),
        ({"offsets": np.array([0, 1, 2, 5])}, "row 2 has 3 tokens, and a completion has 1 to 2"),
        ({"offsets": np.array([0, 3, 2, 5])}, "row 0 has 3 tokens"),
        ({"policy_version": 6}, "policy version 6 sampled, 2 behind the newest, and may be 1"),
        ({"policy_version": 9}, "it says that policy version 9 sampled, and the newest is 8"),
        ({"texts": ("f", "d", "de")}, "the text of row 0 is 'f', and its tokens say 'de'"),
        ({"texts": ("de", "f", "d<eos>")}, "the text of row 2 is 'd<eos>', and its tokens say 'd'"),
    ],
)
def test_what_cannot_be_trained_is_named(changes, says):
    found = problem(replace(GOOD, **changes))
    assert found is not None
    assert says in found


@pytest.mark.parametrize("shift", [1, -1, 5])
def test_texts_that_are_moved_by_rows_show_in_the_few_that_are_decoded(shift):
    rows = 50
    texts = tuple(f"text {row}" for row in range(rows))
    moved = (*texts[shift:], *texts[:shift])
    batch = replace(GOOD, token_ids=np.arange(rows, dtype=np.int32), offsets=np.arange(rows + 1), texts=moved)
    decoded = []

    def decode(completions):
        decoded.extend(int(ids[0]) for ids in completions)
        return [f"text {ids[0]}" for ids in completions]

    assert text_problem(batch, decode) is not None
    assert len(decoded) == ROWS_DECODED and {0, rows - 1} <= set(decoded)
