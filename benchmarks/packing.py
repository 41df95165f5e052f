"""How tightly samples are packed, how evenly ranks share the work, and how long that takes.

    python benchmarks/packing.py

For 100,000 samples in micro-batches of 8,192 tokens, and for one batch of 256 samples. Costs are those of SmolLM2-135M,
in which attention to 7,780 tokens takes as long as everything else. benchmarks/packing.md has the results.
"""

from __future__ import annotations

import time

import numpy as np

from rlflow.batching import pack
from rlflow.memory import shape_of
from rlflow.types import Sample

MAX_TOKENS = 8192
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def lengths_of(name: str, number: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    match name:
        case "like GSM8K":  # Prompts and solutions of 60 to 500 tokens, 190 in the mean.
            return np.clip(rng.lognormal(5.2, 0.35, number), 60, 500).astype(int)
        case "lognormal":  # As of completions with a long tail: 200 in the mean, up to 4,000.
            return np.clip(rng.lognormal(5.0, 0.8, number), 2, 4000).astype(int)
        case _:
            return rng.integers(16, 8000, number)


def row(name: str, number: int, num_ranks: int) -> str:
    cost = shape_of(SMOLLM2).attention_cost
    lengths = lengths_of(name, number)
    samples = [
        Sample(np.zeros(n, dtype=np.int32), np.ones(n, dtype=bool), np.ones(n, dtype=np.float32)) for n in lengths
    ]
    started = time.perf_counter()
    by_cost = pack(samples, max_tokens=MAX_TOKENS, num_ranks=num_ranks, attention_cost=cost)
    seconds = time.perf_counter() - started
    by_tokens = pack(samples, max_tokens=MAX_TOKENS, num_ranks=num_ranks)
    trained = sum(len(batch.token_ids) for of_rank in by_cost for batch in of_rank)
    filled = lengths.sum() / MAX_TOKENS / sum(map(len, by_cost))
    waits = [waiting(batches, cost) for batches in (by_tokens, by_cost)]
    assert sum(of_rank.num_real_tokens for of_rank in by_cost) == lengths.sum()
    return (
        f"| {name} | {number:,} | {num_ranks} | {trained / lengths.sum():.4f} | {filled:.3f} | "
        f"{waits[0] - 1:.2%} | {waits[1] - 1:.2%} | {seconds:.2f} |"
    )


def waiting(batches: list, cost: float) -> float:
    """What the slowest rank of each round of micro-batches costs, over the mean of the ranks."""
    lengths = [[np.diff(batch.cu_seqlens) for batch in of_rank] for of_rank in batches]
    costs = np.array([[(n * (1 + cost * n)).sum() for n in of_rank] for of_rank in lengths])
    return costs.max(axis=0).sum() / costs.mean(axis=0).sum()


def main() -> None:
    print(
        "| lengths | samples | ranks | trained / real tokens | filled | waiting, equal tokens | equal costs | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in ("like GSM8K", "lognormal", "uniform"):
        print(row(name, 100_000, 8), flush=True)
    for name in ("like GSM8K", "lognormal", "uniform"):
        print(row(name, 256, 4), flush=True)


if __name__ == "__main__":
    main()
