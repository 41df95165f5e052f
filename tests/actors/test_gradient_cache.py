"""A loss that compares the sequences of a batch has the value and the gradient of one big batch, however small the
micro-batches: GradCache's two passes against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from free_ports import free_address

from rlflow.actors.sequence_trainer import SequenceTrainer
from rlflow.algorithms.batch import TensorBatch
from rlflow.algorithms.objectives import objective_of
from rlflow.algorithms.weighing import weigh
from rlflow.batching import pack
from rlflow.recipe import ModelBlock, TrainerBlock, algorithm_of
from rlflow.types import Sample

RANKS = Path(__file__).with_name("zero_ranks.py")
ROWS = {
    "infonce": ("embedding", {"embedding": {"temperature": 0.1, "matryoshka_dims": [16, 4]}}),
    "own negatives": ("embedding", {"embedding": {"in_batch_negatives": False}}),
    "contrastive": ("embedding", {"embedding": {"loss": "contrastive"}}),
    "online_contrastive": ("embedding", {"embedding": {"loss": "online_contrastive"}}),
    "pairwise": ("reranker", {"reranking": {"loss": "pairwise"}}),
    "listwise": ("reranker", {"reranking": {"loss": "listwise", "temperature": 0.5}}),
}


def samples_of(name: str) -> list[Sample]:
    """Rows of two sequences, a score each, or of two to four: an anchor, its positive and hard negatives."""
    generator, samples = np.random.default_rng(3), []
    of_pairs = "contrastive" in name
    for row in range(6):
        for place in range(2 if of_pairs else 3 + row % 2):
            length = int(generator.integers(3, 12))
            label = float(row % 2) if of_pairs else (0.0, 1.0, -1.0, -1.0)[place]
            samples.append(
                Sample(
                    token_ids=generator.integers(2, 60, length).astype(np.int32),
                    loss_mask=np.arange(length) == length - 1,
                    loss_weights=np.zeros(length, dtype=np.float32),
                    label=label,
                    group=row,
                    text=len(samples),
                )
            )
    return samples


def trainer_of(
    model: Path, algorithm: Any, rank: int = 0, num_ranks: int = 1, address: str | None = None, **block: Any
) -> SequenceTrainer:
    """A rank of a trainer. ``block``: keys of the trainer block."""
    trainer = SequenceTrainer(
        ModelBlock(path=str(model)),
        TrainerBlock.model_validate({"max_grad_norm": 1e9, "workers": num_ranks, **block}),
        rank=rank,
        world_size=num_ranks,
        num_threads=1,
        seed=0,
        algorithm=algorithm,
    )
    trainer.setup(address)
    if algorithm.name == "reranker":
        # A head of zeros gives the layers below it no gradient at all.
        torch.nn.init.normal_(trainer.module.model.score.weight, generator=torch.Generator().manual_seed(0))
    return trainer


def taken_gradients(trainer: SequenceTrainer) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in trainer.module.named_parameters():
        if parameter.grad is not None:
            found[name], parameter.grad = parameter.grad.clone(), None
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_micro_batches_of_one_sequence_have_the_loss_and_the_gradient_of_one_pass(tiny_model_dir: Path, name: str):
    row, options = ROWS[name]
    algorithm = algorithm_of(row, **options)
    trainer = trainer_of(tiny_model_dir, algorithm)
    samples, denominators = weigh(samples_of(name), algorithm, 64)
    (whole,) = pack(samples, max_tokens=4096, num_ranks=1)[0]
    outputs = trainer.module(whole, trainer.device, "scores")
    order = torch.from_numpy(np.argsort(whole.sample_indices))
    numbers = {field: torch.tensor([float(getattr(s, field)) for s in samples]) for field in ("label", "group", "text")}
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = TensorBatch(
        *(nothing, nothing, nothing.bool(), nothing.float(), nothing),
        labels=numbers["label"],
        groups=numbers["group"],
        texts=numbers["text"],
    )
    loss, metrics = objective_of(algorithm)(outputs[order], None, batch, algorithm, denominators)
    loss.backward()
    expected = taken_gradients(trainer)
    norm = float(sum(value.square().sum() for value in expected.values())) ** 0.5
    assert norm > 1e-4
    for max_tokens in (1, 20, 4096):
        micro_batches = pack(samples, max_tokens=max_tokens, num_ranks=1)[0]
        assert max_tokens != 1 or len(micro_batches) == len(samples)
        found = trainer.forward_backward(micro_batches, algorithm, denominators)
        assert found.keys() == metrics.keys()
        for key, metric in metrics.items():
            assert found[key].value == pytest.approx(float(metric.value), abs=1e-5), key
        gradients = taken_gradients(trainer)
        error = sum((gradients[key] - expected[key]).square().sum() for key in expected)
        assert float(error) ** 0.5 < 1e-5 * norm
        measured = trainer.evaluate(micro_batches, algorithm, denominators)
        assert measured.loss == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.slow
def test_two_ranks_of_zero_have_the_loss_and_the_gradient_norm_of_one(tiny_model_dir: Path, tmp_path: Path):
    row, options = ROWS["infonce"]
    algorithm = algorithm_of(row, **options)
    samples, denominators = weigh(samples_of("infonce"), algorithm, 64)
    trainer = trainer_of(tiny_model_dir, algorithm)
    metrics = trainer.forward_backward(pack(samples, max_tokens=4096, num_ranks=1)[0], algorithm, denominators)
    expected = {name: float(metric.value) for name, metric in metrics.items()}
    expected["grad_norm"] = trainer.optim_step(1e-2).grad_norm
    address = free_address()
    paths = f"{RANKS.parents[2]}:{RANKS.parents[1]}:{RANKS.parent}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                str(RANKS),
                str(tiny_model_dir),
                "infonce",
                str(rank),
                "2",
                address,
                str(tmp_path / "said"),
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(ranks):
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 0, errors[-3000:]
        said = json.loads((tmp_path / f"said.{rank}").read_text())
        assert said["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        # Each rank has its share of a metric.
        assert said["loss/embedding"] == pytest.approx(expected["loss/embedding"] / 2, rel=1e-5)
