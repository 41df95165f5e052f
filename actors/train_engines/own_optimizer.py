"""An optimizer of the user's own: any torch.optim.Optimizer, with what a checkpoint needs of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rlflow.actors.train_engines.sharded_state import local_of
from rlflow.plugins import PluginError, call_by_name, naming
from rlflow.recipe.trainer_blocks import OwnOptimizerBlock

_OURS = ("params", "param_names", "lr", "rate")
"""What of a group is not the optimizer's own number."""


class OwnOptimizer:
    """See Optimizer.

    The learning rate is the recipe's: it is set before each step, times a group's ``rate`` where it has one. A
    checkpoint keeps the tensors and numbers of each parameter's state, and the numbers that the optimizer has changed
    in its groups. What it keeps of a parameter is known once it has made a step: before its first, one of gradients of
    0 is made and undone.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], block: OwnOptimizerBlock) -> None:
        """
        Args:
            named: What is trained, by Hugging Face name.

        Raises:
            PluginError: The function gives no optimizer of all these parameters.
        """
        self.plugin = block.plugin
        optimizer = call_by_name(
            block.plugin, block.args, parameters=list(named.values()), named_parameters=list(named.items())
        )
        if not isinstance(optimizer, torch.optim.Optimizer):
            kind = type(optimizer).__name__
            raise PluginError(f"{block.plugin} returned a {kind}: return a torch.optim.Optimizer")
        stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if left_out := [name for name, parameter in named.items() if parameter not in stepped]:
            more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
            raise PluginError(f"{block.plugin}: its optimizer leaves out {left_out[0]}{more}: give it all parameters")
        self.inner = optimizer
        self._initial = {self._first(group): self._numbers(group) for group in optimizer.param_groups}
        self._unstepped: set[torch.Tensor] = set(named.values())
        """Those whose state is of no step, but for its shape."""
        self._has_states = False

    def step(self, learning_rate: float) -> None:
        self._has_states = True
        for parameter in self._unstepped:
            self.inner.state.pop(parameter, None)
        self._unstepped.clear()
        self._step(learning_rate)

    def moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self._has_states:
            self._make_states()
        found = {"has_stepped": torch.tensor(float(parameter not in self._unstepped))}
        for name, value in self.inner.state.get(parameter, {}).items():
            if value is not None:
                found[name] = self._tensor(name, value, parameter)
        for group in self.inner.param_groups:
            if self._first(group) is parameter:
                initial = self._initial[parameter]
                for name, value in self._numbers(group).items():
                    found[f"group.{name}"] = torch.tensor(value, dtype=torch.float64)
                    found[f"initial.{name}"] = torch.tensor(initial[name], dtype=torch.float64)
        return found

    def put(self, parameter: torch.Tensor, moments: Mapping[str, torch.Tensor]) -> None:
        if bool(moments["has_stepped"]):
            self._unstepped.discard(parameter)
        else:
            self._unstepped.add(parameter)
        state = self.inner.state[parameter]
        for name, value in state.items():
            if isinstance(value, int | float):
                state[name] = type(value)(moments[name].item())
        for group in self.inner.param_groups:
            if self._first(group) is not parameter:
                continue
            for name in self._numbers(group):
                # What the recipe gave, and may give otherwise to a run that is resumed, stays as it is.
                if not torch.equal(moments[f"group.{name}"], moments[f"initial.{name}"]):
                    group[name] = type(group[name])(moments[f"group.{name}"].item())

    def _step(self, learning_rate: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = learning_rate * group.get("rate", 1.0)
        with naming(self.plugin):
            self.inner.step()

    def _make_states(self) -> None:
        """Has the optimizer make its states at a step of gradients of 0, which changes nothing."""
        self._has_states = True
        waiting = list(self._unstepped)
        values = [parameter.detach().clone() for parameter in waiting]
        groups = [self._numbers(group) for group in self.inner.param_groups]
        for parameter in waiting:
            parameter.grad = torch.zeros_like(parameter)
        self._step(0.0)
        with torch.no_grad():
            for parameter, value in zip(waiting, values, strict=True):
                parameter.grad = None
                parameter.copy_(value)
        for group, numbers in zip(self.inner.param_groups, groups, strict=True):
            group.update(numbers)

    def _tensor(self, name: str, value: Any, parameter: torch.Tensor) -> torch.Tensor:
        if isinstance(value, int | float):
            return torch.tensor(value, dtype=torch.float64)
        if not isinstance(value, torch.Tensor):
            kind = type(value).__name__
            raise PluginError(f"{self.plugin}: its state {name} is a {kind}, which no checkpoint holds: keep tensors")
        local = local_of(value)
        is_shared = isinstance(parameter, DTensor) and parameter.device_mesh.size() > 1
        if is_shared and local.ndim and local.shape != local_of(parameter).shape:
            raise PluginError(
                f"{self.plugin}: its state {name} has not the shape of its parameter, which several ranks share: set "
                "trainer.workers: 1"
            )
        return local

    @staticmethod
    def _first(group: Mapping[str, Any]) -> torch.Tensor:
        return group["params"][0]

    @staticmethod
    def _numbers(group: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in group.items() if k not in _OURS and isinstance(v, int | float)}
