"""What an engine returns: every kind of it that cannot be trained is named, with the row and the value."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlflow.rollout_checks import ROWS_DECODED, layout_problem, request_problem, text_problem, token_problem
from rlflow.types import GroupRequest, Prompt, RolloutBatch, SamplingParams

# Two prompts, of the ids 4 and of 5 and 2; three completions of two, one and two tokens.
GOOD = RolloutBatch(
    group_ids=(11, 12),
    sizes=(2, 1),
    token_ids=np.array([4, 3, 4, 4, 5, 5, 2, 3, 1], dtype=np.int32),
    is_sampled=np.array([0, 1, 1, 0, 1, 0, 0, 1, 1], dtype=bool),
    logprobs=np.array([0, -0.5, -1.0, 0, 0.0, 0, 0, 5e-7, -30.0], dtype=np.float32),
    versions=np.array([-1, 7, 8, -1, 8, -1, -1, 7, 7], dtype=np.int32),
    offsets=np.array([0, 3, 5, 9]),
    finish_reasons=("length", "length", "stop"),
    texts=("de", "f", "d"),
)
REQUESTS = [
    GroupRequest(11, Prompt("p", np.array([4]), (), {}), (1, 2), SamplingParams(2), min_version=7),
    GroupRequest(12, Prompt("q", np.array([5, 2]), (), {}), (3,), SamplingParams(2), min_version=6),
]
# Ids 0 and 1 are padding and eos, 2 is a row of the embedding that no token has.
IS_TOKEN = np.array([True, True, False, True, True, True])


def decode(completions, rows) -> list[str]:
    return ["".join("de f"[i - 3] if i < 5 else "f" for i in ids if i > 2) for ids in completions]


def problem(batch: RolloutBatch) -> str | None:
    return (
        layout_problem(batch, np.full(3, 2))
        or request_problem(batch, REQUESTS, newest=8)
        or token_problem(batch, IS_TOKEN)
        or text_problem(batch, decode)
    )


def test_a_good_batch_has_no_problem():
    assert problem(GOOD) is None


def changed(name: str, place: int, value: float) -> dict[str, np.ndarray]:
    """One number of a per-token array is another."""
    values = getattr(GOOD, name).copy()
    values[place] = value
    return {name: values}


FIRST = "(row 2, token 0)"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (changed("logprobs", 7, np.nan), f"1 of 5 logprobs are none, the first nan {FIRST}"),
        (changed("logprobs", 7, np.inf), f"1 of 5 logprobs are none, the first inf {FIRST}"),
        (changed("logprobs", 7, -np.inf), "1 of 5 logprobs are none, the first -inf"),
        (changed("logprobs", 7, 0.01), "1 of 5 logprobs are none, the first 0.01"),
        (changed("token_ids", 4, 6), "1 of 5 token ids are none, the first 6 (row 1, token 0)"),
        (changed("token_ids", 8, -1), "1 of 5 token ids are none, the first -1 (row 2, token 1)"),
        (changed("token_ids", 4, 1234567890), "1 of 5 token ids are none, the first 1234567890 (row 1, token 0)"),
        (changed("token_ids", 4, 2), "1 of 5 token ids are none, the first 2"),
        ({"texts": GOOD.texts[:2]}, "it has 2 texts for 3 completions that were asked for"),
        ({"finish_reasons": ("stop",) * 4}, "it has 4 finish reasons for 3"),
        ({"offsets": GOOD.offsets[:3]}, "it has 2 offsets less one for 3"),
        ({"sizes": (1, 1)}, "its 2 groups have 2 rollouts, and 3 were asked for"),
        ({"sizes": (1, 2)}, "group 0 has 1 rollouts for 2 seeds"),
        ({"finish_reasons": ("stop", "stop", "eaten")}, "finished for 'eaten', which is none of stop, length, abort"),
        ({"offsets": np.array([0, 3, 5, 8])}, "9 versions and offsets from 0 to 8 do not agree"),
        ({"offsets": np.array([1, 3, 5, 9])}, "offsets from 1 to 9 do not agree"),
        ({"offsets": np.array([0, 5, 3, 9])}, "offsets from 0 to 9 do not agree"),
        ({"logprobs": GOOD.logprobs[:4]}, "9 tokens, 9 marks, 4 logprobs, 9 versions"),
        ({"versions": GOOD.versions[:4]}, "9 logprobs, 4 versions"),
        (changed("is_sampled", 4, False), "row 1 has 0 tokens, and a completion has 1 to 2"),
        (changed("is_sampled", 6, True), "row 2 has 3 tokens, and a completion has 1 to 2"),
        (changed("token_ids", 3, 3), "row 1 goes on from another prompt than the one that it was asked for"),
        (changed("versions", 7, 9), "it says that policy version 9 sampled, and the newest is 8"),
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
    ids = np.arange(rows, dtype=np.int32)
    batch = replace(GOOD, token_ids=ids, is_sampled=ids >= 0, offsets=np.arange(rows + 1), texts=moved)
    decoded = []

    def decode(completions, of_rows):
        assert [int(ids[0]) for ids in completions] == of_rows
        decoded.extend(of_rows)
        return [f"text {row}" for row in of_rows]

    assert text_problem(batch, decode) is not None
    assert len(decoded) == ROWS_DECODED and {0, rows - 1} <= set(decoded)
