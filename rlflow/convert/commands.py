"""Whose command a line is: launchers taken off, the framework and its verb, and how many processes it starts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from rlflow.convert.folds import Machines
from rlflow.convert.given import flags_of, plain
from rlflow.convert.shell import ShellCommand
from rlflow.data.errors import DataError

Framework = Literal["swift", "megatron", "trl", "verl", "openrlhf"]

_TRL_SCRIPTS = {
    "sft": "sft",
    "dpo": "dpo",
    "kto": "kto",
    "grpo": "grpo",
    "rloo": "rloo",
    "reward": "reward",
    "gspo": "grpo",
    "gkd": "gkd",
    "distillation": "distillation",
}
_VERL_MODULES = {"main_ppo": "ppo", "main_dapo": "ppo", "fsdp_sft_trainer": "sft", "sft_trainer": "sft"}
_OPENRLHF_MODULES = {
    "train_sft": "sft",
    "train_dpo": "dpo",
    "train_kto": "kto",
    "train_rm": "reward",
    "train_ppo_ray": "ppo",
    "train_ppo": "ppo",
}
_OTHER_PROGRAMS = {
    "[",
    "[[",
    "test",
    "echo",
    "printf",
    "pip",
    "cd",
    "git",
    "ls",
    "mkdir",
    "cat",
    "grep",
    "from",
    "import",
}
_HARMLESS = re.compile(
    r"CUDA_|NCCL_|NPROC|NNODES|NODE_RANK|MASTER_|OMP_|PYTORCH|TOKENIZERS_|HYDRA_|RAY_|VLLM_|WANDB_|SWANLAB_|HF_|TRL_"
    r"|MODELSCOPE_|ASCEND|HCCL|PYTHON|TORCH|USE_HF|LOG_LEVEL|MEGATRON_|NVTE_|CELOSS|PATH$|LD_"
)


@dataclass(frozen=True, slots=True)
class Invocation:
    """One command of a framework."""

    framework: Framework
    verb: str
    words: tuple[str, ...]
    """Behind the verb."""
    machines: Machines
    engine: str
    """What the launcher says of sharding: the name or file of accelerate's or DeepSpeed's configuration, or nothing."""
    environment: Mapping[str, str]
    """Variables of the script that the command may read: neither the machine's nor used in its words."""
    line: int
    broken: tuple[int, ...] = ()
    """Lines of it that a shell would take for commands of their own."""
    unset: frozenset[str] = frozenset()
    """Texts in its words that stand for what the script does not say, such as ``$MODEL``."""


def invocation_of(command: ShellCommand, gpus: int | None = None) -> Invocation | None:
    """The command as one of a framework; None where it is none.

    Args:
        gpus: How many GPUs there are, where the user says so.
    """
    words = list(command.words)
    if words[0] in _OTHER_PROGRAMS:
        return None
    for place, word in enumerate(words):
        found = _target(words, place, word)
        if found is None:
            continue
        framework, verb, length = found
        before, launcher = words[:place], {name: plain(value) for name, value in _options(words[:place]).items()}
        machines = _machines(framework, verb, before, launcher, command.environment, gpus)
        engine = _sharding(before, launcher)
        noted = {
            name: value for name, value in command.environment.items() if name.isupper() and not _HARMLESS.match(name)
        }
        own = tuple(words[place + length :])
        return Invocation(framework, verb, own, machines, engine, noted, command.line, command.broken, command.unset)
    return None


