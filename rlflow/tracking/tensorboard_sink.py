"""TensorBoard's event files, written by its own writer, without TensorFlow or torch: see child_process.py."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any

_TABLE_TEXT = 400
"""Characters of a text in a table: a dashboard shows all of it at once."""


class Sink:
    """An event file in a run's directory, one more whenever it is resumed.

    Args:
        arguments: ``directory``; ``config``, the recipe as text.
    """

    def __init__(self, arguments: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._event, self._summary, self._tensor = (_proto(name) for name in ("event", "summary", "tensor"))
        writer: Any = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self._writer = writer.EventFileWriter(arguments["directory"], flush_secs=5)
        self._config, self._has_begun = arguments["config"], False
        say(f"tensorboard: `tensorboard --logdir {arguments['directory']}`")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._begin(step)
        self._add(step, [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()])

    def show(
        self,
        step: int,
        histograms: Mapping[str, tuple[Sequence[int], Sequence[float]]],
        samples: Sequence[Mapping[str, Any]],
    ) -> None:
        self._begin(step)
        values = [self._histogram(name, counts, edges) for name, (counts, edges) in histograms.items()]
        if samples:
            values.append(self._text("rollouts/samples", _table(samples)))
        self._add(step, values)

    def finish(self, summary: Mapping[str, float], *, is_whole: bool) -> None:
        self._writer.close()

    def _begin(self, step: int) -> None:
        """Before the first event: TensorBoard forgets what an earlier process wrote for this step and later ones."""
        if self._has_begun:
            return
        self._has_begun = True
        log = self._event.SessionLog
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, session_log=log(status=log.START)))
        self._add(step, [self._text("recipe", f"```yaml\n{self._config}\n```")])

    def _add(self, step: int, values: Sequence[Any]) -> None:
        summary = self._summary.Summary(value=values)
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, summary=summary))

    def _histogram(self, name: str, counts: Sequence[int], edges: Sequence[float]) -> Any:
        """A bucket holds what lies below its limit and not below the one before: the first one nothing."""
        middles = [(low + high) / 2 for low, high in pairwise(edges)]
        histogram = self._summary.HistogramProto(
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
            sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
            bucket_limit=edges,
            bucket=[0, *counts],
        )
        return self._summary.Summary.Value(tag=name, histo=histogram)

    def _text(self, name: str, text: str) -> Any:
        about = self._summary.SummaryMetadata
        metadata = about(plugin_data=about.PluginData(plugin_name="text"))
        tensor = self._tensor.TensorProto(dtype=_proto("types").DT_STRING, string_val=[text.encode()])
        return self._summary.Summary.Value(tag=f"{name}/text_summary", metadata=metadata, tensor=tensor)


def _proto(name: str) -> Any:
    module: ModuleType = importlib.import_module(f"tensorboard.compat.proto.{name}_pb2")
    return module


def _table(samples: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    columns = [column for column in samples[0] if column not in ("step", "prompt_id")]
    rows = [[_cell(sample[column]) for column in columns] for sample in samples]
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    if len(text) > _TABLE_TEXT:
        text = f"{text[: _TABLE_TEXT // 2]} ... {text[-_TABLE_TEXT // 2 :]}"
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("`", "&#96;")
    return " ".join(escaped.split())
