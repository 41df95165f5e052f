"""How likely a model holds texts, by transformers or by vLLM: what rounding costs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlflow.data.errors import DataError
from rlflow.driver.errors import RunError

VLLM_S = 3600.0
"""Deadline of a measurement by vLLM, its start included."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Loss:
    """Negative log-likelihoods of the same texts before and after, each the sum over a text's tokens but its first."""

    before: Sequence[float]
    after: Sequence[float]
    lengths: Sequence[int]
    """Tokens of each text that have a likelihood."""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def mean_before(self) -> float:
        """Nats a token."""
        return sum(self.before) / self.tokens

    @property
    def mean_after(self) -> float:
        return sum(self.after) / self.tokens

    @property
    def mean(self) -> float:
        """What is lost, in nats a token; below zero where the rounded model is the better one on these texts."""
        return self.mean_after - self.mean_before

    @property
    def standard_error(self) -> float:
        """Of the mean, from text to text (a ratio's: Cochran, Sampling Techniques, equation 6.13); NaN of one text."""
        count = len(self.lengths)
        if count < 2:
            return math.nan
        rows = zip(self.before, self.after, self.lengths, strict=True)
        squares = sum((after - before - self.mean * length) ** 2 for before, after, length in rows)
        return math.sqrt(squares * count / (count - 1)) / self.tokens


def by_transformers(directory: Path, texts: Sequence[Sequence[int]], progress: Progress, **options: Any) -> list[float]:
    """The negative log-likelihood of each text, of a model that is loaded as anybody does.

    Raises:
        DataError: transformers does not load it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from rlflow.actors.pretrained import load_whole

    try:
        model: Any = load_whole(AutoModelForCausalLM, str(directory), dtype="auto", as_stored=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise DataError(f"{directory} cannot be loaded by transformers: {error}") from error
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    sums = []
    with torch.inference_mode():
        for number, token_ids in enumerate(texts, 1):
            ids = torch.tensor([list(token_ids)], device=model.device)
            logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
            sums.append(-logprobs.gather(-1, ids[0, 1:, None]).sum(dtype=torch.float64).item())
            progress(number, len(texts))
    return sums


def by_vllm(directory: Path, texts: Sequence[Sequence[int]], *, trust_remote_code: bool) -> list[float]:
    """The same by vLLM, in a process of its own: it does not give memory back.

    Raises:
        RunError: vLLM ended with an error, or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="rlflow-") as folder:
        asked, answered = Path(folder, "texts.json"), Path(folder, "sums.json")
        asked.write_text(json.dumps([list(ids) for ids in texts]), encoding="utf-8")
        words = [sys.executable, "-m", "rlflow.quantization.vllm_likelihood", str(directory), str(asked), str(answered)]
        words += ["--trust-remote-code"] * trust_remote_code
        try:
            ended = subprocess.run(
                words, capture_output=True, text=True, timeout=VLLM_S, env={**os.environ, "TQDM_DISABLE": "1"}
            )
        except subprocess.TimeoutExpired as error:
            raise RunError(f"vLLM did not measure {directory} within {VLLM_S:.0f} s") from error
        if ended.returncode:
            said = next((line for line in reversed(ended.stderr.splitlines()) if "Error" in line), ended.stderr[-400:])
            raise RunError(f"vLLM cannot measure {directory}: {said}")
        return json.loads(answered.read_text(encoding="utf-8"))
