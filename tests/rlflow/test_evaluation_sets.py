"""Sets become problems, ends are scored as transformers scores them, and what cannot be used says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlflow.data.errors import DataError
from rlflow.evaluation_sets.choices import best_of, encode_pair, score_choices
from rlflow.evaluation_sets.sets import BOXED, Choice, ProblemSet, Reading, read_named, read_own
from rlflow.model_source import find_model
from rlflow.serving.models import ServedModel, Settings, read_model

GSM8K = {"question": "Two ducks lay 3 eggs each. How many?", "answer": "2 * 3 = <<2*3=6>>6\n#### 6"}
HEAD = "def double(x):\n"
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": HEAD,
    "entry_point": "double",
    "test": "def check(f):\n    assert f(2) == 4\n",
}
MMLU = {"question": "Which is even?", "choices": ["1", "2", "3", "5"], "answer": 1, "subject": "numbers"}
ARC = {"question": "Which is hot?", "choices": {"text": ["ice", "the sun"], "label": ["A", "B"]}, "answerKey": "B"}


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> ServedModel:
    return read_model(find_model(str(tiny_model_dir)), Settings())


@pytest.fixture(scope="module")
def plain(model: ServedModel, tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> ServedModel:
    """The same model without a chat template."""
    directory = tmp_path_factory.mktemp("plain")
    for path in tiny_model_dir.iterdir():
        if path.name != "chat_template.jinja":
            (directory / path.name).write_bytes(path.read_bytes())
    return read_model(find_model(str(directory)), Settings())


def named(name: str, row: dict[str, Any], model: ServedModel, directory: Path, **reading: Any) -> ProblemSet:
    path = directory / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return read_named(name, str(path), Reading(model, **reading))


def text_of(found: ProblemSet, model: ServedModel) -> str:
    (prompt,) = found.prompts
    return model.tokenizer.decode(prompt.token_ids)


def test_a_question_is_asked_in_the_chat_template_with_the_sets_instruction(model: ServedModel, tmp_path: Path):
    found = named("gsm8k", GSM8K, model, tmp_path, system="Count.", instruction="Only the number.")
    assert text_of(found, model) == f"system:Count.user:{GSM8K['question']}\nOnly the number.assistant:"
    assert found.prompts[0].columns == {"solution": GSM8K["answer"]}
    assert found.prompts[0].id == "gsm8k:1"
    assert found.reward is not None and found.reward.name == "math_accuracy"
    assert named("gsm8k", GSM8K, model, tmp_path, instruction="").prompts[0].messages[0]["content"] == GSM8K["question"]


def test_without_a_template_a_question_is_a_text(plain: ServedModel, tmp_path: Path):
    assert text_of(named("gsm8k", GSM8K, plain, tmp_path), plain) == f"Question: {GSM8K['question']}\nAnswer:"


def test_the_named_sets_take_the_columns_in_which_they_are_published(plain: ServedModel, tmp_path: Path):
    math = named("math500", {"problem": "1 + 1?", "solution": "It is 2.", "answer": "2", "level": 1}, plain, tmp_path)
    assert math.prompts[0].columns == {"solution": "2", "level": 1}
    code = named("humaneval", HUMANEVAL, plain, tmp_path)
    assert text_of(code, plain) == HEAD
    assert code.prompts[0].columns == {"test": HUMANEVAL["test"], "entry_point": "double", "code": HEAD}
    assert code.reward is not None and (code.kind, code.reward.name) == ("code", "python_tests")
    assert "\ndef " in code.stop
    (mmlu,) = named("mmlu", MMLU, plain, tmp_path).choices
    assert (mmlu.text, mmlu.ends) == ("Which is even?\nA. 1\nB. 2\nC. 3\nD. 5\nAnswer:", (" A", " B", " C", " D"))
    (arc,) = named("arc_easy", ARC, plain, tmp_path).choices
    assert arc == Choice("arc_easy:1", "Question: Which is hot?\nAnswer:", (" ice", " the sun"), 1)
    assert arc.lengths == (3, 7)


def test_math_problems_ask_for_a_box(model: ServedModel, tmp_path: Path):
    # The tiny tokenizer has no backslash: what it lacks is named.
    with pytest.raises(DataError, match=r"\\\\"):
        named("gsm8k", GSM8K, model, tmp_path)
    assert "\\boxed" in BOXED


@pytest.mark.parametrize(
    ("row", "kind", "reward"),
    [
        ({"prompt": "1 + 1?", "solution": "2"}, "answer", "math_accuracy"),
        ({"question": "1 + 1?", "answer": "2"}, "answer", "math_accuracy"),
        ({"prompt": "Write it.", "test": "assert True"}, "code", "python_tests"),
        ({"question": "Even?", "choices": ["1", "2"], "answer": "2"}, "choice", None),
        ({"question": "Even?", "choices": ["1", "2"], "answer": "b"}, "choice", None),
    ],
    ids=str,
)
def test_the_columns_of_ones_own_file_say_what_judges(
    model: ServedModel, tmp_path: Path, row: dict[str, Any], kind: str, reward: str | None
):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(row) + "\n")
    found = read_own("mine", str(path), Reading(model))
    assert (found.kind, found.reward and found.reward.name, len(found)) == (kind, reward, 1)
    if kind == "choice":
        assert found.choices[0].right == 1
    elif reward == "math_accuracy":
        assert found.prompts[0].columns["solution"] == "2"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "1 + 1?"}, "none of the columns solution, answer, test, choices"),
        (
            {"question": "Even?", "choices": ["1", "2"], "answer": 2},
            "row 1: `answer` is 2, and the choices are numbered 0",
        ),
        ({"question": "Even?", "choices": "12", "answer": 0}, "row 1: `choices` is no list of texts"),
        ({"question": "Even?", "choices": ["1"], "answer": 0}, "row 1: `choices` are no list of 2"),
        ({"choices": ["1", "2"], "answer": 0}, "row 1: there is no question"),
    ],
    ids=str,
)
def test_what_is_no_problem_is_named(model: ServedModel, tmp_path: Path, row: dict[str, Any], says: str):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=says):
        read_own("mine", str(path), Reading(model))


def test_a_named_set_without_its_columns_is_named(model: ServedModel, tmp_path: Path):
    with pytest.raises(DataError, match=r"row 1: `answer` is missing \(it has question\)"):
        named("gsm8k", {"question": "?"}, model, tmp_path)


def test_a_limit_draws_the_same_problems_every_time(model: ServedModel, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**MMLU, "question": f"Question {n}?"}) + "\n" for n in range(20)))
    one, other = (read_named("mmlu", str(path), Reading(model, limit=5, seed=seed)).choices for seed in (0, 1))
    assert len(one) == 5 and one == read_named("mmlu", str(path), Reading(model, limit=5)).choices
    assert {problem.id for problem in one} != {problem.id for problem in other}


def test_ends_are_scored_as_transformers_scores_them_one_by_one(model: ServedModel):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model.source.path)
    problems = [
        Choice("1", "Which is hot?\nAnswer:", (" ice", " the sun", " a very long answer indeed"), 1),
        Choice("2", "Even?\nAnswer:", (" 1", " 2"), 1),
    ]
    found = score_choices(loaded, model.tokenizer, problems, 4096, lambda done, total: None)
    for problem, scores in zip(problems, found, strict=True):
        for end, score in zip(problem.ends, scores, strict=True):
            # A token a character.
            tokens = torch.tensor([model.tokenizer(problem.text + end).input_ids])
            with torch.no_grad():
                logits = loaded(tokens).logits[0]
            expected = sum(
                torch.log_softmax(logits[at - 1], -1)[tokens[0, at]].item()
                for at in range(len(problem.text), len(problem.text) + len(end))
            )
            assert score == pytest.approx(expected, abs=1e-3)


def test_the_likeliest_end_and_the_likeliest_a_character_may_differ():
    scores, lengths = [-4.0, -5.0, -5.0], (3, 10, 2)
    assert (best_of(scores), best_of(scores, lengths)) == (0, 1)


def test_a_text_beyond_the_context_loses_its_beginning(model: ServedModel):
    tokens, length = encode_pair(model.tokenizer, "abcdef", " gh", 5)
    assert (model.tokenizer.decode(tokens), length) == ("ef gh", 3)
