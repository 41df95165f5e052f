"""The functions that a recipe names are imported and asked for their arguments, each in a process of its own.

Importing runs the user's code: it may raise, end its process, print, or never return. An import that goes on is waited
for, torch's takes seconds; one that neither imports nor reads anything for `SILENCE_S` is not. A generator whose rows
are to be read is called there first, for it may never return either, or give rows without an end.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlflow.actors.reward_process import child_environment
from rlflow.cli.plugin_trial import Trial
from rlflow.data.errors import DataError
from rlflow.recipe import Recipe, RewardBlock, SampleBlock, SourceBlock
from rlflow.recipe.own_functions import own_functions
from rlflow.recipe.problems import did_you_mean
from rlflow.rewards import REWARDS
from rlflow.rewards.episodes import EXAMPLE

Found = Iterator[tuple[str, str]]
"""(dotted key, what is wrong with its value and what to do)."""
SILENCE_S = 3.0
LONGEST_S = 60.0
"""Of a whole import."""
CALL_SILENCE_S = 30.0
"""In which a generator gives no row and reads nothing: it may compute for a while."""
CALL_LONGEST_S = 300.0
"""Of a whole call of a generator."""
MOST_ROWS = 10_000_000
"""More of them are taken to be without an end: all are held in memory by a run."""
_AT_A_TIME = 4


@dataclass(frozen=True, slots=True)
class Tried:
    """What a trial has shown."""

    problem: str | None
    """What is wrong with the function, or None."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """JSON schemas of what an environment describes."""
    columns: list[str] = field(default_factory=list)
    """What an environment needs of a row by name."""


def in_generators(recipe: Recipe, *, is_called: bool) -> Found:
    """Of training's and the evaluation's data.

    Args:
        is_called: Whether the generators are called, too, which the reading of their rows would do next.
    """
    plugins = {key: s for key, s in sources_of(recipe).items() if s.generator is not None and ":" in s.generator}
    trials = {
        key: Trial("generator", None, source.generator, source.args, None, is_called) for key, source in plugins.items()
    }
    yield from _problems(trials, {key: f"{key}.generator" for key in plugins}, os.environ)


def sources_of(recipe: Recipe) -> dict[str, SourceBlock]:
    """Training's sources and the evaluation's, by their keys."""
    train = recipe.data.train
    sources = {f"data.train.{i}": s for i, s in enumerate(train)} if isinstance(train, list) else {"data.train": train}
    if recipe.demonstrations is not None:
        shown = recipe.demonstrations.train
        several = shown if isinstance(shown, list) else [shown]
        keys = [f"demonstrations.train.{i}" for i in range(len(several))]
        sources |= dict(zip(keys if isinstance(shown, list) else ["demonstrations.train"], several, strict=True))
    return {**sources, **{f"{key}.data": block.data for key, block in recipe.evaluations.items()}}


def rewards_of(recipe: Recipe) -> dict[str, RewardBlock]:
    """The rewards and the evaluation's, by their keys."""
    rewards = {f"rewards.{index}": reward for index, reward in enumerate(recipe.rewards)}
    for key, block in recipe.evaluations.items():
        if block.reward is not None:
            rewards[f"{key}.reward"] = block.reward
    return rewards


def in_functions(recipe: Recipe) -> Found:
    """Of the optimizer, losses, advantages, metrics and callbacks that are the user's own."""
    functions = own_functions(recipe)
    trials = {
        key: Trial("function", None, f.plugin, f.args, None, offered=f.offered, num_positional=f.num_positional)
        for key, f in functions.items()
    }
    yield from _problems(trials, {key: f"{key}.plugin" for key in functions}, os.environ)


def in_rewards(recipe: Recipe, row: Mapping[str, Any] | None) -> Found:
    """Of the rewards and the evaluation's.

    Args:
        row: The columns of a prompt; None where the data was not read.
    """
    tried: dict[str, Trial] = {}
    if row is not None and recipe.environment is not None:
        row = {**row, **EXAMPLE}
    for key, reward in rewards_of(recipe).items():
        problem = None if reward.name is None else _signature_problem(reward.name, reward.args, row)
        if problem is not None:
            yield f"{key}.args", problem
        elif reward.args or reward.plugin is not None:
            tried[key] = Trial("reward", reward.name, reward.plugin, reward.args, row)
    keys = {key: f"{key}.args" if trial.plugin is None else f"{key}.plugin" for key, trial in tried.items()}
    yield from _problems(tried, keys, child_environment(os.environ, recipe.reward_server.environment))


