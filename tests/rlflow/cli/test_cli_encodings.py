"""Commands under a locale that is not UTF-8: what they write and what they print."""

from __future__ import annotations

import ast
import contextlib
import io
import sys
from pathlib import Path

import pytest

from rlflow.cli.main import main

ROOT = Path(__file__).resolve().parents[3]
RECIPE = """
run: {output_dir: runs/é → 数据, steps: 1}
model:
  characters: "0123456789+="
  architecture: {model_type: qwen3, architectures: [Qwen3ForCausalLM], hidden_size: 16, intermediate_size: 32,
    num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, head_dim: 8, max_position_embeddings: 64}
algorithm: {name: sft}
data: {train: {generator: arithmetic}, prompts_per_step: 2, max_tokens: 64}
"""


@pytest.mark.parametrize(
    ("encoding", "written"), [("latin-1", "runs/é \\u2192 \\u6570\\u636e"), ("utf-8", "runs/é → 数据")]
)
def test_what_the_terminals_encoding_lacks_is_printed_as_an_escape(
    encoding: str, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding))
    assert main(["plan", str(recipe)]) == 0
    sys.stdout.flush()
    assert written in printed.getvalue().decode(encoding)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["infer", "runs/x", "--system", "caf\udce9"], "argument --system: what follows 'caf' is no UTF-8 text"),
        (["eval", "runs/x", "--system", "caf\udce9"], "argument --system: what follows 'caf' is no UTF-8 text"),
        (["plan", "quickstart", "data.system=caf\udce9"], "data.system: has U+DCE9, which is no text"),
    ],
)
def test_bytes_of_a_command_line_that_are_no_text_are_named(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture
):
    with contextlib.suppress(SystemExit):
        assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_no_file_is_read_or_written_in_the_encoding_of_a_locale():
    """json and YAML are UTF-8 wherever they were written; Python's default is what the locale says."""
    of_the_locale = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in ("rlflow", "actors", "rewards")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and _has_text(node) and all(word.arg != "encoding" for word in node.keywords)
    ]
    assert of_the_locale == []


def _has_text(call: ast.Call) -> bool:
    """Whether it opens, reads or writes a file as text."""
    match call:
        case ast.Call(func=ast.Attribute(attr="read_text" | "write_text")):
            return True
        case ast.Call(func=ast.Attribute(attr="open"), args=[] | [ast.Constant()] as mode):
            return "b" not in "".join(map(ast.unparse, mode))
        case ast.Call(func=ast.Name(id="open"), args=[_, *mode]):
            return "b" not in "".join(map(ast.unparse, mode))
    return False
