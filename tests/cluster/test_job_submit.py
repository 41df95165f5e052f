"""The cluster path on one machine: a head with token authentication, as cluster/README.md starts it, takes jobs."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from free_ports import free_ports
from readme_commands import head_command

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LEFT_AT_HOME = (".git", ".venv", "runs", "models", ".env")
JUDGE_KEY = "only-where-ray-starts"
HUB_TOKEN = "only-where-submitted"
STEPS = 8

RECIPE = """\
# A few GRPO steps of a tiny new model; its reward is a file beside it, and needs a key.
algorithm: {name: grpo, group_size: 4}
model:
  architecture: {model_type: qwen3, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1,
    num_attention_heads: 2, num_key_value_heads: 1, head_dim: 16, tie_word_embeddings: true}
  characters: "0123456789+="
data: {train: {generator: arithmetic, args: {rows: 8}}, prompts_per_step: 2, max_prompt_tokens: 16}
rewards: [{plugin: "brevity.py:brevity"}]
reward_server: {environment: [JUDGE_KEY]}
rollout: {engine: torch, max_new_tokens: 8}
run: {steps: 8, save_every: 1}
"""
REWARD = """\
import os
import time

import rlflow

assert "_ray_pkg_" in rlflow.__file__, f"not the uploaded rlflow: {rlflow.__file__}"


def brevity(completions, **columns):
    assert os.environ["JUDGE_KEY"] == "only-where-ray-starts"
    time.sleep(1.0 if os.path.exists("SLOW") else 0)
    return [1.0 / (1 + len(completion)) for completion in completions]
