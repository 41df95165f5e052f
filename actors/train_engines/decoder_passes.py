"""How a decoder is run over the packed sequences of a micro-batch: all of them in one pass, sequences of similar length
side by side, or each alone.

One pass needs layers that mix tokens by attention alone, through transformers' attention interface, or kernels that
take the boundaries of sequences. What carries a state from token to token without them (convolutions, state-space and
other recurrent layers), or has an attention of its own, is run as transformers runs a batch that is padded on the
right: a model that sees nothing of what comes after a token sees nothing of the padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from rlflow.actors.train_engines.packed_attention import PackedLayout
from rlflow.actors.train_engines.tower import Pictures
from rlflow.recipe.token_shares import longest_with_one_rotation

Way = Literal["packed", "padded", "alone"]
"""All sequences of a micro-batch end to end, those of similar length side by side, or each in a pass of its own."""


@dataclass(slots=True)
class DecoderPasses:
    """Which sequences go through a decoder together."""

    way: Way = "packed"
    """``packed`` goes with packed attention, the others with the model's own."""
    reason: str = ""
    """Why not packed."""
    names_boundaries: bool = False
    """Packed sequences go with their boundaries, under the names by which transformers' kernels take them."""
    longest: int | None = None
    """Tokens up to which all sequences have the same rotary embedding; a micro-batch with a longer one is run one
    sequence at a time, as each sequence's rotation depends on its length then. None where it never does."""
    ranks: dist.ProcessGroup | None = None
    """Those that must make as many passes as this one: they gather the weights of a layer for each."""
    places: torch.Tensor | None = None
    """int [N]: where each token of the last micro-batch was among those that layers were given, in all passes; None
    where they were given these tokens, in this order."""

    @property
    def packs(self) -> bool:
        return self.way == "packed"

    def hidden_states(
        self,
        decoder: nn.Module,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
        layout: PackedLayout,
        pictures: Pictures | None = None,
    ) -> torch.Tensor:
        """token_ids, position_ids int [N] -> [n, H] of the tokens that this rank holds.

        Args:
            pictures: Of the micro-batch, where it has some and they can be packed.
        """
        way = self.way if self.longest is None or layout.longest <= self.longest else "alone"
        buckets, self.places = layout.padded if way == "padded" else (layout.alone, None)
        missing = self._missing(1 if way == "packed" else len(buckets), token_ids.device)
        if way == "packed":
            options = self._options(layout) | {"position_ids": layout.own(position_ids)[None]}
            if pictures is not None:
                options |= pictures.inputs
                if pictures.position_ids is not None:
                    options["position_ids"] = pictures.position_ids[:, None]
            hidden = self._pass(decoder, layout.own(token_ids)[None], options)[0]
        else:
            assert pictures is None, "pictures are packed or refused"
            # A token that occurs is no sign of an end to any model, as one for padding is.
            padded = torch.cat([token_ids, token_ids[:1]])
            hidden = torch.cat([self._rows(decoder, padded[bucket]).flatten(0, 1) for bucket in buckets])
            hidden = hidden if self.places is None else hidden[self.places]
        for _ in range(missing):
            hidden = hidden + 0.0 * self._rows(decoder, token_ids[None, :2]).sum()
        return hidden

    def _missing(self, passes: int, device: torch.device) -> int:
        """How many fewer than the rank that makes the most."""
        if self.ranks is None or (self.packs and self.longest is None):
            return 0
        most = torch.tensor([passes], device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.ranks)
        return int(most) - passes

    def _rows(self, decoder: nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
        """Sequences side by side, [B, L] -> [B, L, H]; with packed attention one alone."""
        if not self.packs:
            return self._pass(decoder, token_ids, {})
        layout = PackedLayout(np.array([0, token_ids.shape[1]]), token_ids.device)
        return self._pass(decoder, token_ids, self._options(layout))

    def _options(self, layout: PackedLayout) -> dict[str, Any]:
        return {"layout": layout} | (layout.boundaries if self.names_boundaries else {})

    def _pass(self, decoder: nn.Module, token_ids: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        """token_ids [B, L] -> [B, L, H]."""
        if self.longest is not None:
            _forget_longest(decoder)
        return decoder(input_ids=token_ids, use_cache=False, **options).last_hidden_state


def passes_of(config: Mapping[str, Any]) -> DecoderPasses:
    """For a model with packed attention.

    Args:
        config: Fields of a transformers config.
    """
    return DecoderPasses(longest=longest_with_one_rotation(config))


def packed(sequences: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, PackedLayout]:
    """Token ids of sequences -> those of all [N], their positions [N], their layout."""
    device, lengths = sequences[0].device, [len(sequence) for sequence in sequences]
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    return torch.cat(list(sequences)), positions, PackedLayout(np.cumsum([0, *lengths]), device)


def _forget_longest(decoder: nn.Module) -> None:
    """Rotary embeddings that grow with the longest text that they have seen start again from this one."""
    for module in decoder.modules():
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, 0)
