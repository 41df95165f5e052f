"""What rlflow.activations counts is what torch keeps, to the byte, and what is alive beside it, nearly."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from rlflow import activations
from rlflow.actors import adapters
from rlflow.actors.train_engines import packed_attention
from rlflow.actors.train_engines.packed_attention import PackedLayout
from rlflow.actors.train_engines.token_model import TokenModel, recompute_layers
from rlflow.memory import ModelShape, shape_of, with_adapter
from rlflow.recipe import AdapterBlock, ModelBlock

TOKENS, VOCABULARY = 256, 16
LLAMA = {"hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": {name: size for name, size in LLAMA.items() if name != "head_dim"},
    "qwen3": LLAMA,
    "gpt2": {"n_embd": 24, "n_head": 4, "n_positions": TOKENS},
    "gpt2 relu": {"n_embd": 24, "n_head": 4, "n_positions": TOKENS, "activation_function": "relu"},
    "gpt2 gelu": {"n_embd": 24, "n_head": 4, "n_positions": TOKENS, "activation_function": "gelu"},
}


def build(
    name: str, layers: int, dtype: torch.dtype, adapter: AdapterBlock | None = None
) -> tuple[TokenModel, ModelShape]:
    kind = name.partition(" ")[0]
    count = {"n_layer": layers} if kind == "gpt2" else {"num_hidden_layers": layers}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    fields = {"model_type": kind, "vocab_size": VOCABULARY, **CONFIGS[name], **count, **tokens}
    config = AutoConfig.for_model(**fields)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=packed_attention.NAME).eval()
    shape = shape_of(config.to_dict())
    if adapter is not None:
        adapters.inject(model, ModelBlock(path=".", adapter=adapter), seed=0)
        shape = with_adapter(shape, adapter)
    return TokenModel(model), shape


def inputs() -> tuple[torch.Tensor, torch.Tensor, PackedLayout, torch.Tensor]:
    """Two sequences; one token is scored, so that logits weigh nothing."""
    ids, positions = torch.arange(TOKENS) % VOCABULARY, torch.arange(TOKENS) % (TOKENS // 2)
    layout = PackedLayout(np.array([0, TOKENS // 2, TOKENS]), torch.device("cpu"))
    return ids, positions, layout, torch.arange(TOKENS) == 1


def kept_bytes(module: TokenModel) -> int:
    """Of all distinct tensors that a forward pass keeps, parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = module(*inputs())
    assert outputs.logprobs.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


class LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that operations make, while they live."""

    def __init__(self, module: TokenModel) -> None:
        super().__init__()
        self.now = self.peak = 0
        held = [tensor for p in module.parameters() for tensor in (p, p.grad) if tensor is not None]
        self.known = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                self._track(tensor.untyped_storage())
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed() -> None:
            self.known.discard(key)
            self.now -= size

        weakref.finalize(storage, freed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_keeps_what_is_counted_to_the_byte(name: str, dtype: torch.dtype):
    (two, shape), (three, _) = build(name, 2, dtype), build(name, 3, dtype)
    assert kept_bytes(three) - kept_bytes(two) == TOKENS * activations.kept(shape, dtype.itemsize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_layer_with_an_adapter_keeps_what_is_counted_to_the_byte(name: str, targets: Any, dtype: torch.dtype):
    adapter = AdapterBlock(rank=2, target_modules=targets)
    (two, shape), (three, _) = build(name, 2, dtype, adapter), build(name, 3, dtype, adapter)
    counted = activations.kept(shape, dtype.itemsize, shape.adapter_targets, shape.adapter_rank)
    assert kept_bytes(three) - kept_bytes(two) == TOKENS * counted


def test_an_adapter_that_computes_in_the_models_dtype_casts_no_copies():
    """Of mixed precision."""
    adapter = AdapterBlock(rank=2)
    (two, shape), (three, _) = (build("llama", layers, torch.bfloat16, adapter) for layers in (2, 3))
    counted = activations.kept(shape, 2, shape.adapter_targets, shape.adapter_rank, of_adapter=2)
    assert kept_bytes(three.bfloat16()) - kept_bytes(two.bfloat16()) == TOKENS * counted


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_repeated_keys_and_values_are_kept_as_wide_as_queries(name: str, monkeypatch: pytest.MonkeyPatch):
    """As on a GPU in float32."""
    monkeypatch.setattr(packed_attention, "_repeats_heads", lambda query: True)
    (two, shape), (three, _) = build(name, 2, torch.float32), build(name, 3, torch.float32)
    repeated = 2 * 4 * (shape.query_width - shape.key_width)
    assert kept_bytes(three) - kept_bytes(two) == TOKENS * (activations.kept(shape, 4) + repeated)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_a_forward_pass_without_gradient_holds_what_is_counted(name: str):
    module, shape = build(name, 2, torch.float32)
    live = LiveBytes(module)
    with torch.no_grad(), live:
        module(*inputs())
    assert live.peak == pytest.approx(TOKENS * activations.layer_forward(shape, 4), rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_a_backward_pass_holds_what_is_counted(name: str, checkpointing: bool):
    layers = 6
    module, shape = build(name, layers, torch.float32)
    if checkpointing:
        recompute_layers(module.model)
    module(*inputs()).logprobs.sum().backward()
    live = LiveBytes(module)
    with live:
        module(*inputs()).logprobs.sum().backward()
    layer = activations.kept(shape, 4)
    kept = (layers - 1) * shape.hidden * 4 + layer if checkpointing else layers * layer
    assert live.peak == pytest.approx(TOKENS * (kept + activations.layer_backward(shape, 4)), rel=0.05)
