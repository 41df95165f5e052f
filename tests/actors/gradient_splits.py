"""One rank that computes the gradient of one batch, for several objectives and splits. Run as a script by the test."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

from rlflow.actors.teacher_model import TeacherHead
from rlflow.algorithms.weighing import weigh
from rlflow.batching import pack
from rlflow.recipe import AlgorithmBlock, ModelBlock, RouterBlock, TrainerBlock, algorithm_of
from rlflow.types import Denominators, Sample

VOCABULARY = 60
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {},
    "pretrain": {},
    "grpo": {"correction": {"level": "sequence"}, "loss": {"entropy_coef": 0.01}},
    "dr_grpo": {},
    "dapo": {},
    "gspo": {},
    "gspo_token": {},
    "ppo": {},
    "critic": {},
    "rloo": {},
    "reinforce++": {},
    "reinforce++_baseline": {},
    "cispo": {},
    "sapo": {},
    "opd": {},
    "gkd": {"distill": {"on_policy": 1.0}},
    "gkd, top": {"distill": {"on_policy": 1.0, "top_k": 3, "beta": 0.3}},
    "dpo": {"preference": {"sft_coef": 0.5}},
    "cpo": {},
    "simpo": {},
    "orpo": {},
    "kto": {},
    "reward_model": {"preference": {"center_coef": 0.01}},
    "sft, experts": {},
    "grpo, experts": {},
    "reward_model, experts": {},
    "classification": {"classification": {"problem": "regression"}},
    "embedding": {"embedding": {"temperature": 0.2, "matryoshka_dims": [8]}},
    "reranker": {"reranking": {"loss": "listwise"}},
    "embedding, experts": {},
}
"""Row, and what is changed in it; ``, experts``: of a mixture of experts with losses on its routers, ``, top``: of the
teacher's most probable tokens."""
TEACHER_SIZE = 8
"""Of the teacher's hidden states."""
ROUTER = RouterBlock(balance_coef=0.1, z_coef=0.01)
NUM_SAMPLES = {"full": 10, "odd": 9, "lone": 4}
"""Of a batch. Of a lone one only the first has loss tokens, or the first two are its only pair: of two or three ranks
all but one have no loss token at all."""
MAX_TOKENS = {"full": (30, 4096), "lone": (16, 4096)}
"""Of a micro-batch: one sequence or two each, and all of a rank's."""
SPLITS = ((1, 1), (2, 1), (3, 1), (2, 2), (4, 2))
"""Ranks, and how many of them share each micro-batch's tokens."""
WHOLE = (1, 1, 4096)


class Case(NamedTuple):
    """One way to compute the gradient of a batch."""

    name: str
    batch: str
    world_size: int
    share: int
    max_tokens: int

    @property
    def file(self) -> str:
        return "-".join(map(str, self)) + ".safetensors"


def cases_of(name: str) -> list[Case]:
    """Ranks that share tokens take no losses on routers."""
    splits = [split for split in SPLITS if split[1] == 1 or not name.endswith(", experts")]
    return [
        Case(name, batch, *split, max_tokens)
        for batch, sizes in MAX_TOKENS.items()
        for split in splits
        for max_tokens in sizes
    ]


def algorithm_for(name: str) -> AlgorithmBlock:
    row = "ppo" if name == "critic" else name.partition(", ")[0]
    return algorithm_of(row, **OBJECTIVES[name])


@cache
def batch_of(name: str, kind: str, model: Any) -> tuple[list[Sample], Denominators, int]:
    """Samples of unequal lengths, of a full batch one without a loss token unless they are pairs.

    Old and reference logprobs lie near those of ``model``, a transformers model, so that ratios are as in training.
    """
    generator = np.random.default_rng(7)
    algorithm = algorithm_for(name)
    family, paired = algorithm.learning.family, algorithm.learning.unit_size == 2
    if algorithm.learning.held_out:
        return sequences_of(algorithm, 3 if kind == "lone" else NUM_SAMPLES[kind], generator)
    samples = []
    for i in range(2 if paired and kind == "lone" else NUM_SAMPLES[kind]):
        length = int(generator.integers(4, 24))
        token_ids = generator.integers(2, VOCABULARY, length).astype(np.int32)
        mask = np.arange(length) >= 2
        if not paired and (i > 0 if kind == "lone" else i == 3):
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
                **teacher_fields(name, length, generator),
                label=(1.0 if i % 2 == 0 else -1.0) if family == "preference" else 0.0,
                reward_margin=0.3,
                rank_margin=0.3,
                rank_partner=0.3,
                batch_kl=0.3,
                group=i // (2 if online or paired else 1),
            )
        )
    weighed, denominators = weigh(samples, algorithm, 32)
    return weighed, denominators, algorithm.learning.unit_size


