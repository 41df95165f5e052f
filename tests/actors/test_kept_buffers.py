"""Buffers that a checkpoint has beside its parameters go where weights go: to engines, and into exported models.

Of DeepSeek-V3 a bias by which each router chooses experts, which no gradient reaches. Left out, it would be 0 there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saving_ranks import save_and_export
from transformers import AutoModelForCausalLM, DeepseekV3Config

from rlflow.actors.policy_trainer import PolicyTrainer
from rlflow.actors.rollout_engines.torch_engine import TorchEngine
from rlflow.actors.saved_model import export_saved
from rlflow.actors.weight_sync import unpack_weights
from rlflow.recipe import AdapterBlock, ModelBlock, TrainerBlock, algorithm_of
from rlflow.types import SampleRequest, SamplingParams
from tests.actors.train_engines.architectures import write

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """Its bias decides which experts a token gets; 1.001 is none of bfloat16's numbers."""
    model = write(tmp_path / "policy", DeepseekV3Config.model_type, TINY)
    model.get_buffer(BIAS).copy_(torch.tensor([0.0, 0.5, 1.001, 0.0, 3.0, 0.25, 1.0, 0.0]))
    model.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def trainer_of(block: ModelBlock) -> PolicyTrainer:
    """With an adapter, engines get whole weights."""
    alone: Any = {"rank": 0, "world_size": 1, "num_threads": 1, "seed": 0}
    trainer = PolicyTrainer(block, TrainerBlock(), **alone, sends_merged=block.adapter is not None)
    trainer.setup(None)
    return trainer


@pytest.mark.parametrize("adapter", [None, AdapterBlock(rank=2)], ids=["whole", "merged adapter"])
def test_an_engine_without_weights_writes_with_the_policys_buffers(policy: Path, adapter: AdapterBlock | None):
    snapshot = trainer_of(ModelBlock(path=str(policy), adapter=adapter)).weights(1)
    assert snapshot is not None
    engine = TorchEngine(str(policy), dtype="float32", max_num_seqs=4)
    engine.load_weights(unpack_weights(snapshot), 1)
    engine.add([SampleRequest(0, np.array([5, 9, 2, 30], np.int32), 3, SamplingParams(max_new_tokens=12))])
    while not (completions := engine.step()):
        pass
    text = torch.from_numpy(np.concatenate([[5, 9, 2, 30], completions[0].token_ids])).long()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(policy)(text[None]).logits[0, 3:-1]
    expected = logits.log_softmax(-1).gather(1, text[4:, None]).squeeze(1)
    np.testing.assert_allclose(completions[0].logprobs, expected.numpy(), rtol=0, atol=1e-5)


def test_an_engine_in_bfloat16_has_them_as_they_were_sent(policy: Path):
    block = ModelBlock(path=str(policy), dtype="bfloat16")
    snapshot = trainer_of(block).weights(1)
    assert snapshot is not None
    sent = dict(unpack_weights(snapshot))[BIAS]
    engine = TorchEngine(str(policy), dtype="bfloat16", max_num_seqs=4)
    engine.load_weights(unpack_weights(snapshot), 1)
    assert torch.equal(engine.model.get_buffer(BIAS).float(), sent.float())


def test_exported_models_have_them(policy: Path, tmp_path: Path):
    block = ModelBlock(path=str(policy))
    save_and_export(trainer_of(block), tmp_path)
    (tmp_path / "again").mkdir()
    algorithm = algorithm_of("sft")
    export_saved(tmp_path / "saved", tmp_path / "again", block, algorithm=algorithm, seed=0, progress=lambda *_: None)
    stored = AutoModelForCausalLM.from_pretrained(policy).get_buffer(BIAS)
    for directory in ("final", "again"):
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / directory).get_buffer(BIAS), stored)
