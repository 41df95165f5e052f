"""The routers of a mixture-of-experts model: losses on what they decide, and how evenly the experts are used.

They are watched through forward hooks, so models of tokens and of scalars are called as if they had none. Layers that
gradient checkpointing computes a second time, in the backward pass, are not watched then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from rlflow.actors.train_engines.decoder_passes import DecoderPasses
from rlflow.actors.train_engines.probe import ProbedModule
from rlflow.algorithms.batch import TensorBatch, segment_mean, segment_sum
from rlflow.algorithms.router_losses import balance_loss, one_hot_choices, z_loss
from rlflow.recipe import RouterBlock
from rlflow.types import Denominators

_Decision = tuple[torch.Tensor, torch.Tensor]
"""Logits [N, E] and chosen experts [N, K] of one layer."""


class Routers:
    """Routers that take the K largest of a softmax over E experts, one in each sparse layer."""

    def __init__(self, modules: Sequence[nn.Module], passes: DecoderPasses) -> None:
        self._passes = passes
        self._seen: dict[int, _Decision] | None = None
        self._counts: dict[int, torch.Tensor] = {}
        for layer, module in enumerate(modules):
            module.register_forward_hook(partial(self._see, layer))

    @contextmanager
    def watched(self) -> Iterator[dict[int, _Decision]]:
        """Within, one forward pass leaves its decisions, by layer."""
        seen = self._seen = {}
        try:
            yield seen
        finally:
            self._seen = None

    def loss(
        self, seen: dict[int, _Decision], batch: TensorBatch, block: RouterBlock, denominators: Denominators
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """balance_coef * balance + z_coef * z: means over layers, of means over the trained sequences of the batch.

        Returns:
            This micro-batch's share of the loss, and of its parts before their coefficients, detached.
        """
        sequences, size = batch.sequence_ids, batch.num_sequences
        trained = segment_sum(batch.loss_mask.float(), sequences, size) > 0
        weights = trained / (max(1, denominators.num_sequences) * len(seen))
        balance, z = (torch.zeros((), device=weights.device) for _ in range(2))
        with torch.set_grad_enabled(torch.is_grad_enabled() and block.is_on):
            for layer, (logits, chosen) in seen.items():
                assert len(logits) >= len(sequences), "a router saw other tokens than the batch has"
                # Passes that keep ranks in step come last.
                own = slice(len(sequences)) if self._passes.places is None else self._passes.places
                logits, chosen = logits[own].float(), chosen[own]
                choices = one_hot_choices(chosen, logits.shape[1])
                per_token = (choices, logits.softmax(dim=1), z_loss(logits))
                share, scores, of_z = (segment_mean(values, sequences, size) for values in per_token)
                balance = balance + balance_loss(share, scores, chosen.shape[1]) @ weights
                z = z + of_z @ weights
                counts = choices[trained[sequences]].sum(dim=0, dtype=torch.float64)
                self._counts[layer] = self._counts[layer] + counts if layer in self._counts else counts
        loss = block.balance_coef * balance + block.z_coef * z
        return loss, {
            "moe/loss": loss.detach(),
            "moe/balance_loss": balance.detach(),
            "moe/z_loss": z.detach(),
        }

    def load(self, world_size: int) -> dict[str, float]:
        """How the tokens of all trained sequences since the last call were spread. All ranks take part.

        Returns:
            Each rank's share of: ``max_load``, the most tokens that an expert of any layer got, over what each would
            get if they were spread evenly; ``dead_fraction``, the share of experts, of all layers, that got none.
        """
        counts = torch.stack([self._counts[layer] for layer in sorted(self._counts)])
        self._counts = {}
        if world_size > 1:
            dist.all_reduce(counts)
        even = counts.mean(dim=1, keepdim=True).clamp(min=torch.finfo(counts.dtype).tiny)
        return {
            "moe/max_load": float((counts / even).max()) / world_size,
            "moe/dead_fraction": float((counts == 0).double().mean()) / world_size,
        }

    def _see(self, layer: int, module: nn.Module, args: Any, output: Any) -> None:
        if self._seen is not None:
            logits, _, chosen = output
            before, chosen_before = self._seen.get(layer, (logits[:0], chosen[:0]))
            self._seen[layer] = (torch.cat([before, logits]), torch.cat([chosen_before, chosen]))


def find_routers(module: ProbedModule, block: RouterBlock, device: torch.device) -> Routers | None:
    """The routers of a model; None where it has none, or none that Routers understands.

    Raises:
        ValueError: ``block`` wants losses on them then.
    """
    modules = _modules(module.model)
    if modules and all(_takes_largest_of_softmax(output) for output in _try(module, modules, device)):
        return Routers(modules, module.passes)
    if block.is_on:
        name = type(module.model).__name__
        known = "are not the K largest of a softmax" if modules else "are not there: it is no mixture of experts"
        raise ValueError(f"model.router: the router's choices in {name} {known}; remove model.router")
    return None


def _modules(model: PreTrainedModel) -> list[nn.Module]:
    """As transformers declares them for ``output_router_logits``."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    declared = [(part._can_record_outputs or {}).get("router_logits") for part in parts]
    classes = {spec.target_class for spec in declared if isinstance(spec, OutputRecorder)} - {None, nn.Linear}
    return [module for module in model.modules() if isinstance(module, tuple(classes))]


@torch.no_grad()
def _try(module: ProbedModule, modules: Sequence[nn.Module], device: torch.device) -> list[Any]:
    """What the routers return for a short text."""
    outputs: list[Any] = []
    handles = [router.register_forward_hook(lambda _, __, output: outputs.append(output)) for router in modules]
    module.probe([torch.arange(8, device=device) * 7 % module.model.config.get_text_config().vocab_size])
    for handle in handles:
        handle.remove()
    return outputs


def _takes_largest_of_softmax(output: Any) -> bool:
    """Whether a router returned logits [N, E], weights [N, K] in proportion to their softmax, and choices [N, K]."""
    if not (isinstance(output, tuple) and len(output) == 3 and all(isinstance(x, torch.Tensor) for x in output)):
        return False
    logits, weights, chosen = output
    if logits.ndim != 2 or weights.shape != chosen.shape or chosen.is_floating_point():
        return False
    scores = logits.float().softmax(dim=1)
    largest = scores.topk(chosen.shape[1], dim=1).indices
    given, expected = (x / x.sum(dim=1, keepdim=True) for x in (weights.float(), scores.gather(1, chosen)))
    tolerance = 1e-4 if weights.dtype == torch.float32 else 2e-2
    same = torch.equal(largest.sort(dim=1).values, chosen.sort(dim=1).values)
    return same and torch.allclose(given, expected, atol=tolerance, rtol=0)
