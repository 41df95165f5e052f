"""Stored rollouts through real reward processes once more."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rlflow.cli.main import main
from rlflow.data.answers import LOADERS
from rlflow.data.tokenizer import build_character_tokenizer
from rlflow.recipe import DataBlock
from rlflow.tracking.rollouts import write_rollouts
from rlflow.types import Group, Prompt
from tests.flat_rollouts import flat

TEXTS = (("4", "5", "four", "4"), ("8", "8", "6", "9"))
"""What was written for 2+2= and 4+4=."""
RIGHT = ("4", "8")
SCORES = {
    "exact": "float(text == answer)",
    "raises": "1 / (text != '5')",
    "thinks": "float(text.startswith('<think>'))",
}

Run = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Makes the directory of a run whose function `exact` gave 1 for what is right, and advantages of GRPO."""

    def make(expression: str = SCORES["exact"], opened: str = "", **recipe: Any) -> Path:
        directory, plugin = tmp_path / "run", tmp_path / "score.py"
        plugin.write_text(
            "def exact(completions, solution, **columns):\n"
            f"    return [{expression} for text, answer in zip(completions, solution)]\n"
        )
        blocks: dict[str, Any] = {
            "algorithm": {"name": "grpo", "group_size": 4},
            "model": {"path": "some/model"},
            "data": {"train": {"path": "rows.jsonl"}},
            "rewards": [{"plugin": f"{plugin}:exact"}],
            "run": {"steps": 5, "output_dir": str(directory)},
        }
        (directory / "rollouts").mkdir(parents=True)
        (directory / "recipe.yaml").write_text(yaml.safe_dump(blocks | recipe))
        groups, advantages = [], []
        for number, (texts, answer) in enumerate(zip(TEXTS, RIGHT, strict=True)):
            messages = [{"role": "user", "content": f"{2 * number + 2}+{2 * number + 2}="}]
            prompt = Prompt(f"set:{number}", np.arange(3, dtype=np.int32), messages, {"solution": answer}, opened)
            rewards = [float(text == answer) for text in texts]
            rollouts = [
                flat([0, 1, 2], [4] * len(text), reward, text=text, rewards={"exact": reward})
                for text, reward in zip(texts, rewards, strict=True)
            ]
            groups.append(Group(prompt, 0, tuple(rollouts)))
            # Two of four are right: 0.5 above or below the mean, over the standard deviation 1 / sqrt(3).
            advantages.append((np.array(rewards) - 0.5) / (math.sqrt(1 / 3) + 1e-4))
        for step in (3, 5):
            path = directory / "rollouts" / f"step_{step:06d}.parquet"
            write_rollouts(path, groups, advantages, ["trained"] * 8)
        return directory

    return make


def table(text: str) -> dict[str, list[str]]:
    """The numbers of a replay's table by function."""
    lines = text.split("mean now\n")[1].splitlines()
    return {
        line.split("  ")[0]: line.split("  ", 1)[1].split() for line in lines if "  " in line and "then," not in line
    }


def test_the_same_rewards_and_advantages_come_of_the_same_rollouts(run: Run, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(run()), "--replay"]) == 0
    said = capsys.readouterr()
    numbers = table(said.out)
    assert said.out.splitlines()[0].endswith("run, step 5: 8 of 8 rollouts")
    assert numbers["exact"] == ["8", "0", "0", "0", "0.500", "0.500"]
    assert numbers["reward, weighted"][:2] == ["8", "0"] and numbers["advantage"][:2] == ["8", "0"]


def test_what_a_changed_function_says_now_is_shown_with_the_text(run: Run, capsys: pytest.CaptureFixture) -> None:
    directory = run("float(text == answer or text == 'four')")
    assert main(["inspect", str(directory), "--replay", "--where", "prompt_id == 'set:0'"]) == 0
    said = capsys.readouterr().out
    numbers = table(said)
    assert numbers["exact"] == ["3", "1", "0", "0", "0.500", "0.750"]
    # Three of four are right now: every advantage of the group is another.
    assert numbers["advantage"][:2] == ["0", "4"]
    assert "exact: 0 then, 1 now" in said and "completion  four" in said and "solution  4" in said


