"""`rlflow submit`: what it sends, how it ends, and what it says of a cluster that cannot take the job."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.job_submission
from packaging.requirements import Requirement
from ray.job_submission import JobStatus

from rlflow import ray_jobs
from rlflow.cli import submit
from rlflow.cli.main import main

RECIPE = """\
algorithm: {name: sft}
model: {architecture: {model_type: llama}, characters: "0123456789+="}
data: {train: {generator: arithmetic, args: {digits: 1}}, max_tokens: 32}
run: {steps: 1, output_dir: /shared/run}
"""
TOKEN = "t" * 64
PROXIES = ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY")


class Dashboard(ThreadingHTTPServer):
    """Answers as the dashboard of a head does that has a token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ray_version = version("ray")
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Dashboard

    def do_GET(self) -> None:
        given = self.headers.get("Authorization")
        status = 401 if given is None else 200 if given == f"Bearer {TOKEN}" else 403
        body = json.dumps({"ray_version": self.server.ray_version}) if status == 200 else "no"
        self.send_response(status if self.path == "/api/version" else 404)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Dashboard]:
    """Has a token, which the environment has too."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", *PROXIES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    # What it sets is undone at the end.
    monkeypatch.setattr(submit, "use_dashboard", lambda url: monkeypatch.setenv("RAY_API_SERVER_ADDRESS", url))
    with Dashboard() as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


class FakeClient:
    """Stands for Ray's job client."""

    status = JobStatus.SUCCEEDED
    exit_code: int | None = 0
    log = ("step 1\n", "step 2\n")
    submitted: dict[str, Any]
    refusal: Exception | None = None

    def __init__(self, address: str, headers: dict[str, str]) -> None:
        FakeClient.submitted = {"address": address, "headers": headers}

    def submit_job(self, **given: object) -> str:
        if self.refusal is not None:
            raise self.refusal
        FakeClient.submitted |= given
        return "job-1"

    async def tail_job_logs(self, job: str):
        for text in self.log:
            yield text

    def get_job_info(self, job: str) -> SimpleNamespace:
        return SimpleNamespace(status=self.status, message="it says why", driver_exit_code=self.exit_code)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", FakeClient)
    return FakeClient


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_submit_sends_the_run_and_follows_its_log(recipe_file, client, dashboard, capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://another:8265")
    overrides = ["run.steps=2", "data.system=a b", "run.output_dir=runs/x"]
    assert main(["submit", "recipe.yaml", *overrides, "--address", f"{dashboard.url}/", "--resume"]) == 0
    output = capsys.readouterr()
    assert output.out == "step 1\nstep 2\n"
    assert "set run.output_dir to a directory that every node shares" in output.err
    entrypoint = "python -m rlflow run recipe.yaml run.steps=2 'data.system=a b' run.output_dir=runs/x --resume"
    assert client.submitted["entrypoint"] == entrypoint
    assert client.submitted["runtime_env"]["working_dir"] == str(recipe_file.parent)
    # Ray's client prefers the variable to the address that it is given.
    assert client.submitted["address"] == os.environ["RAY_API_SERVER_ADDRESS"] == dashboard.url
    assert client.submitted["headers"] == {"Authorization": f"Bearer {TOKEN}"}


def test_nothing_secret_of_the_environment_is_part_of_a_job(recipe_file, client, dashboard, capsys, monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, "hunter2-hunter2")
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "60")
    assert main(["submit", "recipe.yaml", "--address", dashboard.url]) == 0
    sent = client.submitted
    assert sent["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    assert "hunter2" not in str(sent) and TOKEN not in str(sent["runtime_env"]) + sent["entrypoint"]
    output = capsys.readouterr()
    assert "hunter2" not in output.out + output.err and TOKEN not in output.out + output.err


@pytest.mark.parametrize(
    ("status", "exit_code", "last", "expected", "said"),
    [
        (JobStatus.FAILED, 3, "step 2\n", 3, "FAILED: exit code 3"),
        (JobStatus.FAILED, 2, "step 2\n", 2, "FAILED: exit code 2"),
        (JobStatus.FAILED, None, "", 1, "FAILED: it says why"),
        (JobStatus.STOPPED, None, "stopped after step 2; go on with --resume\n", 3, "submit it again with --resume"),
        (JobStatus.STOPPED, None, "stopped before anything was saved\n", 1, "STOPPED"),
        (JobStatus.RUNNING, None, "step 2\n", 1, "its log has ended, and it is RUNNING); it goes on: ray job logs"),
    ],
)
def test_submit_ends_as_its_job_did(
    status, exit_code, last, expected, said, recipe_file, client, dashboard, monkeypatch, capsys
):
    monkeypatch.setattr(client, "status", status)
    monkeypatch.setattr(client, "exit_code", exit_code)
    monkeypatch.setattr(client, "log", ("step 1\n", last))
    assert main(["submit", "recipe.yaml", "--address", dashboard.url]) == expected
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_submit_says_what_is_wrong_before_it_asks_the_cluster(recipe_file, monkeypatch, capsys):
    assert main(["submit", "recipe.yaml", "run.stesp=1"]) == 2
    (recipe_file.parent / "elsewhere").mkdir()
    monkeypatch.chdir(recipe_file.parent / "elsewhere")
    assert main(["submit", "../recipe.yaml"]) == 2
    assert "go to a directory that holds it" in capsys.readouterr().err


def refusal_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a submission that fails."""
    capsys.readouterr()
    assert main(["submit", "recipe.yaml", *arguments]) == 1
    output = capsys.readouterr()
    assert output.out == "" and len(output.err.splitlines()) == 1
    return output.err


def test_a_dashboard_that_is_not_there_or_says_nothing_is_one_line(recipe_file, dashboard, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    said = refusal_of(capsys, "--address", f"http://127.0.0.1:{port}")
    assert f"no dashboard of a Ray cluster answers at http://127.0.0.1:{port} (Connection refused)" in said
    assert "bring its dashboard here with ssh -L" in said
    monkeypatch.setattr(submit, "require_dashboard", lambda url: ray_jobs.require_dashboard(url, timeout_s=0.1))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "(nothing within 0.1 s)" in refusal_of(capsys)
    assert "127.0.0.1:6379 is not the URL of a dashboard" in refusal_of(capsys, "--address", "127.0.0.1:6379")


def test_a_token_that_is_missing_or_refused_is_one_line_that_says_where_it_came_from(
    recipe_file, client, dashboard, monkeypatch, capsys, tmp_path
):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong-wrong-wrong")
    said = refusal_of(capsys, "--address", dashboard.url)
    assert "refuses the token of RAY_AUTH_TOKEN: set RAY_AUTH_TOKEN as the cluster has it" in said
    assert "wrong-wrong" not in said
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    assert "asks for a token, and there is none here" in refusal_of(capsys, "--address", dashboard.url)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("wrong-wrong-wrong\n")
    assert f"refuses the token of {tmp_path}/.ray/auth_token" in refusal_of(capsys, "--address", dashboard.url)
    (tmp_path / ".ray/auth_token").write_text(f"{TOKEN}\n")
    assert main(["submit", "recipe.yaml", "--address", dashboard.url]) == 0
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "asks for a token, and RAY_AUTH_MODE is disabled" in refusal_of(capsys, "--address", dashboard.url)


def test_a_cluster_with_another_ray_is_told_and_one_that_is_too_old_refused(recipe_file, client, dashboard, capsys):
    dashboard.ray_version = "2.51.2"
    assert "has Ray 2.51.2, and rlflow needs 2.52 or newer" in refusal_of(capsys, "--address", dashboard.url)
    dashboard.ray_version = "3.1.0"
    assert main(["submit", "recipe.yaml", "--address", dashboard.url]) == 0
    assert "the cluster has Ray 3.1.0, here is" in capsys.readouterr().err
    project = tomllib.loads(Path(__file__).parents[3].joinpath("pyproject.toml").read_text())["project"]
    (needed,) = [need for need in map(Requirement, project["dependencies"]) if need.name == "ray"]
    assert str(needed.specifier) == f">={ray_jobs.OLDEST_RAY}"


def test_what_answers_and_is_no_dashboard_is_named(recipe_file, dashboard, capsys):
    assert "is no dashboard of a Ray cluster (HTTP 404)" in refusal_of(capsys, "--address", f"{dashboard.url}/x")


def test_a_proxy_that_stands_before_the_dashboard_is_named(recipe_file, client, dashboard, monkeypatch, capsys):
    monkeypatch.setenv("http_proxy", dashboard.url)
    said = refusal_of(capsys, "--address", "http://head:8265")
    assert said.endswith("(HTTP 404): a proxy is asked, of the environment: export NO_PROXY=head\n")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert main(["submit", "recipe.yaml", "--address", dashboard.url]) == 0


def test_what_the_cluster_says_against_a_job_is_one_line(recipe_file, client, dashboard, monkeypatch, capsys):
    trace = RuntimeError("Request failed with status code 500: Traceback (most recent call last):\n ...\nOSError: full")
    for refusal, said in ((trace, "OSError: full"), (ValueError("Package size (600MiB) exceeds"), "Package size")):
        monkeypatch.setattr(client, "refusal", refusal)
        assert f"the job could not be submitted: {said}" in refusal_of(capsys, "--address", dashboard.url)


def test_the_working_directory_travels_without_environments_repositories_and_results(tmp_path: Path):
    (tmp_path / "my-environment").mkdir()
    (tmp_path / "my-environment" / "pyvenv.cfg").write_text("")
    excludes = submit.make_runtime_env(tmp_path)["excludes"]
    assert {"/my-environment", ".git", "/runs", "/checkpoints", "/models", ".venv*", ".env"} <= set(excludes)


def test_an_interrupted_submit_leaves_the_job_and_says_so(client, monkeypatch, capsys):
    async def interrupted(self: FakeClient, job: str):
        yield "step 1\n"
        raise asyncio.CancelledError

    monkeypatch.setattr(client, "tail_job_logs", interrupted)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(submit.submit("http://head", "x", {}))
    assert "job job-1 goes on; to end it: ray job stop --address http://head job-1" in capsys.readouterr().err
