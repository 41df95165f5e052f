"""The dependency order of the design: what is above may import what is below, never the reverse."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("rlflow", "actors", "rewards")
"""The last two are imported through links in the first, as rlflow.actors and rlflow.rewards."""

LAYERS = (
    ("rlflow.types", "rlflow.recipe", "rlflow.callbacks"),
    (
        "rlflow.activations",
        "rlflow.actor_memory",
        "rlflow.preparation_memory",
        "rlflow.algorithms",
        "rlflow.batching",
        "rlflow.checkpoint",
        "rlflow.convert",
        "rlflow.data",
        "rlflow.garbage",
        "rlflow.machine",
        "rlflow.memory",
        "rlflow.metrics",
        "rlflow.planning",
        "rlflow.policy_weights",
        "rlflow.plan_text",
        "rlflow.plugins",
        "rlflow.positions",
        "rlflow.progress",
        "rlflow.remedies",
        "rlflow.roles",
        "rlflow.text_files",
        "rlflow.rollout_checks",
        "rlflow.torchvision_operators",
        "rlflow.tower_shape",
        "rlflow.tracking",
    ),
    ("rlflow.actors", "rlflow.environments", "rlflow.rewards"),
    (
        "rlflow.actor_groups",
        "rlflow.driver",
        "rlflow.in_process",
        "rlflow.placement",
        "rlflow.ray_cluster",
        "rlflow.ray_jobs",
        "rlflow.shared_files",
    ),
    ("rlflow.model_source", "rlflow.ui"),
    ("rlflow.serving",),
    ("rlflow.evaluation_sets", "rlflow.inspection", "rlflow.quantization"),
    ("rlflow.doctor",),
    ("rlflow.__main__", "rlflow.api", "rlflow.cli", "rlflow.results", "rlflow"),
)
"""From the lowest up; modules of one layer may import each other. `rlflow` itself is the package's front door."""

HEAVY = {"torch", "transformers", "vllm", "ray", "datasets", "trl"}
WITHOUT_HEAVY_IMPORTS = {
    "rlflow": HEAVY,
    "rlflow.actor_groups": HEAVY,
    "rlflow.activations": HEAVY,
    "rlflow.actor_memory": HEAVY,
    "rlflow.preparation_memory": HEAVY,
    "rlflow.batching": HEAVY,
    "rlflow.cli": HEAVY,
    "rlflow.convert": HEAVY,
    "rlflow.data": HEAVY,
    "rlflow.doctor": HEAVY,
    "rlflow.garbage": HEAVY,
    "rlflow.in_process": HEAVY,
    "rlflow.inspection": HEAVY,
    "rlflow.machine": HEAVY,
    "rlflow.memory": HEAVY,
    "rlflow.metrics": HEAVY,
    "rlflow.planning": HEAVY,
    "rlflow.policy_weights": HEAVY,
    "rlflow.plan_text": HEAVY,
    "rlflow.model_source": HEAVY - {"ray"},
    "rlflow.positions": HEAVY,
    "rlflow.progress": HEAVY,
    "rlflow.quantization": HEAVY - {"ray"},
    "rlflow.recipe": HEAVY,
    "rlflow.remedies": HEAVY,
    "rlflow.rollout_checks": HEAVY,
    "rlflow.tracking": HEAVY,
    "rlflow.types": HEAVY,
    "rlflow.driver": HEAVY - {"ray"},
    "rlflow.environments": HEAVY,
    "rlflow.placement": HEAVY - {"ray"},
    "rlflow.ui": HEAVY,
    "rlflow.rewards": {"ray", "vllm"},
}
"""What importing a package's modules may not load, itself or through what it imports: it starts at once then."""

STANDARD_NAMES = {"rlflow/types.py", "rlflow/cli/inspect.py"}
"""Files that bear the name of a module of the standard library all the same."""


def module_files() -> dict[str, Path]:
    files = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if package == "rlflow" else ("rlflow", *parts)
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


MODULES = module_files()


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def layer_of(module: str) -> int:
    """The layer whose most specific entry ``module`` belongs to."""
    entries = [(len(entry), level) for level, layer in enumerate(LAYERS) for entry in layer if within(module, entry)]
    return max(entries)[1]


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of every module of ours that ``path`` imports, at its top or within a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import in full, not relative"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in full]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name in MODULES)


def test_every_module_belongs_to_a_layer_and_imports_downward_only():
    upward = []
    for module, path in MODULES.items():
        for line, imported in imported_modules(path):
            if layer_of(imported) > layer_of(module):
                upward.append(f"{path.relative_to(ROOT)}:{line}: {module} imports {imported}, which is above it")
    assert upward == []


def test_the_drivers_modules_import_each_other_without_a_circle():
    """Imports for types alone count too: who must be read with whom is a circle all the same."""
    driver = {
        module: {name for _, name in imported_modules(path) if within(name, "rlflow.driver")}
        for module, path in MODULES.items()
        if within(module, "rlflow.driver")
    }
    TopologicalSorter(driver).prepare()


def test_nothing_imports_actors_or_rewards_but_through_rlflow():
    # A second copy of a module under another name, or a user's own folder of that name, would be imported.
    imports = re.compile(r"^\s*(?:from|import) (?:actors|rewards)\b", re.MULTILINE)
    folders = ("rlflow", "actors", "rewards", "tests", "benchmarks", "recipes", "requirements")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert [str(path) for path in files if imports.search(path.read_text(encoding="utf-8"))] == []


def test_the_front_door_is_the_only_module_of_rlflow_without_a_layer_of_its_own():
    entries = [entry for layer in LAYERS for entry in layer if entry != "rlflow"]
    homeless = [module for module in MODULES if module != "rlflow" and not any(within(module, e) for e in entries)]
    assert homeless == []


def test_no_file_bears_the_name_of_a_module_of_the_standard_library():
    names = {str(path.relative_to(ROOT)) for path in MODULES.values() if path.stem in sys.stdlib_module_names}
    assert names <= STANDARD_NAMES


@pytest.mark.slow
@pytest.mark.parametrize("heavy", list(map(sorted, {*map(frozenset, WITHOUT_HEAVY_IMPORTS.values())})))
def test_importing_a_package_loads_nothing_heavy(heavy):
    """All packages that may not load the same are imported in one process: whichever loads it is named."""
    packages = [package for package, unwanted in WITHOUT_HEAVY_IMPORTS.items() if unwanted == set(heavy)]
    modules = [
        name
        for name in MODULES
        if any(name == package if package == "rlflow" else within(name, package) for package in packages)
    ]
    code = "import importlib, sys\n"
    code += f"for name in {modules!r}:\n"
    code += "    importlib.import_module(name)\n"
    code += f"    assert not (loaded := {set(heavy)!r} & sys.modules.keys()), f'{{name}} loads {{sorted(loaded)}}'\n"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr.strip().splitlines()[-1]
