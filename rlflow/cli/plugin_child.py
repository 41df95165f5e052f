"""The process in which a function of a recipe is tried: ``python -P -m rlflow.cli.plugin_child FD``.

It reads a `Trial`, writes one JSON object a line to the descriptor: a few times a second how far the import or the call
is, and at last what is wrong with the function, or that nothing is, and what an environment says of itself.
Standard output and error belong to the function.
"""

from __future__ import annotations

import inspect
import json
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rlflow.cli.plugin_trial import Trial
from rlflow.environments.loading import load_environment
from rlflow.environments.protocol import EnvironmentFault
from rlflow.environments.session import Session
from rlflow.plugins import PluginError, import_plugin, load_plugin
from rlflow.rewards import RewardError
from rlflow.rewards.conventions import VERL, is_verl, of_trl
from rlflow.rewards.resolving import find, load

TELLS_EVERY_S = 0.2


@dataclass(slots=True)
class Progress:
    """How far a trial is."""

    rows: int | None = None
    """Rows that a generator has given; None before it is called, or an environment is made."""


def main(descriptor: int) -> None:
    trial: Trial = pickle.load(sys.stdin.buffer)
    progress = Progress()
    with os.fdopen(descriptor, "w", buffering=1, encoding="utf-8") as said:
        threading.Thread(target=_tell, args=(said, threading.get_ident(), _file(trial), progress), daemon=True).start()
        described: dict[str, Any] = {}
        try:
            problem = _problem(trial, progress, described)
        except BaseException as error:  # the user's code: SystemExit is no Exception
            problem = _describe(error, _file(trial), "importing" if progress.rows is None else "calling")
        print(json.dumps({"problem": problem, **described}), file=said)
        said.flush()
        os._exit(0)  # threads that the plugin started go on otherwise


def _tell(said: Any, main_thread: int, file: str, progress: Progress) -> None:
    """Says where the import or the call is, for as long as somebody listens."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(TELLS_EVERY_S)
        frame: FrameType | None = sys._current_frames().get(main_thread)
        while frame is not None and frame.f_code.co_filename != file:
            frame = frame.f_back
        line = None if frame is None else frame.f_lineno
        told = {"line": line, "modules": len(sys.modules), "rows": progress.rows}
        print(json.dumps(told), file=said)
    os._exit(1)


def _problem(trial: Trial, progress: Progress, described: dict[str, Any]) -> str | None:
    """What is wrong; what an environment says of itself is added to ``described``."""
    match trial.kind:
        case "reward":
            return _reward_problem(trial)
        case "generator":
            return _generator_problem(trial, progress)
        case "function":
            return _function_problem(trial)
        case "environment":
            return _environment_problem(trial, progress, described)


def _function_problem(trial: Trial) -> str | None:
    try:
        target = load_plugin(str(trial.plugin))
    except PluginError as error:
        return _describe(error.__cause__, _file(trial)) if error.__cause__ else str(error)
    signature = inspect.signature(target)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    offered = {name: None for name in trial.offered if takes_all or name in signature.parameters}
    if both := sorted(offered.keys() & trial.args.keys()):
        return f"{both[0]} is not an argument of the recipe: every call brings it"
    try:
        signature.bind(*[None] * (0 if isinstance(target, type) else trial.num_positional), **offered, **trial.args)
    except TypeError as error:
        given = f"; it may take {', '.join(trial.offered)}" if trial.offered else ""
        return f"{error}{given}, and args of the recipe"
    return None


def _reward_problem(trial: Trial) -> str | None:
    try:
        target, label = find(trial.name, trial.plugin)
        if isinstance(target, type):
            inspect.signature(target).bind(**trial.args)
            return None  # made once, by the reward server: it may load a model
        function = load(trial.name, trial.plugin, trial.args)
        if trial.row is None:
            return None
        if trial.plugin is None:
            return _call_once(function, trial.row)
        if missing := _missing(target, trial):
            return f"needs the column {missing[0]}, and the data has {', '.join(trial.row) or 'none'}"
    except RewardError as error:
        return _describe(error.__cause__, _file(trial)) if error.__cause__ else str(error)
    except TypeError as error:
        return f"reward {label}: {error}"
    return None


def _call_once(function: Any, row: Mapping[str, Any]) -> str | None:
    """What a built-in function says against its arguments when it judges an empty completion."""
    columns = {name: [value] for name, value in row.items()}
    try:
        function([[{"role": "user", "content": ""}]], [""], [[]], **columns)
    except RewardError:
        raise
    except Exception as error:
        return f"cannot be called with these args: {type(error).__name__}: {error}"
    return None


def _missing(function: Any, trial: Trial) -> Sequence[str]:
    """Parameters without a default that nothing gives a value."""
    given = {"prompts", "completions", "completion_ids", *(trial.row or ()), *trial.args}
    given |= set(VERL) if is_verl(function) else of_trl({name: [None] for name in trial.row or ()}).keys()
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in kinds and p.default is p.empty and p.name not in given]


def _generator_problem(trial: Trial, progress: Progress) -> str | None:
    path, _, name = str(trial.plugin).rpartition(":")
    try:
        function = vars(import_plugin(Path(path), f"generator {trial.plugin}"))[name]
    except PluginError as error:
        return _describe(error.__cause__, path) if error.__cause__ else str(error)
    try:
        inspect.signature(function).bind(**trial.args)
    except TypeError as error:
        return f"{error}; its args are {', '.join(inspect.signature(function).parameters) or 'none'}"
    if trial.is_called:
        progress.rows = 0
        for _ in function(**trial.args):
            progress.rows += 1
    return None


def _environment_problem(trial: Trial, progress: Progress, described: dict[str, Any]) -> str | None:
    try:
        make = load_environment(trial.name, trial.plugin, trial.tools, trial.args)
    except EnvironmentFault as error:
        raised = error.__cause__.__cause__ if error.__cause__ else None
        return _describe(raised, _file(trial)) if raised is not None else str(error)
    progress.rows = 0
    said = Session(make).answer("describe")
    if "error" in said:
        return said["error"].replace("describe raised", "making it raised")
    described |= said
    return None


def _file(trial: Trial) -> str:
    return trial.plugin.rpartition(":")[0] if trial.plugin else ""


def _describe(error: BaseException, file: str, doing: str = "importing") -> str:
    """What was raised, and at which line of the plugin."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    place = f"{file}:{lines[-1]}: " if lines else ""
    return f"{place}{doing} it raised {type(error).__name__}: {error}"


if __name__ == "__main__":
    main(int(sys.argv[1]))
