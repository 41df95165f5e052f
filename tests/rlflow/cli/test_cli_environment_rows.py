"""What a plan says of rows that an environment cannot go on from, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlflow.cli.main import main
from rlflow.cli.row_checks import read_data
from rlflow.recipe import load_recipe

RECIPE = """\
algorithm: {{name: grpo, group_size: 2}}
model:
  architecture: {{model_type: llama, hidden_size: 8, intermediate_size: 16, num_hidden_layers: 2,
    num_attention_heads: 2, num_key_value_heads: 1, vocab_size: 64}}
  characters: "abcdefghijklmnopqrstuvwxyz{{}}\\": ,_"
  chat_template: "{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}"
data: {{train: {{path: {rows}}}, prompts_per_step: 1, max_prompt_tokens: 32}}
rewards: [{{name: environment}}]
environment: {environment}
rollout: {{engine: torch, max_new_tokens: 6}}
run: {{steps: 1, output_dir: {out}}}
"""
TOOLS = "def look(word: str) -> str:\n    '''Looks.\n\n    Args:\n        word: which\n    '''\n    return word\n"
GAME = "class Game:\n    def reset(self, row): ...\n    def step(self, message): ...\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "environment", "says"),
    [
        ({"prompt": "say"}, '{{tools: ["{file}:look"]}}', "has `tools`, which the chat template does not show"),
        ({"prompt": "say"}, '{{plugin: "{file}:Looking"}}', "has `tools`, which the chat template does not show"),
        ({"text": "say"}, '{{plugin: "{file}:Game"}}', "is plain text, and what an environment answers is rendered"),
    ],
)
def test_a_plan_refuses_rows_whose_turns_the_template_cannot_write(tmp_path: Path, capsys, row, environment, says):
    rows, file, recipe = tmp_path / "rows.jsonl", tmp_path / "mine.py", tmp_path / "recipe.yaml"
    rows.write_text(json.dumps(row) + "\n")
    file.write_text(f"{TOOLS}\n{GAME}\n{GAME.replace('Game', 'Looking')}    tools = [look]\n")
    recipe.write_text(RECIPE.format(rows=rows, out=tmp_path / "out", environment=environment.format(file=file)))
    assert main(["plan", str(recipe)]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


SHOWING = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
TURNS = "{% for m in messages %}{{ m.content }}{% endfor %}"
UNREADABLE = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}("
    "{% for key in c.function.arguments %}{{ key }},{% endfor %}){% endfor %}{% endfor %}"
)
"""Of calls without what the arguments are."""
LOOK = {"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}


@pytest.mark.parametrize(
    ("row", "template", "says"),
    [
        ({"prompt": "1+1"}, TURNS, "environment: it has `tools`, which the chat template does not show to the policy"),
        ({"prompt": "1+1"}, SHOWING + TURNS, None),
        ({"prompt": "1+1"}, SHOWING + UNREADABLE, "environment.call_parser: the chat template writes calls in a form"),
        ({"text": "1+1"}, SHOWING + TURNS, "is plain text, and what an environment answers is rendered"),
    ],
)
def test_what_the_template_cannot_write_is_told_of_a_model_whose_rows_are_not_tokenised(
    tmp_path: Path, tiny_model_dir: Path, row, template, says
):
    rows, recipe = tmp_path / "rows.jsonl", tmp_path / "recipe.yaml"
    rows.write_text(json.dumps(row) + "\n")
    recipe.write_text(RECIPE.format(rows=rows, out=tmp_path / "out", environment='{plugin: "mine.py:Game"}'))
    model = {"path": tiny_model_dir, "architecture": "null", "characters": "null", "chat_template": f"'{template}'"}
    (stage,) = load_recipe(recipe, [f"model.{key}={value}" for key, value in model.items()])
    reading = read_data(stage, {}, [LOOK], tokenize=False)
    said = [f"{key}: {problem}" for key, problem in reading.problems]
    assert len(said) == (says is not None)
    assert says is None or says in said[0]
