"""What the start of a LoRA takes in memory where it is computed, in the driver, before the actors are started."""

from __future__ import annotations

from rlflow import activations
from rlflow.memory import DTYPE_BYTES, ModelShape
from rlflow.recipe import Recipe

_FLOAT32 = activations.FLOAT32
_TEXTS, _TOKENS = 8, 512
"""Of a forward pass: `rlflow.actors.prepared_adapters._BATCH` and MOST_TOKENS."""
_PYTHON_NUMBER = 48
"""Bytes of a number that PEFT turns into Python's, in a list and a tuple, to tell by its hash what layers read alike;
measured."""
_DECOMPOSED = 6
"""Arrays of a matrix' size that its decomposition holds at a time."""


def preparation_bytes(recipe: Recipe, shape: ModelShape) -> int:
    """Beside what a process takes; 0 where nothing is prepared.

    LoRA-GA keeps the gradients of all layers and what their backward pass needs; CorDA the covariance of what each
    layer reads; EVA makes a forward pass with its loss, and Python's numbers of what a layer reads; PiSSA and OLoRA
    decompose matrix after matrix.
    """
    adapter = recipe.model.adapter
    start = None if adapter is None else adapter.prepared_start
    if start is None or adapter is None:
        return 0
    size, tokens = DTYPE_BYTES[recipe.model.dtype], _TEXTS * _TOKENS
    hidden, mlp, queries = shape.hidden, shape.mlp_width, shape.query_width
    matrices = hidden * (2 * queries + 2 * shape.key_width + 3 * mlp)
    weights = shape.parameters * size + 2 * _FLOAT32 * (shape.adapter or 0)
    decomposed = _DECOMPOSED * _FLOAT32 * hidden * mlp
    logits = tokens * shape.vocabulary * _FLOAT32
    match start.options:
        case "lora_ga_config":
            kept = shape.layers * activations.kept(shape, size) * tokens
            return weights + shape.layers * matrices * size + max(kept + 4 * logits, decomposed)
        case "corda_config":
            # Covariances, and what is kept of their decompositions.
            squares = 2 * shape.layers * (5 * hidden**2 + queries**2 + mlp**2) * _FLOAT32
            return weights + squares + max(logits // _TEXTS, _DECOMPOSED * _FLOAT32 * mlp**2)
        case "eva_config":
            # Logits, rounded as the model computes where that is in fewer bits, in float32, and their log-softmax.
            of_loss = 2 * logits + (tokens * shape.vocabulary * size if size < _FLOAT32 else 0)
            of_hashes = _PYTHON_NUMBER * tokens * max(hidden, mlp, queries)
            return weights + max(of_loss, of_hashes) + tokens * activations.layer_forward(shape, size)
        case _:
            return weights + decomposed
