"""The scenarios' steps in plain torch: transformers' own models and attention, one sequence after the other, float32.

It shares with what it checks the model's shape and its data, and no code.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from engine_scenarios import LEARNING_RATES, MAX_GRAD_NORM, OPTIMIZER, ROUTER, Scenario, config_of, micro_batches
from torch import nn

from rlflow.types import MicroBatch


def plain_model(scenario: Scenario) -> Any:
    """The weights that every engine begins with."""
    config, model_class = config_of(scenario)
    torch.manual_seed(0)
    return model_class(config).train()


def plain_run(scenario: Scenario, num_steps: int = 3) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses and norms of the steps, and the weights after them."""
    model = plain_model(scenario)
    optimizers = plain_optimizers(model, scenario)
    losses, norms = [], []
    for step, learning_rate in enumerate(LEARNING_RATES[:num_steps]):
        loss, norm = _backward(model, scenario, step)
        losses.append(loss)
        norms.append(norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
    return losses, norms, {name: p.detach().clone() for name, p in model.named_parameters()}


def plain_gradient(scenario: Scenario) -> dict[str, torch.Tensor]:
    """Of the first step, clipped."""
    model = plain_model(scenario)
    _backward(model, scenario, 0)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def plain_optimizers(model: nn.Module, scenario: Scenario) -> list[torch.optim.Optimizer]:
    parameters = list(model.parameters())
    muons = []
    if scenario.trainer.get("optimizer", {}).get("kind") == "muon":
        muons = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    rest = [p for p in parameters if not any(p is other for other in muons)]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2]},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, **OPTIMIZER)]
    if muons:
        decay = OPTIMIZER["weight_decay"]
        optimizers.append(torch.optim.Muon(muons, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _backward(model: nn.Module, scenario: Scenario, step: int) -> tuple[float, float]:
    """Leaves a step's clipped gradient behind; its loss, and the gradient's norm before clipping."""
    batches = micro_batches(step)
    num_tokens = sum(int(batch.loss_mask.sum()) for batch in batches)
    model.zero_grad()
    loss = torch.stack([of for batch in batches for of in _losses(model, scenario.model, batch, num_tokens)]).sum()
    loss.backward()
    return float(loss.detach()), float(nn.utils.clip_grad_norm_(list(model.parameters()), MAX_GRAD_NORM))


def _losses(model: Any, kind: str, batch: MicroBatch, num_tokens: int) -> list[torch.Tensor]:
    """Each sequence's part of a mean over all loss tokens of the step."""
    losses = []
    for start, end in pairwise(batch.cu_seqlens):
        ids = torch.tensor(batch.token_ids[start:end], dtype=torch.long)
        mask = torch.tensor(batch.loss_mask[start + 1 : end])
        if kind == "values":
            values = model.score(model.model(ids[None]).last_hidden_state[0, :-1]).squeeze(1)
            losses.append((values - 1.0)[mask].square().sum() / num_tokens)
            continue
        output = model(ids[None], output_router_logits=True) if kind == "experts" else model(ids[None])
        table = torch.log_softmax(output.logits[0, :-1], dim=1)
        losses.append(-table[torch.arange(len(mask)), ids[1:]][mask].sum() / num_tokens)
        if kind == "experts" and mask.any():
            losses.append(_of_routers(output.router_logits, model.config.num_experts_per_tok) / (num_tokens // 4))
    return losses


def _of_routers(layers: Sequence[torch.Tensor], num_chosen: int) -> torch.Tensor:
    """balance_coef E / K sum_i f_i P_i + z_coef mean(logsumexp^2) of one sequence, the mean over layers."""
    total = torch.zeros(())
    for logits in layers:
        num_experts = logits.shape[1]
        scores = logits.softmax(dim=1)
        chosen = torch.zeros_like(scores)
        for token, experts in enumerate(scores.topk(num_chosen, dim=1).indices.tolist()):
            chosen[token, experts] = 1.0
        balance = num_experts / num_chosen * (chosen.mean(dim=0) * scores.mean(dim=0)).sum()
        z = logits.exp().sum(dim=1).log().square().mean()
        total = total + ROUTER.balance_coef * balance + ROUTER.z_coef * z
    return total / len(layers)
