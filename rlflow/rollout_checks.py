"""What an engine returns is looked at where it arrives: a mistake in it would be trained without a word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np

from rlflow.types import FinishReason, RolloutBatch

MOST_LOGPROB = 1e-3
"""In nats: a logprob is at most 0, but for the rounding of float32."""
ROWS_DECODED = 4
"""Of a batch, spread over it: where the texts are of other rows, few are enough to see it."""


def layout_problem(batch: RolloutBatch, num_rows: int, max_new_tokens: int) -> str | None:
    """What keeps a batch from being ``num_rows`` completions of at most ``max_new_tokens`` tokens, if anything does."""
    counts = {"texts": batch.texts, "finish reasons": batch.finish_reasons, "offsets less one": batch.offsets[1:]}
    for name, values in counts.items():
        if len(values) != num_rows:
            return f"it has {len(values)} {name} for {num_rows} completions that were asked for"
    if unknown := set(batch.finish_reasons) - set(get_args(FinishReason)):
        return f"completions finished for {min(unknown)!r}, which is none of {', '.join(get_args(FinishReason))}"
    sizes = (len(batch.token_ids), len(batch.logprobs), int(batch.offsets[-1]))
    if len(set(sizes)) > 1 or batch.offsets[0] != 0:
        return f"{sizes[0]} tokens, {sizes[1]} logprobs and offsets from {batch.offsets[0]} to {sizes[2]} do not agree"
    lengths = np.diff(batch.offsets)
    wrong = np.flatnonzero((lengths < 1) | (lengths > max_new_tokens))
    if len(wrong):
        return f"row {wrong[0]} has {lengths[wrong[0]]} tokens, and a completion has 1 to {max_new_tokens}"
    return None


def token_problem(batch: RolloutBatch, is_token: np.ndarray) -> str | None:
    """A token id that stands for nothing, or a logprob that is none; of a batch without a layout_problem.

    Args:
        is_token: bool [V], by id.
    """
    ids = batch.token_ids
    inside = (ids >= 0) & (ids < len(is_token))
    known = inside & is_token[np.where(inside, ids, 0)]
    is_logprob = np.isfinite(batch.logprobs) & (batch.logprobs <= MOST_LOGPROB)
    for name, values, good in (("token id", ids, known), ("logprob", batch.logprobs, is_logprob)):
        wrong = np.flatnonzero(~good)
        if len(wrong):
            row = int(np.searchsorted(batch.offsets, wrong[0], side="right")) - 1
            place = f"row {row}, token {wrong[0] - batch.offsets[row]}"
            return f"{len(wrong)} of {len(values)} {name}s are none, the first {values[wrong[0]]!s} ({place})"
    return None


def version_problem(batch: RolloutBatch, newest: int, max_staleness: int) -> str | None:
    """Weights other than those that may have sampled."""
    version = batch.policy_version
    if version > newest:
        return f"it says that policy version {version} sampled, and the newest is {newest}"
    if version < newest - max_staleness:
        lag = f"{newest - version} behind the newest, and may be {max_staleness}"
        return f"policy version {version} sampled, {lag}: the weights that it took since did not reach its engine"
    return None


def text_problem(batch: RolloutBatch, decode: Callable[[Sequence[np.ndarray]], Sequence[str]]) -> str | None:
    """Texts that are not what their rows' tokens say, of a few rows; of a batch without a layout_problem."""
    rows = np.unique(np.linspace(0, len(batch.texts) - 1, ROWS_DECODED).astype(int))
    tokens = [batch.token_ids[batch.offsets[row] : batch.offsets[row + 1]] for row in rows]
    for row, text in zip(rows, decode(tokens), strict=True):
        if text != batch.texts[row]:
            return f"the text of row {row} is {batch.texts[row][:60]!r}, and its tokens say {text[:60]!r}"
    return None
