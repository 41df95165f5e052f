"""Block-causal attention over packed sequences, exact, without a [tokens, tokens] mask.

On a GPU in 16 bits torch's variable-length FlashAttention takes the packed tokens as they are. Elsewhere sequences of
similar length are padded on the right into one [sequences, heads, length, dim] batch and go through causal
scaled-dot-product attention. Under a causal mask no real token can see what is padded to its right, so the padding
needs no mask and changes nothing. Everything outside attention stays packed.
"""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

NAME = "rlflow_packed"
"""What transformers calls this attention. Because it registers no mask function, models build no mask for it."""

_MAX_PADDING = 0.25
"""Share of a bucket's longest sequence that its shortest may leave empty."""
_AMPERE = (8, 0)
_LARGEST_KERNEL_HEAD = 256
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""torch 2.11 takes fewer key-value heads without being told."""


class NotPackable(ValueError):
    """Packed attention has not what this model's attention does; the message says what."""


class PackedLayout:
    """Where the sequences of a packed micro-batch lie. Built once, used by every layer.

    This rank holds the hidden states of all tokens; of a SplitLayout, it holds a part of them.
    """

    first = 0
    """The first token that this rank holds."""

    def __init__(self, cu_seqlens: np.ndarray, device: torch.device) -> None:
        """Args: cu_seqlens: int [S + 1], boundaries of the packed sequences."""
        self.num_tokens = int(cu_seqlens[-1])
        self.device = device
        self._starts, self._lengths = cu_seqlens[:-1].astype(np.int64), np.diff(cu_seqlens).astype(np.int64)

    @cached_property
    def padded(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Buckets of padded sequences, and where each token sits in them.

        A bucket, int [sequences, length], names its tokens; ``num_tokens`` is padding. The place of a token, int [N],
        is its index in all buckets, flat and one after the other.
        """
        buckets: list[torch.Tensor] = []
        where = np.empty(self.num_tokens, dtype=np.int64)
        base = 0
        for members in _similar_lengths(self._lengths):
            longest = int(self._lengths[members].max())
            column = np.arange(longest)
            real = column[None, :] < self._lengths[members][:, None]
            tokens = np.where(real, self._starts[members][:, None] + column[None, :], self.num_tokens)
            where[tokens[real]] = base + np.flatnonzero(real.ravel())
            base += tokens.size
            buckets.append(torch.from_numpy(tokens).to(self.device))
        return buckets, torch.from_numpy(where).to(self.device)

    @property
    def alone(self) -> list[torch.Tensor]:
        """The tokens of each sequence, int [1, length]."""
        return [torch.arange(own.start, own.stop, device=self.device)[None] for own in self.sequences]

    @cached_property
    def boundaries(self) -> dict[str, Any]:
        """Where sequences begin, by the names that transformers hands on to kernels of attention, of convolutions and
        of layers with a state: int32 [S + 1] and [1, N]."""
        lengths = torch.from_numpy(self._lengths).to(self.device)
        number = torch.arange(len(lengths), dtype=torch.int32, device=self.device)
        options: dict[str, Any] = {"seq_idx": number.repeat_interleave(lengths)[None]}
        for side in ("q", "k"):
            options |= {f"cu_seq_lens_{side}": self.bounds, f"max_length_{side}": self.longest}
        return options

    @cached_property
    def bounds(self) -> torch.Tensor:
        """int32 [S + 1], as the kernel wants them."""
        bounds = np.append(self._starts, self.num_tokens).astype(np.int32)
        return torch.from_numpy(bounds).to(self.device)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self._lengths.max())

    @property
    def sequences(self) -> list[slice]:
        """Where each lies among the tokens."""
        return [slice(int(a), int(a + n)) for a, n in zip(self._starts, self._lengths, strict=True)]

    def own(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N] -> those of the tokens that this rank holds."""
        return tokens

    def held(self, positions: torch.Tensor) -> torch.Tensor | slice:
        """Of indices of tokens [M], those that this rank holds, as an index."""
        return slice(None)

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that share the tokens, on each of them."""
        return values

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
        *,
        sinks: torch.Tensor | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """query [N, H, D], key [N, K, D], value [N, K, E] -> [N, H, E].

        Args:
            sinks: Of each head a logit that takes a share of its attention and brings no value, [H].
            softcap: The size below which ``softcap * tanh(logits / softcap)`` keeps attention's logits.
        """
        if sinks is None and softcap is None and _has_kernel(query, value):
            return self._by_kernel(query, key, value, scaling, window)
        return self._padded_attention(query, key, value, scaling, window, sinks, softcap)

    def _by_kernel(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None
    ) -> torch.Tensor:
        out = varlen_attn(
            query,
            key,
            value,
            self.bounds,
            self.bounds,
            self.longest,
            self.longest,
            scale=scaling,
            # Tokens to the left of a token's own, which it sees as well.
            window_size=(-1 if window is None else window - 1, 0),
            **_GROUPED,
        )
        assert isinstance(out, torch.Tensor)  # it returns more when it is asked for more
        return out

    def _padded_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
        sinks: torch.Tensor | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Padded rows read an extra all-zero token."""
        scale = query.shape[2] ** -0.5 if scaling is None else scaling
        if _repeats_heads(query) or softcap is not None:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        query, key, value = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (query, key, value))
        buckets, where = self.padded
        outputs = []
        for tokens in buckets:
            q, k, v = (x[tokens].transpose(1, 2) for x in (query, key, value))
            out = _attention(q, k, v, scale, window, sinks, softcap)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)[where]


