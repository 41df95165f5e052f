"""What each part of rlflow makes of an architecture: a verdict of a few words each, against plain transformers.

trained   how sequences are run together, and logprobs and all gradients against those of each alone, to 1e-4
adapter   LoRA of all linear layers trains, is the base when it is off to the bit, and merged gives the trained logits
engine    the torch engine, built without weights, takes two versions of them as a trainer sends them, and its logprobs
          are those of transformers with the same version
vllm      the same of vLLM
"""

from __future__ import annotations

import copy
import multiprocessing
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tiny_architectures import FOR_VLLM, VOCABULARY, build

from rlflow.actors import adapters
from rlflow.actors.checkpoint_names import kept_buffers, to_checkpoint
from rlflow.actors.merged_weights import merged_weights
from rlflow.actors.rollout_engines.sent_weights import Chunks
from rlflow.actors.rollout_engines.torch_engine import TorchEngine
from rlflow.actors.train_engines.probe import choose_passes, use_own_attention
from rlflow.actors.train_engines.token_model import TokenModel
from rlflow.actors.weight_sync import pack_weights, unpack_weights
from rlflow.recipe import AdapterBlock, ModelBlock
from rlflow.types import SampleRequest, SamplingParams

LENGTHS = (7, 23, 20)
_ENOUGH, _ENGINES_ENOUGH, _CLOSE = 1e-4, 3e-4, 5e-3
_NOT_THERE = "are not supported for now|was supported in vLLM until|does not dispatch|Argument position_ids not found"
"""What vLLM says of a model that it does not have, nor can run as transformers does."""
_WANTS_PROCESSOR = "Can't load image processor|instantiate the backend tokenizer"
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
    def start(directory: str) -> Any:
        return TorchEngine(directory, dtype="float32", max_num_seqs=4)

    made, apart = _two_versions(build(name), start)
    return (made.way.name, "") if apart < _ENGINES_ENOUGH else ("WRONG", f"logprobs differ by {apart:.2g}")


def vllm(name: str) -> tuple[str, str]:
    from rlflow.actors.rollout_engines.vllm_engine import VllmEngine

    sizes: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 4, "kv_cache_gib": 0.05, "gpu_memory_fraction": 0.5}
    alone: dict[str, Any] = {"tensor_parallel_size": 1, "num_threads": 1, "seed": 0, "trust_remote_code": False}

    def start(directory: str) -> Any:
        return VllmEngine(directory, dtype="float32", log_path=None, **sizes, **alone)

    try:
        made, apart = _two_versions(build(name, FOR_VLLM), start)
    except ValueError as error:
        if re.search(_NOT_THERE, str(error)):
            return "-", ""
        if re.search(_WANTS_PROCESSOR, str(error)):
            return "not tried", "vLLM wants the processor of its pictures, which a small one has not"
        # Without the options that it was started with.
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        return "refused", shown(cause, named=not isinstance(cause, ValueError))
    (kind,) = made.llm.apply_model(_class_name)
    how = ", through transformers" if kind.startswith("Transformers") else ""
    if apart < _ENGINES_ENOUGH:
        return f"ok, {apart:.0e}{how}", ""
    return (f"close, {apart:.0e}" if apart < _CLOSE else "WRONG") + how, f"logprobs differ by {apart:.2g}"


def _class_name(model: Any) -> str:
    return type(model).__name__


def _two_versions(model: Any, start: Callable[[str], Any]) -> tuple[Any, float]:
    """An engine, and how far its logprobs are from transformers' with either of two versions of the weights."""
    use_own_attention(model)
    _soften(model)
    models = [model, copy.deepcopy(model)]
    _disturb(models[1])
    ask = _in_another_process(models)
    model.whole_config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory() as directory:
        model.whole_config.save_pretrained(directory)
        made = start(directory)
    apart = 0.0
    for version, one in enumerate(models):
        sent = pack_weights(to_checkpoint(one, chain(one.named_parameters(), kept_buffers(one))), version)
        weights = unpack_weights(sent)
        # The second a tensor at a time: experts and tied ones may not want to come together.
        made.load_weights(Chunks([one] for one in weights) if version else weights, version)
        apart = max(apart, _apart(made, partial(ask, version)))
    return made, apart


def _in_another_process(models: list[Any]) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """The logits of one of the models. In this one vLLM changes the classes of what it runs through transformers."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    context.Process(target=_answer, args=(models, ours, theirs), daemon=True).start()
    theirs.close()

    def ask(version: int, tokens: torch.Tensor) -> torch.Tensor:
        ours.send((version, tokens.numpy()))
        return torch.from_numpy(ours.recv())

    return ask


def _answer(models: list[Any], ours: Any, theirs: Any) -> None:
    ours.close()
    # Until the other end is closed.
    with suppress(EOFError):
        while True:
            version, tokens = theirs.recv()
            theirs.send(_logits(models[version], torch.from_numpy(tokens)).numpy())


@torch.no_grad()
def _soften(model: Any) -> None:
    """Brings logits to where no token is sure: at a logprob of 0 any two models agree."""
    tokens = torch.arange(3, VOCABULARY)[None, :40]
    # Again, where logits are capped.
    for _ in range(4):
        if (spread := float(_logits(model, tokens).std())) > 2:
            model.get_output_embeddings().weight.mul_(2 / spread)


@torch.no_grad()
def _disturb(model: Any) -> None:
    """Moves every weight, and what routers choose experts by."""
    generator = torch.Generator().manual_seed(3)
    biases = [tensor for name, tensor in kept_buffers(model) if name.endswith("bias")]
    for size, tensors in ((0.5, biases), (0.02, model.parameters())):
        for tensor in tensors:
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=size)


@torch.no_grad()
def _apart(made: Any, logits_of: Callable[[torch.Tensor], torch.Tensor]) -> float:
    prompts = [(np.arange(size) * 7 % 61 + 3).astype(np.int32) for size in (3, 7, 40)]
    params = SamplingParams(max_new_tokens=10)
    made.add([SampleRequest(index, prompt, index, params) for index, prompt in enumerate(prompts)])
    completions: list[Any] = []
    while len(completions) < len(prompts):
        completions += made.step()
    apart = surprise = 0.0
    for completion in completions:
        prompt = prompts[completion.id]
        text = torch.from_numpy(np.concatenate([prompt, completion.token_ids])).long()
        logprobs = logits_of(text[None])[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, text[len(prompt) :, None]).squeeze(1).numpy()
        apart = max(apart, float(np.abs(completion.logprobs - expected).max()))
        surprise -= float(expected.sum())
    assert surprise > 0.3, f"its tokens are too sure to tell: all have {surprise:.2g} nats"
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
