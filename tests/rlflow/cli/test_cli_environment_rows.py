"""What a plan says of rows that an environment cannot go on from, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlflow.cli.main import main

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
