"""recipes/gsm8k_solutions.py: pairs and labels of GSM8K's model solutions, split by problem."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlflow.data.errors import DataError
from rlflow.data.formats import format_of
from rlflow.data.sources import read_table
from rlflow.recipe.data_blocks import SourceBlock

FILE = Path(__file__).resolve().parent.parent / "recipes" / "gsm8k_solutions.py"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def problem(number: int, labels: tuple[bool, ...]) -> dict:
    solutions = {
        model: {"is_correct": label, "solution": f"{model} on {number}\nA: {number if label else 0}"}
        for model, label in zip(MODELS, labels, strict=True)
    }
    return {"question": f"What is {number}?", "ground_truth": f"It is {number}.\nA: {number}", **solutions}


@pytest.fixture
def read(tmp_path):
    """read(problems, function, **args) -> the rows, by the same way a recipe takes."""

    def read(problems: list, function: str, **args) -> list[dict]:
        path = tmp_path / "solutions.jsonl"
        path.write_text("".join(json.dumps(item) + "\n" for item in problems))
        source = SourceBlock(generator=f"{FILE}:{function}", args={"path": str(path), **args})
        return [row.columns for row in read_table(source).rows]

    return read


def test_a_problem_with_a_right_and_a_wrong_solution_is_a_pair_and_the_others_are_none(read):
    problems = [
        problem(1, (True, True, True, True)),
        problem(2, (False, False, False, False)),
        problem(3, (False, False, True, False)),
        problem(4, (True, True, False, True)),
    ]
    third, fourth = read(problems, "pairs", split="all")
    assert (third["prompt"], third["chosen"]) == ("What is 3?", "175b_finetuning on 3\nA: 3")
    assert third["rejected"].endswith("on 3\nA: 0")
    assert (fourth["prompt"], fourth["rejected"]) == ("What is 4?", "175b_finetuning on 4\nA: 0")
    assert fourth["chosen"].endswith("on 4\nA: 4")
    assert third["solution"] == "It is 3.\nA: 3"


def test_the_pairs_of_many_problems_are_of_all_models(read):
    pairs = read([problem(n, (True, True, False, False)) for n in range(100)], "pairs", split="all")
    assert {pair["chosen"].split()[0] for pair in pairs} == set(MODELS[:2])
    assert {pair["rejected"].split()[0] for pair in pairs} == set(MODELS[2:])


def test_every_solution_is_a_labelled_answer(read):
    rows = read([problem(5, (True, False, False, True))], "labelled", split="all")
    assert [row["label"] for row in rows] == [True, False, False, True]
    assert [row["completion"] for row in rows] == [
        f"{m} on 5\nA: {n}" for m, n in zip(MODELS, (5, 0, 0, 5), strict=True)
    ]
    assert {row["prompt"] for row in rows} == {"What is 5?"}


@pytest.mark.parametrize("function", ["pairs", "labelled"])
def test_train_and_heldout_share_no_problem_and_together_are_all(read, function):
    problems = [problem(number, (True, False, True, False)) for number in range(300)]
    parts = {split: read(problems, function, split=split) for split in ("train", "heldout", "all")}
    train, heldout = ({row["prompt"] for row in parts[split]} for split in ("train", "heldout"))
    assert not train & heldout
    assert len(parts["train"]) + len(parts["heldout"]) == len(parts["all"])
    assert len(heldout) / 300 == pytest.approx(0.1, abs=0.05)


def test_pairs_and_labels_hold_out_the_same_problems_wherever_these_are_in_the_file(read):
    problems = [problem(number, (True, False, True, False)) for number in range(100)]
    of_pairs = {row["prompt"] for row in read(problems, "pairs", split="heldout")}
    of_labels = {row["prompt"] for row in read(problems[::-1], "labelled", split="heldout")}
    assert of_pairs == of_labels
    more = [problem(number, (True, False, True, False)) for number in range(120)]
    assert {row["prompt"] for row in read(more, "pairs", split="heldout")} >= of_pairs


def test_the_same_file_gives_the_same_rows_in_its_order(read):
    problems = [problem(number, (True, False, True, False)) for number in range(50)]
    first = read(problems, "pairs")
    assert first == read(problems, "pairs")
    numbers = [int(re.findall(r"\d+", row["prompt"])[0]) for row in first]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize(("function", "form"), [("pairs", "preference"), ("labelled", "kto")])
def test_the_rows_are_of_the_format_that_training_needs(tmp_path, function, form):
    path = tmp_path / "solutions.jsonl"
    path.write_text(json.dumps(problem(1, (True, False, True, False))) + "\n")
    args = {"path": str(path), "split": "all"}
    table = read_table(SourceBlock(generator=f"{FILE}:{function}", args=args))
    assert format_of(table, judged=form == "kto") == form


def test_a_missing_file_says_where_to_fetch_it(tmp_path):
    source = SourceBlock(generator=f"{FILE}:pairs", args={"path": str(tmp_path / "solutions.jsonl")})
    with pytest.raises(DataError, match=r"solutions\.jsonl: no such file\..* says where to fetch it"):
        read_table(source)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"split": "test"}, "split is 'test'; it is train, heldout or all"),
        ({"heldout_fraction": 1.0}, r"heldout_fraction is 1\.0; it lies between 0 and 1"),
    ],
)
def test_an_argument_out_of_its_range_is_refused(read, args, message):
    with pytest.raises(DataError, match=message):
        read([problem(1, (True, False, True, False))], "pairs", **args)


def test_a_line_of_another_kind_is_named(read):
    with pytest.raises(DataError, match=r"solutions\.jsonl, row 2: is no problem with the solutions of 6b_finetuning"):
        read([problem(1, (True, False, True, False)), {"question": "What is 2?"}], "labelled")
