"""The schemes of `rlflow export --quantize`: one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlflow.data.errors import DataError

GROUP_SIZES = (128, 64, 32)
"""Weights that share a scale, the largest first: vLLM's kernels have these."""

WITH_EXPERTS = ("fp8", "w4a16")
"""Schemes that transformers reads mixtures of experts in, whose experts it holds as one tensor."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights and activations are stored."""

    name: str
    summary: str
    preset: str | None
    """Its name in compressed-tensors; None where auto-round writes it."""
    file_format: str
    """What config.json calls the layout of the tensors, or auto-round its export."""
    bits: int
    is_grouped: bool
    """Whether groups of weights within a row share a scale; otherwise a whole row does."""
    is_calibrated: bool
    """Whether it is fitted to texts."""

    @property
    def reader(self) -> str:
        """What measures it: transformers reads the formats of AWQ and GPTQ with a package for GPUs alone."""
        return "vLLM" if self.preset is None else "transformers"


SCHEMES: Mapping[str, Scheme] = {
    row.name: row
    for row in (
        Scheme(
            "fp8",
            "weights in float8 (e4m3), a scale a row; activations in float8, scaled token by token",
            *("FP8_DYNAMIC", "float-quantized", 8, False, False),
        ),
        Scheme(
            "int8",
            "weights in 8-bit integers, a scale a row; activations in 8-bit integers, scaled token by token",
            *("INT8", "int-quantized", 8, False, False),
        ),
        Scheme(
            "w4a16",
            "weights in 4-bit integers, rounded to the nearest; activations as they are",
            *("W4A16", "pack-quantized", 4, True, False),
        ),
        Scheme(
            "awq",
            "weights in 4-bit integers, rounded by SignRound (arXiv 2309.05516); AWQ's file format",
            *(None, "auto_awq", 4, True, True),
        ),
        Scheme(
            "gptq",
            "weights in 4-bit integers, rounded by SignRound (arXiv 2309.05516); GPTQ's file format",
            *(None, "auto_gptq", 4, True, True),
        ),
    )
}


def group_size_for(widths: Mapping[str, int]) -> int:
    """The largest group size that divides every layer's width.

    Args:
        widths: Inputs of each linear layer, by its name.

    Raises:
        DataError: There is none.
    """
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in widths.values()):
            return size
    smallest = GROUP_SIZES[-1]
    name, width = next((name, width) for name, width in widths.items() if width % smallest)
    raise DataError(
        f"{name} has {width:,} inputs, which groups of {smallest} weights do not divide: 4 bits need that. "
        "--quantize fp8 or int8 has a scale a row, for any width"
    )
