"""requirements/setup_env.py: what it finds to differ, what it does about it, and what it says when it cannot."""

from __future__ import annotations

import importlib.util
import json
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def load_setup_env():
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "requirements/setup_env.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup_env(tmp_path, monkeypatch):
    """The module, aimed at an empty environment below ``tmp_path``."""
    module = load_setup_env()
    monkeypatch.setattr(module, "VENV", tmp_path / "venv")
    monkeypatch.setattr(module, "LOG", tmp_path / "venv/setup.log")
    (tmp_path / "venv/bin").mkdir(parents=True)
    return module


@pytest.fixture
def site(tmp_path):
    """A site-packages directory that holds pip and this checkout's rlflow."""
    path = tmp_path / "venv/lib/python3.12/site-packages"
    path.mkdir(parents=True)
    (path / "pip").mkdir()
    (tmp_path / "venv/bin/python").write_text("")
    install_project(path, ROOT)
    (path / "rlflow_torchvision.pth").write_text("")
    return path


def install(site: Path, name: str, version: str, complete: bool = True) -> Path:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if complete:
        (info / "INSTALLER").write_text("pip\n")
    return info


def install_project(site: Path, checkout: Path, version: str = PROJECT["version"]) -> None:
    info = install(site, "rlflow", version)
    (info / "direct_url.json").write_text(json.dumps({"url": checkout.as_uri(), "dir_info": {"editable": True}}))
    commands = "\n".join(f"{name} = {target}" for name, target in PROJECT["scripts"].items())
    (info / "entry_points.txt").write_text(f"[console_scripts]\n{commands}\n")


def test_an_environment_as_pinned_needs_nothing(setup_env, site):
    install(site, "ray", "2.60.0")
    install(site, "typing_extensions", "4.16.0")

    plan = setup_env.compare(site, {"ray": "2.60.0", "typing-extensions": "4.16.0"}, ("torchvision",))

    assert plan.empty
    assert plan.drifted == []


def test_a_drifted_version_is_named_and_installed_again(setup_env, site):
    install(site, "ray", "2.59.0")

    plan = setup_env.compare(site, {"ray": "2.60.0", "numpy": "2.3.5"}, ())

    assert plan.install == {"ray": "2.60.0", "numpy": "2.3.5"}
    assert plan.drifted == ["ray 2.59.0 != 2.60.0"]
    assert plan.missing == ["numpy"]


def test_a_half_installed_distribution_is_installed_again(setup_env, site):
    info = install(site, "ray", "2.60.0", complete=False)

    plan = setup_env.compare(site, {"ray": "2.60.0"}, ())
    setup_env.forget_incomplete(site)

    assert plan.install == {"ray": "2.60.0"}
    assert plan.drifted == ["ray is half installed"]
    assert not info.exists()


def test_what_breaks_a_set_is_removed_from_it(setup_env, site):
    install(site, "torchcodec", "0.17.0")

    plan = setup_env.compare(site, {}, setup_env.CONFLICTS["cpu"])

    assert plan.remove == ["torchcodec"]
    assert plan.drifted == ["torchcodec 0.17.0 must not be in this set"]


@pytest.mark.parametrize(
    ("installed", "pinned", "same"),
    [
        ("2.13.0+cpu", "2.13.0+cpu", True),
        ("2.13.0+cu130", "2.13.0+cpu", False),
        ("2.13.0", "2.13.0+cpu", False),
        ("2.13.0+cu130", "2.13.0", True),
        ("2.13.1", "2.13.0", False),
    ],
)
def test_a_pin_without_a_local_version_accepts_any(setup_env, installed, pinned, same):
    assert setup_env.matches(installed, pinned) is same


def test_rlflow_is_installed_again_after_a_change_of_version_or_commands(setup_env, site):
    assert not setup_env.compare(site, {}, ()).project
    next(site.glob("rlflow-*/entry_points.txt")).write_text("[console_scripts]\nold = rlflow.cli:old\n")
    assert setup_env.compare(site, {}, ()).project


def test_rlflow_is_installed_again_where_its_hook_is_missing(setup_env, site):
    (site / "rlflow_torchvision.pth").unlink()
    assert setup_env.compare(site, {}, ()).project


