"""Three training steps of a tiny model, for engine_ranks.py and plain_engine.py to do.

A step has four or eight micro-batches of unequal lengths, dealt to ranks in turn; every fourth has no loss token, so
that of four ranks the last has none at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from rlflow.recipe import RouterBlock, TrainerBlock
from rlflow.types import Denominators, MicroBatch

LEARNING_RATES = (1e-2, 5e-3, 2e-3)
OPTIMIZER = {"betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1}
MAX_GRAD_NORM = 0.5
VOCABULARY = 50
CPU = torch.device("cpu")
_routers: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""Of the modules that have some."""


@dataclass(frozen=True)
class Scenario:
    trainer: dict[str, Any] = field(default_factory=dict)
    """Keys of the trainer block."""
    model: str = "tokens"
    """`tokens`, `untied` or `values`: a language model with tied embeddings or without, or a classifier. `experts`: a
    mixture of experts with losses on its routers."""
    dtype: str = "float32"
    tolerance: float = 1e-5
    """How far losses, norms (relative) and weights may be from plain torch's."""
    way: str = "packed"
    """How the decoder is run over sequences: otherwise in passes of which ranks have unlike numbers."""


def fsdp(**options: Any) -> Scenario:
    return Scenario({"fsdp": options})


def zero(stage: int, offload: str = "none", gradient_checkpointing: bool = False, **other: Any) -> Scenario:
    options = {"stage": stage, "offload": offload}
    return Scenario(
        {"engine": "deepspeed", "deepspeed": options, "gradient_checkpointing": gradient_checkpointing}, **other
    )


SCENARIOS = {
    "fsdp": fsdp(),
    "fsdp, weights kept after forward": fsdp(reshard_after_forward=False),
    "fsdp, offload": fsdp(offload=True),
    "fsdp, replicas": fsdp(replicas=2),
    "fsdp, checkpointing": Scenario({"gradient_checkpointing": True}),
    "fsdp, untied": Scenario(model="untied"),
    "fsdp, classifier": Scenario(model="values"),
    # Newton-Schulz runs in bfloat16: where ranks round a sum otherwise, the last of its eight bits may flip.
    "fsdp, Muon": Scenario({"optimizer": OPTIMIZER | {"kind": "muon"}}, tolerance=5e-4),
    "fsdp, mixed precision": Scenario({"fsdp": {"mixed_precision": True}}, tolerance=5e-2),
    "fsdp, bfloat16": Scenario(dtype="bfloat16", tolerance=5e-2),
    "fsdp, experts": Scenario(model="experts"),
    "fsdp, experts and checkpointing": Scenario({"gradient_checkpointing": True}, model="experts"),
    "fsdp, one sequence at a time": Scenario(way="alone"),
    "fsdp, checkpointing, sequences side by side": Scenario({"gradient_checkpointing": True}, way="padded"),
    "fsdp, experts, sequences side by side": Scenario(model="experts", way="padded"),
    "ZeRO 3, one sequence at a time": zero(3, way="alone"),
    "ZeRO 1": zero(1),
    "ZeRO 2": zero(2),
    "ZeRO 3": zero(3),
    "ZeRO 1, optimizer offload": zero(1, "optimizer"),
    "ZeRO 2, optimizer offload": zero(2, "optimizer"),
    "ZeRO 3, optimizer offload": zero(3, "optimizer"),
    "ZeRO 3, offload": zero(3, "all"),
    "ZeRO 3, checkpointing": zero(3, gradient_checkpointing=True),
    "ZeRO 1, untied": zero(1, model="untied"),
    "ZeRO 2, untied": zero(2, model="untied"),
    "ZeRO 3, untied": zero(3, model="untied"),
    "ZeRO 2, classifier": zero(2, model="values"),
    "ZeRO 3, classifier": zero(3, model="values"),
    "ZeRO 2, experts": zero(2, model="experts"),
    "ZeRO 3, experts": zero(3, model="experts"),
    "ZeRO 1, bfloat16": zero(1, dtype="bfloat16", tolerance=5e-2),
    "ZeRO 2, bfloat16": zero(2, dtype="bfloat16", tolerance=5e-2),
    "ZeRO 3, bfloat16": zero(3, dtype="bfloat16", tolerance=5e-2),
}
ROUTER = RouterBlock(balance_coef=0.1, z_coef=0.01)
RESUMED = ("fsdp", "ZeRO 1", "ZeRO 2", "ZeRO 3", "ZeRO 3, offload")
"""Saved after the second step; each engine then reads what itself and the other wrote."""
RESUMED_ALONE = (
    "fsdp, experts",
    "ZeRO 3, experts",
    "fsdp, replicas",
    "fsdp, Muon",
    "fsdp, bfloat16",
    "ZeRO 1, bfloat16",
    "ZeRO 3, bfloat16",
)
"""Each reads what itself wrote."""


