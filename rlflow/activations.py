"""What one token takes while a model computes, in bytes: counted in transformers' layers and in our packed attention.

A layer keeps tensors for its backward pass; beside them, what its own operations need is alive for a moment. Counts are
of a decoder layer without a fused kernel, H wide, with queries of Q, keys and values of K and an MLP of M elements:

    norm -> q, k, v -> attention -> o -> residual -> norm -> MLP (gate, up, down; or up, down) -> residual

tests/actors/test_activation_memory.py holds them against what autograd keeps, to the byte.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlflow.memory import ModelShape
    from rlflow.tower_shape import TowerShape

FLOAT32 = 4
COMPOSED_GELU = {"gelu_new", "gelu_fast", "gelu_python", "quick_gelu"}
"""Activations that transformers writes as several operations: each keeps what it multiplies."""
INPUTS = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "o_proj": "output",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "down",
}
"""Linear layer -> the tensor that it reads."""


def kept(
    shape: ModelShape | TowerShape,
    size: int,
    targets: Collection[str] | None = None,
    rank: int = 0,
    of_adapter: int = FLOAT32,
) -> int:
    """Of one layer, for its backward pass.

    Args:
        size: Bytes of an element of the model's dtype.
        targets: Names of the linear layers with an adapter, where only adapters are trained; None where all is.
        rank: Of the adapters.
        of_adapter: Bytes of an element that they compute with.
    """
    trained = size if targets is None else 0
    norms = 2 * _norm(shape, size, trained)
    inputs = _inputs(shape, size, targets, rank, of_adapter)
    # Queries, keys and values as attention read them, what it wrote, and a float32 normalizer a head.
    attention = size * (2 * shape.query_width + 2 * shape.key_width) + FLOAT32 * shape.heads
    if shape.has_qk_norms:
        widths = shape.query_width + shape.key_width
        heads = shape.heads + shape.heads * shape.key_width // shape.query_width
        attention += FLOAT32 * (widths + heads) + trained * widths
    return norms + attention + size * _mlp_factor(shape) * shape.mlp_width + inputs


def kept_by_tower(tower: TowerShape, size: int) -> int:
    """Of one layer, for its backward pass, of a patch. A value that is a part of a joint matrix' output keeps all of
    it; elsewhere what attention wrote is what the next matrix reads."""
    return kept(tower, size) + size * tower.hidden * (2 if tower.is_joint else -1)


def layer_backward(shape: ModelShape | TowerShape, size: int) -> int:
    """Beside what is kept, at the MLP's backward pass: gradients of its width, and of the layer's output."""
    return size * (2 * shape.mlp_width + shape.hidden)


def layer_forward(shape: ModelShape | TowerShape, size: int) -> int:
    """Of a forward pass that keeps nothing, in its largest layer: at the MLP or at attention.

    Beside each are the embeddings, the layer's input, its residual and what the norm wrote.
    """
    if shape.is_gated:
        mlp = 4 * shape.hidden + 3 * shape.mlp_width
    else:
        mlp = 6 * shape.hidden + (4 if shape.activation in COMPOSED_GELU else 2) * shape.mlp_width
    # Queries rotated, padded, gathered, attended, joined and put back in order; keys and values as often, in pairs.
    attention = 3 * shape.hidden + 6 * shape.query_width + 6 * shape.key_width
    return size * max(mlp, attention)


def final_norm(shape: ModelShape, size: int, *, is_trained: bool) -> int:
    """What the norm behind the last layer keeps, and the rows of it that are scored."""
    return _norm(shape, size, size if is_trained else 0) + 2 * size * shape.hidden


def _norm(shape: ModelShape | TowerShape, size: int, trained: int) -> int:
    """RMSNorm keeps its input in float32, its reciprocal root and, if its weight is trained, the normalized input.
    torch's LayerNorm keeps its input, mean and reciprocal deviation."""
    if shape.is_gated:
        return FLOAT32 * (shape.hidden + 1) + trained * shape.hidden
    return size * (shape.hidden + 2)


def _mlp_factor(shape: ModelShape | TowerShape) -> int:
    """Tensors of its width that an MLP keeps beside the input of its last matrix."""
    if shape.is_gated:
        return 3
    return 4 if shape.activation in COMPOSED_GELU else 0 if shape.activation == "relu" else 1


def _inputs(
    shape: ModelShape | TowerShape, size: int, targets: Collection[str] | None, rank: int, of_adapter: int
) -> int:
    """What linear layers read. An adapter that computes in another dtype casts a copy of its own."""
    widths = {"attention": shape.hidden, "output": shape.query_width, "mlp": shape.hidden, "down": shape.mlp_width}
    if targets is None:
        return size * sum(widths.values())
    read = [INPUTS.get(name, "attention") for name in targets]
    if size == of_adapter:
        read = sorted(set(read))
    return of_adapter * (sum(widths[name] for name in read) + rank * len(targets))
