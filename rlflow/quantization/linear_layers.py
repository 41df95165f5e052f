"""Which weights of a model are quantised: those of its linear layers, but for head, embeddings and routers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlflow.data.errors import DataError
from rlflow.quantization.schemes import WITH_EXPERTS, Scheme
from rlflow.tracking.card_snippets import is_reward_model

ROUTER = r".*\.(gate|router|shared_expert_gate)$"
"""Chooses experts: its errors send tokens elsewhere, and it is small."""
_EXPERT = re.compile(r".*\.experts\.\d+\.\w+$")
"""Of hubs' checkpoints; within transformers the experts of a layer are one tensor."""


@dataclass(frozen=True, slots=True)
class LinearLayers:
    """The linear layers of a model by their names in its files."""

    shapes: Mapping[str, tuple[int, int]]
    """Rows (outputs) and columns (inputs) of each that is quantised."""
    ignored: tuple[str, ...]
    """Those left as they are, as config.json names them for readers: names, or ``re:`` and a pattern."""

    @property
    def widths(self) -> Mapping[str, int]:
        return {name: columns for name, (_, columns) in self.shapes.items()}


def read_config(source: Path) -> dict[str, Any]:
    """The model's config.json.

    Raises:
        DataError: It cannot be read, or the model is none that can be quantised.
    """
    path = source / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    quantized = config.get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method", "another scheme") if isinstance(quantized, dict) else quantized
        raise DataError(
            f"{source} is quantised already ({method}): a second rounding would add to the first. Name the model that "
            "it was made of"
        )
    if is_reward_model(source):
        raise DataError(f"{source} is a reward model: --quantize is for models that write. Export it without")
    return config


def find_layers(
    source: Path, shapes: Mapping[str, tuple[int, ...]], scheme: Scheme, *, trust_remote_code: bool
) -> LinearLayers:
    """
    Args:
        shapes: Of all tensors in the model's files, by name.

    Raises:
        DataError: The model cannot be built from its config, has nothing to quantise, or has experts that the scheme
            is not read for.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"trust_remote_code": trust_remote_code}
    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(source, **options)
            model = AutoModelForCausalLM.from_config(config, **options)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{source}: there is no model that can be read: {error}") from error
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    head = model.get_output_embeddings()
    left = {name for name, module in model.named_modules() if module is head or re.fullmatch(ROUTER, name)}
    if experts := next((name for name in shapes if "experts" in name and len(shapes[name]) > 2), None):
        raise DataError(
            f"{source} stores the experts of a layer as one tensor ({experts}), and schemes are of linear layers: "
            "export it without --quantize, and have vLLM quantise it as it loads (quantization='fp8')"
        )
    prefix = f"{model.base_model_prefix}."
    wanted = {}
    for tensor, shape in shapes.items():
        name = tensor.removesuffix(".weight")
        if name == tensor or len(shape) != 2:
            continue
        module = name if name in linear else prefix + name
        is_expert = _EXPERT.fullmatch(name) is not None
        if (module in linear and module not in left) or is_expert:
            wanted[name] = (shape[0], shape[1])
    if not wanted:
        raise DataError(f"{source}: a {config.model_type} model has no linear layers of torch to quantise")
    ignored = sorted({"lm_head", *(left & linear)})
    if any(_EXPERT.fullmatch(name) for name in wanted):
        if scheme.name not in WITH_EXPERTS:
            raise DataError(
                f"{source} is a mixture of experts, and {scheme.name} is not read or not tried for them: --quantize "
                f"{' or '.join(WITH_EXPERTS)}"
            )
        # Routers are linear layers to vLLM.
        ignored.append(f"re:{ROUTER}")
    return LinearLayers(wanted, tuple(ignored))
