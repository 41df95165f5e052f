"""One update of a policy whose tokens ranks share, in several settings. Run as a script, it is all ranks, one after the
other one, two and four: forks, which import nothing again."""

from __future__ import annotations

import multiprocessing
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from free_ports import free_address
from gradient_splits import algorithm_for, batch_of
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from rlflow.actors.policy_trainer import PolicyTrainer
from rlflow.actors.train_engines import token_model
from rlflow.actors.train_engines.engine import init_process_group
from rlflow.actors.train_engines.sequence_parallel import SequenceRanks, share_tokens
from rlflow.actors.train_engines.token_model import load_token_model
from rlflow.batching import pack, unpack
from rlflow.recipe import ModelBlock, TrainerBlock
from rlflow.types import Sample

CPU = torch.device("cpu")
MAX_TOKENS = 48
TEMPERATURE = 0.9
# The first step of such an Adam is smooth in the gradient: rounding stays as small in the weights.
OPTIMIZER = {"eps": 1.0}


@dataclass(frozen=True)
class Setting:
    trainer: dict[str, Any] = field(default_factory=dict)
    model: str = "grouped"
    """`grouped`: 2 heads and 1 key-value head; `heads`: 4 and 2; `window`: the same, and no token sees over 5 back."""
    adapter: dict[str, Any] | None = None
    splits: tuple[tuple[int, int], ...] = ((2, 2),)
    """Ranks, and how many of them share tokens."""


def zero(stage: int, **other: Any) -> dict[str, Any]:
    return {"engine": "deepspeed", "deepspeed": {"stage": stage}, **other}


SETTINGS = {
    "key-value heads copied": Setting(splits=((2, 2), (4, 2))),
    "key-value heads split": Setting(model="heads", splits=((2, 2), (4, 4))),
    "window": Setting(model="window"),
    "checkpointing": Setting({"gradient_checkpointing": True}, splits=((2, 2), (4, 2))),
    "replicas": Setting({"fsdp": {"replicas": 2}}, splits=((2, 2), (4, 2))),
    "adapter": Setting(adapter={"rank": 4}),
    "ZeRO 1": Setting(zero(1)),
    "ZeRO 2": Setting(zero(2)),
    "ZeRO 3": Setting(zero(3), splits=((2, 2), (4, 2))),
    "ZeRO 3, checkpointing": Setting(zero(3, gradient_checkpointing=True)),
}


def trainer_of(setting: Setting, models: Path, rank: int, world_size: int, share: int) -> PolicyTrainer:
    given = {"optimizer": OPTIMIZER, "max_grad_norm": 1e9, **setting.trainer}
    if world_size == 1:
        given = {key: value for key, value in given.items() if key not in ("engine", "deepspeed", "fsdp")}
    block = TrainerBlock.model_validate({"workers": world_size, "sequence_parallel": share, **given})
    model = ModelBlock.model_validate({"path": str(models / setting.model), "adapter": setting.adapter})
    return PolicyTrainer(model, block, rank=rank, world_size=world_size, num_threads=1, seed=0)


def update(trainer: PolicyTrainer, samples: list[Sample], denominators: Any) -> dict[str, torch.Tensor]:
    """Logprobs of the samples, metrics over all ranks, the gradient's norm, and the weights after a step."""
    share = trainer.trainer.sequence_parallel
    batches = pack(samples, max_tokens=MAX_TOKENS, num_ranks=trainer.world_size // share)
    own = batches[trainer.rank // share]
    logprobs = of_all(trainer, samples, batches, trainer.logprobs(own, TEMPERATURE))
    metrics = trainer.forward_backward(own, algorithm_for("grpo"), denominators, TEMPERATURE)
    evaluated = trainer.evaluate(own, algorithm_for("grpo"), denominators, TEMPERATURE)
    assert evaluated.metrics == metrics
    stats = trainer.optim_step(1.0)
    counted = 1.0 if trainer.rank % share == 0 else 0.0
    totals = torch.tensor(
        [counted * metric.value for _, metric in sorted(metrics.items()) if metric.over_ranks == "sum"]
    )
    if trainer.world_size > 1:
        dist.all_reduce(totals)
    weights = {f"model/{name}": tensor.clone() for name, tensor in trainer.engine.full_weights(trained_only=True)}
    return weights | {"logprobs": logprobs, "metrics": totals, "grad_norm": torch.tensor([stats.grad_norm])}


def of_all(trainer: PolicyTrainer, samples: list[Sample], batches: list, own: np.ndarray) -> torch.Tensor:
    """[tokens of all samples], once rank 0 has the others' results; ranks that share tokens must have the same."""
    share = trainer.trainer.sequence_parallel
    per_rank: list[Any] = [own]
    if trainer.world_size > 1:
        per_rank = [None] * trainer.world_size
        dist.all_gather_object(per_rank, own)
    for rank, values in enumerate(per_rank):
        first = per_rank[rank // share * share]
        assert np.array_equal(values, first)
    return torch.from_numpy(np.concatenate(unpack(samples, batches, per_rank[::share])))


class Mixing(nn.Module):
    """A model whose hidden states depend on all tokens of the slice, attention or not."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.inner, self.model, self.passes, self.tower = module, module.model, module.passes, module.tower
        self.ranks: SequenceRanks | None = None

    def hidden_states(self, *args: Any) -> torch.Tensor:
        return self.inner.hidden_states(*args).cumsum(dim=0)


def refusal(models: Path) -> str:
    """What a rank of two says of a model that mixes tokens outside attention."""
    module = Mixing(load_token_model(ModelBlock(path=str(models / "grouped")), seed=0, device=CPU))
    try:
        share_tokens(module, 2, CPU, timeout_s=60)
    except ValueError as error:
        return str(error)
    return "accepted"


def rank_main(rank: int, world_size: int, address: str, models: Path, output: Path) -> None:
    # Ranks then score their tokens in different numbers of chunks.
    token_model._CHUNK_BYTES = 4 * 4 * 100
    torch.set_num_threads(1)
    if world_size > 1:
        init_process_group(rank, world_size, address, timeout_s=120)
    for name, setting in SETTINGS.items():
        start = AutoModelForCausalLM.from_pretrained(models / setting.model)
        # Nine, so that with four ranks the groups have unlike numbers of samples.
        samples, denominators, _ = batch_of("grpo", "odd", start)
        for share in [share for ranks, share in (*setting.splits, (1, 1)) if ranks == world_size]:
            trainer = trainer_of(setting, models, rank, world_size, share)
            trainer.setup(None)
            found = update(trainer, samples, denominators)
            if rank == 0:
                save_file(found, output / f"{name}-{world_size}-{share}.safetensors")
    if world_size == 2:
        (output / f"refusal-{rank}.txt").write_text(refusal(models))


def main(models: Path, output: Path) -> None:
    context = multiprocessing.get_context("fork")
    for world_size in (1, 2, 4):
        address = free_address()
        arguments = [(rank, world_size, address, models, output) for rank in range(world_size)]
        ranks = [context.Process(target=rank_main, args=of_rank, daemon=True) for of_rank in arguments]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(240)
        codes = [rank.exitcode for rank in ranks]
        if any(codes) or None in codes:
            raise SystemExit(f"{world_size} ranks ended with {codes}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