def _target(words: Sequence[str], place: int, word: str) -> tuple[Framework, str, int] | None:
    """Framework, verb and length of what names them at a place."""
    following = words[place + 1] if place + 1 < len(words) else ""
    program = os.path.basename(word)
    is_first = place == 0 or not words[place - 1].startswith("-")
    if program in ("swift", "megatron", "trl") and is_first and re.fullmatch(r"[a-z][a-z_-]*", following):
        return program, following, 2
    if match := re.search(r"swift[./]cli[./](_megatron[./])?(\w+?)(?:\.py)?$", word):
        return "megatron" if match[1] else "swift", match[2], 1
    module = re.sub(r"\.py$", "", word).replace("/", ".").rpartition(".")
    if module[2] in _VERL_MODULES and (
        module[0].startswith("verl") or "recipe" in module[0] or module[2].startswith("main_")
    ):
        return "verl", _VERL_MODULES[module[2]], 1
    if module[2] in _OPENRLHF_MODULES and "openrlhf" in module[0]:
        return "openrlhf", _OPENRLHF_MODULES[module[2]], 1
    if (
        word.endswith(".py")
        and "online" not in module[2]
        and (verb := _TRL_SCRIPTS.get(re.split(r"[_-]", module[2])[0]))
    ):
        return "trl", "reward" if module[2].startswith("reward") else verb, 1
    if module[0] == "trl.scripts" and module[2] in _TRL_SCRIPTS:
        return "trl", module[2], 1
    return None


def _options(words: Sequence[str]) -> dict[str, Any]:
    return flags_of(words, {})[0]


def _machines(
    framework: str,
    verb: str,
    before: Sequence[str],
    launcher: Mapping[str, Any],
    environment: Mapping[str, str],
    gpus: int | None,
) -> Machines:
    """Processes: as the launcher says, or ms-swift's variables, or the visible devices."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    devices = len([device for device in visible.split(",") if device.strip()])
    if gpus is not None:
        return Machines(gpus, f"--gpus {gpus}")
    nodes = _number(
        launcher.get("nnodes")
        or launcher.get("num_machines")
        or launcher.get("num_nodes")
        or environment.get("NNODES"),
        1,
    )
    a_node = launcher.get("nproc_per_node") or launcher.get("num_gpus") or environment.get("NPROC_PER_NODE")
    if processes := launcher.get("num_processes") or _from_file(launcher, "num_processes"):
        return Machines(_number(processes, devices or 1), f"num_processes {processes}")
    if a_node is not None:
        count = _number(a_node, devices or 1)
        source = f"{a_node} processes a node" + (f" x {nodes} nodes" if nodes > 1 else "")
        return Machines(count * nodes, source)
    if framework in ("swift", "megatron"):
        shared = ": one process, the model laid over them (device_map)" if devices > 1 else ""
        return Machines(1, f"CUDA_VISIBLE_DEVICES={visible}{shared}" if devices else "no NPROC_PER_NODE: one process")
    if devices:
        return Machines(devices, f"CUDA_VISIBLE_DEVICES={visible}")
    return Machines(1, "the command does not say how many GPUs: 1 is taken (rlflow convert --gpus N)")


def _number(value: Any, otherwise: int) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        return otherwise


def _from_file(launcher: Mapping[str, Any], name: str) -> Any:
    path = Path(str(launcher.get("config_file", "")))
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return None
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content.get(name) if isinstance(content, dict) else None


def _sharding(before: Sequence[str], launcher: Mapping[str, Any]) -> str:
    for name in ("config_file", "accelerate_config", "deepspeed_config_file", "deepspeed_config"):
        if launcher.get(name):
            return str(launcher[name])
    return ""


def take_launcher_flags(values: dict[str, Any], invocation: Invocation) -> Invocation:
    """``trl grpo --num_processes 4 --accelerate_config zero3``: the launcher's flags among the command's."""
    launcher = {
        name: values.pop(name) for name in ("num_processes", "accelerate_config", "config_file") if name in values
    }
    if not launcher:
        return invocation
    machines, engine = invocation.machines, str(launcher.get("accelerate_config") or launcher.get("config_file") or "")
    if (processes := launcher.get("num_processes")) is not None:
        machines = Machines(_number(plain(processes), 1), f"--num_processes {processes}")
    return replace(invocation, machines=machines, engine=engine or invocation.engine)


def read_yaml(path: str, told_by: str) -> dict[str, Any]:
    """The mapping of a configuration file that a command names.

    Raises:
        DataError: There is no such file, or it is no mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(
            f"{told_by} names {path}, which cannot be read ({reason}): run rlflow convert where it is"
        ) from error
    except yaml.YAMLError as error:
        raise DataError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no keys")
    return content
