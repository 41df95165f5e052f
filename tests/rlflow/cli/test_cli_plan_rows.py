"""What `rlflow plan` says of rows: their form always and at once, and with --tokenize what the model makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlflow.cli.main import main
from rlflow.cli.row_checks import read_data
from rlflow.recipe import load_recipe

ROWS = [{"prompt": f"{number}+1", "solution": str(number + 1)} for number in (1, 2, 12345678)]
RECIPE = """\
algorithm: {{name: grpo, group_size: 2}}
model: {{path: {model}}}
data: {{train: {{path: rows.jsonl}}, prompts_per_step: 1, max_prompt_tokens: 20, overlong: drop}}
rewards: [{{name: exact_match}}]
rollout: {{engine: torch, max_new_tokens: 4}}
run: {{steps: 1, output_dir: out}}
"""
WITHOUT = """\
import sys
from rlflow.cli.main import main
code = main(sys.argv[1:])
print(*sorted({"torch", "ray", "vllm", "datasets", "transformers", "asyncio"} & sys.modules.keys()), file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    write(ROWS)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_model_dir))
    return path


def write(rows: list[dict[str, str]]) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("options", "says", "imported"),
    [
        ([], "data       3 rows; how many of them fit: --tokenize\n", ""),
        (["--tokenize"], "data       2 rows\n", "asyncio transformers"),
    ],
)
@pytest.mark.slow
def test_a_plan_reads_rows_without_transformers_and_tokenises_them_without_torch(
    recipe_file: Path, options: list[str], says: str, imported: str
):
    command = [sys.executable, "-c", WITHOUT, "plan", str(recipe_file), *options]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    assert says in finished.stdout
    assert finished.stderr.splitlines()[-1].split() == imported.split()


def test_a_row_without_what_its_format_needs_is_told_without_a_tokenizer(recipe_file: Path, capsys):
    write([*ROWS, {"prompt": "", "solution": "4"}])
    assert main(["plan", str(recipe_file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{recipe_file}:3: data.train: ") and "row 4: `prompt` is empty" in said


@pytest.mark.parametrize(
    ("algorithm", "lacks"),
    [
        ("dpo", "it has no rejected answer"),
        ("kto", "it has no `label`"),
        ("sft", "it has no assistant answer to learn"),
        ("classification", "it has no `label`"),
    ],
)
def test_rows_without_what_is_learned_from_are_told_without_a_tokenizer(recipe_file: Path, algorithm: str, lacks: str):
    write([{"prompt": "1+1"} if algorithm == "sft" else {"prompt": "1+1", "response": "2"}])
    changes = [f"algorithm={{name: {algorithm}}}", "data={train: {path: rows.jsonl}}", "rewards=[]"]
    (recipe,) = load_recipe(recipe_file, changes)
    reading = read_data(recipe, {}, tokenize=False)
    assert [key for key, _ in reading.problems] == ["data.train"]
    assert f"row 1: {lacks}" in reading.problems[0][1]


def test_rewards_are_shown_the_same_columns_whether_rows_are_tokenised_or_not(recipe_file: Path):
    write([{"prompt": "1+1", "response": "2", "solution": "2"}, {"prompt": "1+2", "response": "3", "level": "1"}])
    (recipe,) = load_recipe(recipe_file, [])
    alone, tokenised = (read_data(recipe, {}, tokenize=whole) for whole in (False, True))
    assert alone.row == tokenised.row == {"response": "2", "solution": "2", "level": "1"}
    assert (alone.tokenized, tokenised.tokenized) == (False, True)
