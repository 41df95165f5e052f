"""What each part of rlflow makes of an architecture: a verdict of a few words each, against plain transformers.

trained   how sequences are run together, and logprobs and all gradients against those of each alone, to 1e-4
adapter   LoRA of all linear layers trains, is the base when it is off to the bit, and merged gives the trained logits
engine    the torch engine, built without weights, takes two versions of them as a trainer sends them, and its logprobs
          are those of transformers with the same version
vllm      the same of vLLM
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tiny_architectures import FOR_VLLM, VOCABULARY, build

from rlflow.actors import adapters
from rlflow.actors.checkpoint_names import kept_buffers, to_checkpoint
from rlflow.actors.merged_weights import merged_weights
from rlflow.actors.rollout_engines.torch_engine import TorchEngine
from rlflow.actors.train_engines.probe import choose_passes, use_own_attention
from rlflow.actors.train_engines.token_model import TokenModel
from rlflow.actors.weight_sync import pack_weights, unpack_weights
from rlflow.recipe import AdapterBlock, ModelBlock
from rlflow.types import SampleRequest, SamplingParams

LENGTHS = (7, 23, 20)
_ENOUGH = 1e-4
WAYS = {"packed": "packed", "padded": "side by side", "alone": "one at a time"}


def trained(name: str) -> tuple[str, str]:
    """The verdict, and what is to be said of it."""
    model = build(name)
    plain: Any = copy.deepcopy(model)
    use_own_attention(plain)
    module = TokenModel(model)
    try:
        choose_passes(module, torch.device("cpu"))
    except ValueError as error:
        return "refused", shown(error)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    ours = torch.cat(module.probe(texts))
    theirs = torch.cat([TokenModel.probe_plain(SimpleNamespace(model=plain), text) for text in texts])  # pyright: ignore
    apart = float((ours - theirs).detach().abs().max())
    one, other = _gradient(model, ours), _gradient(plain, theirs)
    turned = float((one - other).norm() / other.norm())
    if not (apart < _ENOUGH and turned < _ENOUGH):
        return "WRONG", f"logprobs differ by {apart:.2g}, gradients by {turned:.2g}"
    return WAYS[module.passes.way], module.passes.reason


def adapter(name: str) -> tuple[str, str]:
    model = build(name)
    tokens = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(2))
    plain, before = copy.deepcopy(model), _logits(model, tokens)
    adapters.inject(model, ModelBlock(path="small", adapter=AdapterBlock(rank=2)), seed=0)
    optimizer = torch.optim.Adam(adapters.adapter_parameters(model).values(), 1e-2)
    for _ in range(2):
        model(tokens, use_cache=False).logits.float().log_softmax(-1)[..., 3].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    now = _logits(model, tokens)
    with adapters.as_reference(model):
        off = _logits(model, tokens)
    merged = dict(merged_weights(model))
    names = dict(chain(plain.named_parameters(), kept_buffers(plain)))
    if merged.keys() != names.keys():
        return "WRONG", f"merged, {sorted(merged.keys() ^ names.keys())[0]} is there or here alone"
    plain.load_state_dict(merged, strict=False)
    apart = float((_logits(plain, tokens) - now).abs().max())
    if not torch.equal(off, before):
        return "WRONG", f"without the adapter the numbers differ by {float((off - before).abs().max()):.1g}"
    if not apart < _ENOUGH:
        return "WRONG", f"merged, the numbers differ by {apart:.1g}"
    return ("ok", "") if float((now - before).abs().max()) > _ENOUGH else ("WRONG", "nothing is trained")


def engine(name: str) -> tuple[str, str]:
    model = build(name)

    def start(directory: str) -> Any:
        return TorchEngine(directory, dtype="float32", max_num_seqs=4)

    made, apart = _two_versions(model, start)
    return (made.way.name, "") if apart < 3e-4 else ("WRONG", f"logprobs differ by {apart:.2g}")


def vllm(name: str) -> tuple[str, str]:
    from vllm import ModelRegistry

    from rlflow.actors.rollout_engines.vllm_engine import VllmEngine

    if type(build(name)).__name__ not in ModelRegistry.get_supported_archs():
        return "not listed", ""
    model = build(name, **FOR_VLLM)
    sizes: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 4, "kv_cache_gib": 0.05, "gpu_memory_fraction": 0.5}
    alone: dict[str, Any] = {"tensor_parallel_size": 1, "num_threads": 1, "seed": 0, "trust_remote_code": False}

    def start(directory: str) -> Any:
        return VllmEngine(directory, dtype="float32", log_path=None, **sizes, **alone)

    _, apart = _two_versions(model, start)
    return ("ok", "") if apart < 3e-4 else ("WRONG", f"logprobs differ by {apart:.2g}")


def _two_versions(model: Any, start: Callable[[str], Any]) -> tuple[Any, float]:
    """An engine, and how far its logprobs are from transformers' with either of two versions of the weights."""
    use_own_attention(model)
    model.whole_config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory() as directory:
        model.whole_config.save_pretrained(directory)
        made = start(directory)
    apart = 0.0
    for version in range(2):
        if version:
            _disturb(model)
        sent = pack_weights(to_checkpoint(model, chain(model.named_parameters(), kept_buffers(model))), version)
        made.load_weights(unpack_weights(sent), version)
        apart = max(apart, _apart(made, model))
    return made, apart


@torch.no_grad()
def _disturb(model: Any) -> None:
    """Moves every weight, and what routers choose experts by."""
    generator = torch.Generator().manual_seed(3)
    biases = [tensor for name, tensor in kept_buffers(model) if name.endswith("bias")]
    for size, tensors in ((0.5, biases), (0.02, model.parameters())):
        for tensor in tensors:
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=size)


@torch.no_grad()
def _apart(made: Any, model: Any) -> float:
    prompts = [np.array([5, 9, 12, 30, 7, 3, 40][:size], np.int32) for size in (3, 5, 7)]
    params = SamplingParams(max_new_tokens=10)
    made.add([SampleRequest(index, prompt, index, params) for index, prompt in enumerate(prompts)])
    completions: list[Any] = []
    while len(completions) < len(prompts):
        completions += made.step()
    apart = 0.0
    for completion in completions:
        prompt = prompts[completion.id]
        text = torch.from_numpy(np.concatenate([prompt, completion.token_ids])).long()
        logprobs = _logits(model, text[None])[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, text[len(prompt) :, None]).squeeze(1).numpy()
        apart = max(apart, float(np.abs(completion.logprobs - expected).max()))
    return apart


@torch.no_grad()
def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, use_cache=False).logits


def _gradient(model: Any, logprobs: torch.Tensor) -> torch.Tensor:
    loss = (logprobs * torch.linspace(-1, 1, len(logprobs))).sum()
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


def shown(error: Exception, named: bool = False) -> str:
    text = " ".join((f"{type(error).__name__}: {error}" if named else str(error)).split()).replace("|", "/")
    return text if len(text) <= 200 else text[:197] + "..."
