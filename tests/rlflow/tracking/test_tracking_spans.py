"""Traces: who did what and when, and how busy each role was. Times are by hand."""

from __future__ import annotations

import json

import pytest

from rlflow.tracking.spans import Span, Trace, busy_metrics, write_trace

SPANS = [
    Span("driver", "train", 10.0, 20.0),
    Span("trainer[0]", "forward_backward", 10.0, 14.0),
    Span("trainer[0]", "optim_step", 13.0, 16.0),
    Span("trainer[1]", "forward_backward", 10.0, 12.0),
    Span("rollout[0]", "generate", 5.0, 15.0),
    Span("rollout[0]", "wait", 15.0, 19.0),
]


def test_a_role_is_as_busy_as_its_actors_in_the_mean_and_what_overlaps_counts_once():
    # Of ten seconds: 10 to 16 and 10 to 12; the worker's 5 to 15 from 10 on, and not what it waited.
    assert busy_metrics(SPANS, 10.0, 20.0) == pytest.approx({"busy/trainer": (0.6 + 0.2) / 2, "busy/rollout": 0.5})


def test_a_file_has_a_thread_an_actor_and_an_event_a_span_in_microseconds(tmp_path):
    write_trace(tmp_path / "traces" / "step_000001.json", SPANS)
    events = json.loads((tmp_path / "traces" / "step_000001.json").read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert sorted(names.values()) == ["driver", "rollout[0]", "trainer[0]", "trainer[1]"] and names[0] == "driver"
    spans = [(names[e["tid"]], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert spans[0] == ("rollout[0]", "generate", 5_000_000, 10_000_000)
    assert ("trainer[0]", "optim_step", 13_000_000, 3_000_000) in spans and len(spans) == 6


def test_what_is_taken_is_gone():
    trace = Trace()
    trace.add("driver", "train", 1.0, 2.0)
    assert trace.take() == [Span("driver", "train", 1.0, 2.0)]
    assert trace.take() == []
