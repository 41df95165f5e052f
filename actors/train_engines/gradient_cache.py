"""Losses that compare the sequences of a whole batch, in two passes (GradCache, arXiv 2101.06983, section 3.3).

    pass 1, no gradient   every rank: micro-batches --> outputs [s, D] --gather--> outputs [S, D] on every rank
                          loss(outputs) --> d loss / d outputs [S, D]
    pass 2, with one      every micro-batch again: sum of outputs * (d loss / d outputs), whose gradient is the loss's

So a batch's loss is of all of its sequences, whatever its micro-batches and ranks, in the memory of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from rlflow.algorithms.batch import TensorBatch
from rlflow.metrics import Metric
from rlflow.types import MicroBatch

Loss = Callable[[torch.Tensor, TensorBatch], tuple[torch.Tensor, Mapping[str, Metric]]]
"""Of outputs [S, D] and what is known of the S sequences of a batch."""


@dataclass(frozen=True, slots=True)
class WholeBatch:
    """What a loss says of a batch."""

    loss: float
    """This rank's share: those of all ranks add up to the loss."""
    metrics: dict[str, Metric]
    """The same."""
    gradient: torch.Tensor | None
    """[S, D] or [S]: of the loss by the outputs; None where it was not asked for."""

    def share_of(self, outputs: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        """What has the gradient of the loss by a micro-batch's outputs [s, D] or [s]."""
        assert self.gradient is not None, "the first pass was made without a gradient"
        index = torch.from_numpy(micro_batch.sample_indices.astype(np.int64)).to(outputs.device)
        # Filler is of no sample.
        own = self.gradient[index.clamp(min=0)] * (index >= 0).view(-1, *[1] * (outputs.ndim - 1))
        return (outputs * own).sum()


def whole_batch(
    micro_batches: Sequence[MicroBatch],
    outputs_of: Callable[[MicroBatch], torch.Tensor],
    loss_of: Loss,
    *,
    rank: int,
    world_size: int,
    share: int,
    wants_gradient: bool,
) -> WholeBatch:
    """The first pass. All ranks take part, and find the same.

    Args:
        outputs_of: The model's outputs of a micro-batch's sequences.
        share: Neighbouring ranks that share each micro-batch, and so have the same outputs.
    """
    with torch.no_grad():
        outputs = torch.cat([outputs_of(micro_batch) for micro_batch in micro_batches])
    index = np.concatenate([micro_batch.sample_indices for micro_batch in micro_batches]).astype(np.int64)
    is_scalar, real = outputs.ndim == 1, index >= 0
    numbers = np.stack([_joined(micro_batches, name) for name in ("labels", "groups", "texts")], axis=1)
    known = torch.from_numpy(numbers).to(outputs.device)
    rows = torch.cat([outputs[:, None] if is_scalar else outputs, known], dim=1)[torch.from_numpy(real)]
    rows = _gathered(rows, torch.from_numpy(index[real]), rank, world_size, share)
    outputs, (labels, groups, texts) = rows[:, : -known.shape[1]], rows[:, -known.shape[1] :].unbind(dim=1)
    outputs = (outputs[:, 0] if is_scalar else outputs).clone().requires_grad_(wants_gradient)
    with torch.set_grad_enabled(wants_gradient):
        loss, metrics = loss_of(outputs, _batch_of(labels, groups, texts))
    gradient = torch.autograd.grad(loss, outputs)[0] if wants_gradient else None
    num_shares = world_size // share
    shares = {name: metric._replace(value=float(metric.value) / num_shares) for name, metric in metrics.items()}
    return WholeBatch(float(loss.detach()) / num_shares, shares, gradient)


def _gathered(rows: torch.Tensor, index: torch.Tensor, rank: int, world_size: int, share: int) -> torch.Tensor:
    """rows [s, F] of the samples [s] of each rank -> [S, F] of all, in the order of the batch."""
    size = index.max().add(1).view(1) if len(index) else torch.zeros(1, dtype=torch.int64)
    size = size.to(rows.device)
    if world_size > 1:
        dist.all_reduce(size, op=dist.ReduceOp.MAX)
    gathered = torch.zeros(int(size), rows.shape[1], dtype=rows.dtype, device=rows.device)
    if rank % share == 0:
        gathered[index.to(rows.device)] = rows
    if world_size > 1:
        # Each row is of one rank, and 0 elsewhere: a sum that rounds nothing.
        dist.all_reduce(gathered)
    return gathered


def _joined(micro_batches: Sequence[MicroBatch], name: str) -> np.ndarray:
    """float32 [s]; 0 where the sequences have not that number."""
    parts = [(getattr(micro_batch, name), len(micro_batch.sample_indices)) for micro_batch in micro_batches]
    return np.concatenate([np.zeros(size, dtype=np.float32) if part is None else part for part, size in parts])


def _batch_of(labels: torch.Tensor, groups: torch.Tensor, texts: torch.Tensor) -> TensorBatch:
    """What is known of sequences, without their tokens."""
    nothing = torch.zeros(0, dtype=torch.int64, device=labels.device)
    return TensorBatch(
        token_ids=nothing,
        position_ids=nothing,
        loss_mask=nothing.bool(),
        loss_weights=nothing.float(),
        sequence_ids=nothing,
        labels=labels,
        groups=groups,
        texts=texts,
    )