def sequences_of(
    algorithm: AlgorithmBlock, count: int, generator: np.random.Generator
) -> tuple[list[Sample], Denominators, int]:
    """Rows of three sequences of unequal lengths, the second the better or the positive one; the last has fewer."""
    samples = []
    for i in range(count):
        length = int(generator.integers(4, 24))
        samples.append(
            Sample(
                token_ids=generator.integers(2, VOCABULARY, length).astype(np.int32),
                loss_mask=np.arange(length) == length - 1,
                loss_weights=np.zeros(length, dtype=np.float32),
                label=(0.0, 1.0, -1.0)[i % 3],
                targets=np.array([i % 3], dtype=np.float32),
                text=i,
                group=i // 3,
            )
        )
    # An anchor alone, or a document alone, is no row.
    samples = samples[: len(samples) - (len(samples) % 3 == 1)]
    return *weigh(samples, algorithm, 32), 1


def teacher_fields(name: str, length: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """What a teacher says of a sample."""
    if name == "opd":
        return {"teacher_logprobs": generator.normal(-3.0, 1.0, length).astype(np.float32)}
    if name == "gkd":
        return {"teacher_hidden": generator.standard_normal((length, TEACHER_SIZE)).astype(np.float32)}
    if name != "gkd, top":
        return {}
    ids = np.stack([generator.permutation(VOCABULARY)[:3] for _ in range(length)])
    probabilities = generator.dirichlet(np.ones(4), length)
    ids = np.concatenate([ids, np.full((length, 1), -1)], axis=1)
    return {"teacher_top": np.stack([ids, np.log(probabilities)], axis=-1).astype(np.float32)}


def teacher_head() -> TeacherHead:
    weight = np.random.default_rng(8).standard_normal((VOCABULARY, TEACHER_SIZE)).astype(np.float32)
    return TeacherHead(weight, None, "float32", 1.0, None)


@torch.no_grad()
def logprobs_of(model: Any, token_ids: np.ndarray) -> np.ndarray:
    """float32 [T], the first 0."""
    tokens = torch.from_numpy(token_ids.astype(np.int64))
    logprobs = torch.log_softmax(model(tokens[None]).logits[0, :-1], dim=-1)
    return np.concatenate([[0.0], logprobs.gather(1, tokens[1:, None]).squeeze(1).numpy()]).astype(np.float32)


def trainer_of(kind: str, model: Path, router: RouterBlock, rank: int, world_size: int, share: int) -> Any:
    """share: Ranks that share each micro-batch's tokens."""
    from rlflow.actors.policy_trainer import PolicyTrainer
    from rlflow.actors.sequence_trainer import SequenceTrainer
    from rlflow.actors.value_trainer import ValueTrainer

    cls = {"policy": PolicyTrainer, "critic": ValueTrainer}.get(kind, SequenceTrainer)
    block = TrainerBlock(workers=world_size, sequence_parallel=share, max_grad_norm=1e9)
    start = ModelBlock(path=str(model), router=router)
    of_head = {"algorithm": algorithm_for(kind)} if cls is SequenceTrainer else {}
    return cls(start, block, rank=rank, world_size=world_size, num_threads=1, seed=0, **of_head)


def gradients(trainer: Any, case: Case, model: Any) -> dict[str, torch.Tensor]:
    """Whole gradients by parameter, and metrics."""
    from torch.distributed.tensor import DTensor

    samples, denominators, unit_size = batch_of(case.name, case.batch, model)
    share, num_ranks = case.share, case.world_size // case.share
    batches = pack(samples, max_tokens=case.max_tokens, num_ranks=num_ranks, unit_size=unit_size)
    metrics = trainer.forward_backward(batches[trainer.rank // share], algorithm_for(case.name), denominators)
    found = {}
    for key, parameter in trainer.module.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            found[key] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()
            parameter.grad = None
    # One number a name, summed over ranks as the driver does: of those that share micro-batches, one.
    counted = 1.0 if trainer.rank % share == 0 else 0.0
    totals = torch.tensor(
        [counted * metric.value for _, metric in sorted(metrics.items()) if metric.over_ranks == "sum"]
    )
    if trainer.world_size > 1:
        torch.distributed.all_reduce(totals)
    return found | {"metrics": totals}


def main(rank: int, world_size: int, address: str, dense: Path, mixture: Path, output: Path) -> None:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    starts = {path: AutoModelForCausalLM.from_pretrained(path) for path in (dense, mixture)}
    trainers: dict[tuple[str, Path, int], Any] = {}
    for case in (case for name in OBJECTIVES for case in cases_of(name) if case.world_size == world_size):
        row, _, variant = case.name.partition(", ")
        kind = row if row == "critic" or algorithm_for(case.name).learning.head != "token" else "policy"
        model, router = (mixture, ROUTER) if variant == "experts" else (dense, RouterBlock())
        key = (kind, model, case.share)
        if key not in trainers:
            trainer = trainer_of(kind, model, router, rank, world_size, case.share)
            trainer.setup(address if world_size > 1 and not trainers else None)
            if kind == "policy":
                trainer.take_teacher_head(teacher_head())
            elif kind != "embedding":
                # A head of zeros gives the layers below it no gradient at all.
                with torch.no_grad():
                    trainer.module.model.score.weight.fill_(0.05)
            trainers[key] = trainer
        whole = gradients(trainers[key], case, starts[model])
        if rank == 0:
            save_file(whole, output / case.file)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], *map(Path, sys.argv[4:]))
