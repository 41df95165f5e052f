"""Adapters in one model, of which one is in use, or none: no weight is merged."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel


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
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Found missing adapter keys")
                if self._peft is None:
                    self._peft = PeftModel.from_pretrained(model, directory, adapter_name=inner)
            # Of one that is there already this reads the weights once more: only so PEFT says which found no place.
            filled = self._peft.load_adapter(directory, inner)
        # What torch raises where shapes differ.
        except RuntimeError as error:
            said = " ".join(str(error).split()[:40])
            raise ValueError(f"{directory} is no adapter of this model: {said}") from error
        if strange := sorted({*filled.missing_keys, *filled.unexpected_keys}):
            raise ValueError(f"{directory} is no adapter of this model: {strange[0]} is not in both")
