"""TeacherModel: the frozen model that a policy is distilled from. Each actor holds a whole copy.

What it says of a token is a number, the k most probable tokens of its place, or the hidden state there: where the whole
vocabulary is compared, H numbers a token travel in the place of V, and each trainer holds the teacher's head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlflow.actors.reference_model import ReferenceModel
from rlflow.types import MicroBatch


@dataclass(frozen=True, slots=True)
class TeacherHead:
    """What makes logits of a teacher's hidden states."""

    weight: np.ndarray
    """[V, H]: float32, or the bits of 16-bit numbers as uint16."""
    bias: np.ndarray | None
    """[V], the same."""
    dtype: str
    """Of torch: what the bits are."""
    scale: float
    """Logits are multiplied by it."""
    softcap: float | None
    """Logits z become softcap tanh(z / softcap)."""


class TeacherModel(ReferenceModel):
    def logprobs(self, micro_batches: Sequence[MicroBatch], temperature: float = 1.0) -> np.ndarray:
        """As a reference's.

        Raises:
            ValueError: They are not finite.
        """
        return require_finite(super().logprobs(micro_batches, temperature), "logprobs")

    def hidden_states(self, micro_batches: Sequence[MicroBatch]) -> np.ndarray:
        """What the head makes logits of for each loss token, [N, H] of the micro-batches end to end; 0 elsewhere.

        Returns:
            float32, or the bits of 16-bit numbers as uint16.

        Raises:
            ValueError: They are not finite.
        """
        return np.concatenate([self._hidden(batch) for batch in micro_batches])

    def top_logprobs(self, micro_batches: Sequence[MicroBatch], k: int, temperature: float) -> np.ndarray:
        """The k most probable tokens at each loss token and all others as one, float32 [N, k + 1, 2]: see
        Sample.teacher_top. 0 elsewhere.

        Raises:
            ValueError: They are not finite, or the model has not more than k tokens.
        """
        import torch

        from rlflow.algorithms.distillation import with_tail

        found = []
        for batch in micro_batches:
            top = np.zeros((len(batch.token_ids), k + 1, 2), dtype=np.float32)
            places = np.flatnonzero(batch.loss_mask)
            hidden = self._states_before(batch)
            for start in range(0, len(places), step := self.module.tokens_of_chunk(hidden)):
                rows = places[start : start + step]
                logits = self._logits(hidden[torch.from_numpy(rows - 1).to(self.device)]) / temperature
                if logits.shape[1] <= k:
                    raise ValueError(f"algorithm.distill.top_k is {k} of {logits.shape[1]} tokens: leave it out")
                ids = logits.topk(k, dim=1).indices
                top[rows, :k, 0], top[rows, k, 0] = ids.cpu().numpy(), -1
                top[rows, :, 1] = with_tail(logits, ids).cpu().numpy()
            found.append(require_finite(top, "logprobs"))
        return np.concatenate(found)

    def head(self) -> TeacherHead:
        """What the trainers need to make logits of its hidden states."""
        head = self.module.model.get_output_embeddings()
        assert head is not None
        bias = getattr(head, "bias", None)
        return TeacherHead(
            to_numpy(head.weight),
            None if bias is None else to_numpy(bias),
            str(head.weight.dtype).removeprefix("torch."),
            self.module.logit_scale,
            self.module.softcap,
        )

    def _hidden(self, batch: MicroBatch) -> np.ndarray:
        import torch

        states = self._states_before(batch)
        places = torch.from_numpy(np.flatnonzero(batch.loss_mask)).to(states.device)
        of_tokens = torch.zeros_like(states)
        of_tokens[places] = states[places - 1]
        if not bool(torch.isfinite(of_tokens).all()):
            raise ValueError(NOT_FINITE.format(what="hidden states"))
        return to_numpy(of_tokens)

    def _states_before(self, batch: MicroBatch):
        """[N, H] of every token: what is made of it says which comes next."""
        import torch

        from rlflow.actors.train_engines.sequence_parallel import layout_of

        with torch.no_grad():
            return self.module.hidden_states(
                torch.from_numpy(batch.token_ids).to(self.device),
                torch.from_numpy(batch.position_ids).to(self.device),
                layout_of(batch.cu_seqlens, self.device, None),
            )

    def _logits(self, hidden):
        """float32 [M, V]; ids that the policy has no token for are all but ruled out."""
        import torch

        with torch.no_grad():
            logits, scale = self.module.logits(hidden)
            logits = logits * scale
            if self.module.left_out is not None:
                logits = logits.masked_fill(self.module.left_out, torch.finfo(torch.float32).min / 2)
        return logits


NOT_FINITE = (
    "the teacher's {what} are not finite: its weights are damaged, or too large for teacher.dtype: try float32 or "
    "bfloat16"
)


def require_finite(values: np.ndarray, what: str) -> np.ndarray:
    """The values.

    Raises:
        ValueError: Some are NaN or infinite.
    """
    if not np.isfinite(values).all():
        raise ValueError(NOT_FINITE.format(what=what))
    return values


def to_numpy(tensor) -> np.ndarray:
    """float32 as it is; of 16-bit numbers, which numpy has not all of, the bits as uint16."""
    import torch

    tensor = tensor.detach().contiguous().cpu()
    if tensor.dtype == torch.float32:
        return tensor.numpy()
    assert tensor.element_size() == 2, tensor.dtype
    return tensor.view(torch.int16).numpy().view(np.uint16)


def to_tensor(values: np.ndarray, dtype: str, device):
    """The tensor that `to_numpy` made ``values`` of."""
    import torch

    # Arrays out of Ray's object store are read-only, which torch.from_numpy warns about: torch.tensor copies.
    if values.dtype == np.float32:
        return torch.tensor(values, device=device)
    return torch.tensor(values.view(np.int16), device=device).view(getattr(torch, dtype))
