"""Demonstrations in the optimizer update of rollouts: one loss, of two parts (CHORD, arXiv 2508.11408).

    L = (1 - mu) L_policy + mu L_demonstrations,    L_demonstrations = mean over their tokens of -phi log pi

Both weights are part of the tokens' loss weights, so that micro-batches, packing and ranks change nothing. numpy, on
the driver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rlflow.batching import with_the_fields_of
from rlflow.types import Sample


def mixed(rollouts: Sequence[Sample], demonstrations: Sequence[Sample], mu: float) -> list[Sample]:
    """The samples of one optimizer update: the rollouts, and behind them the demonstrations, labelled 1.

    Args:
        rollouts: With the loss weights that they would have alone; labelled 0.
        mu: The share of the demonstrations' loss; at 0 the rollouts are alone.
    """
    num_tokens = sum(int(sample.loss_mask.sum()) for sample in demonstrations)
    if not mu or not num_tokens:
        return list(rollouts)
    kept = [replace(sample, loss_weights=np.float32(1.0 - mu) * sample.loss_weights) for sample in rollouts]
    shown = [
        replace(
            with_the_fields_of(sample, rollouts[0]),
            loss_weights=np.where(sample.loss_mask, mu / num_tokens, 0.0).astype(np.float32),
            label=1.0,
        )
        for sample in demonstrations
    ]
    return [*kept, *shown]
