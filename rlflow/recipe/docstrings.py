"""What the keys of a block mean: the docstrings under its fields, read from its source when somebody asks."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache

from rlflow.recipe.block import Block


def meaning(block: type[Block], key: str) -> str:
    """The docstring of a block's field on one line; empty where there is none."""
    for owner in block.__mro__:
        if owner is not Block and issubclass(owner, Block) and key in (found := _under_fields(owner)):
            return found[key]
    return ""


@cache
def _under_fields(block: type[Block]) -> dict[str, str]:
    """Those of the fields that a class itself declares."""
    (declared,) = ast.parse(textwrap.dedent(inspect.getsource(block))).body
    assert isinstance(declared, ast.ClassDef)
    found = {}
    for field, text in zip(declared.body, declared.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found
