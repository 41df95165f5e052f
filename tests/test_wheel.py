"""What is installed: one package, with actors/, rewards/ and recipes/ in it, that works where there is no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

import rlflow

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("actors", "rewards", "recipes")
"""Folders of the checkout that are installed in rlflow/."""


def build(kind: str, source: Path, directory: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(directory)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    (built,) = directory.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory into which the wheel alone was installed."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return target


def names_in(wheel: Path) -> list[str]:
    return [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]


def test_the_wheel_holds_every_module_once_and_nothing_beside_rlflow(wheel: Path):
    files = Counter(names_in(wheel))
    modules = {f"rlflow/{path.relative_to(ROOT)}" for top in LINKED for path in (ROOT / top).rglob("*.py")}
    inside = (path for path in (ROOT / "rlflow").rglob("*.py") if path.relative_to(ROOT).parts[1] not in LINKED)
    modules |= {str(path.relative_to(ROOT)) for path in inside}
    assert {name for name in files if name.endswith(".py")} == modules
    pages = {
        str(path.relative_to(ROOT))
        for folder in ("tracking/page", "ui/static")
        for path in (ROOT / "rlflow" / folder).iterdir()
    }
    assert len(pages) > 15 and pages <= set(files)
    assert set(files.values()) == {1} and {name.partition("/")[0] for name in files} == {
        "rlflow",
        "rlflow_torchvision.pth",
    }


def test_the_wheel_has_the_recipes_and_says_that_it_is_typed_and_of_which_version_it_is(wheel: Path):
    files = set(names_in(wheel))
    assert {f"rlflow/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")} <= files
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "rlflow").rglob("*.html")}
    assert pages and pages | {"rlflow/py.typed"} <= files
    assert wheel.name.split("-")[1] == rlflow.__version__


@pytest.mark.slow
def test_a_wheel_made_of_the_sdist_is_the_same(wheel: Path, tmp_path: Path):
    with tarfile.open(build("sdist", ROOT, tmp_path)) as packed:
        packed.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert sorted(names_in(build("wheel", source, tmp_path))) == sorted(names_in(wheel))


@pytest.mark.slow
def test_the_installed_command_plans_a_recipe_that_came_with_it(installed: Path, tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(installed)}

    def rlflow_says(*arguments: str) -> str:
        # The environment's own rlflow, of the checkout, is behind the one that was installed here.
        code = f"import sys; sys.path.insert(0, {str(installed)!r}); from rlflow.cli.main import main; sys.exit(main())"
        command = [sys.executable, "-c", code, *arguments]
        finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    assert (installed / "bin" / "rlflow").is_file()
    assert "run a recipe" in rlflow_says("--help")
    assert "quickstart " in rlflow_says("recipes")
    plan = rlflow_says("plan", "quickstart")
    assert f"results    {tmp_path}/runs/quickstart/grpo" in plan
    (tmp_path / "mine.yaml").write_text(rlflow_says("recipes", "quickstart"))
    assert rlflow_says("plan", "mine.yaml") == plan
