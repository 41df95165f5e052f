"""The user's callbacks of a stage: each is called where it has a method; what it raises is an error that names it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rlflow.callbacks import Callback, Outcome, StopTraining
from rlflow.driver.errors import RunError, StoppedUnsaved, StopRequested
from rlflow.plugins import described, load_plugin, naming
from rlflow.recipe import Recipe
from rlflow.recipe.function_blocks import CallbackBlock
from rlflow.recipe.problems import did_you_mean
from rlflow.tracking.lines import split_evaluations
from rlflow.tracking.tracker import StderrMessages
from rlflow.types import StepStats

METHODS = tuple(name for name in vars(Callback) if name.startswith("on_"))
CallbackLike = Any
"""An object with some of Callback's methods, or a function of (step, metrics)."""


class CallbackError(RunError):
    """A callback raised, or answered what means nothing."""


class Callbacks:
    """Those of a stage.

    Args:
        given: Objects and functions.

    Raises:
        TypeError: One of them is no callback.
    """

    def __init__(self, given: Sequence[CallbackLike] = ()) -> None:
        self._methods = [(name_of(callback), _methods_of(callback)) for callback in given]
        self.is_asked_to_stop = False
        """Whether one of them wants the stage to end."""
        self._has_started = False

    def run_starts(self, recipe: Recipe) -> None:
        """Tells it once, however often the stage begins again with fresh actors."""
        if self._has_started:
            return
        self._has_started = True
        self._call("on_run_start", "at the start", recipe)

    def step_ended(self, stats: StepStats) -> None:
        """Tells of a step, unless it is 0, and of what was measured behind it."""
        when = f"of step {stats.step}"
        if stats.step:
            self._call("on_step", when, stats.step, dict(stats.metrics))
        self.evaluated(stats)

    def evaluated(self, stats: StepStats) -> None:
        """Tells of what was measured behind a step."""
        when = f"of step {stats.step}"
        for name, metrics in split_evaluations(stats.metrics).items():
            self._call("on_evaluation", when, stats.step, name, metrics)

    def checkpoint_written(self, step: int, path: Path) -> None:
        self._call("on_checkpoint", f"of step {step}", step, path)

    @contextmanager
    def telling_the_end(self, recipe: Recipe) -> Iterator[None]:
        """Tells how the stage ended that runs within."""
        try:
            yield
        except BaseException as error:
            is_stopped = isinstance(error, StopRequested | StoppedUnsaved | KeyboardInterrupt)
            try:
                self._run_ends(recipe, "stopped" if is_stopped else "failed")
            except CallbackError as also:
                StderrMessages().message(str(also))
            raise
        self._run_ends(recipe, "finished")

    def _run_ends(self, recipe: Recipe, outcome: Outcome) -> None:
        self._call("on_run_end", "at the end", recipe, outcome)

    def _call(self, method: str, when: str, *arguments: Any) -> None:
        """Raises CallbackError. A callback that has raised is not called again: the run is ending, and says why."""
        for entry in list(self._methods):
            name, methods = entry
            if method not in methods:
                continue
            try:
                answer = methods[method](*arguments)
            except StopTraining:
                answer = "stop"
            except Exception as error:
                self._methods.remove(entry)
                raise CallbackError(f"callback {name}: {method} {when} {described(error)}") from error
            if answer == "stop":
                self.is_asked_to_stop = True
            elif answer is not None:
                self._methods.remove(entry)
                raise CallbackError(f'callback {name}: {method} returned {answer!r}: return "stop", or nothing')


def make_callback(block: CallbackBlock) -> CallbackLike:
    """What a recipe names: a class is made with its arguments, a function gets them with every call.

    Raises:
        PluginError: It cannot be imported or made.
    """
    target = load_plugin(block.plugin)
    if not isinstance(target, type):
        return _Named(block.plugin, partial(target, **block.args))
    with naming(block.plugin):
        return target(**block.args)


class _Named:
    """A function of a recipe, which messages call as the recipe does."""

    def __init__(self, name: str, on_step: Callable[..., Any]) -> None:
        self.name, self.on_step = name, on_step


def name_of(callback: CallbackLike) -> str:
    """What messages call it."""
    if isinstance(callback, _Named):
        return callback.name
    return callback.__qualname__ if inspect.isroutine(callback) else type(callback).__qualname__


def _methods_of(callback: CallbackLike) -> Mapping[str, Callable[..., Any]]:
    if isinstance(callback, type):
        raise TypeError(f"callback {callback.__qualname__} is a class: give an object of it, {callback.__qualname__}()")
    strange = [name for name in dir(callback) if name.startswith("on_") and name not in METHODS]
    if strange:
        raise TypeError(f"callback {name_of(callback)} has {strange[0]} ({did_you_mean(strange[0], METHODS)})")
    # What was not overridden says nothing, and need not be called.
    own = {name: getattr(callback, name) for name in METHODS if hasattr(callback, name)}
    found = {name: method for name, method in own.items() if _function_of(method) is not getattr(Callback, name)}
    if not found and callable(callback):
        return {"on_step": callback}
    if not own:
        raise TypeError(f"callback {name_of(callback)} is no function and has none of {', '.join(METHODS)}")
    return found


def _function_of(method: Any) -> Any:
    return method.__func__ if inspect.ismethod(method) else method
