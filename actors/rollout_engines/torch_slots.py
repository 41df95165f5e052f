"""A cache with a slot for each row, in which rows of any length begin and end at any time.

Keys and values lie in [slot, head, column, dim]. Whatever their lengths, all rows end at the same column: the next
token of each goes into one column, and a row of L tokens lies in the L columns before it. What lies farther left is
padding, as transformers knows it: positions and a mask for each row, and windows and chunks that count from the right.
Slots are without gaps, and so a step computes with slices. Columns move on by one a step; when they are at an end the
rows are laid out anew, from the left. Long rows lie before short ones, about: all grow alike, so that they need only be
kept so when some end, and attention of a block of short ones sees only as far as they reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from rlflow.actors.rollout_engines.torch_reading import Images, last_logits_only
from rlflow.actors.train_engines.tower import Tower, require_tower

GROUPED = "rlflow_grouped"
"""What transformers calls ``grouped_attention``."""
_READ_TOKENS = 8192
"""Tokens of one forward pass that reads texts, padding included, unless a single text is longer."""
_MORE_COLUMNS = 64
"""At least so many, and an eighth of the longest row, are there for steps to come."""
_BLOCKS = 4
_FEW_KEYS = 8192
"""Of all rows together, padding included: so few are seen faster at once than in blocks."""

Text = tuple[bytes, Images]
"""Token ids, int64, and pictures."""


class Span:
    """Where the forward pass that runs now writes and what it sees; all layers of a cache share it."""

    def __init__(self) -> None:
        self.num_slots, self.num_columns = 0, 0
        """Of the layers."""
        self.num_rows = 0
        self.start, self.end = 0, 0
        """Columns: the first of the longest row, and the one after every row's last."""
        self.slots: torch.Tensor | None = None
        """int [S]: texts are read, each into one or more of these slots; None while rows are written."""
        self.which = torch.empty(0)
        """int [S]: the text of each of the slots."""

    @property
    def longest(self) -> int:
        return self.end - self.start


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values."""

    def __init__(self, span: Span) -> None:
        super().__init__()
        self.span = span

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = self._zeros(key_states), self._zeros(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """key_states and value_states [R, H, N, D] -> what their queries see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        span, length = self.span, key_states.shape[-2]
        if span.slots is not None:
            columns = slice(span.end - length, span.end)
            self.keys[span.slots, :, columns] = key_states[span.which]
            self.values[span.slots, :, columns] = value_states[span.which]
            return key_states, value_states
        self.keys[: span.num_rows, :, span.end : span.end + length] = key_states
        self.values[: span.num_rows, :, span.end : span.end + length] = value_states
        seen = slice(span.start, span.end + length)
        return self.keys[: span.num_rows, :, seen], self.values[: span.num_rows, :, seen]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self.span.slots is not None else self.span.longest

    def get_max_length(self) -> int:
        return -1

    def lay_out(self, seen: slice, start: int) -> None:
        """Takes the size that the span has now; what lay in the columns ``seen`` begins at ``start``."""
        rows, width = slice(self.span.num_rows), seen.stop - seen.start
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._zeros(old)
            new[rows, :, start : start + width] = old[rows, :, seen]
            setattr(self, name, new)

    def copy(self, source: int, targets: torch.Tensor, start: int, length: int) -> None:
        """Copies ``length`` columns of one slot, from ``start`` on, to the end of others."""
        for held in (self.keys, self.values):
            assert held is not None
            held[targets, :, self.span.end - length : self.span.end] = held[source, :, start : start + length].clone()

    def move(self, slots: torch.Tensor, sources: torch.Tensor) -> None:
        """What is in ``sources`` [M] is in ``slots`` [M] then."""
        for held in (self.keys, self.values):
            assert held is not None
            columns = held[:, :, self.span.start : self.span.end]
            columns[slots] = columns[sources]

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        """Of the span's size: no number that is none may lie in the padding."""
        return like.new_zeros(self.span.num_slots, like.shape[1], self.span.num_columns, like.shape[3])


