"""Cores, memory, disks and GPUs, and the limits that a container sets."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rlflow.doctor.finding import Finding, fail, ok, warn
from rlflow.doctor.packages import installed, torch_cuda
from rlflow.machine import cpu_quota, this_machine

GIB = 1 << 30
LEAST_MEMORY = 4 * GIB
LEAST_SHARED = 2 * GIB
"""Of /dev/shm: what a run asks of Ray's object store on one machine."""
LEAST_DISK, MORE_DISK = 1 * GIB, 10 * GIB
DRIVERS = {12: 525, 13: 580}
"""CUDA's major version -> the least driver that runs it."""
_QUERY_S = 2.0


def check_cores() -> Iterator[Finding]:
    cores, allowed = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    quota = cpu_quota()
    useful = min(allowed, quota or allowed)
    detail = f"{cores}{'' if allowed == cores else f', of which this process may use {allowed}'}"
    if quota is not None and quota < allowed:
        yield warn(
            "cores",
            f"{detail}; the container may use the time of {quota:g}, and Ray counts {cores}",
            f"raise the container's limit, or reserve no more than {max(1, int(useful))} CPUs in all (cpus_per_worker)",
        )
    elif allowed < cores:
        yield warn("cores", f"{detail}; Ray counts {cores}", "start it without taskset, or reserve no more CPUs in all")
    else:
        yield ok("cores", f"{detail}; {_half_precision()}")
    if (threads := os.environ.get("OMP_NUM_THREADS", "")).isdecimal() and int(threads) > allowed:
        yield warn("threads", f"OMP_NUM_THREADS is {threads}, and there are {allowed} cores", "unset it")


def _half_precision() -> str:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return "no word of what they compute in"
    if {"avx512_bf16", "amx_bf16"} & set(flags):
        return "they compute in bfloat16 too"
    return "without bfloat16 units: on CPUs, model.dtype float32 is the faster one"


def check_memory() -> Iterator[Finding]:
    total = this_machine().memory
    free = min(total, _available())
    detail = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    if free < LEAST_MEMORY:
        yield warn("memory", detail, "close what else runs; `rlflow plan` says what a recipe needs")
    else:
        yield ok("memory", detail)


def _available() -> int:
    """Bytes that may be had without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_disks() -> Iterator[Finding]:
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield fail("/dev/shm", "is not there", "mount a tmpfs at /dev/shm: Ray keeps its objects in it")
    else:
        free = shutil.disk_usage(shared).free
        detail = f"{free / GIB:.1f} GiB free"
        if free < LEAST_SHARED:
            yield warn("/dev/shm", f"{detail}: Ray's objects go to the disk", "docker run --shm-size=8g")
        else:
            yield ok("/dev/shm", detail)
    places = {"here": Path.cwd(), "temporary files": Path(tempfile.gettempdir()), "models' cache": hub_cache()}
    for name, place in places.items():
        yield _of_place(name, place)


def hub_cache() -> Path:
    """Where transformers keeps what it fetched."""
    if "HF_HUB_CACHE" in os.environ:
        return Path(os.environ["HF_HUB_CACHE"])
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface") / "hub"


def _of_place(name: str, place: Path) -> Finding:
    there = next(path for path in (place, *place.parents) if path.exists())
    free = shutil.disk_usage(there).free
    detail = f"{place}: {free / GIB:.1f} GiB free"
    remedy = "set HF_HOME to a directory that can hold models" if name == "models' cache" else "make room"
    if not os.access(there, os.W_OK | os.X_OK):
        change = {"here": "go elsewhere, or set run.output_dir", "temporary files": "set TMPDIR"}.get(name, remedy)
        return warn(name, f"{there} cannot be written to", change)
    if free < LEAST_DISK:
        return fail(name, detail, remedy)
    return warn(name, detail, remedy) if free < MORE_DISK else ok(name, detail)


def check_gpus() -> Iterator[Finding]:
    machine, cuda = this_machine(), torch_cuda()
    if not machine.gpus:
        yield ok("GPUs", "none: rollout.engine auto is torch, and gpus_per_worker stays 0")
        return
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=_QUERY_S).stdout.strip().splitlines()
    except (OSError, subprocess.TimeoutExpired):
        said = []
    if not said:
        yield fail("GPUs", f"{machine.gpus} are there, and nvidia-smi does not answer", "install or restart the driver")
        return
    driver = int(said[0].rpartition(",")[2].strip().partition(".")[0] or 0)
    detail = "; ".join(said)
    least = DRIVERS.get(int((cuda or "0").partition(".")[0]), 0)
    if installed("torch") is not None and cuda is None:
        yield fail("GPUs", f"{detail}; torch is a CPU build", "pip install torch for CUDA, see pytorch.org")
    elif driver < least:
        yield fail("GPUs", f"{detail}; torch for CUDA {cuda} needs driver {least} or newer", "update the driver")
    else:
        yield ok("GPUs", f"{detail}; torch for CUDA {cuda}")


CHECKS = (check_cores, check_memory, check_disks, check_gpus)
