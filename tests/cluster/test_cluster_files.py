"""What the files of cluster/ promise: authentication on, the dashboard closed, recipes that exist, a lean upload."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from readme_commands import head_command

from rlflow import __version__
from rlflow.cli.submit import EXCLUDES
from rlflow.doctor.surroundings import PORTS
from rlflow.recipe import load_recipe
from rlflow.roles import roles

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads(Path(__file__).with_name("schemas").joinpath("kuberay_rayjob.json").read_text())
"""KubeRay's, of the oldest operator that cluster/README.md names."""
FILES = sorted(path for path in (ROOT / "cluster").iterdir() if path.is_file())
STARTS_A_HEAD = [path for path in FILES if path.suffix in (".yaml", ".sh") and "--head" in path.read_text()]


def test_every_head_is_started_with_a_token_and_a_dashboard_on_loopback():
    assert [path.name for path in STARTS_A_HEAD] == ["ray-up.yaml", "slurm.sh"]
    for path in STARTS_A_HEAD:
        text = path.read_text()
        assert "RAY_AUTH_MODE=token" in text, path
        assert re.findall(r"--dashboard-host=(\S+)", text) == ["127.0.0.1"], path


def test_the_head_of_the_readme_takes_no_port_that_another_ray_has_by_default():
    from ray._private import ray_constants

    given = dict(itertools.pairwise(head_command()))
    fixed = {name: int(given[name]) for name in ("--port", "--dashboard-port", "--ray-client-server-port")}
    # 0 is whichever port is free.
    for name in ("--dashboard-agent-listen-port", "--min-worker-port", "--max-worker-port"):
        assert given[name] == "0"
    of_ray = {ray_constants.DEFAULT_PORT, ray_constants.DEFAULT_DASHBOARD_PORT, 10001}
    of_its_workers = range(10002, 20000)
    assert not of_ray & set(fixed.values()) and not [port for port in fixed.values() if port in of_its_workers]
    assert given["--temp-dir"] != "/tmp/ray"
    assert {port: text.rpartition(" ")[2] for port, text in PORTS.items()} == {
        port: name for name, port in fixed.items()
    }


def test_every_command_that_starts_ray_asks_for_a_token_by_itself():
    lines = [
        line for path in FILES for line in path.read_text().replace("\\\n", " ").splitlines() if "ray start -" in line
    ]
    assert len(lines) == 6
    exported = (ROOT / "cluster/slurm.sh").read_text().partition("ray start")[0]
    assert "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN\n" in exported
    assert [line for line in lines if "on_nodes" not in line and "RAY_AUTH_MODE=token" not in line] == []


@pytest.mark.slow
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


def rayjob() -> Any:
    return next(yaml.safe_load_all((ROOT / "cluster/rayjob.yaml").read_text()))


