"""The recipe's optimizer, over parameters that are whole or sharded by FSDP2.

Each has three verbs: ``step``; ``moments``, what a checkpoint keeps of a parameter beside its values, each tensor the
part that this rank holds; and ``put``, called when moments were read or written.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rlflow.actors.train_engines.engine import decoder_layers
from rlflow.actors.train_engines.own_optimizer import OwnOptimizer
from rlflow.actors.train_engines.sharded_state import local_of, shard_of
from rlflow.recipe import OptimizerBlock
from rlflow.recipe.trainer_blocks import OwnOptimizerBlock

Moments = dict[str, torch.Tensor]
Shares = Mapping[str, float]
"""Parameter, by its name in a module's model -> its learning rate over the trainer's."""

MUON_MOMENTUM = 0.95


class Optimizer(Protocol):
    def step(self, learning_rate: float) -> None:
        """Applies the parameters' gradients."""
        ...

    def moments(self, parameter: torch.Tensor) -> Moments:
        """By name; zeros before the first step."""
        ...

    def put(self, parameter: torch.Tensor, moments: Moments) -> None:
        """Takes up moments that came from ``moments`` and were filled, or written to a checkpoint."""
        ...


def make_optimizer(
    module: nn.Module, block: OptimizerBlock | OwnOptimizerBlock, shares: Shares | None = None
) -> Optimizer:
    """
    Args:
        shares: See trained_rates.

    Raises:
        ValueError: bitsandbytes is not installed; the user's own function makes no optimizer.
    """
    if isinstance(block, OwnOptimizerBlock):
        return OwnOptimizer(dict(trainable(module)), block)
    rates = trained_rates(module, shares)
    match block.kind:
        case "adamw":
            return AdamW(rates, block)
        case "adamw_8bit":
            return AdamW8bit(rates, block)
        case "muon":
            return Muon(module, list(rates), block)


def trained_rates(module: nn.Module, shares: Shares | None = None) -> dict[torch.Tensor, float]:
    """What of a module's model is trained, with its share of the learning rate.

    Args:
        shares: By name in the model; 1 of all that is not there.
    """
    return {parameter: (shares or {}).get(name, 1.0) for name, parameter in trainable(module)}


