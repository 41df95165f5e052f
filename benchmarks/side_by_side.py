"""How much slower sequences side by side, or one at a time, train than packed: one architecture in each way in turn.

    OMP_NUM_THREADS=1 python benchmarks/side_by_side.py

The same sequences, forward and backward, in float32; a round has each way once, and the ways take turns. Counted is
CPU time, which others of the machine hardly change: with one thread, that is the time on an idle one.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rlflow.actors.train_engines import packed_attention
from rlflow.actors.train_engines.decoder_passes import Way
from rlflow.actors.train_engines.token_model import TokenModel
from rlflow.actors.vision import set_text_attention

ROUNDS, TOKENS = 3, 1024
SIZES = {"hidden_size": 576, "num_hidden_layers": 4, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
OTHER = {"vocab_size": 8192, "intermediate_size": 1536, "max_position_embeddings": 2048, "pad_token_id": 0}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 384}
KINDS: dict[str, dict[str, Any]] = {"llama": {}, "qwen3_moe": EXPERTS}
"""SmolLM2-135M's sizes, but for four of its thirty layers and a smaller vocabulary."""
WAYS: tuple[Way, ...] = ("packed", "padded", "alone")


def main() -> None:
    transformers.logging.set_verbosity_error()
    print(f"{torch.get_num_threads()} threads, {TOKENS} tokens, median of {ROUNDS} rounds\n")
    print("| architecture | lengths | packed, tokens/s | side by side | one at a time |")
    print("|---|---|---|---|---|")
    for kind, own in KINDS.items():
        torch.manual_seed(0)
        config = CONFIG_MAPPING[kind](**SIZES | OTHER | own, bos_token_id=None, eos_token_id=1)
        module = TokenModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
        for name, sequences in _texts().items():
            seconds: dict[Way, list[float]] = {way: [] for way in WAYS}
            for number in range(ROUNDS + 1):
                for way in WAYS[number % 3 :] + WAYS[: number % 3]:
                    spent = _seconds(module, way, sequences)
                    # The first round warms up.
                    if number:
                        seconds[way].append(spent)
            packed, padded, alone = (median(seconds[way]) for way in WAYS)
            rates = f"{TOKENS / packed:.0f} | x {packed / padded:.2f} | x {packed / alone:.2f}"
            print(f"| {kind} | {name} | {rates} |", flush=True)


def _texts() -> dict[str, list[torch.Tensor]]:
    """Sequences of TOKENS tokens together."""
    generator = np.random.default_rng(0)
    spread = np.minimum(np.maximum(generator.lognormal(4.3, 0.8, 200).astype(int), 8), 512)
    lengths = {
        "32 each": [32] * (TOKENS // 32),
        "256 each": [256] * (TOKENS // 256),
        "8 to 512": spread[: np.searchsorted(spread.cumsum(), TOKENS)],
    }
    texts = {}
    for name, given in lengths.items():
        whole = [*given, TOKENS - sum(given)] if sum(given) < TOKENS else given
        texts[name] = [torch.from_numpy(generator.integers(2, 8192, size=length)) for length in whole]
    return texts


def _seconds(module: TokenModel, way: Way, sequences: list[torch.Tensor]) -> float:
    set_text_attention(module.model, packed_attention.NAME if way == "packed" else "sdpa")
    module.passes.way = way
    module.zero_grad(set_to_none=True)
    start = time.process_time()
    torch.cat(module.probe(sequences)).sum().backward()
    return time.process_time() - start


if __name__ == "__main__":
    main()
