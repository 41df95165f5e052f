"""The torch engine against the waves that it had before, and against transformers' generate: tokens a CPU second.

    python benchmarks/torch_engine.py [--rounds 5] [--models tiny small]

A wave takes as many requests as there are rows, pads their prompts on the left, and ends with the last of them; rows
that have ended leave it when they are half of it. generate has all requests in one call, where there are rows for all.
The arms take turns, on one thread; benchmarks/torch_engine.md has the results.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config

from rlflow.actors.rollout_engines.engine import generate
from rlflow.actors.rollout_engines.torch_engine import TorchEngine
from rlflow.actors.rollout_engines.torch_sampling import sample
from rlflow.types import SampleRequest, SamplingParams

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {  # 0.82M parameters
        "vocab_size": 96,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "small": {  # 135M parameters, the sizes of SmolLM2
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
}

ARMS = ("engine", "waves", "generate")


@dataclass(frozen=True, slots=True)
class Work:
    name: str
    model: str
    num_prompts: int
    group_size: int
    max_num_seqs: int
    params: SamplingParams


def stops_at_random(num_tokens: int, vocabulary: int, one_in: int) -> SamplingParams:
    """With weights of which every token has about the same probability."""
    return SamplingParams(num_tokens, stop_token_ids=tuple(range(max(1, vocabulary // one_in))))


WORKS = (
    Work("equal lengths", "tiny", 8, 8, 64, SamplingParams(110)),
    Work("stop at random, all at once", "tiny", 8, 8, 64, stops_at_random(512, 96, 110)),
    Work("stop at random", "tiny", 24, 8, 64, stops_at_random(512, 96, 110)),
    Work("equal lengths", "small", 4, 4, 16, SamplingParams(64)),
)


def requests_of(work: Work) -> list[SampleRequest]:
    """Prompts of 12 to 40 tokens."""
    rng = np.random.default_rng(0)
    lengths = 12 + 28 * np.arange(work.num_prompts) // work.num_prompts
    prompts = [rng.integers(0, MODELS[work.model]["vocab_size"], n).astype(np.int32) for n in rng.permutation(lengths)]
    return [
        SampleRequest(i, prompts[i // work.group_size], i, work.params)
        for i in range(work.num_prompts * work.group_size)
    ]


def padded(prompts: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, int64 [R, L]."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


@torch.inference_mode()
def wave(model: Any, requests: Sequence[SampleRequest], params: SamplingParams) -> int:
    """Returns how many tokens were generated."""
    prompts = {id(request.token_ids): request.token_ids for request in requests}
    which = torch.tensor([list(prompts).index(id(request.token_ids)) for request in requests])
    ids, mask = padded(list(prompts.values()))
    cache = DynamicCache(config=model.config)
    call: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, **call).logits[:, -1]
    cache.batch_select_indices(which)
    logits, mask = logits[which], mask[which]
    uniforms = torch.from_numpy(
        np.stack([np.random.Generator(np.random.Philox(key=r.seed)).random(params.max_new_tokens) for r in requests])
    )
    stop = torch.tensor(params.stop_token_ids, dtype=torch.long)
    tokens = torch.zeros(len(requests), params.max_new_tokens, dtype=torch.long)
    logprobs = torch.zeros(len(requests), params.max_new_tokens)
    running = torch.ones(len(requests), dtype=torch.bool)
    rows = torch.arange(len(requests))
    num_tokens = 0
    for t in range(params.max_new_tokens):
        token, logprob = sample(logits, uniforms[rows, t], params)
        tokens[rows, t], logprobs[rows, t] = torch.where(running, token, 0), torch.where(running, logprob, 0.0)
        num_tokens += int(running.sum())
        running &= ~torch.isin(token, stop)
        num_running = int(running.sum())
        if num_running == 0 or t + 1 == params.max_new_tokens:
            break
        if num_running <= len(rows) // 2:
            keep = running.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            rows, token, mask, running = rows[keep], token[keep], mask[keep], running[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = mask.sum(1, keepdim=True) - 1
        logits = model(input_ids=token[:, None], attention_mask=mask, position_ids=positions, **call).logits[:, -1]
    return num_tokens


@torch.inference_mode()
def transformers_generate(model: Any, requests: Sequence[SampleRequest], params: SamplingParams) -> int:
    """Returns how many tokens were generated, those behind a stop token left out."""
    ids, mask = padded([request.token_ids for request in requests])
    stop = list(params.stop_token_ids)
    written = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=params.max_new_tokens,
        eos_token_id=stop or None,
        pad_token_id=0,
    )[:, ids.shape[1] :]
    ended = torch.isin(written, torch.tensor(stop, dtype=torch.long)).cumsum(1)
    return int((ended - torch.isin(written, torch.tensor(stop, dtype=torch.long)).long() == 0).sum())


def arms_of(work: Work, model: Any, engine: TorchEngine) -> dict[str, Callable[[], int]]:
    requests = requests_of(work)
    waves = [requests[i : i + work.max_num_seqs] for i in range(0, len(requests), work.max_num_seqs)]
    arms: dict[str, Callable[[], int]] = {
        "engine": lambda: sum(len(completion.token_ids) for completion in generate(engine, requests)),
        "waves": lambda: sum(wave(model, part, work.params) for part in waves),
    }
    if len(waves) == 1:
        arms["generate"] = lambda: transformers_generate(model, requests, work.params)
    return arms


def measure(work: Work, rounds: int) -> str:
    """A row of the table."""
    torch.manual_seed(0)
    config = Qwen3Config(**MODELS[work.model], tie_word_embeddings=True, eos_token_id=None, bos_token_id=None)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        engine = TorchEngine(directory, dtype="float32", max_num_seqs=work.max_num_seqs)
    engine.load_weights(model.named_parameters(), 0)
    rates: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for name, arm in arms_of(work, model, engine).items():
            started = time.process_time()
            num_tokens = arm()
            if number:  # The first round warms up.
                rates.setdefault(name, []).append(num_tokens / (time.process_time() - started))
    cells = [work.model, work.name, f"{work.num_prompts} x {work.group_size}", str(work.max_num_seqs)]
    cells += [f"{np.median(rates[name]):,.0f}" if name in rates else "" for name in ARMS]
    for name in ARMS[1:]:
        ratios = np.array(rates["engine"]) / np.array(rates[name]) if name in rates else None
        cells.append("" if ratios is None else f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | lengths | completions | rows | engine | waves | generate | engine / waves | engine / generate |")
    print("|---|---|---|---|---|---|---|---|---|")
    for work in WORKS:
        if work.model in arguments.models:
            print(measure(work, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
