"""The user's own policy loss and loss of a pair: what their functions are given, and what they must return."""

from __future__ import annotations

import torch

from rlflow.algorithms.batch import TensorBatch
from rlflow.plugins import PluginError, call_by_name
from rlflow.recipe.policy_loss_blocks import OwnLossBlock
from rlflow.recipe.preference_blocks import OwnPairBlock


def own_policy_loss(
    block: OwnLossBlock,
    tokens: TensorBatch,
    *,
    ratio: torch.Tensor,
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
) -> torch.Tensor:
    """A loss for each loss token [N], which the reduction's weights add up.

    Args:
        tokens: The loss tokens alone.
        ratio, logprobs: [N], with gradient.
        old_logprobs: [N]: the ratio's denominator.

    Raises:
        PluginError: The function raises, or returns something else.
    """
    loss = call_by_name(
        block.plugin,
        block.args,
        ratio=ratio,
        log_ratio=logprobs - old_logprobs,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        engine_logprobs=tokens.old_logprobs,
        ref_logprobs=tokens.ref_logprobs,
        advantages=tokens.advantages,
        sequence_ids=tokens.sequence_ids,
        num_sequences=tokens.num_sequences,
    )
    return _checked(block.plugin, loss, logprobs.shape, "a loss for each token")


def own_pair_loss(block: OwnPairBlock, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """A loss for each pair [B].

    Args:
        chosen, rejected: [B] each: log pi / pi_ref of the answers, see `rlflow.algorithms.preference_losses`.

    Raises:
        PluginError: The function raises, or returns something else.
    """
    loss = call_by_name(block.plugin, block.args, chosen=chosen, rejected=rejected, beta=block.beta)
    return _checked(block.plugin, loss, chosen.shape, "a loss for each pair")


def _checked(plugin: str, loss: object, shape: torch.Size, what: str) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor):
        raise PluginError(f"{plugin} returned a {type(loss).__name__}: return {what}, a tensor of shape {list(shape)}")
    if loss.shape != shape:
        raise PluginError(f"{plugin} returned a tensor of shape {list(loss.shape)}: return {what}, {list(shape)}")
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise PluginError(f"{plugin} returned a loss without a gradient: compute it from the logprobs it is given")
    return loss
