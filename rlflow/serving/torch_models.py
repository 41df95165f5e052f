"""The torch engine with weights: one model, and for each adapter an engine that shares it, as one alone steps at a
time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from rlflow.actors.pretrained import load_language_model
from rlflow.actors.rollout_engines.torch_engine import TorchEngine
from rlflow.serving.models import ServedModel, Settings, adapters_of, names_of


def torch_engines(
    model: ServedModel, given: Mapping[str, Path], settings: Settings
) -> tuple[dict[str, TorchEngine], Callable[[str], None]]:
    """Engines by the names of the models, and what makes the model that of a name.

    Args:
        given: PEFT directories by the names of their models, beside the source's own.

    Raises:
        ValueError: The checkpoint is not whole, or an adapter is not of this model.
    """
    assert model.base.path is not None
    dtype = getattr(torch, model.base.dtype)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": model.base.trust_remote_code}
    adapters = adapters_of(model, given)
    # PEFT puts no adapter on some formats as they are stored.
    loaded: Any = load_language_model(model.base.path, as_stored=not adapters, **options)
    use = _switch(loaded, adapters) if adapters else _use_the_one
    engines: dict[str, TorchEngine] = {}
    for name in names_of(model, given):
        use(name)
        engines[name] = TorchEngine(
            model.base.path, dtype=model.base.dtype, max_num_seqs=settings.max_num_seqs, model=loaded
        )
    return engines, use


def _switch(model: Any, adapters: Mapping[str, Path]) -> Callable[[str], None]:
    from rlflow.serving.adapter_switch import AdapterSwitch

    return AdapterSwitch(model, adapters).use


def _use_the_one(name: str) -> None:
    """There is one model."""
