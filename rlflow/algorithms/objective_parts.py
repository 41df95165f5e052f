"""What every objective is made of: its form, and metrics that add up over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlflow.algorithms.batch import TensorBatch
from rlflow.metrics import Metric
from rlflow.types import Denominators

Metrics = dict[str, Metric]
Objective = Callable[[torch.Tensor, torch.Tensor | None, TensorBatch, Any, Denominators], tuple[torch.Tensor, Metrics]]
"""The fourth is the algorithm, of the class that has the objective in rlflow.recipe.algorithm.BLOCKS."""


def mean(values: torch.Tensor, count: int) -> Metric:
    """This micro-batch's share of a mean over ``count`` values of the whole batch."""
    return Metric(values.detach().sum() / max(1, count))


def token_mean(values: torch.Tensor, denominators: Denominators) -> Metric:
    return mean(values, denominators.num_tokens)


def largest(values: torch.Tensor) -> Metric:
    """Maximum of values >= 0, 0 for none."""
    return Metric(torch.cat([values, values.new_zeros(1)]).max(), "max", "max")
