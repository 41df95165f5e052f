"""A model whose config asks for dropout gives the same numbers every time: nothing of it is active."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from rlflow.actors.rollout_engines.engine import generate
from rlflow.actors.rollout_engines.torch_engine import TorchEngine
from rlflow.actors.train_engines.scalar_model import load_scalar_model
from rlflow.actors.train_engines.token_model import load_token_model
from rlflow.batching import pack
from rlflow.recipe import ModelBlock
from rlflow.types import Sample, SampleRequest, SamplingParams

CPU = torch.device("cpu")
CONFIG = {
    "model_type": "gpt2",
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "resid_pdrop": 0.5,
    "embd_pdrop": 0.5,
    "attn_pdrop": 0.5,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(GPT2Config(**CONFIG)).eval()


@pytest.fixture(scope="module")
def directory(plain: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    plain.save_pretrained(path)
    return path


def micro_batch():
    tokens = np.random.default_rng(0).integers(2, 64, 40).astype(np.int32)
    return pack([Sample(tokens, np.arange(40) > 0, np.ones(40, dtype=np.float32))], max_tokens=64, num_ranks=1)[0][0]


@torch.no_grad()
def plain_logprobs(model: PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(tokens.astype(np.int64))
    logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1], dim=-1)
    return logprobs.gather(1, ids[1:, None]).squeeze(1).numpy()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_drops_nothing_out(plain: PreTrainedModel, directory: Path, checkpointing: bool):
    block = ModelBlock(path=str(directory))
    module = load_token_model(block, seed=0, device=CPU, checkpointing=checkpointing)
    # With gradients, as in a step.
    logprobs = module.of_batch(micro_batch(), CPU).logprobs.detach().numpy()
    np.testing.assert_allclose(logprobs[1:], plain_logprobs(plain, micro_batch().token_ids), atol=1e-5)


def test_new_models_drop_nothing_out(directory: Path):
    block = ModelBlock(path=str(directory), architecture=CONFIG, characters="ab")
    batch = micro_batch()
    policy = load_token_model(block, seed=0, device=CPU)
    critic = load_scalar_model(block, seed=0, device=CPU)
    torch.nn.init.normal_(critic.model.get_submodule("score").weight)
    assert torch.equal(policy.of_batch(batch, CPU).logprobs, policy.of_batch(batch, CPU).logprobs)
    assert torch.equal(critic(batch, CPU, "values"), critic(batch, CPU, "values"))
    assert critic(batch, CPU, "values").abs().max() > 0


def test_the_torch_engine_drops_nothing_out(plain: PreTrainedModel, directory: Path):
    engine = TorchEngine(str(directory), dtype="float32", max_num_seqs=4)
    engine.load_weights(((name, parameter.detach()) for name, parameter in plain.named_parameters()), version=0)
    prompt = np.array([5, 9, 33], dtype=np.int32)
    (completion,) = generate(engine, [SampleRequest(0, prompt, 7, SamplingParams(max_new_tokens=20))])
    sequence = np.concatenate([prompt, completion.token_ids])
    np.testing.assert_allclose(completion.logprobs, plain_logprobs(plain, sequence)[2:], atol=1e-5)