def scenarios(world_size: int) -> list[str]:
    """All on two ranks; on one and on four those that differ most."""
    if world_size == 2:
        return list(SCENARIOS)
    chosen = {*RESUMED, *RESUMED_ALONE, "ZeRO 1, optimizer offload", "ZeRO 2, classifier", "ZeRO 3, untied"}
    return [name for name in SCENARIOS if name in chosen and (world_size > 1 or "replicas" not in name)]


def pairs(reading: int, writing: int) -> list[tuple[str, str]]:
    """Reader and writer of checkpoints, on so many ranks."""
    same = [(name, name) for name in (*RESUMED, *RESUMED_ALONE)]
    crossed = [("fsdp", name) for name in RESUMED[1:]] + [(name, "fsdp") for name in RESUMED[1:]]
    found = [*same, *crossed, ("ZeRO 3", "fsdp, replicas")]
    return [pair for pair in found if pair[0] in scenarios(reading) and pair[1] in scenarios(writing)]


def trainer_block(scenario: Scenario, world_size: int = 1) -> TrainerBlock:
    return TrainerBlock.model_validate(
        {"workers": world_size, "optimizer": OPTIMIZER, "max_grad_norm": MAX_GRAD_NORM, **scenario.trainer}
    )


def config_of(scenario: Scenario) -> tuple[Any, Any]:
    """The model's config and transformers' class of it."""
    from transformers import (
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3ForSequenceClassification,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 16,
        "num_labels": 1,
    }
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    if of_experts := scenario.model == "experts":
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = (Qwen3MoeConfig if of_experts else Qwen3Config)(
        vocab_size=VOCABULARY, tie_word_embeddings=scenario.model == "tokens", pad_token_id=0, **sizes, **heads
    )
    classes = {"values": Qwen3ForSequenceClassification, "experts": Qwen3MoeForCausalLM}
    return config, classes.get(scenario.model, Qwen3ForCausalLM)


def new_module(scenario: Scenario) -> nn.Module:
    """The same weights every time."""
    from rlflow.actors.train_engines import packed_attention
    from rlflow.actors.train_engines.routers import find_routers
    from rlflow.actors.train_engines.scalar_model import ScalarModel
    from rlflow.actors.train_engines.token_model import TokenModel

    config, model_class = config_of(scenario)
    config._attn_implementation = packed_attention.NAME if scenario.way == "packed" else "sdpa"
    torch.manual_seed(0)
    model = model_class(config)
    if scenario.trainer.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, scenario.dtype))
    model.train()
    if scenario.model == "values":
        return ScalarModel(model)
    module = TokenModel(model)
    module.passes.way = scenario.way
    if scenario.model == "experts":
        _routers[module] = find_routers(module, ROUTER, CPU)
    return module


def micro_batches(step: int) -> list[MicroBatch]:
    """Four in even steps, eight in odd ones."""
    generator = np.random.default_rng(step)
    return [_micro_batch(generator, with_loss=i % 4 != 3) for i in range(8 if step % 2 else 4)]


def _micro_batch(generator: np.random.Generator, with_loss: bool) -> MicroBatch:
    lengths = generator.integers(2, 12, size=generator.integers(1, 4))
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.concatenate([np.arange(length) for length in lengths])
    mask = (positions > 0) & (generator.random(len(positions)) < 0.8) if with_loss else positions < 0
    return MicroBatch(
        token_ids=generator.integers(0, VOCABULARY, size=len(positions)).astype(np.int32),
        position_ids=positions.astype(np.int32),
        cu_seqlens=bounds.astype(np.int32),
        loss_mask=mask,
        loss_weights=mask.astype(np.float32),
        sample_indices=np.arange(len(lengths), dtype=np.int32),
        labels=np.zeros(len(lengths), dtype=np.float32),
    )


def loss_of(module: nn.Module, batch: MicroBatch, num_tokens: int) -> torch.Tensor:
    """This micro-batch's share of a mean over all loss tokens of the step."""
    from rlflow.actors.train_engines.token_model import TokenModel
    from rlflow.algorithms.batch import TensorBatch

    mask = torch.from_numpy(batch.loss_mask)
    if isinstance(module, TokenModel):
        with _routers[module].watched() if module in _routers else nullcontext() as seen:
            loss = -(module.of_batch(batch, CPU).logprobs * mask).sum() / num_tokens
        if seen is None:
            return loss
        denominators = Denominators(num_tokens, num_sequences=num_tokens // 4, num_groups=1)
        return loss + _routers[module].loss(seen, TensorBatch.from_numpy(batch, CPU), ROUTER, denominators)[0]
    return ((module(batch, CPU, "values") - 1.0).square() * mask).sum() / num_tokens


def count_tokens(batches: Sequence[MicroBatch]) -> int:
    return sum(int(batch.loss_mask.sum()) for batch in batches)


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.get_submodule("model").named_parameters()}
