"""A micro-batch as torch tensors, and sums over its sequences."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from rlflow.types import MicroBatch

_PER_TOKEN = frozenset(
    {
        "token_ids",
        "position_ids",
        "loss_mask",
        "loss_weights",
        "sequence_ids",
        "advantages",
        "old_logprobs",
        "proximal_logprobs",
        "ref_logprobs",
        "teacher_logprobs",
        "divergences",
        "old_values",
        "returns",
        "selected",
    }
)


@dataclass(frozen=True, slots=True)
class TensorBatch:
    """MicroBatch's tensors. Shapes: N tokens, S sequences."""

    token_ids: torch.Tensor
    """int64 [N]."""
    position_ids: torch.Tensor
    """int64 [N]."""
    loss_mask: torch.Tensor
    """bool [N]."""
    loss_weights: torch.Tensor
    """float [N]."""
    sequence_ids: torch.Tensor
    """int64 [N], ascending: which sequence each token is of."""
    labels: torch.Tensor
    """float [S]; 0 for filler."""
    groups: torch.Tensor | None = None
    """float [S]."""
    targets: torch.Tensor | None = None
    """float [S, K]."""
    texts: torch.Tensor | None = None
    """float [S]."""
    reward_margins: torch.Tensor | None = None
    """float [S], as the three that follow."""
    rank_margins: torch.Tensor | None = None
    rank_partners: torch.Tensor | None = None
    batch_kls: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None
    proximal_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    teacher_logprobs: torch.Tensor | None = None
    teacher_hidden: torch.Tensor | None = None
    """[N, H]: float32, or the bits of 16-bit numbers as int16."""
    teacher_top: torch.Tensor | None = None
    """float [N, k + 1, 2]."""
    divergences: torch.Tensor | None = None
    """Of the policy from the teacher, with gradient: what a trainer computes of the batch."""
    old_values: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    selected: torch.Tensor | None = None

    @classmethod
    def from_numpy(cls, micro_batch: MicroBatch, device: torch.device | str) -> TensorBatch:
        """Copies a micro-batch to a device."""
        lengths = np.diff(micro_batch.cu_seqlens)
        sequence_ids = np.repeat(np.arange(len(lengths)), lengths)
        # Arrays out of Ray's object store are read-only, which torch.from_numpy warns about: torch.tensor copies.
        tensors: dict[str, Any] = {"sequence_ids": torch.tensor(sequence_ids, device=device)}
        for name in (f.name for f in fields(cls) if f.name not in ("sequence_ids", "divergences")):
            array = getattr(micro_batch, name)
            dtype = torch.int64 if name in ("token_ids", "position_ids") else None
            if array is not None and array.dtype == np.uint16:
                array = array.view(np.int16)  # torch cannot index uint16
            tensors[name] = None if array is None else torch.tensor(array, dtype=dtype, device=device)
        return cls(**tensors)

    @property
    def num_sequences(self) -> int:
        """S, filler included."""
        return len(self.labels)

    def loss_tokens(self) -> TensorBatch:
        """The same batch with the loss tokens only: what the losses see, so that nothing outside the mask can reach
        them, not even as NaN times 0. What divergences were made of is not among their fields."""
        chosen = {name: getattr(self, name) for name in _PER_TOKEN}
        of_loss_tokens = {name: x[self.loss_mask] for name, x in chosen.items() if x is not None}
        return replace(self, teacher_hidden=None, teacher_top=None, **of_loss_tokens)


def segment_sum(values: torch.Tensor, sequence_ids: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """Sums of values [N, ...] over each sequence -> [S, ...]; 0 for a sequence without tokens.

    Sequences are contiguous, so that the sums have a fixed order: index_add has none on a GPU.
    """
    lengths = torch.bincount(sequence_ids, minlength=num_sequences)
    return torch.segment_reduce(values, "sum", lengths=lengths)


def segment_mean(values: torch.Tensor, sequence_ids: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """Means of values [N, ...] over each sequence -> [S, ...]; 0 for a sequence without tokens."""
    lengths = torch.bincount(sequence_ids, minlength=num_sequences)
    counts = lengths.clamp(min=1).view(-1, *[1] * (values.ndim - 1))
    return torch.segment_reduce(values, "sum", lengths=lengths) / counts