"""


@dataclass(frozen=True)
class Head:
    """A head node of its own: its address, the environment that reaches it, where it keeps its files."""

    address: str
    environment: dict[str, str]
    directory: Path
    process: subprocess.Popen[bytes]

    @property
    def token(self) -> str:
        return self.environment["RAY_AUTH_TOKEN"]

    def get(self, path: str, token: str | None) -> tuple[int, str]:
        """The status and the text of an answer."""
        request = urllib.request.Request(f"{self.address}{path}")
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""

    def jobs(self) -> list[dict[str, Any]]:
        return json.loads(self.get("/api/jobs/", self.token)[1])

    def call(self, command: Sequence[str | Path], directory: Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs a command of the person who submits, whose environment has secrets of its own."""
        environment = self.environment | {"HF_TOKEN": HUB_TOKEN} | options.pop("environment", {})
        finished = subprocess.run(
            command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300, **options
        )
        self.assert_up(finished.stdout + finished.stderr)
        return finished

    def assert_up(self, said: str = "") -> None:
        """With the last of what each of its processes wrote, where the head has ended."""
        if self.process.poll() is not None:
            logs = [self.directory / "head.log", *sorted(self.directory.glob("session_2*/logs/*.*"))]
            ends = [f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in logs if path.is_file()]
            pytest.fail("\n\n".join([f"the head ended, status {self.process.returncode}; {said[-1500:]}", *ends]))

    def submit(self, working_dir: Path, *entrypoint: str) -> subprocess.CompletedProcess[str]:
        command = [BIN / "ray", "job", "submit", "--address", self.address, "--working-dir", ".", "--", *entrypoint]
        return self.call(command, working_dir)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Started as cluster/README.md says, on free ports; ended by its own process group, nobody else's."""
    directory = Path(tempfile.mkdtemp(prefix="rlflow-", dir="/tmp"))  # Unix sockets below it: the path must be short.
    port, dashboard, client = free_ports(3)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    command = head_command(
        {
            "--port": port,
            "--dashboard-port": dashboard,
            "--ray-client-server-port": client,
            "--temp-dir": directory,
        }
    )
    command += ["--block", "--num-cpus=4", f"--object-store-memory={200 * 1024**2}"]
    with (directory / "head.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment | {"JUDGE_KEY": JUDGE_KEY}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        started = Head(f"http://127.0.0.1:{dashboard}", environment, directory, process)
        wait_until_up(started)
        yield started
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        finally:
            with_group_gone(process.pid)
            shutil.rmtree(directory, ignore_errors=True)


def wait_until_up(head: Head, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        head.assert_up()
        try:
            head.get("/api/version", None)
            return
        except urllib.error.URLError:
            time.sleep(0.5)
    raise AssertionError(f"no head after {timeout_s} s:\n{(head.directory / 'head.log').read_text()}")


def with_group_gone(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def slow_switch(checkout: Path) -> Path:
    """Where this file is, a step takes a second, which is time to stop the run in its middle."""
    return checkout.parent / "slow"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages, a recipe with its reward, and things that no cluster is to see."""
    directory = tmp_path_factory.mktemp("checkout")
    for package in ("rlflow", "actors", "rewards"):
        shutil.copytree(ROOT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".rayignore", directory)
    (directory / "tiny.yaml").write_text(RECIPE)
    (directory / "brevity.py").write_text(REWARD.replace("SLOW", str(slow_switch(directory))))
    for name in LEFT_AT_HOME:
        (directory / name).mkdir()
        (directory / name / "private").write_text("not for the cluster")
    return directory


def test_the_dashboard_refuses_who_has_no_token(head):
    assert head.get("/api/version", None)[0] == 401
    assert head.get("/api/jobs/", "0" * 64)[0] == 403
    assert head.get("/api/version", head.token)[0] == 200


@pytest.fixture(scope="module")
def undisturbed(head: Head, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a job of plain Ray has trained, without a stop."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    finished = head.submit(checkout, "rlflow", "run", "tiny.yaml", f"run.output_dir={output}")
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    assert "succeeded" in finished.stdout
    assert head.token not in finished.stdout + finished.stderr
    return output


def test_a_job_of_plain_ray_runs_from_an_upload_without_what_stays_at_home(head, undisturbed):
    assert (undisturbed / "final/model.safetensors").is_file()
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


def wait_for(condition: Callable[[], bool], what: Callable[[], str], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def test_a_job_that_is_watched_and_stopped_leaves_a_checkpoint_and_goes_on_to_the_same_parameters(
    head, checkout, undisturbed, tmp_path
):
    output, log = tmp_path / "run", tmp_path / "submit.log"
    submit = [sys.executable, "-m", "rlflow", "submit", "tiny.yaml", f"run.output_dir={output}"]
    submit += ["--address", head.address]
    jobs = {job["submission_id"] for job in head.jobs()}
    slow_switch(checkout).touch()
    with log.open("w") as file:
        watching = subprocess.Popen(submit, cwd=checkout, env=head.environment, stdout=file, stderr=file)
        try:
            wait_for(lambda: re.search(r"step +1/8", log.read_text()) is not None, log.read_text)
            (job,) = {job["submission_id"] for job in head.jobs()} - jobs
            stopped = head.call([BIN / "ray", "job", "stop", "--address", head.address, job], checkout)
            assert stopped.returncode == 0, stopped.stderr
            watching.wait(timeout=120)
        finally:
            slow_switch(checkout).unlink()
            watching.kill()
    text = log.read_text()
    assert watching.returncode == 3, text
    assert re.search(r"stopped after step \d; go on with --resume", text) and f"job {job} was stopped, with a" in text
    assert {found["submission_id"]: found["status"] for found in head.jobs()}[job] == "STOPPED"
    steps = sorted(int(path.name[5:]) for path in (output / "checkpoints").glob("step_*"))
    assert steps and steps[-1] < STEPS and not (output / "final").exists()

    resumed = head.call([*submit, "--resume"], checkout)

    assert resumed.returncode == 0, resumed.stdout[-4000:] + resumed.stderr[-4000:]
    assert f"resumed from step_{steps[-1]:06d}" in resumed.stdout
    name = "final/model.safetensors"
    assert (output / name).read_bytes() == (undisturbed / name).read_bytes()


def test_secrets_come_from_where_ray_starts_and_are_in_nothing_that_a_job_shows_or_leaves(head, undisturbed):
    """The reward of each run has asked for the key."""
    shown = head.get("/api/jobs/", head.token)[1]
    (job,) = [job for job in head.jobs() if str(undisturbed) in job["entrypoint"]]
    assert "_ray_pkg_" in job["runtime_env"]["working_dir"]
    left = [path for path in undisturbed.rglob("*") if path.is_file()]
    logs = [path for path in head.directory.glob("session_latest/logs/**/*") if path.is_file()]
    assert {"run.log", "recipe.yaml"} <= {path.name for path in left} and f"job-driver-{job['submission_id']}.log" in {
        path.name for path in logs
    }
    for secret in (JUDGE_KEY, HUB_TOKEN, head.token):
        assert secret not in shown
        assert [path for path in [*left, *logs] if secret.encode() in path.read_bytes()] == []


def test_a_refused_token_is_one_line(head, checkout):
    submit = [sys.executable, "-m", "rlflow", "submit", "tiny.yaml", "--address", head.address, "run.output_dir=/x"]
    refused = head.call(submit, checkout, environment={"RAY_AUTH_TOKEN": "0" * 64})
    assert refused.returncode == 1 and refused.stdout == ""
    assert "refuses the token of RAY_AUTH_TOKEN" in refused.stderr and len(refused.stderr.splitlines()) == 1