def test_a_function_that_fails_now_is_counted_and_its_cause_told(run: Run, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(run(SCORES["raises"])), "--replay"]) == 0
    said = capsys.readouterr().out
    assert table(said)["exact"] == ["4", "4", "1", "0", "0.500", "1"]
    assert "1 x exact: it raised ZeroDivisionError: division by zero (score.py:2)" in said
    assert "exact: 0 then, failed now" in said


def test_rewards_see_what_the_prompt_had_opened(run: Run, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(run(SCORES["thinks"], "<think>")), "--replay"]) == 0
    assert table(capsys.readouterr().out)["exact"][-1] == "1"


def test_other_functions_are_tried_on_stored_rollouts(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mine.py").write_text("def short(completions, **columns):\n    return [0.5] * len(completions)\n")
    arguments = ["--rewards", f"{tmp_path / 'mine.py'}:short", "--rewards", "exact_match", "--limit", "2"]
    assert main(["inspect", str(run()), *arguments]) == 0
    numbers = table(capsys.readouterr().out)
    assert numbers["short (new)"] == ["-", "-", "0", "0", "-", "0.500"]
    assert numbers["exact_match (new)"][-1] == "0.500"
    assert numbers["exact (not replayed)"][-2:] == ["0.500", "-"]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"algorithm": {"name": "gone_by"}}, "is no recipe of this version"),
        (
            {"rewards": [{"name": "exact_match", "args": {"api_key": "***"}}]},
            "has no secrets, and the reward exact_match",
        ),
    ],
)
def test_a_recipe_that_cannot_be_replayed_is_one_line_with_the_remedy(
    run: Run, capsys: pytest.CaptureFixture, recipe: dict[str, Any], said: str
) -> None:
    assert main(["inspect", str(run(**recipe)), "--replay"]) == 2
    error = capsys.readouterr().err
    assert said in error and "--recipe" in error and error.count("\n") == 1


def test_a_recipe_that_is_given_replays_a_run_whose_own_is_of_another_version(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    directory = run()
    (directory / "recipe.yaml").rename(tmp_path / "mine.yaml")
    (directory / "recipe.yaml").write_text("algo: grpo\n")
    assert main(["inspect", str(directory), "--recipe", str(tmp_path / "mine.yaml")]) == 0
    assert table(capsys.readouterr().out)["exact"][:2] == ["8", "0"]


def test_advantages_that_need_more_than_is_stored_are_not_computed_and_it_is_said(
    run: Run, capsys: pytest.CaptureFixture
) -> None:
    algorithm = {"name": "grpo", "group_size": 4, "kl": {"coef": 0.1, "placement": "reward"}}
    assert main(["inspect", str(run(algorithm=algorithm)), "--replay"]) == 0
    said = capsys.readouterr()
    assert "advantage" not in table(said.out)
    assert "advantages are not computed: their KL needs the reference's logprobs" in said.err


def test_what_is_exported_trains_as_it_is_and_holds_no_answer_twice(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    best = tmp_path / "best.jsonl"
    arguments = ["--steps", ":", "--where", "reward == 1", "--export", str(best)]
    assert main(["inspect", str(run()), *arguments]) == 0
    rows = [json.loads(line) for line in best.read_text().splitlines()]
    assert [[message["content"] for message in row["messages"]] for row in rows] == [["2+2=", "4"], ["4+4=", "8"]]
    data = DataBlock.model_validate({"train": {"path": str(best)}, "max_tokens": 32})
    examples = LOADERS["example"](data, build_character_tokenizer("0123456789+="), 0)
    # 2 + 2 = 4 <eos>: the answer and its end are trained.
    assert [int(example.loss_mask.sum()) for example in examples] == [2, 2]