def _repeats_heads(query: torch.Tensor) -> bool:
    """Whether keys and values must be as many as queries. On a GPU torch takes fewer in FlashAttention, which is of 16
    bits and without a mask, and otherwise in the kernel that writes out [sequences, heads, length, length]; what saves
    memory in float32 takes as many."""
    return query.is_cuda


def _has_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether FlashAttention is there for these heads: on a GPU since Ampere, in 16 bits, for the same size of keys and
    values."""
    size = query.shape[2]
    fits = size == value.shape[2] and size % 8 == 0 and size <= _LARGEST_KERNEL_HEAD
    if not (fits and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)):
        return False
    return torch.cuda.get_device_capability(query.device) >= _AMPERE


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layout: PackedLayout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, H, N, D], key and value [1, K, N, D] -> [1, N, H, D].

    Raises:
        NotPackable: The model biases attention's logits, caps them beside sinks, has a mask of its own, drops out, or
            does not hand on ``layout``.
    """
    if position_bias is not None:
        raise NotPackable("its attention has a position bias")
    if softcap is not None and s_aux is not None:
        raise NotPackable("its attention caps its logits and has sinks, both")
    if attention_mask is not None:
        raise NotPackable("it makes an attention mask of its own")
    if dropout:
        raise NotPackable("packed attention drops nothing out")
    if layout is None:
        raise NotPackable("its layers do not hand on to attention where sequences begin")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = layout.attend(q, k, v, scaling, sliding_window, sinks=s_aux, softcap=softcap)
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, packed_attention)


def _similar_lengths(lengths: np.ndarray) -> list[np.ndarray]:
    """Groups of sequence indices, longest first, within which padding stays below ``_MAX_PADDING``."""
    order = np.argsort(-lengths, kind="stable")
    groups: list[list[int]] = []
    longest = 0
    for index in order:
        if not groups or lengths[index] < (1 - _MAX_PADDING) * longest:
            groups.append([])
            longest = int(lengths[index])
        groups[-1].append(int(index))
    return [np.array(group) for group in groups]


def _band(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [length, length]: what each token sees."""
    window = length if window is None else window
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < window)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None,
    sinks: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """Of one bucket: query [S, H, L, D], key [S, K, L, D], value [S, K, L, E] -> [S, H, L, E]."""
    length = query.shape[2]
    if sinks is None and softcap is None and (window is None or length <= window):
        mask = None
    else:
        mask = _band(length, window, query.device)
        if softcap is not None:
            return _capped_attention(query, key, value, mask, scale, softcap)
        if sinks is not None:
            query, key, value, mask = _with_sinks(query, key, value, mask, sinks / scale)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def _with_sinks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Adds a first key without a value, which every query sees, and whose product with a query is its head's sink.

    query [S, H, L, D], key [S, K, L, D], value [S, K, L, E], mask bool [L, L] -> the same with D + 1, and L + 1 keys.

    Args:
        sinks: Before they are scaled, [H].
    """
    own = sinks.to(query.dtype)[None, :, None, None].expand(*query.shape[:3], 1)
    key = F.pad(key, (0, 1, 1, 0))
    is_sink = torch.zeros_like(key[0, 0])
    is_sink[0, -1] = 1
    return torch.cat([query, own], dim=3), key + is_sink, F.pad(value, (0, 0, 1, 0)), F.pad(mask, (1, 0), value=True)


def _capped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """query, key [S, H, L, D], value [S, H, L, E], mask bool [L, L] -> [S, H, L, E]; all pairs are written out."""
    logits = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    weights = logits.masked_fill(~mask, -torch.inf).softmax(
        dim=3, dtype=torch.promote_types(query.dtype, torch.float32)
    )
    return weights.to(query.dtype) @ value