def test_an_environment_of_another_directory_is_made_anew(setup_env, site, tmp_path, capsys):
    install_project(site, tmp_path)

    assert setup_env.site_packages(setup_env.VENV) is None
    assert "was made for another directory" in capsys.readouterr().out


def test_a_complete_environment_starts_no_process(setup_env, site, monkeypatch):
    pins = {**setup_env.read_pins(ROOT / "requirements/cpu.txt"), **setup_env.read_pins(ROOT / "requirements/dev.txt")}
    for name, version in pins.items():
        install(site, name, version)
    monkeypatch.setattr(setup_env.subprocess, "Popen", None)
    monkeypatch.setattr(setup_env.subprocess, "run", None)

    assert setup_env.prepare("cpu") == 0


def test_a_failed_installation_names_its_reason_and_the_log(setup_env):
    python = setup_env.VENV / "bin/python"
    python.write_text("#!/bin/sh\necho 'Collecting ray==2.60.0'\necho 'ERROR: no space left'\nexit 1\n")
    python.chmod(0o755)
    setup_env.LOG.write_text("")

    with pytest.raises(setup_env.SetupError, match=r"installing 1: ERROR: no space left\nthe log is .*setup\.log"):
        setup_env.pip("installing 1", ["install", "ray==2.60.0"], 1)


def test_a_cpu_torch_that_pip_does_not_know_comes_from_pytorchs_index(setup_env, monkeypatch):
    calls = []

    def pip(title, arguments, total):
        calls.append(arguments)
        if len(calls) == 1:
            setup_env.LOG.write_text("ERROR: No matching distribution found for torch==2.13.0+cpu\n")
            raise setup_env.SetupError("no")

    monkeypatch.setattr(setup_env, "pip", pip)
    setup_env.install_torch("2.13.0+cpu")

    assert [call[-2:] for call in calls] == [
        ["--no-deps", "torch==2.13.0+cpu"],
        ["--extra-index-url", setup_env.CPU_TORCH_INDEX],
    ]


def test_another_failure_of_torch_is_not_retried_elsewhere(setup_env, monkeypatch):
    def pip(title, arguments, total):
        setup_env.LOG.write_text("ERROR: no space left on device\n")
        raise setup_env.SetupError("no space")

    monkeypatch.setattr(setup_env, "pip", pip)
    with pytest.raises(setup_env.SetupError, match="no space"):
        setup_env.install_torch("2.13.0+cpu")


def test_an_interpreter_that_cannot_make_environments_is_passed_over(setup_env, tmp_path, monkeypatch):
    for name, body in {"old": "echo 3 9", "python3.11": "exit 127", "python3.12": "echo 3 12"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "old"))

    assert setup_env.find_interpreter() == str(tmp_path / "python3.12")

    (tmp_path / "python3.12").unlink()
    with pytest.raises(setup_env.SetupError, match=r"old \(Python 3\.9\), .*python3\.11 \(cannot make environments\)"):
        setup_env.find_interpreter()


def test_a_requirement_that_is_no_pin_is_named_with_its_line(setup_env, tmp_path):
    path = tmp_path / "cpu.txt"
    path.write_text("# comment\nray==2.60.0\nnumpy>=2\n")

    with pytest.raises(setup_env.SetupError, match=r"cpu\.txt:3: expected name==version, found 'numpy>=2'"):
        setup_env.read_pins(path)


@pytest.mark.parametrize("chosen", ["cpu", "gpu"])
def test_the_pinned_sets_fulfil_pyproject(setup_env, chosen):
    pins = {
        **setup_env.read_pins(ROOT / f"requirements/{chosen}.txt"),
        **setup_env.read_pins(ROOT / "requirements/dev.txt"),
    }
    extras = PROJECT["optional-dependencies"]
    wanted = map(Requirement, PROJECT["dependencies"] + extras[chosen] + extras["dev"])

    assert [str(want) for want in wanted if not want.specifier.contains(pins[setup_env.normalise(want.name)])] == []
    assert not set(setup_env.CONFLICTS[chosen]) & set(pins)
