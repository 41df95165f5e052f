"""EleutherAI's lm-evaluation-harness in the place of our own sets, where it is installed."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlflow.data.errors import DataError
from rlflow.data.image_processor import ImageProcessor
from rlflow.evaluation_sets.estimates import Estimate
from rlflow.evaluation_sets.measuring import SetResult
from rlflow.model_source import ModelSource

_BATCH = 8
"""Texts in one forward pass."""
_Z = 1.959964
"""Of a 95% interval."""


def require_lm_eval() -> None:
    """
    Raises:
        DataError: It is not installed.
    """
    if find_spec("lm_eval") is None:
        raise DataError("--backend lm_eval needs lm-evaluation-harness: pip install lm-eval, or leave the option out")


def measure_with_lm_eval(
    source: ModelSource, tasks: Sequence[str], limit: int | None, dtype: str, directory: Path, *, trust: bool
) -> list[SetResult]:
    """Runs tasks by their names there, with its model ``hf``; all that it returned is in lm_eval.json.

    Raises:
        DataError: It does not know a task, or cannot load the model.
    """
    lm_eval: Any = importlib.import_module("lm_eval")
    began = time.monotonic()
    path = source.base if source.is_adapter else source.path
    if path is not None and ImageProcessor(path, trust_remote_code=trust).takes_images:
        raise DataError(f"--backend lm_eval: its model hf reads text alone, and {path} sees: leave the option out")
    arguments = {"pretrained": path, "dtype": dtype}
    if source.is_adapter:
        arguments |= {"peft": source.path, "tokenizer": source.path}
    if trust:
        arguments["trust_remote_code"] = True
    try:
        found = lm_eval.simple_evaluate(
            model="hf", model_args=arguments, tasks=list(tasks), limit=limit, device=_device(), batch_size=_BATCH
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"lm_eval: {error}") from error
    path = directory / "lm_eval.json"
    path.write_text(json.dumps(found, default=str, indent=1) + "\n", encoding="utf-8")
    seconds = time.monotonic() - began
    counts = found.get("n-samples", {})
    return [
        SetResult(
            name=task,
            kind="lm_eval",
            num_problems=int(counts.get(task, {}).get("effective", 0)),
            samples=1,
            estimates=dict(_estimates(values, int(counts.get(task, {}).get("effective", 0)))),
            facts={},
            settings={"backend": "lm_eval", "version": found.get("versions", {}).get(task)},
            seconds=seconds,
            file=path.name,
        )
        for task, values in found["results"].items()
    ]


def _device() -> str:
    """Where torch computes: the harness asks for a GPU otherwise."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _estimates(values: Mapping[str, Any], num_problems: int) -> list[tuple[str, Estimate]]:
    """Metrics with the normal interval of the standard error that lm_eval gives."""
    estimates = []
    for key, value in values.items():
        metric, _, variant = key.partition(",")
        if not isinstance(value, int | float) or metric.endswith("_stderr") or metric == "sample_len":
            continue
        error = values.get(f"{metric}_stderr,{variant}")
        reach = _Z * error if isinstance(error, int | float) else 0.0
        name = metric if variant in ("", "none") else f"{metric} ({variant})"
        estimates.append((name, Estimate(float(value), float(value) - reach, float(value) + reach, num_problems)))
    return estimates
