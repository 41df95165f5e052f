"""The functions that a recipe names are imported and asked for their arguments, each in a process of its own.

Importing runs the user's code: it may raise, end its process, print, or never return. An import that goes on is waited
for, torch's takes seconds; one that neither imports nor reads anything for `SILENCE_S` is not.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import os
import pickle
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlflow.actors.reward_process import child_environment
from rlflow.cli.plugin_child import Trial
from rlflow.recipe import Recipe, RewardBlock, SourceBlock
from rlflow.recipe.problems import did_you_mean
from rlflow.rewards import REWARDS

Found = Iterator[tuple[str, str]]
"""(dotted key, what is wrong with its value and what to do)."""
SILENCE_S = 3.0
LONGEST_S = 60.0
"""Of a whole import."""
_AT_A_TIME = 4


def in_generators(recipe: Recipe) -> Found:
    """Of training's and the evaluation's data."""
    plugins = {key: s for key, s in sources_of(recipe).items() if s.generator is not None and ":" in s.generator}
    trials = {key: Trial("generator", None, source.generator, source.args, None) for key, source in plugins.items()}
    yield from _problems(trials, {key: f"{key}.generator" for key in plugins}, os.environ)


def sources_of(recipe: Recipe) -> dict[str, SourceBlock]:
    """Training's sources and the evaluation's, by their keys."""
    train = recipe.data.train
    sources = {f"data.train.{i}": s for i, s in enumerate(train)} if isinstance(train, list) else {"data.train": train}
    return sources if recipe.evaluation is None else {**sources, "evaluation.data": recipe.evaluation.data}


def rewards_of(recipe: Recipe) -> dict[str, RewardBlock]:
    """The rewards and the evaluation's, by their keys."""
    rewards = {f"rewards.{index}": reward for index, reward in enumerate(recipe.rewards)}
    if recipe.evaluation is not None and recipe.evaluation.reward is not None:
        rewards["evaluation.reward"] = recipe.evaluation.reward
    return rewards


def in_rewards(recipe: Recipe, row: Mapping[str, Any] | None) -> Found:
    """Of the rewards and the evaluation's.

    Args:
        row: The columns of a prompt; None where the data was not read.
    """
    tried: dict[str, Trial] = {}
    for key, reward in rewards_of(recipe).items():
        problem = None if reward.name is None else _signature_problem(reward.name, reward.args, row)
        if problem is not None:
            yield f"{key}.args", problem
        elif reward.args or reward.plugin is not None:
            tried[key] = Trial("reward", reward.name, reward.plugin, reward.args, row)
    keys = {key: f"{key}.args" if trial.plugin is None else f"{key}.plugin" for key, trial in tried.items()}
    yield from _problems(tried, keys, child_environment(os.environ, recipe.reward_server.environment))


def _signature_problem(name: str, args: Mapping[str, Any], row: Mapping[str, Any] | None) -> str | None:
    """What a built-in reward lacks or does not take, by its source: importing it would load sympy."""
    module, _, function = REWARDS[name].partition(":")
    found = importlib.util.find_spec(module)
    assert found is not None and found.origin is not None
    tree = ast.parse(Path(found.origin).read_bytes())
    signature = next((n.args for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function), None)
    if signature is None:
        return None  # a class, which says itself what it is made of
    options = {each.arg: default for each, default in zip(signature.kwonlyargs, signature.kw_defaults, strict=True)}
    for key in args:
        if key not in options:
            return f"{name} takes no argument {key} ({did_you_mean(key, list(options)) if options else 'remove it'})"
    missing = [key for key, default in options.items() if default is None and key not in args]
    if missing:
        return f"{name} needs {', '.join(missing)}, e.g. args: {{{missing[0]}: ...}}"
    given = {"prompts", "completions", "completion_ids", *(row or ())}
    required = signature.args[: len(signature.args) - len(signature.defaults)]
    columns = [each.arg for each in required if each.arg not in given]
    if row is None or not columns:
        return None
    there = ", ".join(row) or "none"
    return f"{name} needs the column {columns[0]}, and the data has {there}: map it in data.train.columns"


def _problems(trials: Mapping[str, Trial], keys: Mapping[str, str], environment: Mapping[str, str]) -> Found:
    with ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="plugins") as threads:
        said = threads.map(lambda trial: _try(trial, environment), trials.values())
        for key, problem in zip(trials, said, strict=True):
            if problem is not None:
                yield keys[key], problem


def _try(trial: Trial, environment: Mapping[str, str]) -> str | None:
    """What is wrong with a function, or None. Its process, and what that started, is gone afterwards."""
    read, write = os.pipe()
    packages = str(Path(__file__).absolute().parents[2])
    path = os.pathsep.join([packages, environment["PYTHONPATH"]]) if "PYTHONPATH" in environment else packages
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "rlflow.cli.plugin_child", str(write)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(write,),
        start_new_session=True,
        env={**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    os.close(write)
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as told:
            told.write(pickle.dumps(trial))
        return _listen(read, process)
    finally:
        os.close(read)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _listen(descriptor: int, process: subprocess.Popen[bytes]) -> str | None:
    """Follows an import to its end, or to the end of patience."""
    started = moved = time.monotonic()
    line, modules, text = None, 0, b""
    before: object = None
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if selector.select(timeout=0.2):
                part = os.read(descriptor, 1 << 16)
                if not part:
                    return f"importing it ended the process (exit code {process.wait()})"
                *whole, text = (text + part).split(b"\n")
                for said in map(json.loads, whole):
                    if "problem" in said:
                        return said["problem"]
                    line, modules = said["line"], said["modules"]
            now, after = time.monotonic(), (line, modules, _read_bytes(process.pid))
            before, moved = after, moved if after == before else now
            if now - moved > SILENCE_S or now - started > LONGEST_S:
                return _hang(line, now - started)


def _read_bytes(pid: int) -> str:
    """What a process has read from files, mapped ones included, as Linux counts it."""
    with contextlib.suppress(OSError):
        counters = Path(f"/proc/{pid}/io").read_text().splitlines()
        return f"{counters[0]} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[9]}"
    return ""


def _hang(line: int | None, seconds: float) -> str:
    place = "" if line is None else f" and is at line {line}"
    return (
        f"importing it does not end: for {SILENCE_S:g} of {seconds:.0f} s it has imported and read nothing{place}; "
        "move what takes long into the function, or into the __init__ of a class"
    )
