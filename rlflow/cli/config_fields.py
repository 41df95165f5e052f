"""The fields that transformers' config of a kind of model has, read from its source: importing it would load torch."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_BASE = "PreTrainedConfig"
_OLD_NAMES = {"model_type", "architectures", "torch_dtype", "rope_theta", "rope_scaling", "partial_rotary_factor"}
"""Fields that every config takes without declaring them."""


@cache
def model_types() -> dict[str, str]:
    """Every kind of model that transformers knows, with the name of its config's class; empty where that has moved."""
    file = _transformers() / "models" / "auto" / "auto_mappings.py"
    for node in ast.walk(_parsed(file)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CONFIG_MAPPING_NAMES":
            return dict(ast.literal_eval(node.value.args[0])) if isinstance(node.value, ast.Call) else {}
    return {}


def config_fields(model_type: str) -> dict[str, frozenset[str]] | None:
    """Field -> the names of its types, none where it is not declared; None where the config is made of others."""
    name = model_type.replace("-", "_")
    tree = _parsed(_transformers() / "models" / name / f"configuration_{name}.py")
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    config = classes.get(model_types().get(model_type, ""))
    if config is None or [ast.unparse(base) for base in config.bases] != [_BASE]:
        return None
    base = _parsed(_transformers() / "configuration_utils.py")
    common = next((n for n in ast.walk(base) if isinstance(n, ast.ClassDef) and n.name == _BASE), None)
    if common is None:
        return None
    declared = {**dict(_declared(common)), **dict(_declared(config))}
    return {name: frozenset() for name in {*_OLD_NAMES, *_mentioned(config), *_mentioned(common)}} | declared


def _declared(config: ast.ClassDef) -> Iterator[tuple[str, frozenset[str]]]:
    for node in config.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            types = (ast.unparse(inner) for inner in ast.walk(node.annotation) if isinstance(inner, ast.expr))
            yield node.target.id, frozenset(types)


def _mentioned(config: ast.ClassDef) -> Iterator[str]:
    """Other names of fields, and those that the config takes out of its arguments itself."""
    for node in ast.walk(config):
        match node:
            case ast.Assign(targets=[ast.Name(id="attribute_map")], value=ast.Dict(keys=keys)):
                yield from (key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))
            case ast.Call(func=ast.Attribute(attr="pop" | "get"), args=[ast.Constant(value=str(name)), *_]):
                yield name
            case ast.arg(arg=name) | ast.Attribute(value=ast.Name(id="self"), attr=name):
                yield name


@cache
def _transformers() -> Path:
    found = importlib.util.find_spec("transformers")
    return Path(found.origin).parent if found is not None and found.origin else Path()


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_bytes()) if file.is_file() else ast.Module([], [])
