"""ReferenceModel: the frozen model of the KL term and of preference losses. Each actor holds a whole copy."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from rlflow.garbage import without_collection
from rlflow.recipe import ModelBlock
from rlflow.types import MicroBatch


class ReferenceModel:
    @without_collection()
    def __init__(
        self, model: ModelBlock, *, gpus: float, num_threads: int, seed: int, tokens_of: ModelBlock | None = None
    ) -> None:
        """
        Args:
            tokens_of: See load_token_model.
        """
        import torch

        from rlflow.actors.train_engines.token_model import load_token_model

        started = time.perf_counter()
        torch.set_num_threads(num_threads)
        self.device = torch.device("cuda" if gpus else "cpu")
        self.module = load_token_model(model, seed=seed, device=self.device, tokens_of=tokens_of)
        self.module.requires_grad_(False)
        self._seconds = time.perf_counter() - started

    def ready(self) -> float:
        """Seconds the model took to load."""
        return self._seconds

    def logprobs(self, micro_batches: Sequence[MicroBatch], temperature: float = 1.0) -> np.ndarray:
        """Log-probabilities of the loss tokens, float32 [N] of the micro-batches end to end."""
        from rlflow.actors.train_engines.token_model import score

        return score(self.module, micro_batches, self.device, temperature)
