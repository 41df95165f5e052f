"""How the torch engine has a transformers model read texts and go on from them, a token of every row at a time.

The first way that gives the logprobs of transformers' forward pass of each sequence alone is taken (torch_engine):
texts of any length side by side in a cache with slots (torch_slots), or those of one length together, with whatever
cache the model makes for itself, or with none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch


class Reading(Protocol):
    """Rows [R] that are being written: each is a text, of which the last token may have been read or not."""

    def add(self, texts: Sequence[np.ndarray], images: Sequence[Images] = ()) -> None:
        """Appends rows.

        Args:
            texts: int [L], L >= 1, with the processor's expansion of pictures.
            images: Of each text; none where no text has any.

        Raises:
            ValueError: There are pictures, and this way of reading takes none.
        """
        ...

    def logits(self) -> torch.Tensor:
        """Of the token after each row's last, [R, V]; called once before each ``write``."""
        ...

    def write(self, tokens: torch.Tensor) -> None:
        """Appends a token to every row, int [R]."""
        ...

    def remove(self, ended: np.ndarray) -> np.ndarray:
        """Ends rows, int [E], ascending. Returns those that are left in their new order, int [R - E]."""
        ...

    def outdate(self) -> None:
        """Weights have changed, and what was read with the old ones is kept for the rows that are here alone."""
        ...


Images = tuple[bytes, ...]
"""Of a text, encoded, in the order of their places."""
Reader = Callable[..., Reading]
"""Of a model, and for slots of its ``tower``: a reading without rows."""


class UnpaddedReading:
    """Texts of one length together, as they are: no padding, and whatever cache the model makes for itself, or none and
    all tokens again for each new one."""

    def __init__(self, model: Any, *, is_cached: bool) -> None:
        self.model, self.is_cached = model, is_cached
        self.options = {"use_cache": is_cached} | last_logits_only(model)
        self.parts: list[_Part] = []
        self.places = np.empty(0, dtype=np.int64)
        """int64 [R]: where each row is among those of all parts, one part after the other."""

    def add(self, texts: Sequence[np.ndarray], images: Sequence[Images] = ()) -> None:
        if any(images):
            raise ValueError(
                f"{type(self.model).__name__} is generated from without a cache of slots, which pictures need: set "
                "rollout.engine: vllm"
            )
        lengths = np.array([len(text) for text in texts])
        places, start = np.empty(len(texts), dtype=np.int64), sum(len(part.ids) for part in self.parts)
        for length in dict.fromkeys(lengths.tolist()):
            members = np.flatnonzero(lengths == length)
            places[members] = start + np.arange(len(members))
            start += len(members)
            ids = np.stack([texts[i] for i in members]).astype(np.int64)
            self.parts.append(_Part(torch.from_numpy(ids).to(self.model.device)))
        self.places = np.concatenate([self.places, places])

    def logits(self) -> torch.Tensor:
        return torch.cat([self._read(part) for part in self.parts])[self._index(self.places)]

    def write(self, tokens: torch.Tensor) -> None:
        sizes = [len(part.ids) for part in self.parts]
        new = torch.zeros(sum(sizes), dtype=torch.long, device=tokens.device)
        new[self._index(self.places)] = tokens
        for part, own in zip(self.parts, new.split(sizes), strict=True):
            part.ids = torch.cat([part.ids, own[:, None]], dim=1)

    def remove(self, ended: np.ndarray) -> np.ndarray:
        left = np.delete(np.arange(len(self.places)), ended)
        self.places = self.places[left]
        sizes = [len(part.ids) for part in self.parts]
        stays = np.zeros(sum(sizes), dtype=bool)
        stays[self.places] = True
        for part, own in zip(self.parts, np.split(stays, np.cumsum(sizes)[:-1]), strict=True):
            # A cache of the model's own cannot be cut, and so its rows stay for as long as one of them is written.
            own |= self.is_cached and own.any()
            part.ids = part.ids[self._index(np.flatnonzero(own))]
        self.parts = [part for part in self.parts if len(part.ids)]
        self.places = (np.cumsum(stays) - 1)[self.places]
        return left

    def outdate(self) -> None:
        """Nothing that was read is shared with rows that come."""

    def _read(self, part: _Part) -> torch.Tensor:
        output = self.model(input_ids=part.ids[:, part.num_read :], **self.options, **part.cache)
        if self.is_cached:
            part.num_read = part.ids.shape[1]
            names = ("past_key_values", "cache_params")
            part.cache = {name: output[name] for name in names if output.get(name) is not None}
        return output.logits[:, -1]

    def _index(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.model.device, non_blocking=True)


class _Part:
    """Rows that began together with texts of one length."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids
        """int64 [K, L]."""
        self.num_read = 0
        self.cache: dict[str, Any] = {}


def last_logits_only(model: Any) -> dict[str, Any]:
    """The option of a model's forward pass by which it makes no logits of a whole text, which take more memory than all
    else; none where it has no such option."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
