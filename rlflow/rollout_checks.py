"""What an engine returns is looked at where it arrives: a mistake in it would be trained without a word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import get_args

import numpy as np

from rlflow.types import GroupRequest, RolloutBatch, RolloutEnd

MOST_LOGPROB = 1e-3
"""In nats: a logprob is at most 0, but for the rounding of float32."""
ROWS_DECODED = 4
"""Of a batch, spread over it: where the texts are of other rows, few are enough to see it."""


def arrival_problem(
    batch: RolloutBatch,
    requests: Sequence[GroupRequest | None],
    newest: int,
    is_token: np.ndarray,
    decode: Callable[[Sequence[np.ndarray], Sequence[Sequence[int]]], Sequence[str]],
) -> str | None:
    """What keeps a batch from being what was asked for, if anything does.

    Args:
        requests: Of its groups, in their order; None for one that is not wanted any more.
        newest: Version of the newest weights that any worker was given.
        is_token: bool [V], by id.
        decode: Texts of completions, from their tokens and the tokens that may end each.
    """
    known = [request for request in requests if request is not None]
    of_row = [request for request, size in zip(requests, batch.sizes, strict=True) for _ in range(size)]
    most = np.iinfo(np.int32).max
    longest = np.array([request.max_sampled_tokens if request else most for request in of_row])
    problem = layout_problem(batch, longest) or request_problem(batch, requests, newest)
    problem = problem or token_problem(batch, is_token)
    if problem or len(known) < len(requests):
        return problem
    stop = [request.params.stop_token_ids for request in of_row if request is not None]
    return text_problem(batch, lambda tokens, rows: decode(tokens, [stop[row] for row in rows]))


def layout_problem(batch: RolloutBatch, max_new_tokens: np.ndarray) -> str | None:
    """What keeps a batch from being whole rollouts of some sampled tokens each, if anything does.

    Args:
        max_new_tokens: int [R]: the most that each may have.
    """
    num_rows = len(max_new_tokens)
    counts = {"texts": batch.texts, "finish reasons": batch.finish_reasons, "offsets less one": batch.offsets[1:]}
    for name, values in counts.items():
        if len(values) != num_rows:
            return f"it has {len(values)} {name} for {num_rows} completions that were asked for"
    if len(batch.sizes) != len(batch.group_ids) or sum(batch.sizes) != num_rows:
        return f"its {len(batch.group_ids)} groups have {sum(batch.sizes)} rollouts, and {num_rows} were asked for"
    if unknown := set(batch.finish_reasons) - set(get_args(RolloutEnd)):
        return f"completions finished for {min(unknown)!r}, which is none of {', '.join(get_args(RolloutEnd))}"
    per_token = (batch.token_ids, batch.is_sampled, batch.logprobs, batch.versions)
    sizes = {len(values) for values in per_token} | {int(batch.offsets[-1])}
    if len(sizes) > 1 or batch.offsets[0] != 0 or (np.diff(batch.offsets) < 1).any():
        names = ("tokens", "marks", "logprobs", "versions")
        told = ", ".join(f"{len(values)} {name}" for name, values in zip(names, per_token, strict=True))
        return f"{told} and offsets from {batch.offsets[0]} to {batch.offsets[-1]} do not agree"
    lengths = np.add.reduceat(batch.is_sampled.astype(np.int64), batch.offsets[:-1])
    wrong = np.flatnonzero((lengths < 1) | (lengths > max_new_tokens))
    if len(wrong):
        row = wrong[0]
        return f"row {row} has {lengths[row]} tokens, and a completion has 1 to {max_new_tokens[row]}"
    return _episode_problem(batch)


def _episode_problem(batch: RolloutBatch) -> str | None:
    """A sequence of an episode that nothing was sampled in, or whose first token was: there is nothing before it."""
    if batch.episodes and len(batch.episodes) != len(batch.texts):
        return f"it has {len(batch.episodes)} episodes for {len(batch.texts)} rollouts"
    for row, episode in enumerate(batch.episodes):
        first, end = int(batch.offsets[row]), int(batch.offsets[row + 1])
        borders = [*episode.starts, end - first]
        if borders[0] != 0 or any(start >= stop for start, stop in pairwise(borders)):
            return f"row {row}: its sequences begin at {episode.starts}, and it has {end - first} tokens"
        parts = [batch.is_sampled[first + start : first + stop] for start, stop in pairwise(borders)]
        for part in parts:
            if part[0] or not part.any():
                return f"row {row}: a sequence of it has nothing that the policy wrote, or nothing before it"
    return None


def token_problem(batch: RolloutBatch, is_token: np.ndarray) -> str | None:
    """A token id that stands for nothing, or a logprob that is none; of a batch without a layout_problem.

    Args:
        is_token: bool [V], by id.
    """
    ids = batch.token_ids
    inside = (ids >= 0) & (ids < len(is_token))
    known = ~batch.is_sampled | (inside & is_token[np.where(inside, ids, 0)])
    is_logprob = np.isfinite(batch.logprobs) & (batch.logprobs <= MOST_LOGPROB)
    num_sampled = int(batch.is_sampled.sum())
    for name, values, good in (("token id", ids, known), ("logprob", batch.logprobs, is_logprob)):
        wrong = np.flatnonzero(~good)
        if len(wrong):
            row = int(np.searchsorted(batch.offsets, wrong[0], side="right")) - 1
            token = int(batch.is_sampled[batch.offsets[row] : wrong[0]].sum())
            place = f"row {row}, token {token}"
            return f"{len(wrong)} of {num_sampled} {name}s are none, the first {values[wrong[0]]!s} ({place})"
    return None


def request_problem(batch: RolloutBatch, requests: Sequence[GroupRequest | None], newest: int) -> str | None:
    """What keeps a batch from being the groups that were asked for; of a batch without a layout_problem.

    Args:
        requests: Of its groups, in their order; None for one that is not looked at.
        newest: Version of the newest weights that any worker was given.
    """
    ends = accumulate(batch.sizes)
    for index, (request, size, end_row) in enumerate(zip(requests, batch.sizes, ends, strict=False)):
        if request is None:
            continue
        if size != len(request.seeds):
            return f"group {index} has {size} rollouts for {len(request.seeds)} seeds"
        for row in range(end_row - size, end_row):
            start, end = batch.offsets[row], batch.offsets[row + 1]
            asked = request.prompt.token_ids
            prompt = batch.token_ids[start : start + len(asked)]
            own_prompt = bool(batch.episodes) and batch.episodes[row].prompt is not None
            if not own_prompt and not np.array_equal(prompt, asked):
                return f"row {row} goes on from another prompt than the one that it was asked for"
            version = batch.versions[start:end].max()
            if version > newest:
                return f"it says that policy version {version} sampled, and the newest is {newest}"
    return None


def text_problem(
    batch: RolloutBatch, decode: Callable[[Sequence[np.ndarray], Sequence[int]], Sequence[str]]
) -> str | None:
    """Texts that are not what their rows' tokens say, of a few rows; of a batch without a layout_problem.

    Args:
        decode: Of the tokens that were sampled in some rows, and which rows they are.
    """
    rows = np.unique(np.linspace(0, len(batch.texts) - 1, ROWS_DECODED).astype(int))
    spans = [slice(batch.offsets[row], batch.offsets[row + 1]) for row in rows]
    tokens = [batch.token_ids[span][batch.is_sampled[span]] for span in spans]
    for row, text in zip(rows, decode(tokens, rows.tolist()), strict=True):
        if text != batch.texts[row]:
            return f"the text of row {row} is {batch.texts[row][:60]!r}, and its tokens say {text[:60]!r}"
    return None
