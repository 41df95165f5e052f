"""trackio, in its own process: see child_process.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Sink:
    """One trackio run: in the user's own trackio directory, or where trackio's variables say.

    Args:
        arguments: Of ``trackio.init``.
    """

    def __init__(self, arguments: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        self._run = self._trackio.init(**arguments, embed=False, auto_log_gpu=False, auto_log_cpu=False)
        say(f"trackio: `trackio show --project {arguments['project']}`, run {arguments['name']}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def show(
        self,
        step: int,
        histograms: Mapping[str, tuple[Sequence[int], Sequence[float]]],
        samples: Sequence[Mapping[str, Any]],
    ) -> None:
        shown: dict[str, Any] = {name: self._trackio.Histogram(np_histogram=both) for name, both in histograms.items()}
        if samples:
            shown["rollouts/samples"] = self._trackio.Table(data=[dict(sample) for sample in samples])
        self._run.log(shown, step=step)

    def finish(self, summary: Mapping[str, float], *, is_whole: bool) -> None:
        if summary:
            self._run.log(dict(summary))
        self._run.finish()
