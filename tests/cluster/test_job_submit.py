"""The cluster path on one machine: a head with token authentication takes a job, and a recipe runs in it."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LEFT_AT_HOME = (".git", ".venv", "runs", "models", ".env")

RECIPE = """\
# One GRPO step of a tiny new model; its reward is a file beside it.
algorithm: {name: grpo, group_size: 4}
model:
  architecture: {model_type: qwen3, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1,
    num_attention_heads: 2, num_key_value_heads: 1, head_dim: 16, tie_word_embeddings: true}
  characters: "0123456789+="
data: {train: {generator: arithmetic, args: {rows: 8}}, prompts_per_step: 2, max_prompt_tokens: 16}
rewards: [{plugin: "brevity.py:brevity"}]
rollout: {engine: torch, max_new_tokens: 8}
run: {steps: 1}
"""
REWARD = """\
import rlflow

assert "_ray_pkg_" in rlflow.__file__, f"not the uploaded rlflow: {rlflow.__file__}"


def brevity(completions, **columns):
    return [1.0 / (1 + len(completion)) for completion in completions]
"""


@dataclass(frozen=True)
class Head:
    """A head node of its own: its address, the environment that reaches it, where it keeps its files."""

    address: str
    environment: dict[str, str]
    directory: Path

    def status_of(self, path: str, token: str | None) -> int:
        request = urllib.request.Request(f"{self.address}{path}")
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            return urllib.request.urlopen(request, timeout=10).status
        except urllib.error.HTTPError as error:
            return error.code

    def submit(self, working_dir: Path, *entrypoint: str) -> subprocess.CompletedProcess[str]:
        command = [BIN / "ray", "job", "submit", "--address", self.address, "--working-dir", ".", "--", *entrypoint]
        return subprocess.run(
            command, cwd=working_dir, env=self.environment, capture_output=True, text=True, timeout=300
        )


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Started as cluster/README.md says, on free ports; ended by its own process group, nobody else's."""
    directory = Path(tempfile.mkdtemp(prefix="rlflow-", dir="/tmp"))  # Unix sockets below it: the path must be short.
    port, dashboard, agent, client = free_ports(4)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    command = [BIN / "ray", "start", "--head", "--block", f"--port={port}", f"--temp-dir={directory}", "--num-cpus=4"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--ray-client-server-port={client}", f"--object-store-memory={200 * 1024**2}"]
    with (directory / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        started = Head(f"http://127.0.0.1:{dashboard}", environment, directory)
        wait_until_up(started, process)
        yield started
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        finally:
            with_group_gone(process.pid)
            shutil.rmtree(directory, ignore_errors=True)


def wait_until_up(head: Head, process: subprocess.Popen[bytes], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, (head.directory / "head.log").read_text()
        try:
            head.status_of("/api/version", None)
            return
        except urllib.error.URLError:
            time.sleep(0.5)
    raise AssertionError(f"no head after {timeout_s} s:\n{(head.directory / 'head.log').read_text()}")


def with_group_gone(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages, a recipe with its reward, and things that no cluster is to see."""
    directory = tmp_path_factory.mktemp("checkout")
    for package in ("rlflow", "actors", "rewards"):
        shutil.copytree(ROOT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".rayignore", directory)
    (directory / "tiny.yaml").write_text(RECIPE)
    (directory / "brevity.py").write_text(REWARD)
    for name in LEFT_AT_HOME:
        (directory / name).mkdir()
        (directory / name / "private").write_text("not for the cluster")
    return directory


def test_the_dashboard_refuses_who_has_no_token(head):
    assert head.status_of("/api/version", None) == 401
    assert head.status_of("/api/jobs/", "0" * 64) == 403
    assert head.status_of("/api/version", head.environment["RAY_AUTH_TOKEN"]) == 200


def test_a_submitted_recipe_runs_from_an_upload_without_what_stays_at_home(head, checkout, tmp_path):
    output = tmp_path / "run"

    finished = head.submit(checkout, "rlflow", "run", "tiny.yaml", f"run.output_dir={output}")

    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    assert "succeeded" in finished.stdout
    assert head.environment["RAY_AUTH_TOKEN"] not in finished.stdout + finished.stderr
    assert (output / "final/model.safetensors").is_file()
    # session_latest is a link to the session itself.
    found = head.directory.glob("session_*/**/working_dir_files/*")
    (uploaded,) = {path.resolve() for path in found if path.is_dir()}
    names = {path.name for path in uploaded.iterdir()}
    assert names >= {"rlflow", "actors", "rewards", "tiny.yaml"}
    assert not names & set(LEFT_AT_HOME)


def test_a_run_that_cannot_start_fails_its_job(head, checkout):
    finished = head.submit(checkout, "rlflow", "run", "missing.yaml")

    assert finished.returncode != 0
    assert "failed with exit code 2" in finished.stdout
