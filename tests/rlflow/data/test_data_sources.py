"""Where rows come from: names, columns, budgets, draws, generators, the hub."""

from __future__ import annotations

import pytest

from rlflow.data.errors import DataError
from rlflow.data.records import load_records
from rlflow.recipe.data_blocks import SourceBlock


def ids(rows):
    return [row.id for row in rows]


def number_rows(count):
    return [{"prompt": f"question {n}"} for n in range(1, count + 1)]


def test_a_missing_file_is_said_to_be_missing_with_the_nearest_name_beside_it(tmp_path, read, write_jsonl):
    write_jsonl(number_rows(1), "gsm8k_train.jsonl")
    with pytest.raises(DataError) as error:
        read(tmp_path / "gsm8k_trian.jsonl")
    assert str(error.value) == f"{tmp_path}/gsm8k_trian.jsonl: no such file. Nearest: gsm8k_train.jsonl."


@pytest.mark.parametrize("path", ["rows.jsonl.gz", "./rows", "~/no/such/rows"])
def test_what_looks_like_a_path_is_never_asked_from_the_hub(path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="no such file"):
        load_records(SourceBlock(path=path), 0, lambda record: record)


def test_a_hub_id_is_loaded_by_datasets_with_its_subset_and_split(monkeypatch):
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        return [{"question": "one", "answer": "1"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = SourceBlock(path="openai/gsm8k", subset="main", split="test", columns={"prompt": "question"})
    rows = load_records(source, 0, lambda record: record)
    assert asked == [("openai/gsm8k", "main", "test")]
    assert ids(rows) == ["gsm8k:1"]
    assert rows[0].value.columns == {"answer": "1"}


def test_a_subset_that_is_no_configuration_is_a_folder_of_the_dataset(monkeypatch):
    def load_dataset(path, name=None, data_dir=None, split=None):
        if name is not None:
            raise ValueError(f"BuilderConfig '{name}' not found. Available: ['default']")
        if data_dir != "harmless-base":
            raise FileNotFoundError(f"{path} has no folder {data_dir}")
        return [{"text": f"{split} of {data_dir}"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    rows = load_records(SourceBlock(path="Anthropic/hh-rlhf", subset="harmless-base"), 0, lambda record: record)
    assert rows[0].value.text == "train of harmless-base"
    with pytest.raises(DataError, match=r"BuilderConfig 'harmles-base' not found"):
        load_records(SourceBlock(path="Anthropic/hh-rlhf", subset="harmles-base"), 0, lambda record: record)


def test_a_hub_that_cannot_be_reached_says_to_give_a_local_path(monkeypatch, caplog):
    from huggingface_hub.utils import logging

    def load_dataset(*_, **__):
        logging.get_logger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"openai/gsm8k .*split train.*Couldn't reach.*give the path of a local file"):
        load_records(SourceBlock(path="openai/gsm8k"), 0, lambda record: record)
    logging.get_logger("huggingface_hub").warning("heard again")
    assert caplog.messages == ["heard again"]


def test_a_column_that_is_nowhere_names_the_columns_there_are_and_the_nearest(read, write_jsonl):
    path = write_jsonl([{"question": "one", "answer": "1"}])
    with pytest.raises(DataError) as error:
        read(path, columns={"prompt": "qestion"})
    assert str(error.value) == (
        f"{path}: has no column `qestion` (columns: {{prompt: qestion}}). Its columns are question, answer. "
        "Nearest: question."
    )


def test_a_column_that_one_row_lacks_is_a_bad_row(read, write_jsonl):
    path = write_jsonl([{"question": "one"}, {"answer": "2"}])
    rows = read(path, columns={"prompt": "question"}, max_bad_rows=1)
    assert [str(bad) for bad in rows.skipped] == [f"{path}, row 2: `question` is missing"]


def test_columns_may_be_swapped_doubled_and_put_over_others(read, write_jsonl):
    row = {"problem": "p", "solution": "long", "answer": "a", "level": 3}
    columns = {"prompt": "problem", "solution": "answer", "proof": "solution", "response": "answer"}
    record = read(write_jsonl([row]), columns=columns)[0].value
    assert record.messages == [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    assert record.columns == {"level": 3, "solution": "a", "proof": "long"}


def test_more_bad_rows_than_the_budget_are_counted_and_the_first_ten_listed(read, write_jsonl):
    path = write_jsonl([{"prompt": "one"}, *[{"prompt": ""}] * 12])
    with pytest.raises(DataError) as error:
        read(path, max_bad_rows=11)
    head, *listed, more, remedy = str(error.value).split("\n")
    assert head == f"{path}: 12 bad rows, and max_bad_rows is 11."
    assert listed == [f"  row {row}: `prompt` is empty" for row in range(2, 12)]
    assert more == "  and 2 more"
    assert remedy == "Repair them, or leave them out with `max_bad_rows: 12` in this source."
    assert len(read(path, max_bad_rows=12).skipped) == 12


def test_bad_rows_of_every_stage_are_reported_together_in_the_order_of_the_file(read, write_jsonl):
    rows = [{"prompt": ""}, [], {"prompt": "a\0"}, {"prompt": "good"}, {"other": 1}]
    assert [bad.row for bad in read(write_jsonl(rows), max_bad_rows=4).skipped] == [1, 2, 3, 5]


def test_a_file_of_bad_rows_alone_is_an_error_within_any_budget(read, write_jsonl):
    for rows in ([{"prompt": ""}], [[]]):
        with pytest.raises(DataError, match=r"every row is bad\.\n  row 1: "):
            read(write_jsonl(rows), max_bad_rows=5)


def test_a_repeated_id_column_is_a_bad_row_that_names_the_first(read, write_jsonl):
    rows = [
        {"prompt": "a", "id": "x"},
        {"prompt": "b", "id": 7},
        {"prompt": "c", "id": "x"},
        {"prompt": "d", "id": None},
    ]
    loaded = read(write_jsonl(rows), max_bad_rows=1)
    assert ids(loaded) == ["rows:1", "rows:2", "rows:4"]
    assert loaded.skipped[0].reason == "`id` 'x' is also that of row 1"


def test_sources_of_one_name_get_ids_of_their_own(tmp_path, write_jsonl):
    (tmp_path / "other").mkdir()
    paths = [write_jsonl(number_rows(2)), write_jsonl(number_rows(1), "other/rows.jsonl")]
    loaded = load_records([SourceBlock(path=str(path)) for path in paths], 0, lambda record: record)
    assert ids(loaded) == ["rows:1", "rows:2", "rows-2:1"]


def test_sources_whose_ids_meet_are_refused(tmp_path, write_jsonl):
    (tmp_path / "other").mkdir()
    paths = [write_jsonl(number_rows(1), name) for name in ("rows-2.jsonl", "rows.jsonl", "other/rows.jsonl")]
    with pytest.raises(DataError, match="the same ids"):
        load_records([SourceBlock(path=str(path)) for path in paths], 0, lambda record: record)


def test_drawn_rows_depend_on_the_seed_alone_and_stay_in_order(read, write_jsonl):
    path = write_jsonl(number_rows(100))
    first, again, other = (ids(read(path, seed, rows=10)) for seed in (1, 1, 2))
    assert first == again != other
    numbers = [int(name.partition(":")[2]) for name in first]
    assert numbers == sorted(set(numbers)) and len(numbers) == 10


def test_more_rows_than_there_are_repeat_under_ids_of_their_own(read, write_jsonl):
    loaded = read(write_jsonl(number_rows(3)), rows=7)
    assert ids(loaded)[:6] == ["rows:1", "rows:2", "rows:3", "rows:1#2", "rows:2#2", "rows:3#2"]
    assert ids(loaded)[6] in {"rows:1#3", "rows:2#3", "rows:3#3"} and len(loaded) == 7


def test_bad_rows_are_never_drawn(read, write_jsonl):
    path = write_jsonl([{"prompt": ""}, {"prompt": "good"}])
    assert ids(read(path, rows=3, max_bad_rows=1)) == ["rows:2", "rows:2#2", "rows:2#3"]


def test_a_generator_of_a_file_is_called_with_its_args(tmp_path, read):
    (tmp_path / "mine.py").write_text("def rows(n):\n    for i in range(n):\n        yield {'prompt': f'q{i}'}\n")
    assert ids(read(None, generator=f"{tmp_path}/mine.py:rows", args={"n": 2})) == ["rows:1", "rows:2"]


@pytest.mark.parametrize(
    ("generator", "args", "says"),
    [
        ("arithmetics", {}, "no generator is called arithmetics.*Nearest: arithmetic"),
        ("arithmetic", {"digit": 2}, "unexpected keyword argument 'digit'.*Its args are: operators, digits"),
        ("DIR/mine.py:rowz", {}, "has no function rowz. Nearest: rows"),
        ("DIR/mime.py:rows", {}, "mime.py: no such file. Nearest: mine.py"),
        ("DIR/mine.py:rows", {}, "missing a required argument: 'n'.*Its args are: n"),
        ("DIR/mine.py:rows", {"n": 0}, "raised ZeroDivisionError"),
        ("DIR/mine.py:rows", {"n": 2}, "row 2: is text, not an object"),
        ("DIR/mine.py:numbered", {}, "row 1: has a column whose name is a number, not text"),
        ("DIR/broken.py:rows", {}, "importing .*broken.py raised NameError"),
    ],
)
def test_what_is_wrong_with_a_generator_is_said(tmp_path, read, generator, args, says):
    (tmp_path / "mine.py").write_text(
        "def rows(n):\n    yield {'prompt': str(1 / n)}\n    yield 'text'\ndef numbered():\n    yield {0: 'a'}\n"
    )
    (tmp_path / "broken.py").write_text("nothing\n")
    with pytest.raises(DataError, match=says):
        read(None, generator=generator.replace("DIR", str(tmp_path)), args=args)
