"""How the torch engine has a transformers model read prompts and go on from them, a token of every row at a time.

The first way that gives the logprobs of transformers' forward pass of each sequence alone is taken (torch_engine).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from transformers import DynamicCache


class Reading(Protocol):
    """Rows [R] that are being written."""

    logits: torch.Tensor
    """Of the next token, [R, V]."""
    can_leave_out: bool
    """Rows that have ended."""

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows alone, int [K]."""
        ...

    def write(self, token: torch.Tensor) -> None:
        """token [R] -> new ``logits``."""
        ...


Reader = Callable[[Any, Sequence[np.ndarray], Sequence[int]], Reading]
"""Of a model, prompts, and which prompt each row goes on from."""


class PaddedReading:
    """Prompts of unlike lengths, padded on the left, each read once for all of its rows."""

    def __init__(self, model: Any, prompts: Sequence[np.ndarray], which: Sequence[int]) -> None:
        self.model, self.can_leave_out = model, True
        longest = max(len(prompt) for prompt in prompts)
        ids = np.zeros((len(prompts), longest), dtype=np.int64)
        mask = np.zeros((len(prompts), longest), dtype=np.int64)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = prompt
            mask[i, longest - len(prompt) :] = 1
        self.mask = torch.from_numpy(mask).to(model.device)
        self.cache = DynamicCache(config=model.config)
        output = model(
            input_ids=torch.from_numpy(ids).to(model.device),
            attention_mask=self.mask,
            position_ids=(self.mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1]
        self.keep(torch.tensor(which, device=model.device))

    def keep(self, rows: torch.Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.logits, self.mask = self.logits[rows], self.mask[rows]

    def write(self, token: torch.Tensor) -> None:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        output = self.model(
            input_ids=token[:, None],
            attention_mask=self.mask,
            position_ids=self.mask.sum(1, keepdim=True) - 1,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits = output.logits[:, -1]


class PromptReading:
    """One prompt, as it is, once for each of its rows: no padding, and whatever cache the model makes for itself, or
    none and all tokens again for each new one."""

    def __init__(self, model: Any, prompts: Sequence[np.ndarray], which: Sequence[int], *, is_cached: bool) -> None:
        (prompt,) = prompts
        self.model, self.is_cached, self.can_leave_out = model, is_cached, not is_cached
        self.ids = torch.from_numpy(prompt.astype(np.int64)).to(model.device).expand(len(which), -1)
        self.cache: dict[str, Any] = {}
        # Logits of a whole prompt, for each of its rows, take more memory than all else.
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.options = {"use_cache": is_cached} | ({"logits_to_keep": 1} if keeps else {})
        self._read(self.ids)

    def keep(self, rows: torch.Tensor) -> None:
        self.ids, self.logits = self.ids[rows], self.logits[rows]

    def write(self, token: torch.Tensor) -> None:
        self.ids = torch.cat([self.ids, token[:, None]], dim=1)
        self._read(token[:, None] if self.is_cached else self.ids)

    def _read(self, ids: torch.Tensor) -> None:
        output = self.model(input_ids=ids, **self.options, **self.cache)
        self.logits = output.logits[:, -1]
        if self.is_cached:
            names = ("past_key_values", "cache_params")
            self.cache = {name: output[name] for name in names if output.get(name) is not None}


def read_padded(model: Any, prompts: Sequence[np.ndarray], which: Sequence[int]) -> Reading:
    """All prompts together."""
    return PaddedReading(model, prompts, which)


ONE_PROMPT: tuple[Reader, ...] = (
    partial(PromptReading, is_cached=True),
    partial(PromptReading, is_cached=False),
)
"""A prompt at a time, the faster way first; the last is transformers' forward pass itself."""
