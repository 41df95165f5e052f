"""Canaries: secrets that a recipe and its environment hold are in nothing that a run writes or says."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rlflow.cli.main import main
from tests.local_actors import use_local_actors
from tests.report_pages import embedded

RECIPE = """
run: {{output_dir: {out}, seed: 3, steps: 1}}
model: {{path: {model}}}
algorithm: {{name: grpo, group_size: 4, kl: {{coef: 0.0}}}}
data: {{train: {{path: {rows}}}, prompts_per_step: 2, max_prompt_tokens: 32}}
rewards:
  - plugin: "{plugin}:Judge"
    args:
      api_key: CANARY plain words
      account: {{credentials: {{user: [{{name: CANARYnested}}]}}}}
      headers: {{Authorization: Bearer CANARYheader, X-Mine: CANARYcustom}}
      url: "https://ann:CANARYurl@host/v1?sig=CANARYquery&n=1"
reward_server: {{environment: [JUDGE_TOKEN, JUDGE_SETTING], max_error_fraction: 0.99}}
rollout: {{engine: torch, max_new_tokens: 4}}
tracking: [console, jsonl]
"""

JUDGE = """
import os
class Judge:
    def __init__(self, **args):
        self.said = f"{args} {args['url'].partition(':')[2]} {os.environ['JUDGE_TOKEN']} {os.environ['JUDGE_SETTING']}"
        assert self.said.count("CANARY") == 10
        self.said += f" Authorization: {args['headers']['Authorization']} {args['account']['credentials']['user']}"
    def __call__(self, completions, **columns):
        print(self.said, flush=True)
        return [self.score(text) for text in completions]
    def score(self, text):
        if ord((text + "?")[0]) % 3 == 0:
            raise RuntimeError(f"HTTP 401: {self.said}")
        return float(len(text) + ord((text + "?")[0]))
"""


@pytest.fixture
def recipe_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model_dir: Path) -> Path:
    use_local_actors(monkeypatch)
    monkeypatch.setenv("JUDGE_TOKEN", "CANARYtoken")
    monkeypatch.setenv("JUDGE_SETTING", "CANARYsetting")
    rows, plugin, recipe = tmp_path / "rows.jsonl", tmp_path / "judge.py", tmp_path / "recipe.yaml"
    rows.write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(4)))
    plugin.write_text(JUDGE)
    recipe.write_text(RECIPE.format(out=tmp_path / "out", model=tiny_model_dir, rows=rows, plugin=plugin))
    return recipe


def files_with_canaries(directory: Path) -> list[str]:
    """Names of files that hold the word, what is compressed included."""
    found = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.suffix == ".parquet":
            content += str(pq.read_table(path).to_pydict()).encode()
        if path.suffix == ".html":
            content += str(embedded(content.decode())).encode()
        if b"CANARY" in content:
            found.append(str(path.relative_to(directory)))
    return found


@pytest.mark.slow
def test_no_secret_is_in_what_a_run_leaves_and_says_and_a_resumed_run_has_them_still(
    recipe_file: Path, capsys: pytest.CaptureFixture
):
    out = recipe_file.parent / "out"
    assert main(["run", str(recipe_file)]) == 0
    (out / "final").rename(recipe_file.parent / "final")
    assert main(["run", str(recipe_file), "run.steps=2", "--resume"]) == 0
    said = capsys.readouterr()
    assert "could not be scored" in said.out and "raised RuntimeError: HTTP 401: {'api_key': '***'" in said.out
    assert "CANARY" not in said.out + said.err
    assert len(list(out.glob("rollouts/*.parquet"))) == 2 and (out / "report.html").exists()
    assert "HTTP 401" in (out / "logs" / "run.log").read_text()
    assert files_with_canaries(out) == []
    assert files_with_canaries(recipe_file.parent / "final") == []


def test_no_secret_is_in_the_message_that_ends_a_run(recipe_file: Path, capsys: pytest.CaptureFixture):
    assert main(["run", str(recipe_file), "reward_server.max_error_fraction=0.0"]) == 1
    said = capsys.readouterr()
    assert "more than reward_server.max_error_fraction" in said.err and "HTTP 401" in said.err
    assert "CANARY" not in said.out + said.err
    assert files_with_canaries(recipe_file.parent / "out") == []
