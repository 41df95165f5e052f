"""One rank that computes the gradient of one batch, for several objectives and splits. Run as a script by the test."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from rlflow.algorithms.reductions import preference_weights
from rlflow.batching import pack
from rlflow.driver.assemble import weigh
from rlflow.recipe import AlgorithmBlock, ModelBlock, RouterBlock, TrainerBlock
from rlflow.recipe.presets import ALGORITHMS
from rlflow.types import Denominators, Sample

VOCABULARY = 60
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {},
    "grpo": {"correction": {"old_policy": "trainer", "mode": "truncate"}, "loss": {"entropy_coef": 0.01}},
    "dr_grpo": {},
    "dapo": {},
    "gspo": {},
    "gspo_token": {},
    "rloo": {},
    "cispo": {},
    "sapo": {},
    "dpo": {"preference": {"sft_coef": 0.5}},
    "simpo": {},
    "orpo": {},
    "kto": {},
    "reward_model": {"preference": {"center_coef": 0.01}},
    "critic": {},
    "sft, experts": {},
    "grpo, experts": {},
    "reward_model, experts": {},
}
"""Row, and what is changed in it; ``, experts``: of a mixture of experts with losses on its routers."""
ROUTER = RouterBlock(balance_coef=0.1, z_coef=0.01)
MAX_TOKENS = (16, 48, 4096)
"""Of a micro-batch: nearly one sequence each, a few, and all of a rank's."""
SPLITS = ((1, 1), (2, 1), (3, 1), (2, 2), (4, 2))
"""Ranks, and how many of them share each micro-batch's tokens."""


def splits_of(name: str) -> tuple[tuple[int, int], ...]:
    """Those of SPLITS that the objective has: ranks that share tokens take no losses on routers."""
    return tuple(split for split in SPLITS if split[1] == 1) if name.endswith(", experts") else SPLITS


def algorithm_of(name: str) -> AlgorithmBlock:
    row = "ppo" if name == "critic" else name.removesuffix(", experts")
    given = {"name": row, **ALGORITHMS[row].defaults}
    for block, values in OBJECTIVES[name].items():
        given[block] = {**given.get(block, {}), **values}
    return AlgorithmBlock.model_validate(given)


def batch_of(name: str, model: Any, num_samples: int = 10) -> tuple[list[Sample], Denominators, int]:
    """Samples of unequal lengths, one of them without a loss token unless they are pairs.

    Old and reference logprobs lie near those of ``model``, a transformers model, so that ratios are as in training.
    """
    generator = np.random.default_rng(7)
    algorithm = algorithm_of(name)
    family = ALGORITHMS[algorithm.name].family
    paired = ALGORITHMS[algorithm.name].objective in ("preference", "reward_model")
    samples = []
    for i in range(num_samples):
        length = int(generator.integers(4, 24))
        token_ids = generator.integers(2, VOCABULARY, length).astype(np.int32)
        mask = np.arange(length) >= 2
        if i == 3 and not paired:
            mask[:] = False
        own = logprobs_of(model, token_ids)
        old, *near = [(own + 0.1 * generator.standard_normal(length)).astype(np.float32) for _ in range(3)]
        noise = [generator.standard_normal(length).astype(np.float32) for _ in range(3)]
        online = family == "online"
        samples.append(
            Sample(
                token_ids=token_ids,
                loss_mask=mask,
                loss_weights=np.zeros(length, dtype=np.float32),
                advantages=noise[0] if online else None,
                old_logprobs=old if online else None,
                proximal_logprobs=near[0] if online else None,
                ref_logprobs=near[1],
                old_values=noise[1] if name == "critic" else None,
                returns=noise[2] if name == "critic" else None,
                label=(1.0 if i % 2 == 0 else -1.0) if family == "preference" else 0.0,
                margin=0.3,
            )
        )
    if paired:
        counts, labels = np.array([s.loss_mask.sum() for s in samples]), np.array([s.label for s in samples])
        weights, denominators = preference_weights(algorithm.loss.reduction, counts, labels, 32)
        weighed = [
            Sample(**{f: getattr(s, f) for f in s.__slots__} | {"loss_weights": (s.loss_mask * w).astype(np.float32)})
            for s, w in zip(samples, weights, strict=True)
        ]
        return weighed, denominators, 2
    weighed, denominators = weigh(samples, 2 if family == "online" else 1, algorithm, 32)
    return weighed, denominators, 1


