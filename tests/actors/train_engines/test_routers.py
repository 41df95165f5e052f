from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, MixtralConfig, PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from rlflow.actors.policy_trainer import PolicyTrainer
from rlflow.actors.train_engines import packed_attention
from rlflow.actors.train_engines.routers import find_routers
from rlflow.actors.train_engines.token_model import TokenModel
from rlflow.batching import pack
from rlflow.metrics import values_of
from rlflow.recipe import ModelBlock, RouterBlock, TrainerBlock, algorithm_of
from rlflow.types import Denominators, Sample

CPU = torch.device("cpu")
LENGTHS = (6, 11, 4)
SFT = algorithm_of("sft")
LOSSES = RouterBlock(balance_coef=0.1, z_coef=0.01)


def trainer_of(directory: Path, router: RouterBlock = LOSSES, **options: Any) -> PolicyTrainer:
    block = TrainerBlock(**options)
    trainer = PolicyTrainer(
        ModelBlock(path=str(directory), router=router), block, rank=0, world_size=1, num_threads=1, seed=0
    )
    trainer.setup(None)
    return trainer


def samples() -> list[Sample]:
    """The last has no loss token."""
    generator = np.random.default_rng(1)
    found = []
    for i, length in enumerate(LENGTHS):
        mask = (np.arange(length) >= 2) & (i < 2)
        weights = mask / sum(length - 2 for length in LENGTHS[:2])
        tokens = generator.integers(2, 60, length).astype(np.int32)
        found.append(Sample(token_ids=tokens, loss_mask=mask, loss_weights=weights.astype(np.float32)))
    return found


def run(trainer: PolicyTrainer, max_tokens: int = 4096) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and gradients of one batch."""
    (batches,) = pack(samples(), max_tokens=max_tokens, num_ranks=1)
    metrics = trainer.forward_backward(batches, SFT, Denominators(num_tokens=13, num_sequences=2, num_groups=2))
    gradients = {name: p.grad.clone() for name, p in trainer.module.named_parameters() if p.grad is not None}
    trainer.module.zero_grad()
    return values_of(metrics), gradients


@torch.no_grad()
def logits_of(model: PreTrainedModel, sample: Sample) -> tuple[torch.Tensor, ...]:
    """Of every sparse layer, as transformers returns them."""
    return model(torch.from_numpy(sample.token_ids).long()[None], output_router_logits=True).router_logits


def test_metrics_are_those_of_transformers_logits_over_the_trained_sequences(tiny_moe_dir):
    metrics, _ = run(trainer_of(tiny_moe_dir))
    model = AutoModelForCausalLM.from_pretrained(tiny_moe_dir)
    layers = [layer for sample in samples()[:2] for layer in logits_of(model, sample)]
    assert len(layers) == 4
    balance = np.mean([float(load_balancing_loss_func((layer,), 8, 2)) / 2 for layer in layers])
    z = np.mean([float(layer.logsumexp(dim=1).square().mean()) for layer in layers])
    assert metrics["moe/balance_loss"] == pytest.approx(balance, rel=1e-5)
    assert metrics["moe/z_loss"] == pytest.approx(z, rel=1e-5)
    assert metrics["moe/loss"] == pytest.approx(0.1 * balance + 0.01 * z, rel=1e-5)

    both = [torch.cat([layers[i], layers[i + 2]]).topk(2, dim=1).indices.flatten() for i in range(2)]
    counts = torch.stack([torch.bincount(chosen, minlength=8) for chosen in both])
    assert metrics["moe/max_load"] == pytest.approx(int(counts.max()) * 8 / (2 * 17))
    assert metrics["moe/dead_fraction"] == pytest.approx(int((counts == 0).sum()) / 16)


def test_the_losses_add_their_gradient_to_the_algorithms(tiny_moe_dir):
    """Against autograd on transformers' own forward pass of each sequence."""
    _, without = run(trainer_of(tiny_moe_dir, RouterBlock()))
    _, gradients = run(trainer_of(tiny_moe_dir))
    model = AutoModelForCausalLM.from_pretrained(tiny_moe_dir)
    for sample in samples()[:2]:
        tokens = torch.from_numpy(sample.token_ids).long()[None]
        for layer in model(tokens, output_router_logits=True).router_logits:
            balance = load_balancing_loss_func((layer,), 8, 2) / 2
            (0.1 * balance + 0.01 * layer.logsumexp(dim=1).square().mean()).div(4).backward(retain_graph=True)
    changed = 0
    for name, parameter in model.named_parameters():
        added = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[f"model.{name}"] - without[f"model.{name}"], added, atol=2e-6, rtol=1e-3)
        changed += bool(added.any())
    assert changed > 10


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"tokens_per_micro_batch": 8192}], ids=str)
def test_neither_recomputed_layers_nor_micro_batches_change_a_gradient(tiny_moe_dir, options):
    metrics, whole = run(trainer_of(tiny_moe_dir))
    split_metrics, split = run(trainer_of(tiny_moe_dir, **options), max_tokens=12)
    assert split_metrics == pytest.approx(metrics, rel=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, atol=1e-6, rtol=1e-5)


def test_without_coefficients_a_mixture_is_measured_and_its_loss_left_alone(tiny_moe_dir):
    metrics, _ = run(trainer_of(tiny_moe_dir, RouterBlock()))
    assert metrics["moe/loss"] == 0.0
    assert metrics["moe/balance_loss"] > 1.0
    trainer = trainer_of(tiny_moe_dir, RouterBlock())
    (batches,) = pack(samples(), max_tokens=4096, num_ranks=1)
    denominators = Denominators(num_tokens=13, num_sequences=2, num_groups=2)
    assert values_of(trainer.evaluate(batches, SFT, denominators).metrics) == pytest.approx(metrics)


def test_logprobs_are_not_watched(tiny_moe_dir):
    trainer = trainer_of(tiny_moe_dir)
    (batches,) = pack(samples(), max_tokens=4096, num_ranks=1)
    trainer.logprobs(batches)
    assert trainer.routers is not None
    assert not trainer.routers._counts


def test_a_model_without_experts_has_no_routers_and_losses_on_them_are_refused(tiny_model_dir):
    assert trainer_of(tiny_model_dir, RouterBlock()).routers is None
    with pytest.raises(ValueError, match=r"model\.router: .* Qwen3ForCausalLM .*no mixture of experts; remove"):
        trainer_of(tiny_model_dir)


SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
}


def test_other_routers_of_a_softmax_are_known():
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    config._attn_implementation = packed_attention.NAME
    assert find_routers(TokenModel(AutoModelForCausalLM.from_config(config)), RouterBlock(), CPU) is not None


def test_routers_that_choose_otherwise_are_left_alone_and_losses_on_them_refused():
    config = DeepseekV3Config(
        **SIZES,
        moe_intermediate_size=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
    )
    config._attn_implementation = packed_attention.NAME
    model = TokenModel(AutoModelForCausalLM.from_config(config))
    assert find_routers(model, RouterBlock(), CPU) is None
    with pytest.raises(ValueError, match=r"model\.router: .*DeepseekV3ForCausalLM are not the K largest of a softmax"):
        find_routers(model, LOSSES, CPU)
