"""Checkpoints whose weights are in few bits, as their config.json says: which can be trained from. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

DEQUANTIZED = ("compressed-tensors", "fp8", "mxfp4")
"""Formats that trainers read as the numbers that they stand for: a model in `model.dtype` like any other."""
_ROUNDED_AGAIN = {"bitsandbytes": "nf4", "torchao": "torchao_int8"}
"""Formats that ``model.adapter.quantize`` makes as it loads."""
_NEEDS_GPTQMODEL = ("gptq", "awq")


def stored_format(config: Mapping[str, Any]) -> str | None:
    """What config.json calls its weights' format; None of weights as they are.

    Args:
        config: Its fields.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    return str(method or "bitsandbytes")


def format_problem(path: str, method: str | None, *, has_adapter: bool, rounds: bool = False) -> str | None:
    """Why trainers cannot start from weights in a format, and what to do; None where they can.

    Args:
        path: The model's, for the message.
        has_adapter: The model stays as it is, and an adapter is trained.
        rounds: ``model.adapter.quantize`` is given.
    """
    if method is None:
        return None
    what, plain = f"{path} has its weights in {method}'s format", "name the model that it was made of"
    if rounds:
        return f"{what}, and model.adapter.quantize rounds what is in full precision: {plain}, or set quantize: none"
    if method == "compressed-tensors" and find_spec("compressed_tensors") is None:
        return f"{what}, which compressed-tensors reads: pip install compressed-tensors, or {plain}"
    if method in DEQUANTIZED:
        return None
    if method in _NEEDS_GPTQMODEL:
        missing = [package for package in ("gptqmodel", "optimum") if find_spec(package) is None]
        if not missing and has_adapter:
            return None
        how = f"pip install {' '.join(missing)}, " if missing else "set model.adapter, "
        return f"{what}, beside which an adapter is trained where gptqmodel and optimum are: {how}or {plain}"
    if method in _ROUNDED_AGAIN:
        return f"{what}: {plain}, and set model.adapter.quantize: {_ROUNDED_AGAIN[method]}"
    return f"{what}, from which nothing is trained here: {plain}"
