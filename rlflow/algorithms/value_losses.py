"""The critic's loss."""

from __future__ import annotations

import torch


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float | None = None
) -> torch.Tensor:
    """Half the squared error, clipped around the values before the update (arXiv 2005.12729, section 3, no. 1):

        1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)

    Args:
        values: [N], with gradient.
        old_values, returns: [N].
        clip: c; None leaves 1/2 (V - R)^2.

    Returns:
        [N].
    """
    error = (values - returns) ** 2
    if clip is None:
        return 0.5 * error
    clipped = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    return 0.5 * torch.maximum(error, (clipped - returns) ** 2)
