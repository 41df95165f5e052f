"""What a model would have given to the tokens of a text that it is shown: vLLM's ``prompt_logprobs``."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

_ROWS = 256
"""Places whose logprobs over the whole vocabulary are held in float32 at a time."""


class PromptLogprobs(NamedTuple):
    """Of each token of a text but the first, its own logprob and those of the k most probable ones in its place, of the
    whole vocabulary at temperature 1."""

    token_ids: np.ndarray
    """int64 [L - 1, k + 1]: the text's own token first, which may come again among the others."""
    logprobs: np.ndarray
    """float32, the same shape."""
    ranks: np.ndarray
    """int64, the same shape: 1 and the number of tokens that are more probable."""


def prompt_logprobs(logits: torch.Tensor, token_ids: np.ndarray, k: int) -> PromptLogprobs:
    """
    Args:
        logits: [L, V] of a text, each row of what follows its token.
        token_ids: int [L] of the text.
        k: At most V.
    """
    own = torch.from_numpy(token_ids[1:].astype(np.int64)).to(logits.device)[:, None]
    parts = [_of_rows(logits[:-1][start : start + _ROWS], own[start : start + _ROWS], k) for start in _starts(own)]
    ids, logprobs, ranks = (torch.cat(one).cpu().numpy() for one in zip(*parts, strict=True))
    return PromptLogprobs(ids, logprobs, ranks)


def _of_rows(logits: torch.Tensor, own: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, logprobs and ranks [R, k + 1] of some places."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    best, ids = logprobs.topk(k, dim=-1)
    of_own = logprobs.gather(1, own)
    rank = 1 + (logprobs > of_own).sum(dim=-1, keepdim=True)
    ranks = torch.arange(1, k + 1, device=logits.device).expand(len(own), -1)
    return torch.cat([own, ids], 1), torch.cat([of_own, best], 1), torch.cat([rank, ranks], 1)


def _starts(own: torch.Tensor) -> range:
    """Where chunks begin: one that is empty where the text has one token."""
    return range(0, max(1, len(own)), _ROWS)
