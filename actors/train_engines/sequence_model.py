"""Models that say something of a whole sequence, by the algorithm's head: reward models, classifiers, rerankers,
embeddings. On disk each is what transformers has of its kind."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from transformers import AutoModel, PreTrainedModel

from rlflow.actors.pretrained import load_whole
from rlflow.actors.train_engines.heads import EmbeddingHead, Head, ScoreHead, YesNoHead
from rlflow.actors.train_engines.picture_probe import prepare_tower
from rlflow.actors.train_engines.probe import choose_passes
from rlflow.actors.train_engines.scalar_model import Outputs, Problem, ScalarModel, random_head, read_classifier
from rlflow.actors.train_engines.token_model import read_language_model, recompute_layers
from rlflow.actors.train_engines.tower import tower_of
from rlflow.actors.vision import train_parts
from rlflow.data.sequence_format import answer_ids
from rlflow.data.tokenizer import load_tokenizer
from rlflow.recipe import (
    AlgorithmBlock,
    ClassificationBlock,
    EmbeddingBlock,
    GenerativeRerankerBlock,
    ModelBlock,
)
from rlflow.recipe.sequence_blocks import ClassesBlock

_PROBLEMS: dict[str, Problem] = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
"""``classification.problem`` -> transformers' ``problem_type``."""


def load_sequence_model(
    block: ModelBlock, algorithm: AlgorithmBlock, *, seed: int, device: torch.device, checkpointing: bool = False
) -> ScalarModel:
    """Loads the model that an algorithm trains, with its head; a new one answers 0.

    Raises:
        ValueError: The checkpoint has another head, lacks weights, or gives other numbers here than in transformers;
            embeddings are shorter than a length to which they are to be cut; the recipe's adapter does not fit.
    """
    model = read_sequence_model(block, algorithm, seed=seed)
    train_parts(model, block.train)
    if block.adapter is not None:
        from rlflow.actors.train_engines import adapted_heads

        adapted_heads.adapt(model, block, seed=seed)
    model.to(device).eval()  # pyright: ignore[reportArgumentType]
    head = _head_of(block, algorithm)
    module = ScalarModel(model, head)
    module.tower = tower_of(model, block)
    with random_head(model) if isinstance(head, ScoreHead) else nullcontext():
        choose_passes(module, device)
        prepare_tower(module, block, device)
    if checkpointing:
        recompute_layers(model)
    return module


def read_sequence_model(block: ModelBlock, algorithm: AlgorithmBlock, *, seed: int) -> PreTrainedModel:
    """The model that load_sequence_model trains, as transformers has it, without an adapter.

    Raises:
        ValueError: See load_sequence_model.
    """
    if isinstance(algorithm, GenerativeRerankerBlock):
        return read_language_model(block.model_copy(update={"adapter": None}), seed=seed)
    if not isinstance(algorithm, EmbeddingBlock):
        return read_classifier(block, seed=seed, outputs=outputs_of(algorithm))
    assert block.path is not None
    options: dict[str, Any] = {"trust_remote_code": block.trust_remote_code, "dtype": getattr(torch, block.dtype)}
    model = load_whole(AutoModel, block.path, revision=block.revision, **options)
    size = model.config.get_text_config().hidden_size
    if too_long := [length for length in algorithm.embedding.matryoshka_dims if length >= size]:
        raise ValueError(
            f"algorithm.embedding.matryoshka_dims: {too_long[0]} is no part of an embedding of {size} numbers: "
            "name shorter lengths"
        )
    return model


def outputs_of(algorithm: AlgorithmBlock) -> Outputs:
    """What a classifier's head puts out."""
    if not isinstance(algorithm, ClassificationBlock):
        return Outputs()
    problem = algorithm.classification
    names = tuple(problem.labels or ()) if isinstance(problem, ClassesBlock) else ()
    return Outputs(problem.num_outputs, names, _PROBLEMS[problem.problem])


def _head_of(block: ModelBlock, algorithm: AlgorithmBlock) -> Head:
    if isinstance(algorithm, GenerativeRerankerBlock):
        return YesNoHead(*answer_ids(load_tokenizer(block), algorithm.answers))
    if isinstance(algorithm, EmbeddingBlock):
        return EmbeddingHead()
    return ScoreHead(is_scalar=not isinstance(algorithm, ClassificationBlock))
