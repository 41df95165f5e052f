"""Recipes that their schema accepts and that cannot run: one message with file, line, key and remedy, exit code 2."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from rlflow.cli.main import main

GOOD = """\
algorithm: {name: grpo, group_size: 4, kl: {coef: 0.0}}
model:
  characters: "0123456789+="
  architecture: {model_type: qwen3, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1,
    num_attention_heads: 2, num_key_value_heads: 1, head_dim: 16, max_position_embeddings: 64}
data:
  train: {path: good.jsonl}
  prompts_per_step: 4
  max_prompt_tokens: 16
rewards:
  - {name: exact_match}
rollout: {engine: torch, max_new_tokens: 4}
run: {steps: 3, output_dir: out}
"""
FIELDS = "  architecture: {model_type: qwen3, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1,"
HEADS = "    num_attention_heads: 2, num_key_value_heads: 1, head_dim: 16, max_position_embeddings: 64}"


@dataclass(frozen=True)
class Bad:
    """The good recipe with line ``line`` replaced."""

    line: int
    text: str
    key: str
    says: str
    at: int | None = None
    """Where the problem is reported, when it is not ``line``."""


def model(path: str) -> str:
    """The model block of an existing model, on as many lines as that of the new one."""
    return f"model:\n  path: {path}\n\n"


BAD = {
    "no such model type": Bad(
        4, FIELDS.replace("qwen3", "qwen33"), "model.architecture.model_type", "(did you mean qwen3?)"
    ),
    "a misspelt field of a model": Bad(
        4,
        FIELDS.replace("num_hidden", "num_hiden"),
        "model.architecture.num_hiden_layers",
        "a qwen3 has no such field (did you mean num_hidden_layers?)",
    ),
    "a size that is text": Bad(
        4,
        FIELDS.replace("hidden_size: 32", "hidden_size: big"),
        "model.architecture.hidden_size",
        "must be int, is big",
    ),
    "a model without layers": Bad(
        4, FIELDS.replace("layers: 1", "layers: 0"), "model.architecture.num_hidden_layers", "must be more than 0, is 0"
    ),
    "heads that do not divide": Bad(
        5,
        HEADS.replace("heads: 1", "heads: 3"),
        "model.architecture",
        "2 attention heads do not divide over num_key_value_heads: 3",
        at=4,
    ),
    "a width that no head divides": Bad(
        5,
        HEADS.replace("heads: 2", "heads: 5").replace("head_dim: 16, ", "").replace("heads: 1", "heads: 5"),
        "model.architecture",
        "a width of 32 does not divide into 5 attention heads",
        at=4,
    ),
    "a model without config": Bad(2, model("models/nothing"), "model.path", "it has no config.json", at=3),
    "a config that is cut off": Bad(2, model("models/cut"), "model.path", "is no JSON, it may be cut off", at=3),
    "a config that is a list": Bad(2, model("models/list"), "model.path", "holds no fields: fetch it again", at=3),
    "a config of odd heads": Bad(
        2, model("models/heads"), "model.path", "does not divide into 3 attention heads", at=3
    ),
    "a config of no kind": Bad(
        2, model("models/kind"), "model.path", "knows no model lama (did you mean llama?)", at=3
    ),
    "a model that is a file": Bad(2, model("good.jsonl"), "model.path", "is a file: name the directory", at=3),
    "a character that is not there": Bad(
        7, "  train: {path: letters.jsonl}", "data.train", "the character 'w' is not in model.characters"
    ),
    "an empty file": Bad(7, "  train: {path: empty.jsonl}", "data.train", "holds no rows"),
    "a directory of nothing": Bad(7, "  train: {path: models/nothing}", "data.train", "doesn't contain any data files"),
    "a row cut off": Bad(7, "  train: {path: cut.jsonl}", "data.train", "row 1: not valid JSON"),
    "a misspelt column": Bad(
        7, "  train: {path: good.jsonl, columns: {prompt: promt}}", "data.train.columns.prompt", "has no column promt"
    ),
    "another format": Bad(7, "  train: {path: good.jsonl, format: preference}", "data.train", "`chosen` is missing"),
    "prompts over the limit": Bad(
        9, "  max_prompt_tokens: 2", "data.train", "4 tokens, data.max_prompt_tokens is 2", at=7
    ),
    "rows that raise": Bad(
        7, "  train: {generator: 'rows.py:boom'}", "data.train.generator", "rows.py:2: calling it raised KeyError: 'x'"
    ),
    "a generator's argument": Bad(
        7, "  train: {generator: 'rows.py:make'}", "data.train.args", "missing a required argument: 'n'"
    ),
    "a built-in generator's value": Bad(
        7, "  train: {generator: arithmetic, args: {digits: 9}}", "data.train.args", "digits is 9; it goes from 1 to 3"
    ),
    "held-out rows": Bad(
        13,
        "run: {steps: 3, output_dir: out}\nevaluation: {data: {path: empty.jsonl}}",
        "evaluation.data",
        "holds no rows",
        at=14,
    ),
    "a template that breaks off": Bad(
        2, "model:\n  chat_template: '{{ messages'", "data.train", "Set model.chat_template", at=8
    ),
    "a column that a reward needs": Bad(
        11, "  - {plugin: 'needs.py:f'}", "rewards.0.plugin", "needs the column answer, and the data has solution"
    ),
    "a reward's missing argument": Bad(11, "  - {name: soft_overlong}", "rewards.0.args", "needs max_tokens", at=11),
    "a reward that needs no such argument": Bad(
        11, "  - {name: repetition, args: {ngram: 3}}", "rewards.0.args", "(did you mean ngram_size?)"
    ),
    "a pattern that is none": Bad(
        11, "  - {name: format, args: {pattern: '('}}", "rewards.0.args", "cannot be called with these args"
    ),
    "an import that raises": Bad(
        11, "  - {plugin: 'exits.py:f'}", "rewards.0.plugin", "exits.py:2: importing it raised"
    ),
    "a directory below a file": Bad(
        13, "run: {steps: 1, output_dir: good.jsonl/x}", "run.output_dir", "is a file: name a"
    ),
    "a directory that nobody can write": Bad(13, "run: {steps: 1, output_dir: /proc/x}", "run.output_dir", "make room"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}+1=", "solution": str(i + 1)} for i in range(8)]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "letters.jsonl").write_text(json.dumps({"prompt": "w+1=", "solution": "1"}))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "cut.jsonl").write_text('{"prompt": "1+1="\n')
    (tmp_path / "rows.py").write_text("def make(n): ...\ndef boom(): raise KeyError('x')\n")
    (tmp_path / "needs.py").write_text("def f(completions, answer): ...\n")
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(3)\ndef f(): ...\n")
    configs = {
        "nothing": None,
        "cut": '{"model_type": "qwen3", "hid',
        "list": "[]",
        "heads": '{"hidden_size": 32, "num_attention_heads": 3}',
        "kind": '{"model_type": "lama"}',
    }
    for name, config in configs.items():
        (tmp_path / "models" / name).mkdir(parents=True)
        if config is not None:
            (tmp_path / "models" / name / "config.json").write_text(config)
            save_file({}, tmp_path / "models" / name / "model.safetensors")
    return tmp_path


def write(directory: Path, line: int, text: str) -> Path:
    lines = GOOD.splitlines()
    if text.startswith("model:\n  path"):
        lines[1:5] = []
    else:
        lines[line - 1 : line] = []
    path = directory / "recipe.yaml"
    path.write_text("\n".join([*lines[: line - 1], text, *lines[line - 1 :], ""]))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_what_cannot_run_is_one_message_with_line_key_and_remedy(
    bad: Bad, command: str, here: Path, capsys: pytest.CaptureFixture
):
    path = write(here, bad.line, bad.text)
    assert main([command, str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{path}:{bad.at or bad.line}: {bad.key}: "), said
    assert bad.says in said
    assert said.count(str(path)) == 1, "one problem"
    assert not (here / "out").exists()


def test_the_good_recipe_is_planned_with_its_rows(here: Path, capsys: pytest.CaptureFixture):
    path = write(here, 8, "  prompts_per_step: 16")
    assert main(["plan", str(path)]) == 0
    said = capsys.readouterr().out
    assert "data       8 rows\n" in said
    assert "a step of 16 is more than the 8 rows of data.train, which then come several times in it: lower" in said
    assert main(["plan", str(path), "--no-data"]) == 0
    assert "rows" not in capsys.readouterr().out