def in_keep(recipe: Recipe, row: Mapping[str, Any] | None) -> Found:
    """Of the condition by which a stage that samples keeps answers.

    Args:
        row: The columns of a prompt; None where the data was not read.
    """
    if row is None or not isinstance(recipe.algorithm, SampleBlock):
        return
    from rlflow.data.kept_answers import require_condition

    try:
        require_condition(recipe.algorithm.keep, [block.label for block in recipe.rewards], row)
    except DataError as error:
        yield "algorithm.keep.where", str(error)


def try_environment(recipe: Recipe) -> Tried:
    """What is wrong with the environment, which is made once, and what it says of itself."""
    block = recipe.environment
    if block is None:
        return Tried(None)
    trial = Trial("environment", block.name, block.plugin, block.args, None, tools=tuple(block.tools))
    return _try(trial, child_environment(os.environ, block.variables))


def in_tried(recipe: Recipe, tried: Tried, row: Mapping[str, Any] | None) -> Found:
    """Of the environment that was tried.

    Args:
        row: The columns of a prompt; None where the data was not read.
    """
    block = recipe.environment
    if block is None:
        return
    key = "environment.tools" if block.tools else "environment.plugin" if block.plugin else "environment.name"
    if tried.problem is not None:
        yield key, tried.problem
    elif row is not None and (missing := [column for column in tried.columns if column not in row]):
        yield key, f"reset needs the column {missing[0]}, and the data has {', '.join(row) or 'none'}"


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
        for key, tried in zip(trials, said, strict=True):
            if tried.problem is not None:
                yield keys[key], tried.problem


def _try(trial: Trial, environment: Mapping[str, str]) -> Tried:
    """Tries a function. Its process, and what that started, is gone afterwards."""
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
        return _listen(read, process, trial)
    finally:
        os.close(read)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _silenced(process: subprocess.Popen[bytes]) -> str:
    """What a plugin did whose process can say nothing more."""
    try:
        return f"ended the process (exit code {process.wait(SILENCE_S)})"
    except subprocess.TimeoutExpired:
        return "closed files that are not its own, and went on"


def _listen(descriptor: int, process: subprocess.Popen[bytes], trial: Trial) -> Tried:
    """Follows an import, and a generator's call, to the end, or to the end of patience."""
    started = moved = time.monotonic()
    line, furthest, modules, rows, text = None, 0, 0, None, b""
    before: object = None
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if selector.select(timeout=0.2):
                part = os.read(descriptor, 1 << 16)
                if not part:
                    doing = "importing" if rows is None else "calling"
                    doing = "importing or making" if trial.kind == "environment" else doing
                    return Tried(f"{doing} it {_silenced(process)}")
                *whole, text = (text + part).split(b"\n")
                for said in map(json.loads, whole):
                    if "problem" in said:
                        return Tried(**said)
                    if rows is None and said["rows"] is not None:
                        started = time.monotonic()
                    line = line if said["line"] is None else said["line"]
                    furthest = max(furthest, line or 0)
                    modules, rows = said["modules"], said["rows"]
            now = time.monotonic()
            # A loop goes from line to line for ever, and no further than its last.
            after = (furthest, modules, rows, _read_bytes(process.pid))
            before, moved = after, moved if after == before else now
            if rows is None and (now - moved > SILENCE_S or now - started > LONGEST_S):
                return Tried(_endless_import(line, now - started))
            if rows is not None and (
                now - moved > CALL_SILENCE_S or now - started > CALL_LONGEST_S or rows > MOST_ROWS
            ):
                return Tried(_endless_call(trial, line, rows, now - started))


def _read_bytes(pid: int) -> str:
    """What a process has read from files, mapped ones included, as Linux counts it."""
    with contextlib.suppress(OSError):
        counters = Path(f"/proc/{pid}/io").read_text(encoding="utf-8").splitlines()
        return f"{counters[0]} {Path(f'/proc/{pid}/stat').read_text(encoding='utf-8').rpartition(')')[2].split()[9]}"
    return ""


def _endless_import(line: int | None, seconds: float) -> str:
    place = "" if line is None else f" and is at line {line}"
    return (
        f"importing it does not end: for {SILENCE_S:g} of {seconds:.0f} s it has imported and read nothing{place}; "
        "move what takes long into the function, or into the __init__ of a class"
    )


def _endless_call(trial: Trial, line: int | None, rows: int, seconds: float) -> str:
    file = "" if trial.plugin is None else trial.plugin.rpartition(":")[0]
    place = file if line is None else f"{file}:{line}"
    if trial.kind == "environment":
        return f"{place}: making it has not ended after {seconds:.0f} s: every episode makes one"
    return (
        f"{place}: calling it does not end: it has given {rows:,} rows in {seconds:.0f} s and goes on; "
        "let it end, or write its rows to a file and name that as path"
    )
