"""How far a policy's next-token distributions are from a teacher's, in the memory of a chunk of logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from rlflow.actors.teacher_model import TeacherHead, to_tensor
from rlflow.algorithms.batch import TensorBatch
from rlflow.algorithms.distillation import generalized_jsd, with_tail
from rlflow.recipe.distill_blocks import DivergenceDistillBlock

if TYPE_CHECKING:
    from rlflow.actors.train_engines.token_model import TokenModel

_ARRAYS = 6
"""Arrays of the logits' size that a divergence of whole vocabularies keeps beside them for its backward pass."""


class LoadedHead:
    """A teacher's head on a trainer's device."""

    def __init__(self, head: TeacherHead, device: torch.device) -> None:
        self.dtype, self._scale, self._softcap = head.dtype, head.scale, head.softcap
        self._weight = to_tensor(head.weight, head.dtype, device)
        self._bias = None if head.bias is None else to_tensor(head.bias, head.dtype, device)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [M, H], bits or numbers -> float32 [M, V]."""
        logits = F.linear(hidden, self._weight, self._bias).float() * self._scale
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)


class BatchDivergence:
    """The divergence of the recipe at the loss tokens of a micro-batch."""

    def __init__(self, block: DivergenceDistillBlock, batch: TensorBatch, head: LoadedHead | None) -> None:
        self.block, self.batch, self.head = block, batch, head

    def __call__(self, model: TokenModel, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """hidden [M, H] of the policy before each of the tokens ``rows`` -> [M]; chunk by chunk, and all again in the
        backward pass."""
        step = max(1, model.tokens_of_chunk(hidden) // _ARRAYS)
        parts = []
        for start in range(0, max(1, len(rows)), step):
            own = slice(start, start + step)
            if torch.is_grad_enabled():
                parts.append(checkpoint(self._of_chunk, model, hidden[own], rows[own], use_reentrant=False))
            else:
                parts.append(self._of_chunk(model, hidden[own], rows[own]))
        return torch.cat(parts)

    def _of_chunk(self, model: TokenModel, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        block, batch = self.block, self.batch
        logits, scale = model.logits(hidden)
        logits = logits * (scale / block.temperature)
        if block.top_k is not None:
            assert batch.teacher_top is not None, "top_k needs the teacher's most probable tokens"
            top = batch.teacher_top[rows]
            logprobs = with_tail(_without(logits, model.left_out), top[:, :-1, 0].long())
            return generalized_jsd(logprobs, top[:, :, 1], block.beta)
        assert batch.teacher_hidden is not None and self.head is not None, "the teacher's head is to be given first"
        with torch.no_grad():
            of_teacher = batch.teacher_hidden[rows]
            if of_teacher.dtype != torch.float32:
                of_teacher = of_teacher.view(getattr(torch, self.head.dtype))
            theirs = self.head.logits(of_teacher) / block.temperature
        # Embeddings of one tokenizer may be padded to different sizes.
        common = min(logits.shape[1], theirs.shape[1])
        left_out = None if model.left_out is None else model.left_out[:common]
        ours, theirs = (_without(each[:, :common], left_out) for each in (logits, theirs))
        return generalized_jsd(torch.log_softmax(ours, -1), torch.log_softmax(theirs, -1), block.beta)


def _without(logits: torch.Tensor, left_out: torch.Tensor | None) -> torch.Tensor:
    """Logits in which these ids get no probability to speak of: not infinity, whose product with 0 is no number."""
    return logits if left_out is None else logits.masked_fill(left_out, torch.finfo(torch.float32).min / 2)
