"""What trainer, LoRA, weight sync, torch engine and vLLM make of the architectures that people train.

    python benchmarks/architectures_in_use.py docs/architectures.md      # or names, to see those alone

Each is made as small as in architectures.py. LoRA: a step trains A and B of all linear layers, without the adapter the
numbers are the base's to the bit, and the merged weights, as they are sent to engines, give a plain model the trained
numbers. Torch engine: the way of reading that it chose, having compared its logprobs with transformers'. vLLM: whether
it lists the architecture; it is not run.
"""

from __future__ import annotations

import copy
import logging
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import VOCABULARY, build, judge

from rlflow.actors import adapters
from rlflow.actors.merged_weights import merged_weights
from rlflow.actors.rollout_engines.torch_engine import TorchEngine
from rlflow.recipe import AdapterBlock, ModelBlock

NAMES = """
llama mistral qwen2 qwen3 phi3 gemma2 gemma3_text gpt_oss granite cohere cohere2 olmo3 smollm3
mixtral qwen3_moe deepseek_v3 glm4_moe kimi_linear qwen3_next qwen3_5_text qwen3_5_moe_text lfm2
lfm2_moe falcon_h1 bamba granitemoehybrid nemotron_h jamba mamba2 minimax
"""
HEAD = "| architecture | trained and scored | LoRA and merged sync | torch engine | vLLM |"
_ENOUGH = 1e-4


def main() -> None:
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    document = Path(sys.argv[1]) if len(sys.argv) == 2 and sys.argv[1].endswith(".md") else None
    listed = _listed_by_vllm()
    rows = []
    for name in sys.argv[1:] if document is None and len(sys.argv) > 1 else NAMES.split():
        how, why = judge(name)
        parts = [how if how != "not tried" else f"not tried: {why}"]
        if how not in ("not tried", "refused"):
            parts += [_part(_adapter, name), _part(_engine, name), _vllm(name, listed)]
        rows.append(f"| `{name}` | {' | '.join(parts)} |")
        print(rows[-1], flush=True)
    if document is not None:
        before, _, after = document.read_text().partition(HEAD)
        rest = after.split("\n\n", 1)[1] if "\n\n" in after else ""
        table = "\n".join([HEAD, "|---|---|---|---|---|", *rows])
        document.write_text(f"{before}{table}\n" + (f"\n{rest}" if rest else ""))


def _part(look: Any, name: str) -> str:
    try:
        return look(build(name))
    # What a model's code makes of it is what the table is about.
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")
        return f"no: {said[:100]}"


def _adapter(model: Any) -> str:
    tokens = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(2))
    plain, before = copy.deepcopy(model), _logits(model, tokens)
    adapters.inject(model, ModelBlock(path="small", adapter=AdapterBlock(rank=2)), seed=0)
    optimizer = torch.optim.Adam(adapters.adapter_parameters(model).values(), 1e-2)
    for _ in range(2):
        model(tokens, use_cache=False).logits.float().log_softmax(-1)[..., 3].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = _logits(model, tokens)
    with adapters.as_reference(model):
        off = _logits(model, tokens)
    merged = dict(merged_weights(model))
    assert merged.keys() == dict(plain.named_parameters()).keys(), "merged weights have other names"
    plain.load_state_dict(merged, strict=False)
    apart = float((_logits(plain, tokens) - trained).abs().max())
    if not torch.equal(off, before):
        return f"no: without the adapter the numbers differ by {float((off - before).abs().max()):.1g}"
    if not apart < _ENOUGH:
        return f"no: merged, the numbers differ by {apart:.1g}"
    return "ok" if float((trained - before).abs().max()) > _ENOUGH else "no: nothing is trained"


@torch.no_grad()
def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, use_cache=False).logits


def _engine(model: Any) -> str:
    return TorchEngine("small", dtype="float32", max_num_seqs=4, model=model).way.name


def _listed_by_vllm() -> set[str]:
    from vllm import ModelRegistry

    return set(ModelRegistry.get_supported_archs())


def _vllm(name: str, listed: set[str]) -> str:
    return "listed" if type(build(name)).__name__ in listed else "not listed"


if __name__ == "__main__":
    main()
