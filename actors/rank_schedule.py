"""AdaLoRA's ranks (arXiv 2303.10512): after every update the singular values that matter least become 0.

    backward of the loss and of the orthogonality of A and B --> optimizer step --> sensitivity --> values kept

PEFT gives the ranks out; what it needs from step to step is here, among what checkpoints keep of the parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import nn
from transformers import PreTrainedModel

from rlflow.actors.adapters import TRAINED, adapter_parameters, config_of, kind_of
from rlflow.actors.train_engines.optimizers import Moments, Optimizer

_SENSITIVITY, _UNCERTAINTY, _KEPT = "sensitivity", "uncertainty", "kept"


class RankSchedule:
    """An optimizer of an AdaLoRA's parameters that also gives out its ranks."""

    def __init__(self, model: PreTrainedModel, optimizer: Optimizer) -> None:
        """
        Args:
            model: With an adapter whose parameters are whole.
            optimizer: Of these parameters.
        """
        self.model, self.optimizer = model, optimizer
        self.config: Any = config_of(model)
        self.allocator = RankAllocator(model, self.config, TRAINED)
        self.trained = adapter_parameters(model)
        self._names = {parameter: name for name, parameter in self.trained.items()}
        for of_allocator in (self.allocator.ipt, self.allocator.exp_avg_ipt, self.allocator.exp_avg_unc):
            of_allocator |= {name: torch.zeros_like(parameter) for name, parameter in self.trained.items()}
        self.kept = {name: torch.ones_like(p) for name, p in self.trained.items() if ".lora_E." in name}
        """1 where a singular value was not taken away when ranks were last given out."""
        self.number, self.num_updates = 0, self.config.total_step

    def begin(self, number: int, num_updates: int) -> None:
        """Says which update comes next.

        Args:
            number: Counted from 0.
            num_updates: Of the whole run.

        Raises:
            ValueError: There are too few for ranks to be given out in between.
        """
        if num_updates <= self.config.tinit + self.config.tfinal:
            raise ValueError(
                f"model.adapter.peft: ranks are given out between tinit ({self.config.tinit}) and tfinal "
                f"({self.config.tfinal}), and the run has {num_updates} updates: lower them, or train for longer"
            )
        self.number, self.num_updates = number, num_updates

    def orthogonality(self) -> torch.Tensor:
        """orth_reg_weight times the mean over all A and B of |A A^T - 1| and |B^T B - 1| (equation 4, after PEFT)."""
        norms = []
        for name, parameter in self.trained.items():
            if ".lora_E." not in name:
                square = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
                norms.append(torch.linalg.norm(square - torch.eye(len(square), device=square.device)))
        return self.config.orth_reg_weight * torch.stack(norms).mean()

    def mean_rank(self) -> float:
        """How many singular values a layer has that are not 0; before the first update, all that it may have."""
        return sum(float(kept.sum()) for kept in self.kept.values()) / len(self.kept)

    def step(self, learning_rate: float) -> None:
        self.optimizer.step(learning_rate)
        # PEFT's allocator reads it of the config, which is written as it is.
        written, self.config.total_step = self.config.total_step, self.num_updates
        last = self.num_updates - self.config.tfinal
        if self.number > last:
            self.allocator.mask_using_rank_pattern(
                self.model, {name: kept.flatten().bool().tolist() for name, kept in self.kept.items()}
            )
        else:
            is_last = self.number == last
            _, pattern = self.allocator.update_and_allocate(self.model, self.number, force_mask=is_last)
            for name, kept in (pattern or {}).items():
                self.kept[name].copy_(torch.tensor(kept).view_as(self.kept[name]))
        self.config.total_step = written

    def moments(self, parameter: torch.Tensor) -> Moments:
        name = self._names[parameter]  # pyright: ignore[reportArgumentType]
        own = {_SENSITIVITY: self.allocator.exp_avg_ipt[name], _UNCERTAINTY: self.allocator.exp_avg_unc[name]}
        kept = {_KEPT: self.kept[name]} if name in self.kept else {}
        return {**self.optimizer.moments(parameter), **own, **kept}

    def put(self, parameter: torch.Tensor, moments: Moments) -> None:
        name = self._names[parameter]  # pyright: ignore[reportArgumentType]
        self.allocator.exp_avg_ipt[name] = moments[_SENSITIVITY]
        self.allocator.exp_avg_unc[name] = moments[_UNCERTAINTY]
        if name in self.kept:
            self.kept[name] = moments[_KEPT]
        own = {_SENSITIVITY, _UNCERTAINTY, _KEPT}
        self.optimizer.put(parameter, {key: tensor for key, tensor in moments.items() if key not in own})


def gives_out_ranks(model: nn.Module) -> bool:
    """Whether a model has an AdaLoRA."""
    configs: Any = getattr(model, "peft_config", {})
    return TRAINED in configs and kind_of(configs[TRAINED]) == "ADALORA"