def decay_groups(rates: Mapping[torch.Tensor, float], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on norms and biases; a group for each share of the learning rate."""
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for parameter, rate in sorted(rates.items(), key=lambda item: (item[0].ndim < 2, item[1])):
        decay = weight_decay if parameter.ndim >= 2 else 0.0
        group = groups.setdefault((parameter.ndim >= 2, rate), {"params": [], "weight_decay": decay, "rate": rate})
        group["params"].append(parameter)
    return list(groups.values())


def set_learning_rate(groups: Iterable[dict[str, Any]], learning_rate: float) -> None:
    """Of groups from ``decay_groups``, each its share."""
    for group in groups:
        group["lr"] = learning_rate * group["rate"]


def fresh_moments(parameter: torch.Tensor) -> Moments:
    """torch's AdamW makes this state at its first step; a checkpoint may come before."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    zeros = [torch.zeros_like(parameter.detach()) for _ in range(2)]
    return {"step": step, "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}


class AdamW:
    """torch.optim.AdamW, fused (arXiv 1711.05101)."""

    def __init__(self, rates: Mapping[torch.Tensor, float], block: OptimizerBlock) -> None:
        groups = decay_groups(rates, block.weight_decay)
        self.inner = torch.optim.AdamW(groups, betas=block.betas, eps=block.eps, fused=True)

    def step(self, learning_rate: float) -> None:
        _step(self.inner, learning_rate)

    def moments(self, parameter: torch.Tensor) -> Moments:
        state = self.inner.state[parameter]
        if not state:
            state.update(fresh_moments(parameter))
        return {name: local_of(value) for name, value in state.items()}

    def put(self, parameter: torch.Tensor, moments: Moments) -> None:
        """They are the state itself."""


class AdamW8bit:
    """bitsandbytes' AdamW with block-wise 8-bit moments (arXiv 2110.02861), over what this rank holds.

    A checkpoint holds the moments in float32, so that any number of ranks reads them, and plain AdamW too. Writing one
    rounds the moments in use as reading it does: a resumed run goes on like one never stopped.
    """

    def __init__(self, rates: Mapping[torch.Tensor, float], block: OptimizerBlock) -> None:
        try:
            bitsandbytes: Any = importlib.import_module("bitsandbytes")
        except ImportError as error:
            raise ValueError(
                "trainer.optimizer.kind: adamw_8bit needs bitsandbytes: pip install bitsandbytes, or use kind: adamw"
            ) from error
        self._functional = bitsandbytes.functional
        self._views = {parameter: nn.Parameter(local_of(parameter)) for parameter in rates}
        groups = decay_groups({self._views[p]: rate for p, rate in rates.items()}, block.weight_decay)
        self.inner = bitsandbytes.optim.AdamW8bit(groups, betas=block.betas, eps=block.eps)

    def step(self, learning_rate: float) -> None:
        for parameter, view in self._views.items():
            # A rank may hold no row of a small tensor; the kernels take no empty ones.
            view.grad = local_of(parameter.grad) if parameter.grad is not None and view.numel() else None
        _step(self.inner, learning_rate)
        for view in self._views.values():
            view.grad = None

    def moments(self, parameter: torch.Tensor) -> Moments:
        view = self._views[parameter]
        state = self.inner.state[view]
        if not state:
            return {name: value.cpu() for name, value in fresh_moments(view.detach().float()).items()}
        step = torch.tensor(float(state["step"]))
        return {"step": step, "exp_avg": self._whole(state, "1"), "exp_avg_sq": self._whole(state, "2")}

    def put(self, parameter: torch.Tensor, moments: Moments) -> None:
        view = self._views[parameter]
        step = int(moments["step"])
        if not view.numel() or not step:
            return
        state = self.inner.state[view]
        if not state:
            self._make_state(view)
        state["step"] = step
        for key, name in (("1", "exp_avg"), ("2", "exp_avg_sq")):
            values = moments[name].to(view.device)
            if state[f"state{key}"].dtype == torch.uint8:
                values, rounding = self._functional.quantize_blockwise(values, code=state[f"qmap{key}"], blocksize=256)
                state[f"absmax{key}"].copy_(rounding.absmax)
            state[f"state{key}"].copy_(values.view_as(state[f"state{key}"]))

    def _whole(self, state: dict[str, Any], key: str) -> torch.Tensor:
        values = state[f"state{key}"]
        if values.dtype == torch.uint8:
            scale, code = state[f"absmax{key}"], state[f"qmap{key}"]
            values = self._functional.dequantize_blockwise(values, absmax=scale, code=code, blocksize=256)
        return values.float().to("cpu", copy=True)

    def _make_state(self, view: nn.Parameter) -> None:
        """bitsandbytes makes it at a step: take one of this parameter alone that changes nothing."""
        view.grad = torch.zeros_like(view)
        _step(self.inner, 0.0)
        view.grad = None


class Muon:
    """torch.optim.Muon for the matrices of the layers, AdamW for the rest (arXiv 2502.16982).

    Momentum is sharded like the parameters; the update is gathered and orthogonalised whole on every rank, so that the
    number of ranks cannot change it. Its size is that of AdamW's updates (section 2.2), so both take one learning rate.
    """

    def __init__(self, module: nn.Module, parameters: Iterable[torch.Tensor], block: OptimizerBlock) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(
                f"trainer.optimizer.kind: muon needs torch.optim.Muon, which torch {torch.__version__} lacks"
            )
        in_layers = set(decoder_layers(module).parameters())
        matrices = [parameter for parameter in parameters if parameter in in_layers and parameter.ndim == 2]
        self.weight_decay = block.weight_decay
        self.momentum = {matrix: torch.zeros_like(local_of(matrix)) for matrix in matrices}
        self.rest = AdamW({parameter: 1.0 for parameter in parameters if parameter not in self.momentum}, block)

    def step(self, learning_rate: float) -> None:
        with torch.no_grad():
            for matrix, momentum in self.momentum.items():
                assert matrix.grad is not None
                gradient = local_of(matrix.grad)
                momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
                whole = _gathered(gradient.lerp(momentum, MUON_MOMENTUM), matrix)
                change, shard = _orthogonal_change(whole, learning_rate).view(-1), shard_of(matrix)
                shard.values.mul_(1 - learning_rate * self.weight_decay)
                shard.values.add_(change[shard.start : shard.start + len(shard.values)])
        self.rest.step(learning_rate)

    def moments(self, parameter: torch.Tensor) -> Moments:
        if parameter in self.momentum:
            return {"momentum_buffer": self.momentum[parameter]}
        return self.rest.moments(parameter)

    def put(self, parameter: torch.Tensor, moments: Moments) -> None:
        """They are the state itself."""


def _orthogonal_change(update: torch.Tensor, learning_rate: float) -> torch.Tensor:
    """What torch.optim.Muon adds to a matrix, [m, n], for an update that has its momentum already."""
    change = nn.Parameter(torch.zeros_like(update))
    change.grad = update
    torch.optim.Muon(
        [change], lr=learning_rate, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw"
    ).step()
    return change.detach()


def _gathered(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that is sharded like ``matrix``."""
    if not isinstance(matrix, DTensor):
        return rows
    mesh, placements = matrix.device_mesh, matrix.placements
    sharded = DTensor.from_local(rows, mesh, placements, run_check=False, shape=matrix.shape, stride=matrix.stride())
    return sharded.full_tensor()


def _step(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    set_learning_rate(optimizer.param_groups, learning_rate)
    optimizer.step()


def trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Of its ``.model``, by Hugging Face name; tied ones once."""
    for name, parameter in module.get_submodule("model").named_parameters():
        if parameter.requires_grad:
            yield name, parameter