class SlotReading:
    """Rows of any lengths side by side. Of each row all tokens but the last are in the cache."""

    def __init__(self, model: Any, *, in_blocks: bool = False, tower: Tower | None = None) -> None:
        """
        Args:
            in_blocks: The model's attention is ``grouped_attention``.
            tower: Of a model that reads pictures.
        """
        self.tower = tower
        self.model, self.options, self.in_blocks = model, last_logits_only(model), in_blocks
        self.device = model.device
        self.span = Span()
        self.cache = self._new_cache()
        self.last = torch.empty(0, dtype=torch.long, device=self.device)
        """int64 [R]: the token of each row that is to be read."""
        self.lengths = np.empty(0, dtype=np.int64)
        """int64 [R]: tokens of each row in the cache."""
        self.deltas = np.empty(0, dtype=np.int64)
        """int64 [R]: by how much the rotary position of a row's next token exceeds its place in the text: a picture
        has more tokens than it takes positions."""
        self.texts: list[Text | None] = []
        """What each row began with; None where that was read with older weights."""

    def add(self, texts: Sequence[np.ndarray], images: Sequence[Images] = ()) -> None:
        """Reads each text once, if no row began with the same."""
        images = images or [()] * len(texts)
        if any(images):
            require_tower(self.tower, chain.from_iterable(images))
        sources = {text: row for row, text in enumerate(self.texts) if text is not None}
        new_lengths = np.array([len(text) - 1 for text in texts], dtype=np.int64)
        self._make_room(len(texts), int(new_lengths.max()))
        first = self.span.num_rows
        wanted: dict[Text, list[int]] = {}
        deltas = np.zeros(len(texts), dtype=np.int64)
        for slot, (text, own) in enumerate(zip(texts, images, strict=True), start=first):
            key = (text.astype(np.int64).tobytes(), own)
            self.texts.append(key)
            if len(text) > 1:
                wanted.setdefault(key, []).append(slot)
        unread = {}
        for text, slots in wanted.items():
            if text in sources:
                self._copy(sources[text], slots, len(texts[slots[0] - first]) - 1)
                deltas[np.array(slots) - first] = self.deltas[sources[text]]
            else:
                unread[text] = slots
        for slots, delta in self._read([(texts[s[0] - first][:-1], s, text[1]) for text, s in unread.items()]):
            deltas[np.array(slots) - first] = delta
        self.last = torch.cat([self.last, self._on_device(np.array([text[-1] for text in texts], dtype=np.int64))])
        self.lengths = np.concatenate([self.lengths, new_lengths])
        self.deltas = np.concatenate([self.deltas, deltas])
        self.span.num_rows += len(texts)
        self._settle_start()

    def logits(self) -> torch.Tensor:
        if self.span.end == self.span.num_columns:
            self._make_room(0, 0)
        longest, lengths = self.span.longest, self._on_device(self.lengths)
        mask, options = None, {}
        if self.lengths.min() < longest:  # Rows that are all alike need no mask.
            columns = torch.arange(longest, -1, -1, device=self.device)
            mask = (columns <= lengths[:, None]).long()
            options = {"blocks": self._blocks()} if self.in_blocks else {}
        output = self.model(
            input_ids=self.last[:, None],
            attention_mask=mask,
            position_ids=self._positions(lengths),
            past_key_values=self.cache,
            use_cache=True,
            **options,
        )
        self.span.end += 1
        self.lengths += 1
        return output.logits[:, -1]

    def write(self, tokens: torch.Tensor) -> None:
        self.last = tokens

    def remove(self, ended: np.ndarray) -> np.ndarray:
        left = self._order_without(ended)
        moved = np.flatnonzero(left != np.arange(len(left)))
        if len(moved):
            slots, sources = self._on_device(moved), self._on_device(left[moved])
            for layer in self._layers:
                layer.move(slots, sources)
        self.last, self.lengths = self.last[self._on_device(left)], self.lengths[left]
        self.deltas = self.deltas[left]
        self.texts = [self.texts[row] for row in left.tolist()]
        self.span.num_rows = len(left)
        if not len(left):
            self.span.num_slots = self.span.num_columns = self.span.end = 0
            self.cache = self._new_cache()
        self._settle_start()
        return left

    def outdate(self) -> None:
        self.texts = [None] * len(self.texts)

    def _positions(self, lengths: torch.Tensor) -> torch.Tensor:
        """Of the next token of each row: int [R, 1], or [4, R, 1] where a row has a picture."""
        if not self.deltas.any():
            return lengths[:, None]
        rotary = lengths + self._on_device(self.deltas)
        return torch.stack([lengths, rotary, rotary, rotary])[:, :, None]

    def _read(self, wanted: list[tuple[np.ndarray, list[int], Images]]) -> Iterator[tuple[list[int], int]]:
        """Reads texts [L], each into its slots; those of about one length together.

        Yields:
            The slots of each text, and its rotary positions beyond its length.
        """
        wanted.sort(key=lambda item: len(item[0]))
        while wanted:
            longest = len(wanted[-1][0])
            count = min(len(wanted), max(1, _READ_TOKENS // longest))
            together = wanted[-count:]
            del wanted[-count:]
            ids = np.zeros((count, longest), dtype=np.int64)
            mask = np.zeros((count, longest), dtype=np.int64)
            for row, (text, _, _) in enumerate(together):
                ids[row, longest - len(text) :] = text
                mask[row, longest - len(text) :] = 1
            which = np.array([row for row, (_, slots, _) in enumerate(together) for _ in slots])
            self.span.which = self._on_device(which)
            self.span.slots = self._on_device(np.array([slot for _, slots, _ in together for slot in slots]))
            position_ids = self._on_device((mask.cumsum(1) - 1).clip(min=0))
            pictures, deltas = {}, [0] * count
            if any(images := [own for _, _, own in together]):
                assert self.tower is not None
                read = self.tower.read_rows(ids, mask.astype(bool), images, self.device)
                pictures, deltas = read.inputs, read.deltas
                position_ids = position_ids if read.position_ids is None else read.position_ids
            self.model(
                input_ids=self._on_device(ids),
                attention_mask=None if mask.all() else self._on_device(mask),
                position_ids=position_ids,
                past_key_values=self.cache,
                use_cache=True,
                **self.options,
                **pictures,
            )
            self.span.slots = None
            yield from ((slots, delta) for (_, slots, _), delta in zip(together, deltas, strict=True))

    def _block_size(self) -> int:
        num_rows = len(self.lengths)
        split = self.in_blocks and num_rows * self.span.longest > _FEW_KEYS
        return -(-num_rows // _BLOCKS) if split else num_rows

    def _blocks(self) -> list[tuple[slice, int]]:
        """Rows, and the first column after the span's start that one of them has."""
        size, num_rows = self._block_size(), len(self.lengths)
        rows = [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
        return [(block, self.span.longest - int(self.lengths[block].max())) for block in rows]

    def _order_without(self, ended: np.ndarray) -> np.ndarray:
        """Rows that are left: into a hole comes the longest row of the block behind, and into that one's place the same
        way another, until the last row fills a hole of the last block."""
        order, end, size = np.arange(len(self.lengths)), len(self.lengths), self._block_size()
        for hole in ended[::-1].tolist():
            while (start := (hole // size + 1) * size) < end:
                longest = start + int(self.lengths[order[start : min(start + size, end)]].argmax())
                order[hole], hole = order[longest], longest
            end -= 1
            order[hole] = order[end]
        return order[:end]

    def _copy(self, source: int, slots: list[int], length: int) -> None:
        targets = self._on_device(np.array(slots))
        for layer in self._layers:
            layer.copy(source, targets, self.span.end - int(self.lengths[source]), length)

    def _make_room(self, num_more: int, longest: int) -> None:
        """For more rows, for the longest of them, and for a token of each row."""
        span = self.span
        num_rows, width = span.num_rows + num_more, max(span.longest, longest)
        if num_rows <= span.num_slots and longest <= span.end < span.num_columns:
            return
        if num_rows > span.num_slots:
            span.num_slots = max(num_rows, 5 * span.num_slots // 4)
        span.num_columns = width + max(_MORE_COLUMNS, width // 8)
        seen, start = slice(span.start, span.end), width - span.longest
        for layer in self._layers:
            layer.lay_out(seen, start)
        span.start, span.end = start, width

    def _settle_start(self) -> None:
        self.span.start = self.span.end - (int(self.lengths.max()) if len(self.lengths) else 0)

    def _new_cache(self) -> Cache:
        # transformers makes a layer by calling this.
        return Cache(layer_class_to_replicate=partial(SlotLayer, self.span))  # pyright: ignore[reportArgumentType]

    @property
    def _layers(self) -> list[SlotLayer]:
        """Those that hold something: a layer may see what another one holds."""
        layers = [x for x in self.cache.layers if x.is_initialized]  # pyright: ignore[reportAttributeAccessIssue]
        assert all(isinstance(layer, SlotLayer) for layer in layers)
        return layers  # pyright: ignore[reportReturnType]

    def _on_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    blocks: Sequence[tuple[slice, int]] = (),
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface, and its scaled-dot-product attention: query [R, H, N, D], key and value
    [R, K, W, D] -> [R, N, H, D].

    Where each row has one query, the H / K queries that share a key-value head are as good as queries of one text: so
    nothing is repeated, which in a step takes longer than all else.

    Args:
        blocks: Rows, and the first column that any of them sees; none where all rows are seen at once.
    """
    num_rows, num_heads, num_queries, dim = query.shape
    if num_queries > 1 or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    grouped = query.reshape(num_rows, key.shape[1], -1, dim)
    if attention_mask is None or not blocks:
        blocks = [(slice(num_rows), 0)]
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(
            grouped[rows],
            key[rows, :, first:],
            value[rows, :, first:],
            attn_mask=None if attention_mask is None else attention_mask[rows, ..., first:],
            scale=options.get("scaling"),
        )
        for rows, first in blocks
    ]
    return torch.cat(outputs).reshape(num_rows, 1, num_heads, value.shape[-1]), None


def grouped_mask(
    *, q_length: int, mask_function: Any, attention_mask: torch.Tensor | None, **options: Any
) -> torch.Tensor | None:
    """transformers' interface for masks: those of its scaled-dot-product attention.

    Where each row has one query that sees all but padding, as in a step, the padding is the mask; transformers would
    make it of indices, and ask the device first whether there is any.
    """
    if q_length == 1 and mask_function is causal_mask_function and attention_mask is not None:
        return attention_mask[:, None, None, :]
    options |= {"q_length": q_length, "mask_function": mask_function, "attention_mask": attention_mask}
    return sdpa_mask(**options)


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, grouped_mask)
