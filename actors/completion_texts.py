"""What a policy wrote, as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def decode_completions(
    tokenizer: PreTrainedTokenizerFast, completions: Sequence[np.ndarray], stop_token_ids: Sequence[Sequence[int]]
) -> tuple[str, ...]:
    """What the policy wrote, as text: all but stop tokens and padding, special tokens such as ``<think>`` included.

    Args:
        completions: int32 [C] each.
        stop_token_ids: Of each of them.
    """
    padding = [] if tokenizer.pad_token_id is None else [tokenizer.pad_token_id]
    written = [
        token_ids[~np.isin(token_ids, [*stop, *padding])].tolist()
        for token_ids, stop in zip(completions, stop_token_ids, strict=True)
    ]
    # Tokenizers that ask for a clean-up would take the space before a full stop away.
    return tuple(tokenizer.batch_decode(written, skip_special_tokens=False, clean_up_tokenization_spaces=False))
