"""What it takes to get a batch to a trainer's rank and one number a token back: packing, Ray, and the way home.

    python benchmarks/batch_to_rank.py

1,024 samples of 1,024 tokens with the fields of GRPO, in one micro-batch and in micro-batches of 2,048 tokens; the rank
reads every micro-batch and answers with a float32 a token. Wall time, the least and the median of 20 turns: the least
is what it takes when nothing else runs. On two cores with little else to do:

| micro-batch | pack | to the rank and back | unpack | together | median |
|---|---|---|---|---|---|
| 1048576 tokens | 5.1 ms | 17.3 ms | 0.2 ms | 23.1 ms | 27.3 ms |
| 2048 tokens | 7.4 ms | 9.3 ms | 0.2 ms | 17.4 ms | 21.3 ms |
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median

import numpy as np
import ray

from rlflow.batching import pack, unpack
from rlflow.types import MicroBatch, Sample


class Rank:
    """In a trainer's place: it has nothing to compute."""

    def answer(self, micro_batches: Sequence[MicroBatch]) -> np.ndarray:
        return np.concatenate([batch.old_logprobs for batch in micro_batches if batch.old_logprobs is not None])


def make_samples(number: int, length: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    mask = np.arange(length) >= length // 4
    return [
        Sample(
            token_ids=rng.integers(0, 49152, length).astype(np.int32),
            loss_mask=mask,
            loss_weights=mask.astype(np.float32),
            advantages=rng.normal(size=length).astype(np.float32),
            old_logprobs=rng.normal(size=length).astype(np.float32),
            ref_logprobs=rng.normal(size=length).astype(np.float32),
        )
        for _ in range(number)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=20)
    given = parser.parse_args()
    ray.init(include_dashboard=False, log_to_driver=False, object_store_memory=1 << 30)
    rank = ray.remote(Rank).remote()
    samples = make_samples(given.samples, given.length)
    expected = samples[7].old_logprobs
    assert expected is not None
    print("| micro-batch | pack | to the rank and back | unpack | together | median |\n|---|---|---|---|---|---|")
    for max_tokens in (given.samples * given.length, 2048):
        turns = []
        for _ in range(given.turns + 2):
            started = time.perf_counter()
            batches = pack(samples, max_tokens=max_tokens, num_ranks=1)
            packed = time.perf_counter()
            answers = ray.get([rank.answer.remote(batches[0])], timeout=60)
            answered = time.perf_counter()
            values = unpack(samples, batches, answers)
            ended = time.perf_counter()
            assert np.array_equal(values[7], expected)
            turns.append((packed - started, answered - packed, ended - answered, ended - started))
        # The first two make the object store's pages.
        columns = list(zip(*turns[2:], strict=True))
        parts = [f"{1e3 * min(column):.1f} ms" for column in columns]
        print(f"| {max_tokens} tokens | {' | '.join(parts)} | {1e3 * median(columns[-1]):.1f} ms |", flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
