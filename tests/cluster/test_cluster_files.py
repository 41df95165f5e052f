"""What the files of cluster/ promise: authentication on, the dashboard closed, recipes that exist, a lean upload."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlflow.cli.submit import EXCLUDES

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for path in (ROOT / "cluster").iterdir() if path.is_file())
STARTS_A_HEAD = [path for path in FILES if path.suffix in (".yaml", ".sh") and "--head" in path.read_text()]


def test_every_head_is_started_with_a_token_and_a_dashboard_on_loopback():
    assert [path.name for path in STARTS_A_HEAD] == ["ray-up.yaml", "slurm.sh"]
    for path in STARTS_A_HEAD:
        text = path.read_text()
        assert "RAY_AUTH_MODE=token" in text, path
        assert re.findall(r"--dashboard-host=(\S+)", text) == ["127.0.0.1"], path


def test_every_command_that_starts_ray_asks_for_a_token_by_itself():
    lines = [
        line for path in FILES for line in path.read_text().replace("\\\n", " ").splitlines() if "ray start -" in line
    ]
    assert len(lines) == 6
    exported = (ROOT / "cluster/slurm.sh").read_text().partition("ray start")[0]
    assert "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN\n" in exported
    assert [line for line in lines if "on_nodes" not in line and "RAY_AUTH_MODE=token" not in line] == []


def test_a_head_on_all_addresses_without_a_token_is_refused(tmp_path):
    """As the files of cluster/ start it: Ray does not start where it has no token to ask for."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    command = [Path(sys.executable).parent / "ray", "start", "--head", "--dashboard-host", "0.0.0.0"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert finished.returncode != 0
    assert "no authentication token was found" in finished.stderr


def test_the_rayjob_has_a_token_and_lets_nobody_but_the_operator_and_itself_in():
    job, policy = yaml.safe_load_all((ROOT / "cluster/rayjob.yaml").read_text())
    cluster = job["spec"]["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]

    assert cluster["authOptions"] == {"mode": "token"}
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    for pod in pods:
        assert pod["template"]["metadata"]["labels"].items() >= policy["spec"]["podSelector"]["matchLabels"].items()
        for variable in pod["template"]["spec"]["containers"][0]["env"]:
            assert "valueFrom" in variable or not re.search("KEY|TOKEN|SECRET", variable["name"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_recipes_that_a_cluster_file_names_exist(path):
    assert [name for name in re.findall(r"recipes/[\w/]+\.yaml", path.read_text()) if not (ROOT / name).is_file()] == []


def test_a_plain_ray_job_leaves_at_home_what_rlflow_submit_does():
    assert set(EXCLUDES) <= set((ROOT / ".rayignore").read_text().splitlines())
