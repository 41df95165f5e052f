"""The torch engine with weights: one model, and for each adapter an engine that shares it, as one alone steps at a
time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from rlflow.actors.pretrained import load_whole
from rlflow.actors.rollout_engines.engine import RolloutEngine
from rlflow.actors.rollout_engines.torch_engine import TorchEngine
from rlflow.serving.models import ServedModel, Settings, adapters_of, names_of


def torch_engines(
    model: ServedModel, given: Mapping[str, Path], settings: Settings
) -> tuple[dict[str, RolloutEngine], Callable[[str], None]]:
    """Engines by the names of the models, and what makes the model that of a name.

    Args:
        given: PEFT directories by the names of their models, beside the source's own.

    Raises:
        ValueError: The checkpoint is not whole, or an adapter is not of this model.
    """
    assert model.base.path is not None
    dtype = getattr(torch, model.base.dtype)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": model.base.trust_remote_code}
    loaded: Any = load_whole(AutoModelForCausalLM, model.base.path, **options)
    adapters = adapters_of(model, given)
    switch = AdapterSwitch(loaded, adapters)
    engines: dict[str, RolloutEngine] = {}
    for name in names_of(model, given):
        switch.use(name)
        engines[name] = TorchEngine(
            model.base.path, dtype=model.base.dtype, max_num_seqs=settings.max_num_seqs, model=loaded
        )
    return engines, switch.use


class AdapterSwitch:
    """A model with adapters in it, of which one is in use, or none."""

    def __init__(self, model: Any, adapters: Mapping[str, Path]) -> None:
        """Puts the adapters into the model, in place.

        Raises:
            ValueError: One of them is not of this model, or is no adapter of weights.
        """
        self._inner = {name: f"adapter_{index}" for index, name in enumerate(adapters)}
        """PEFT's names, which must hold no full stop."""
        self._peft: Any = None
        self._used: str | None = ""
        """Of PEFT's names, None for the base; none of them before the first use."""
        for name, directory in adapters.items():
            self._add(model, self._inner[name], str(directory))

    def use(self, name: str) -> None:
        """Makes the model that of an adapter, or of any other name the base."""
        inner = self._inner.get(name)
        if self._peft is None or inner == self._used:
            return
        if inner is None:
            self._peft.base_model.disable_adapter_layers()
        else:
            self._peft.base_model.enable_adapter_layers()
            self._peft.set_adapter(inner)
        self._used = inner

    def _add(self, model: Any, inner: str, directory: str) -> None:
        config = PeftConfig.from_pretrained(directory)
        if config.is_prompt_learning:
            raise ValueError(f"{directory} holds a prompt ({config.peft_type}) and no weights of layers: use vLLM")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(model, directory, adapter_name=inner)
        # Of one that is there already this reads the weights once more: only so PEFT says which found no place.
        filled = self._peft.load_adapter(directory, inner)
        if strange := sorted({*filled.missing_keys, *filled.unexpected_keys}):
            raise ValueError(f"{directory} is no adapter of this model: {strange[0]} is not in both")