@torch.no_grad()
def logprobs_of(model: Any, token_ids: np.ndarray) -> np.ndarray:
    """float32 [T], the first 0."""
    tokens = torch.from_numpy(token_ids.astype(np.int64))
    logprobs = torch.log_softmax(model(tokens[None]).logits[0, :-1], dim=-1)
    return np.concatenate([[0.0], logprobs.gather(1, tokens[1:, None]).squeeze(1).numpy()]).astype(np.float32)


def trainer_of(name: str, model: Path, rank: int, world_size: int, share: int = 1) -> Any:
    """share: Ranks that share each micro-batch's tokens."""
    from actors.policy_trainer import PolicyTrainer
    from actors.reward_trainer import RewardTrainer
    from actors.value_trainer import ValueTrainer

    cls = {"reward_model": RewardTrainer, "critic": ValueTrainer}.get(name.removesuffix(", experts"), PolicyTrainer)
    block = TrainerBlock(workers=world_size, sequence_parallel=share, max_grad_norm=1e9)
    router = ROUTER if name.endswith(", experts") else RouterBlock()
    start = ModelBlock(path=str(model), router=router)
    return cls(start, block, rank=rank, world_size=world_size, num_threads=1, seed=0)


def gradients(trainer: Any, name: str, model: Any, max_tokens: int) -> dict[str, torch.Tensor]:
    """Whole gradients by parameter, of one batch in micro-batches of at most ``max_tokens``."""
    from torch.distributed.tensor import DTensor

    samples, denominators, unit_size = batch_of(name, model)
    share = trainer.trainer.sequence_parallel
    batches = pack(samples, max_tokens=max_tokens, num_ranks=trainer.world_size // share, unit_size=unit_size)
    metrics = trainer.forward_backward(batches[trainer.rank // share], algorithm_of(name), denominators)
    found = {}
    for key, parameter in trainer.module.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            found[key] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()
            parameter.grad = None
    # One number a name, summed over ranks as the driver does: of those that share micro-batches, one.
    counted = 1.0 if trainer.rank % share == 0 else 0.0
    totals = torch.tensor([counted * value for key, value in sorted(metrics.items()) if not key.endswith("_max")])
    if trainer.world_size > 1:
        torch.distributed.all_reduce(totals)
    return found | {"metrics": totals}


def main(rank: int, world_size: int, address: str, dense: Path, mixture: Path, output: Path) -> None:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    starts = {path: AutoModelForCausalLM.from_pretrained(path) for path in (dense, mixture)}
    runs = [(name, share) for name in OBJECTIVES for ranks, share in splits_of(name) if ranks == world_size]
    for number, (name, share) in enumerate(runs):
        model = mixture if name.endswith(", experts") else dense
        trainer = trainer_of(name, model, rank, world_size, share)
        trainer.setup(address if world_size > 1 and number == 0 else None)
        if name.startswith(("reward_model", "critic")):
            # A head of zeros gives the layers below it no gradient at all.
            with torch.no_grad():
                trainer.module.model.score.weight.fill_(0.05)
        for max_tokens in MAX_TOKENS:
            whole = gradients(trainer, name, starts[model], max_tokens)
            if rank == 0:
                save_file(whole, output / f"{name}-{world_size}-{share}-{max_tokens}.safetensors")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], *map(Path, sys.argv[4:]))
