"""What there is to run on."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT_S = 10.0
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Machine:
    cpus: int
    memory: int
    """Bytes."""
    gpus: int
    gpu_memory: int = 0
    """Bytes of each; 0 where nobody knows."""


def this_machine() -> Machine:
    """CPUs, memory (the container's limit where there is one) and NVIDIA GPUs; under WSL only nvidia-smi knows them."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text(encoding="utf-8").strip()).isdecimal():
        total = min(total, int(text))
    gpus, sizes = Path("/proc/driver/nvidia/gpus"), _gpu_memories()
    count = len(list(gpus.iterdir())) if gpus.exists() else len(sizes)
    return Machine(os.cpu_count() or 1, total, count, min(sizes, default=0))


def named_cluster() -> str | None:
    """The address in RAY_ADDRESS; None where Ray is to be started here."""
    address = os.environ.get("RAY_ADDRESS", "")
    return None if address in ("", "local") else address


def usable_cores() -> int:
    """The cores that this process may compute on: OMP_NUM_THREADS where it is set, otherwise those that it is allowed,
    or as many as its container has the time of."""
    if (given := os.environ.get("OMP_NUM_THREADS", "")).isdecimal() and int(given) > 0:
        return int(given)
    allowed = len(os.sched_getaffinity(0))
    return max(1, int(min(allowed, cpu_quota() or allowed)))


def cpu_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Cores whose time a cgroup gives; None for all."""
    try:
        quota, period = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _gpu_memories() -> list[int]:
    """Bytes of each GPU, as nvidia-smi says; none where it is missing or says nothing."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        query = [command, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        said = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT_S).stdout
    except subprocess.TimeoutExpired:
        return []
    return [int(line) * _MIB for line in said.split() if line.isdecimal()]