def pods_of(job: Any) -> list[Any]:
    """The pod of the head, and those of the groups of workers."""
    cluster = job["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def bytes_of(quantity: str) -> int:
    return int(quantity.removesuffix("Gi")) << 30


def test_kuberay_takes_the_rayjob():
    assert [error.message for error in Draft202012Validator(SCHEMA).iter_errors(rayjob())] == []


@pytest.mark.parametrize(
    ("where", "field", "value", "message"),
    [
        ([], "backofLimit", 3, "'backofLimit' was unexpected"),
        (["rayClusterSpec", "authOptions"], "mode", "tokens", "'tokens' is not one of"),
        (["rayClusterSpec", "workerGroupSpecs", 0], "minReplicas", "1", "'1' is not of type 'integer'"),
        (["rayClusterSpec", "headGroupSpec", "template", "spec"], "tolerations", {}, "{} is not of type 'array'"),
        (["rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0], "imagePull", "Always", "unexpected"),
    ],
)
def test_kuberay_refuses_a_rayjob_with_a_slip(where, field, value, message):
    job = copy.deepcopy(rayjob())
    block = job["spec"]
    for key in where:
        block = block[key]
    block[field] = value
    (error,) = Draft202012Validator(SCHEMA).iter_errors(job)
    assert message in error.message


def test_pods_of_the_rayjob_reserve_what_they_use_and_share_the_volume_of_the_checkpoints():
    for pod in pods_of(rayjob()):
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert mounted["/shared"]["persistentVolumeClaim"] == {"claimName": "rlflow"}
        assert mounted["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        # It counts as memory of the container.
        assert bytes_of(mounted["/dev/shm"]["emptyDir"]["sizeLimit"]) < bytes_of(
            container["resources"]["limits"]["memory"]
        )


def test_pods_with_gpus_and_no_others_wait_for_nodes_with_gpus():
    head, worker = pods_of(rayjob())
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"] and "nodeSelector" not in head
    assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert worker["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert worker["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]


def test_the_recipe_of_the_rayjob_fits_its_pods_and_a_job_that_is_tried_again_goes_on():
    job = rayjob()
    program, command, path, *overrides, last = shlex.split(job["spec"]["entrypoint"])
    assert (program, command, last) == ("rlflow", "run", "--resume") and job["spec"]["backoffLimit"] == 3
    (recipe,) = load_recipe(ROOT / Path(path).relative_to("/opt/rlflow"), overrides)
    assert recipe.run.output_dir.startswith("/shared/")
    (worker,) = pods_of(job)[1:]
    limits = worker["containers"][0]["resources"]["limits"]
    for name, resource in (("cpus", "cpu"), ("gpus", "nvidia.com/gpu")):
        wanted = sum(Decimal(str(getattr(role, name))) * role.workers for role in roles(recipe))
        assert wanted <= Decimal(limits[resource]), name


def test_ray_up_takes_its_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster/ray-up.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    with pytest.raises(Exception, match="'max_worker' was unexpected"):
        validate_config(prepare_config({**config, "max_worker": 1}))


def test_the_shell_takes_slurm_sh():
    """Where shellcheck is installed it looks, too."""
    for command in (["bash", "-n"], *([["shellcheck"]] if shutil.which("shellcheck") else [])):
        finished = subprocess.run([*command, ROOT / "cluster/slurm.sh"], capture_output=True, text=True, timeout=30)
        assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


def test_what_the_dockerfile_copies_and_installs_is_there_for_cpus_and_for_gpus():
    text = (ROOT / "cluster/Dockerfile").read_text()
    ignored = (ROOT / "cluster/Dockerfile.dockerignore").read_text().split()
    copied = [name for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert copied == ["pyproject.toml", "README.md", "requirements", "."]
    assert [name for name in copied if not (ROOT / name).exists() or name in ignored] == []
    version = re.search(r"^FROM python:(\d+\.\d+)-slim", text, re.MULTILINE)
    setup = (ROOT / "requirements/setup_env.py").read_text()
    assert version is not None and f"({version[1].replace('.', ', ')})" in setup
    assert re.findall(r"^ARG SET=(\w+)$", text, re.MULTILINE) == ["gpu"]
    images = [image for path in FILES for image in re.findall(r"REGISTRY/rlflow:([\d.]+\d)", path.read_text())]
    assert len(images) == 4 and set(images) == {__version__}
    for of_machine in ("cpu", "gpu"):
        pins = (ROOT / "requirements" / f"{of_machine}.txt").read_text()
        assert f"ray=={rayjob()['spec']['rayClusterSpec']['rayVersion']}\n" in pins


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_recipes_that_a_cluster_file_names_exist(path):
    assert [name for name in re.findall(r"recipes/[\w/]+\.yaml", path.read_text()) if not (ROOT / name).is_file()] == []


def test_a_plain_ray_job_leaves_at_home_what_rlflow_submit_does():
    assert set(EXCLUDES) <= set((ROOT / ".rayignore").read_text().splitlines())
