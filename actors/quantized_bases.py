"""Bases in few bits, beside which an adapter is trained in full precision (QLoRA, arXiv 2305.14314).

A model in few bits must say the same of a text whatever it is packed with: activations are rounded a token at a time,
or not at all. Every process makes the same numbers of the weights on disk.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from rlflow.recipe.model_blocks import QUANTIZED_BASES


def check_quantized(kind: str) -> None:
    """
    Raises:
        ValueError: The package is missing, or a GPU. bitsandbytes works on a CPU, many times slower than without.
    """
    base = QUANTIZED_BASES[kind]
    if find_spec(base.package) is None:
        raise ValueError(
            f"model.adapter.quantize: {kind} needs {base.package}: pip install {base.package}, or set none"
        )
    if base.needs_gpu and not torch.cuda.is_available():
        raise ValueError(f"model.adapter.quantize: {kind} needs a GPU, and there is none here: set none")


def quantized(kind: str, dtype: torch.dtype) -> Any:
    """What transformers quantises with as it loads.

    nf4: doubly quantized scales. int8: a scale a row of weights and a token of activations; without LLM.int8's outliers
    (arXiv 2208.07339), which are columns of all that is computed together, so that one text would change another.
    torchao_int8: a scale a row of weights; activations stay as they are.
    """
    match kind:
        case "nf4":
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        case "int8":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        case _:
            from transformers import TorchAoConfig

            return TorchAoConfig(import_module("torchao.quantization").Int8WeightOnlyConfig())


def keep_as_stored(model: nn.Module) -> None:
    """Four-bit layers of a model compute the same on every CPU.

    On one with AVX512_BF16 bitsandbytes rearranges a layer's weights at its first call without a gradient, rounds what
    it multiplies to bfloat16 whatever the model's dtype, has no gradient from then on, and fails on layers whose sizes
    its blocks of 32 and 64 do not divide. `Linear4bit.forward` asks each layer whether it may.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def in_few_bits(parameter: torch.Tensor) -> bool:
    """Whether a parameter is of a quantised layer: integers, or a tensor of torchao's."""
    return not parameter.is_floating_point() or type(parameter.data).__module__.startswith("torchao.")
