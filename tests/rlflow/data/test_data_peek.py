"""What a source's keys name that its data does not have is told before anything is loaded."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from rlflow.cli.preflight import load_checked
from rlflow.data.peek import problems
from rlflow.data.records import load_records
from rlflow.recipe import RecipeError, SourceBlock

ROWS = [{"question": "Hi", "answer": "Two"}, {"question": "Why?", "answer": "Yes", "level": 1}]
FILES = {
    "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "rows.json": json.dumps(ROWS),
    "data.json": json.dumps({"data": ROWS}, indent=1),
    "rows.csv": "question,answer,level\nHi,Two,\nWhy?,Yes,1\n",
}
GENERATOR = "def make(operators, *, digits=2, rows=None):\n    raise SystemExit('never run')\n"


@pytest.fixture
def write(tmp_path):
    """write(name) -> the path of a file of that kind with the two rows."""

    def write(name: str) -> str:
        path = tmp_path / name
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist([{"level": None, **row} for row in ROWS]), path)
        elif name.endswith(".gz"):
            path.write_bytes(gzip.compress(FILES[name.removesuffix(".gz")].encode()))
        else:
            path.write_text(FILES[name])
        return str(path)

    return write


@pytest.mark.parametrize("name", [*FILES, "rows.parquet", "rows.jsonl.gz"])
def test_a_column_that_no_row_has_is_told_with_the_nearest(write, name):
    path = write(name)
    assert list(problems(SourceBlock(path=path, columns={"prompt": "question", "hard": "level"}))) == []
    ((key, message),) = problems(SourceBlock(path=path, columns={"prompt": "question", "solution": "anwser"}))
    assert key == "columns.solution"
    assert message.startswith(f"{path} has no column anwser; it has ") and message.endswith("Nearest: answer.")


def test_columns_that_cannot_be_told_are_left_to_loading(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{broken\n")
    assert list(problems(SourceBlock(path=str(path), columns={"prompt": "question"}))) == []


def test_a_file_stands_in_for_a_dataset_with_splits_and_subsets(write):
    source = SourceBlock(path=write("rows.jsonl"), split="test", subset="main", columns={"prompt": "question"})
    assert list(problems(source)) == []
    assert len(load_records(source, 0, lambda record: record)) == 2


def test_a_directory_has_the_splits_of_its_files(tmp_path):
    (tmp_path / "main").mkdir()
    for name in ("train", "test"):
        (tmp_path / "main" / f"{name}.jsonl").write_text(FILES["rows.jsonl"])
    for split in ("test", "train[:1]+test"):
        assert list(problems(SourceBlock(path=str(tmp_path / "main"), split=split))) == []
    ((key, message),) = problems(SourceBlock(path=str(tmp_path / "main"), split="tset"))
    assert key == "split" and message.endswith("main has no split tset; it has train, test. Nearest: test.")
    assert list(problems(SourceBlock(path=str(tmp_path), subset="main", split="test"))) == []
    ((key, _),) = problems(SourceBlock(path=str(tmp_path), subset="mian"))
    assert key == "subset"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"digts": 2}, "arithmetic: got an unexpected keyword argument 'digts'; its args are operators, digits"),
        ({"digits": 9}, "digits is 9; it goes from 1 to 3"),
        ({"split": "held_out"}, "split is 'held_out'; it is train or heldout"),
        ({"digits": "2"}, "not supported between"),
    ],
)
def test_arguments_of_a_generator_are_looked_at_before_it_runs(args, says):
    ((key, message),) = problems(SourceBlock(generator="arithmetic", args=args))
    assert key == "args" and says in message
    assert list(problems(SourceBlock(generator="arithmetic", args={"digits": 3, "rows": 5}))) == []


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"operators": "+", "digts": 2}, "got an unexpected keyword argument 'digts'"),
        ({"digits": 2}, "missing a required argument: 'operators'"),
        ({"operators": "+", "digits": 2, "rows": 1}, None),
    ],
)
def test_so_are_those_of_a_users_function_whose_file_is_not_run(tmp_path, args, says):
    (tmp_path / "mine.py").write_text(GENERATOR)
    found = list(problems(SourceBlock(generator=f"{tmp_path}/mine.py:make", args=args)))
    assert [key for key, _ in found] == (["args"] if says else [])
    assert says is None or says in found[0][1]


def test_a_plan_names_the_line_of_each(write, tmp_path, tokenizer):
    model = tmp_path / "model"
    tokenizer.save_pretrained(model)
    (model / "config.json").write_text('{"model_type": "llama"}')
    save_file({}, model / "model.safetensors")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "algorithm: {name: sft}\n"
        f"model:\n  path: {model}\n  chat_template_kwargs: {{enable_thinking: false}}\n"
        f"data:\n  train:\n    path: {write('rows.jsonl')}\n    split: test\n"
        "    columns: {prompt: question, response: anwser}\n"
        "run: {steps: 1}\n"
    )
    with pytest.raises(RecipeError) as error:
        load_checked(recipe)
    told = [(problem.line, problem.key) for problem in error.value.problems if "id" not in problem.key]
    assert told == [
        (4, "model.chat_template_kwargs"),
        (9, "data.train.columns.response"),
    ]
