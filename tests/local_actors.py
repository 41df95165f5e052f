"""Runs of a test without Ray: rlflow.in_process in the place of rlflow.placement.

A whole run takes a second instead of half a minute. What only real actors show (several ranks of a trainer, the death
of a process) is tested with Ray.
"""

from __future__ import annotations

from typing import Any

from rlflow import in_process


def use_local_actors(monkeypatch: Any) -> None:
    """Runs of this test place their actors in this process."""
    monkeypatch.setattr("rlflow.driver.run.place", in_process.place)
    monkeypatch.setattr("rlflow.driver.run.start_ray", lambda recipes: False)
