"""Liger's Triton kernels (arXiv 2410.10989) in a loaded model, for GPUs."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

_IGNORED = -100
"""A target that counts as none: there is no such token."""


def apply_kernels(model: PreTrainedModel) -> None:
    """Norms, MLPs and rotary embeddings of a model in place; experts stay as they are.

    Raises:
        ValueError: Liger is not installed, or has nothing for this architecture.
    """
    try:
        liger: Any = importlib.import_module("liger_kernel.transformers.monkey_patch")
    except ImportError as error:
        raise ValueError(f"model.liger needs Liger (pip install liger-kernel): {error}") from error
    kind = model.config.model_type
    if kind not in liger.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(f"model.liger: Liger has no kernels for {kind}: remove it")
    has_experts = any(hasattr(module, "experts") for module in model.modules())
    options = {"swiglu": False} if has_experts else {}
    liger._apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False, **options)


def token_logprobs(hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """hidden [M, H], targets [M] -> log-probabilities [M], float32: linear layer and cross-entropy in one.

    The logits of M H / V tokens are there at a time, in the forward pass and again in the backward pass, where the
    head's gradient is summed in float32.
    """
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Fused

    if not len(targets):
        # It must still reach the head's weights, without a call of the module: other ranks may make none.
        return F.linear(hidden, head.weight, head.bias).sum(dim=1).float()
    no_weights, no_squares, no_smoothing, no_softcap, no_z_loss = None, 0.0, 0.0, None, False
    losses, *_ = Fused.apply(
        hidden,
        head.weight,
        targets.long(),
        head.bias,
        no_weights,
        _IGNORED,
        no_squares,
        no_smoothing,
        "none",
        no_softcap,
        no_z_loss,
        torch.float32,
    )
    return -losses.float()
