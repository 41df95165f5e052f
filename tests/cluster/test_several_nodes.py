"""Runs on several nodes: spread over them, and going on when some are lost."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("several_nodes")


@pytest.fixture(scope="module")
def said(directory: Path) -> str:
    """Of a run that loses two of its three nodes."""
    script = Path(__file__).with_name("losing_nodes.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    finished = subprocess.run(
        [sys.executable, script, directory], env=environment, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    return finished.stdout + finished.stderr


def test_a_run_that_is_spread_over_nodes_outlives_the_loss_of_a_rollout_workers_and_of_a_trainers(said, directory):
    assert re.findall(r"lost behind step \d: the node of \S+", said) == [
        "lost behind step 1: the node of rollout[0]",
        "lost behind step 3: the node of trainer[1]",
    ]
    lines = [json.loads(line) for line in (directory / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["step"]] == [1, 2, 3, 4]
    log = (directory / "run/logs/run.log").read_text()
    assert re.search(r"rollout\[0\].* started again", log), log
    assert "the stage goes on with fresh actors (restart 1 of 3)" in log
    assert lines[-1]["fleet/stage_restarts"] == 1
    assert (directory / "run/final/model.safetensors").is_file()


def test_a_node_that_lacks_a_file_is_named_with_the_file_its_key_and_the_remedy(said):
    (line,) = re.findall("^missing: (.*)$", said, re.MULTILINE)
    assert re.fullmatch(
        r"rewards\.0\.plugin: node [\d.]+ \(of rewards, rollout\) does not have /proc/self/cwd/judge\.py: "
        r"put it on a file system that all nodes share, under the same path \(cluster/README\.md\)",
        line,
    )
