"""Rerankers have the loss and the gradient that sentence-transformers' CrossEncoder has of the same texts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlflow.actors.sequence_trainer import SequenceTrainer
from rlflow.algorithms.weighing import weigh
from rlflow.batching import pack
from rlflow.data.tokenizer import load_tokenizer
from rlflow.driver.units import load_units
from rlflow.recipe import ModelBlock, Recipe, TrainerBlock

losses = pytest.importorskip("sentence_transformers.cross_encoder.losses")
QUERIES = ["red apple", "2 + 2 = ?", "who?"]
DOCUMENTS = [["a red fruit", "a car", "none"], ["4", "5", "22 or so"], ["you", "it is 7", "a bus"]]


def trainer_of(model: Path, recipe: Recipe) -> SequenceTrainer:
    block = ModelBlock(path=str(model))
    options: Any = {"rank": 0, "world_size": 1, "num_threads": 1, "seed": 0, "algorithm": recipe.algorithm}
    trainer = SequenceTrainer(block, TrainerBlock(max_grad_norm=1e9), **options)
    trainer.setup(None)
    if recipe.algorithm.name == "reranker":
        # A head of zeros gives the layers below it no gradient at all.
        torch.nn.init.normal_(trainer.module.model.score.weight, generator=torch.Generator().manual_seed(0))
    return trainer


def recipe_of(model: Path, directory: Path, name: str, loss: str) -> Recipe:
    """Of the queries with a good document and two others each."""
    data = directory / "rows.jsonl"
    rows = [{"query": q, "positive": row[0], "negative": row[1:]} for q, row in zip(QUERIES, DOCUMENTS, strict=True)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    algorithm: dict[str, Any] = {"name": name, "reranking": {"loss": loss}}
    if name == "generative_reranker":
        algorithm["answers"] = {"positive": "y", "negative": "n"}
    given = {"algorithm": algorithm, "model": {"path": str(model)}, "run": {"steps": 1}}
    return Recipe.model_validate({**given, "data": {"train": {"path": str(data)}, "max_tokens": 256}})


def theirs(loss: str, encoder: Any) -> torch.Tensor:
    """The loss of all queries, with gradient."""
    labels = torch.tensor([1.0, 0.0, 0.0])
    if loss == "pointwise":
        queries = [query for query in QUERIES for _ in range(3)]
        documents = [document for row in DOCUMENTS for document in row]
        return losses.BinaryCrossEntropyLoss(encoder)([queries, documents], labels.repeat(3))
    if loss == "pairwise":
        of_pairs = losses.RankNetLoss(encoder, reduction_log="natural")
        return of_pairs([QUERIES, DOCUMENTS], [labels] * 3)
    pairs = [(query, document) for query, row in zip(QUERIES, DOCUMENTS, strict=True) for document in row]
    scores = encoder(encoder.preprocess(pairs))["scores"].view(3, 3)
    return torch.nn.functional.cross_entropy(scores, torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("loss", ["pointwise", "pairwise", "listwise"])
@pytest.mark.parametrize("name", ["reranker", "generative_reranker"])
def test_a_reranker_has_the_gradient_of_a_cross_encoder(
    tiny_model_dir: Path, tmp_path: Path, name: str, loss: str
) -> None:
    from sentence_transformers import CrossEncoder

    recipe = recipe_of(tiny_model_dir, tmp_path, name, loss)
    trainer = trainer_of(tiny_model_dir, recipe)
    trainer.export(tmp_path / "model")
    encoder = CrossEncoder(str(tmp_path / "model"), device="cpu")
    expected = theirs(loss, encoder)
    expected.backward()
    units = load_units(recipe, recipe.data, load_tokenizer(recipe.model))
    samples = [replace(sample, group=row) for row, unit in enumerate(units) for sample in unit]
    weighed, denominators = weigh(samples, recipe.algorithm, 256)
    metrics = trainer.forward_backward(pack(weighed, max_tokens=40, num_ranks=1)[0], recipe.algorithm, denominators)
    assert metrics["loss/reranking"].value == pytest.approx(expected.item(), abs=1e-5)
    ours = {key: parameter.grad for key, parameter in trainer.module.model.named_parameters()}
    for key, parameter in encoder[0].model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(ours[key], parameter.grad, atol=1e-5, rtol=1e-3)
    assert max(float(value.abs().max()) for value in ours.values() if value is not None) > 1e-2
