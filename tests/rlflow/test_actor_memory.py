from __future__ import annotations

import pytest

from rlflow.actor_memory import _chunks
from rlflow.memory import shape_of

SHAPE = shape_of(
    {
        "model_type": "llama",
        "vocab_size": 3_000_000,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
)


@pytest.mark.parametrize(
    ("tokens", "size", "number", "of_chunk"),
    # 256 MiB are the logits of 22 tokens, of 12 MB each; or of 14, with the 6 MB in bfloat16 that they are made from.
    [(16, 4, 1, 16 * 12_000_000), (32, 4, 2, 16 * 12_000_000), (64, 4, 3, 22 * 12_000_000), (16, 2, 2, 8 * 18_000_000)],
)
def test_logits_beyond_256_mib_are_made_in_even_chunks(tokens: int, size: int, number: int, of_chunk: int):
    assert _chunks(tokens, SHAPE, size) == (number, of_chunk)
