"""What a recipe names becomes a maker of environments, in the process that episodes start from."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlflow.environments.adapters import ADAPTERS
from rlflow.environments.methods import MethodsEnvironment
from rlflow.environments.protocol import Environment, EnvironmentFault
from rlflow.environments.tools import ToolEnvironment
from rlflow.plugins import PluginError, import_plugin

_PACKAGES: dict[str, tuple[str, ...]] = {
    "verifiers": ("verifiers", "verifiers.clients", "verifiers.v1.utils.loaders"),
    "openenv": ("openenv.core.generic_client",),
    "reasoning_gym": ("reasoning_gym",),
}
"""What an adapter imports in an episode: seconds of it, that the process has before that episodes start from."""


def load_environment(
    name: str | None, plugin: str | None, tools: Sequence[str], args: Mapping[str, Any]
) -> Callable[[], Environment]:
    """What makes an environment for each episode.

    Raises:
        EnvironmentFault: There is no such name, file, class or function, or it raises while it is imported.
    """
    if tools:
        functions = [_load(tool, "tool") for tool in tools]
        for tool, function in zip(tools, functions, strict=True):
            if not inspect.isroutine(function):
                raise EnvironmentFault(f"tool {tool} is a {type(function).__name__}, not a function")
        return partial(ToolEnvironment, functions)
    if name is not None:
        if name not in ADAPTERS:
            raise EnvironmentFault(f"no environment is called {name!r}; there are {', '.join(ADAPTERS)}")
        _import_first(name, str(args.get("id", "")))
        made: Any = _load(ADAPTERS[name], "environment")
    else:
        made = _load(str(plugin), "environment")
    label = name or str(plugin)
    if not callable(made):
        raise EnvironmentFault(f"environment {label} is a {type(made).__name__}, not a class of environments")
    try:
        inspect.signature(made).bind(**args)
    except TypeError as error:
        raise EnvironmentFault(f"environment {label}: {error}: give it in environment.args as it takes it") from error
    except ValueError:
        pass  # a class that does not say what it takes
    return partial(_make, made, dict(args), label)


def _import_first(name: str, id: str) -> None:
    """Imports an adapter's packages, and the module that verifiers' id of an environment stands for, where they are
    there: what is not, the adapter names itself."""
    own = re.sub(r"@.*", "", id.rpartition("/")[2]).replace("-", "_").lower()
    for package in (*_PACKAGES[name], *([own] if own else [])):
        try:
            importlib.import_module(package)
        except ImportError:
            continue
        # Other people's code.
        except Exception as error:
            raise EnvironmentFault(f"environment {name}: importing {package} raised {error!r:.300}") from error


def _make(made: Callable[..., Any], args: Mapping[str, Any], label: str) -> Environment:
    environment = made(**args)
    if callable(getattr(environment, "step", None)) and callable(getattr(environment, "reset", None)):
        return environment
    if callable(getattr(environment, "reset", None)):
        # TRL's convention: what the policy may call are the methods.
        return MethodsEnvironment(environment)
    raise EnvironmentFault(f"environment {label} has no reset: see docs/environments.md")


def _load(spec: str, kind: str) -> Any:
    file, _, attribute = spec.rpartition(":")
    try:
        if file.endswith(".py"):
            path = Path(os.path.expanduser(file)).resolve()
            if not path.is_file():
                raise EnvironmentFault(f"{kind} {spec}: there is no file {path}")
            module = import_plugin(path, f"{kind} {spec!r}")
        else:
            module = importlib.import_module(file)
    except (PluginError, ImportError) as error:
        raise EnvironmentFault(f"{kind} {spec}: {error}") from error
    if attribute not in vars(module):
        raise EnvironmentFault(f"{kind} {spec}: {file} has no {attribute!r}")
    return vars(module)[attribute]
