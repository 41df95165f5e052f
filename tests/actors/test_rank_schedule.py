"""AdaLoRA: a trainer does what PEFT's own loop does, with the ranks that it gives out; and goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from rlflow.actors.adapters import adapter_parameters
from rlflow.actors.policy_trainer import PolicyTrainer
from rlflow.recipe import AdapterBlock, ModelBlock, TrainerBlock, algorithm_of
from rlflow.types import Denominators, MicroBatch

FIELDS: dict[str, Any] = {
    "init_r": 6,
    "target_r": 2,
    "lora_alpha": 16,
    "tinit": 1,
    "tfinal": 2,
    "deltaT": 2,
    "beta1": 0.7,
    "orth_reg_weight": 0.3,
}
UPDATES, RATE = 9, 1e-2
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def tokens(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 60, size=20).astype(np.int32)


def micro_batch(seed: int) -> MicroBatch:
    positions = np.arange(20, dtype=np.int32)
    return MicroBatch(
        token_ids=tokens(seed),
        position_ids=positions,
        cu_seqlens=np.array([0, 20], dtype=np.int32),
        loss_mask=positions > 0,
        loss_weights=(positions > 0).astype(np.float32) / 19,
        sample_indices=np.zeros(1, dtype=np.int32),
        labels=np.zeros(1, dtype=np.float32),
    )


def trainer_of(directory: Path) -> PolicyTrainer:
    block = ModelBlock(path=str(directory), adapter=AdapterBlock(peft={"peft_type": "ADALORA", **FIELDS}))
    settings = TrainerBlock(max_grad_norm=1.0)
    trainer = PolicyTrainer(block, settings, rank=0, world_size=1, num_threads=1, seed=0)
    trainer.setup(None)
    return trainer


def update(trainer: PolicyTrainer, number: int, of: int = UPDATES) -> float:
    metrics = trainer.forward_backward([micro_batch(number)], algorithm_of("sft"), Denominators(19, 1, 1))
    assert not trainer.optim_step(RATE, number, of).skipped
    return metrics["adapter/rank"].value


@pytest.mark.slow
def test_a_trainer_does_what_pefts_own_loop_does(tiny_model_dir: Path, tmp_path: Path):
    trainer = trainer_of(tiny_model_dir)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = AdaLoraConfig(**FIELDS, target_modules=targets, total_step=UPDATES, task_type="CAUSAL_LM")
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config)
    theirs = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}
    ours = adapter_parameters(trainer.module.model)
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        theirs[name].data.copy_(parameter)
    options = trainer.trainer.optimizer
    groups = [{"params": list(theirs.values()), "weight_decay": options.weight_decay}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=options.betas, eps=options.eps)
    ranks = []
    for number in range(UPDATES):
        ids = torch.from_numpy(tokens(number)).long()[None]
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        optimizer.step()
        model.base_model.update_and_allocate(number)
        optimizer.zero_grad()
        ranks.append(update(trainer, number))
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter, theirs[name], rtol=1e-2, atol=2e-5)
            assert torch.equal(parameter == 0, theirs[name] == 0)
    # All that there are while ranks warm up, the target from the last allocation on.
    assert ranks[0] == ranks[1] == 6 and ranks[-1] == 2 and ranks == sorted(ranks, reverse=True)
    left = sum(int((parameter != 0).sum()) for name, parameter in ours.items() if ".lora_E." in name)
    assert left == 2 * 14

    trainer.export(tmp_path)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), str(tmp_path)).eval()
    ids = torch.from_numpy(tokens(99)).long()[None]
    with torch.no_grad():
        wanted = loaded(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(trainer.logprobs([micro_batch(99)])[1:], wanted.numpy(), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_ranks_are_given_out_after_a_checkpoint_as_without_one(tiny_model_dir: Path, tmp_path: Path):
    whole = trainer_of(tiny_model_dir)
    for number in range(UPDATES):
        if number in (4, 8):
            (tmp_path / str(number)).mkdir()
            whole.save(tmp_path / str(number))
        update(whole, number)
    for start in (4, 8):
        resumed = trainer_of(tiny_model_dir)
        resumed.load(tmp_path / str(start))
        for number in range(start, UPDATES):
            update(resumed, number)
        others = adapter_parameters(resumed.module.model)
        assert all(torch.equal(p, others[name]) for name, p in adapter_parameters(whole.module.model).items())


def test_a_run_too_short_for_its_ranks_is_refused(tiny_model_dir: Path):
    with pytest.raises(ValueError, match=r"between tinit \(1\) and tfinal \(2\), and the run has 3 updates"):
        update(trainer_of(tiny_model_dir), 0, of=3)
