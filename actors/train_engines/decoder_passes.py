"""How a decoder is run over the packed sequences of a micro-batch: all of them in one pass, or each in its own.

One pass needs layers that mix tokens by attention alone, through transformers' attention interface. What carries a
state from token to token (convolutions, state-space and other recurrent layers) or has an attention of its own is run
as transformers runs one sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from rlflow.actors.train_engines.packed_attention import PackedLayout
from rlflow.actors.train_engines.tower import Pictures
from rlflow.recipe.token_shares import longest_with_one_rotation


@dataclass(slots=True)
class DecoderPasses:
    """Which sequences go through a decoder together."""

    packs: bool = True
    """All that a micro-batch has, with packed attention; otherwise one at a time, with the model's own attention."""
    reason: str = ""
    """Why one at a time."""
    longest: int | None = None
    """Tokens up to which all sequences have the same rotary embedding; a micro-batch with a longer one is run one
    sequence at a time, as each sequence's rotation depends on its length then. None where it never does."""
    ranks: dist.ProcessGroup | None = None
    """Those that must make as many passes as this one: they gather the weights of a layer for each."""

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
        together = self.packs and (self.longest is None or layout.longest <= self.longest)
        missing = self._missing(1 if together else len(layout.sequences), token_ids.device)
        if together:
            options: dict[str, Any] = {"position_ids": layout.own(position_ids)[None], "layout": layout}
            if pictures is not None:
                options |= pictures.inputs
                if pictures.position_ids is not None:
                    options["position_ids"] = pictures.position_ids[:, None]
            hidden = self._pass(decoder, layout.own(token_ids), options)
        else:
            assert pictures is None, "pictures are packed or refused"
            hidden = torch.cat([self._alone(decoder, token_ids[tokens]) for tokens in layout.sequences])
        for _ in range(missing):
            hidden = hidden + 0.0 * self._alone(decoder, token_ids[:2]).sum()
        return hidden

    def _missing(self, passes: int, device: torch.device) -> int:
        """How many fewer than the rank that makes the most."""
        if self.ranks is None or (self.packs and self.longest is None):
            return 0
        most = torch.tensor([passes], device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.ranks)
        return int(most) - passes

    def _alone(self, decoder: nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
        """One sequence [L] -> [L, H]."""
        if not self.packs:
            return self._pass(decoder, token_ids, {})
        layout = PackedLayout(np.array([0, len(token_ids)]), token_ids.device)
        return self._pass(decoder, token_ids, {"layout": layout})

    def _pass(self, decoder: nn.Module, token_ids: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        if self.longest is not None:
            _forget_longest(decoder)
        return decoder(input_ids=token_ids[None], use_cache=False, **options).last_hidden_state[0]


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
