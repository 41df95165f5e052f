"""A user's file becomes a module: one that no other file is mistaken for, and that finds the files beside it."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

OF_A_CHECKOUT = Path("rewards", "resolving.py")
"""What a directory on the path holds that is a checkout of rlflow."""


class PluginError(ValueError):
    """A function of the user's own cannot be found or loaded, raises, or returns what it must not."""


@cache
def load_plugin(plugin: str) -> Any:
    """What a recipe names by ``file.py:name``: a function or a class.

    Raises:
        PluginError: There is no such file or name in it, or importing it raises.
    """
    file, _, name = plugin.rpartition(":")
    path = Path(os.path.expanduser(file)).resolve()
    if not name or path.suffix != ".py" or not path.is_file():
        raise PluginError(f"{plugin}: there is no file {path}; write it as path/to/file.py:name")
    names = vars(import_plugin(path, plugin))
    if name not in names:
        near = difflib.get_close_matches(name, [known for known in names if not known.startswith("_")], n=1)
        raise PluginError(f"{plugin}: {path} has no {name}" + (f"; did you mean {near[0]}?" if near else ""))
    if not callable(names[name]):
        raise PluginError(f"{plugin} is a {type(names[name]).__name__}, not a function or a class")
    return names[name]


def call_by_name(plugin: str, args: Mapping[str, Any], **offered: Any) -> Any:
    """Calls a plugin with its arguments of the recipe, and with as much of what is offered as it names.

    Raises:
        PluginError: It names a parameter that nothing gives, or it raises: where.
    """
    function = load_plugin(plugin)
    with naming(plugin):
        return function(**_named_by(function, offered), **args)


def _named_by(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(offered)
    return {name: value for name, value in offered.items() if name in parameters}


@contextmanager
def naming(plugin: str) -> Iterator[None]:
    """What the user's code raises within becomes a PluginError that says where."""
    try:
        yield
    except PluginError:
        raise
    except Exception as error:
        raise PluginError(f"{plugin} {described(error)}") from error


def described(error: BaseException) -> str:
    """What was raised, and at which line."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({last[0].filename}:{last[0].lineno})" if last else ""
    return f"raised {type(error).__name__}: {error}{place}"


def import_plugin(path: Path, label: str) -> ModuleType:
    """Imports a file once, under a name of its own; it may import what lies beside it.

    Args:
        path: Resolved; it exists.
        label: What errors call it.

    Raises:
        PluginError: It raises while it is imported, or what it imports from beside it is hidden by another module.
    """
    # A notebook goes on while its user changes the file: the next run is of what it holds then.
    version = f"{path} {path.stat().st_mtime_ns}"
    name = f"plugin_{path.stem}_{hashlib.sha256(version.encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    for folder in _import_folders(path):
        _make_importable(folder)
    _require_own_neighbours(path, label)
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise PluginError(f"{label}: importing it raised {type(error).__name__}: {error}") from error
    return module


def _import_folders(path: Path) -> list[Path]:
    """The folder of a plugin, and, of one in a package, the folder that holds the package."""
    package = path.parent
    while (package / "__init__.py").is_file():
        package = package.parent
    return list(dict.fromkeys([path.parent, package]))


def _make_importable(folder: Path) -> None:
    """Puts a folder behind what is installed, but before a checkout of rlflow: its folders may have a user's names."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    own = [entry for entry in sys.path if entry != str(folder) and (entry / OF_A_CHECKOUT).is_file()]
    sys.path[:] = [entry for entry in sys.path if entry not in own] + own


def _require_own_neighbours(path: Path, label: str) -> None:
    """Follows the imports of a plugin through the files beside it.

    Raises:
        PluginError: One of them would get another module: Python's, an installed one, or one beside another plugin.
    """
    waiting, seen = [path], {path}
    while waiting:
        file = waiting.pop()
        for name in _imported_names(file):
            neighbour = _module_file(path.parent, name)
            if neighbour is None or neighbour in seen:
                continue
            found = _would_import(name)
            if found != str(neighbour):
                raise PluginError(
                    f"{label}: {file.name} imports {name}, and Python would take {found} for it, not {neighbour} "
                    f"beside it: rename {neighbour.name if neighbour.stem == name else name}"
                )
            seen.add(neighbour)
            waiting.append(neighbour)


def _imported_names(file: Path) -> Iterator[str]:
    """The top-level names that a file imports, anywhere in it; none of a file that is no Python."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name.partition(".")[0] for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module.partition(".")[0]


def _module_file(folder: Path, name: str) -> Path | None:
    candidates = (folder / name / "__init__.py", folder / f"{name}.py")
    return next((file.resolve() for file in candidates if file.is_file()), None)


def _would_import(name: str) -> str:
    """The file that ``import name`` takes now, or in words what else."""
    loaded = sys.modules.get(name)
    try:
        specification = loaded.__spec__ if loaded is not None else importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return "a module that cannot be found"
    origin = None if specification is None else specification.origin
    if name in sys.stdlib_module_names or origin in ("built-in", "frozen"):
        return f"Python's own module {name}"
    return "a namespace package" if origin is None else str(Path(origin).resolve())
