"""wandb, in its own process: see child_process.py."""

from __future__ import annotations

import importlib
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

INIT_SECONDS = 30.0


class Sink:
    """One wandb run: metrics over ``step``, histograms, and a table of samples.

    Args:
        arguments: Of ``wandb.init``.
    """

    def __init__(self, arguments: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        self._run = self._start(arguments, say)
        # A resumed run keeps the settings that it was begun with unless it is told.
        self._run.config.update(arguments["config"], allow_val_change=True)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        if self._run.offline:
            say(f"wandb: offline; `wandb sync {shlex.quote(os.path.dirname(self._run.dir))}` uploads it")
        elif self._run.url:
            say(f"wandb: {self._run.url}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, "step": step})

    def show(
        self,
        step: int,
        histograms: Mapping[str, tuple[Sequence[int], Sequence[float]]],
        samples: Sequence[Mapping[str, Any]],
    ) -> None:
        shown: dict[str, Any] = {name: self._wandb.Histogram(np_histogram=both) for name, both in histograms.items()}
        if samples:
            columns = list(samples[0])
            rows = [[sample[column] for column in columns] for sample in samples]
            shown["rollouts/samples"] = self._wandb.Table(columns=columns, data=rows, allow_mixed_types=True)
        if shown:
            self._run.log({**shown, "step": step})

    def finish(self, summary: Mapping[str, float], *, is_whole: bool) -> None:
        self._run.summary.update(summary)
        self._run.finish(exit_code=0 if is_whole else 1)

    def _start(self, arguments: Mapping[str, Any], say: Callable[[str], None]) -> Any:
        """Starts the run, offline when the service cannot be reached or refuses it."""
        wandb = self._wandb
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=INIT_SECONDS, disable_git=True, save_code=False, disable_code=True
        )
        try:
            return wandb.init(settings=settings, **arguments)
        except wandb.Error as error:
            say(f"wandb takes no run, it is kept offline: {str(error).splitlines()[0]}")
            wandb.teardown(exit_code=1)
            return wandb.init(settings=settings, **{**arguments, "mode": "offline"})
