"""What each kind of file yields, and how each kind of damage is named."""

from __future__ import annotations

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from rlflow.data.errors import DataError

GOOD = [{"prompt": "one", "solution": "1"}, {"prompt": "two", "solution": "2"}]


def prompts(rows):
    return [row.value.messages[0]["content"] for row in rows]


def reasons(rows):
    return [(bad.row, bad.reason) for bad in rows.skipped]


def encoded(kind: str) -> bytes:
    if kind == "json":
        return json.dumps(GOOD, indent=1).encode()
    if kind == "csv":
        return b"prompt,solution\none,1\ntwo,2\n"
    return "".join(json.dumps(row) + "\n" for row in GOOD).encode()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.csv", "a.JSONL", "a.v2.jsonl"])
@pytest.mark.parametrize("zipped", [False, True])
def test_every_kind_of_file_gives_the_same_rows_and_ids(tmp_path, read, name, zipped):
    data = encoded(name.rpartition(".")[2].lower())
    path = tmp_path / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(data) if zipped else data)
    rows = read(path)
    assert [row.id for row in rows] == ["a:1", "a:2"]
    assert prompts(rows) == ["one", "two"]
    assert [row.value.columns for row in rows] == [{"solution": "1"}, {"solution": "2"}]


def test_parquet_keeps_nested_columns_and_null_is_absent(tmp_path, read):
    path = tmp_path / "a.parquet"
    messages = [{"role": "user", "content": "one", "name": None}, {"role": "assistant", "content": "1", "name": None}]
    table = pyarrow.table(
        {"messages": [messages], "tests": [["a", "b"]], "system": pyarrow.array([None], pyarrow.string())}
    )
    pyarrow.parquet.write_table(table, path)
    (row,) = read(path)
    assert row.value.messages == [{"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}]
    assert row.value.columns["tests"] == ["a", "b"]


def test_invalid_utf8_in_parquet_names_its_row(tmp_path, read):
    path = tmp_path / "a.parquet"
    raw = pyarrow.array([b"one", b"t\xffo"], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": raw.cast(pyarrow.string(), safe=False)}), path)
    assert reasons(read(path, max_bad_rows=1)) == [(2, "invalid UTF-8 (byte 0xff)")]


def test_a_json_file_with_an_object_a_line_is_read_as_such(tmp_path, read):
    path = tmp_path / "a.json"
    path.write_bytes(encoded("jsonl"))
    assert prompts(read(path)) == ["one", "two"]


def test_a_line_of_a_text_file_is_a_row_and_blank_lines_only_count(tmp_path, read):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\r\ntwo words\n".encode())
    rows = read(path)
    assert [(row.id, row.value.text) for row in rows] == [("a:1", "one"), ("a:3", "two words")]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path, read, kind):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b"\xef\xbb\xbf" + encoded(kind).replace(b"\n", b"\r\n"))
    assert prompts(read(path)) == ["one", "two"]


def test_blank_lines_at_the_end_of_jsonl_are_no_rows(tmp_path, read):
    path = tmp_path / "a.jsonl"
    path.write_bytes(encoded("jsonl") + b"\n  \n\n")
    rows = read(path)
    assert len(rows) == 2 and rows.skipped == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[1, 2]", "is a list, not an object"),
        (b"null", "is null, not an object"),
        (b'"text"', "is text, not an object"),
        (b"12", "is a number, not an object"),
        (b"true", "is true or false, not an object"),
        (b"{}", "is empty"),
        (b"", "empty line"),
        (b'{"solution": "2"}', "`prompt` or `query` is missing (it has solution)"),
        (b'{"prompt": ""}', "`prompt` is empty"),
        (b'{"prompt": " \\n"}', "`prompt` is empty"),
        (b'{"prompt": null}', "`prompt` is null, not text"),
        (b'{"prompt": 5}', "`prompt` is a number, not text"),
        (b'{"prompt": {"a": 1}}', "`prompt` is an object, not text"),
        (b'{"prompt": "a\\u0000b"}', "`prompt` holds a NUL character"),
        (b'{"prompt": "a\\ud83d"}', "`prompt` holds a lone surrogate (U+D83D)"),
        (b'{"prompt": "a", "tests": [{"in": "\\udc80"}]}', "`tests` holds a lone surrogate (U+DC80)"),
        (b'{"prompt": "a", "b\\u0000": 1}', "`b\\0` holds a NUL character"),
        (b'{"prompt": "a", "\\ud800": 1}', "`\\ud800` holds a lone surrogate (U+D800)"),
        (b'{"prompt": "a\xff"}', "invalid UTF-8 (byte 0xff)"),
        (
            b'{"prompt": "a", "images": ["cat.png"]}',
            "`images[0]` is a picture, and the model takes text alone: train a vision-language model, or leave it out",
        ),
        (b'{"prompt": "a" "b"}', "not valid JSON: Expecting ',' delimiter: line 1 column 16 (char 15)"),
    ],
)
def test_a_bad_line_of_jsonl_is_named_with_its_reason_and_the_others_are_read(tmp_path, read, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "one"}\n' + line + b'\n{"prompt": "three"}\n')
    rows = read(path, max_bad_rows=1)
    assert reasons(rows) == [(2, reason)]
    assert [row.id for row in rows] == ["a:1", "a:3"]
    with pytest.raises(DataError) as error:
        read(path)
    assert f"{path}: 1 bad row, and max_bad_rows is 0.\n  row 2: {reason}" in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"prompt": ' + "[" * 100_000, '{"a": ' + "9" * 5000 + "}"],
    ids=["a deep array", "a deep value", "a long number"],
)
def test_hostile_json_is_a_bad_row_like_any_other(tmp_path, read, text):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"prompt": "one"}}\n{text}\n{{"prompt": "three"}}\n')
    rows = read(path, max_bad_rows=1)
    assert [row.id for row in rows] == ["a:1", "a:3"]


@pytest.mark.parametrize("key", ["data", "rows", "examples", "instances"])
def test_a_json_object_may_have_the_rows_under_a_key(tmp_path, read, key):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": "2", key: [{"prompt": "a"}, {"prompt": "b"}]}, indent=1))
    assert [(row.id, row.value.messages[0]["content"]) for row in read(path)] == [("rows:1", "a"), ("rows:2", "b")]


def test_one_json_object_is_one_row(tmp_path, read):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}, indent=1))
    assert [row.value.messages for row in read(path)] == [[{"role": "user", "content": "Hi"}]]


def test_a_truncated_last_line_is_named_as_that(tmp_path, read):
    path = tmp_path / "a.jsonl"
    path.write_bytes(encoded("jsonl")[:-10])
    ((row, reason),) = reasons(read(path, max_bad_rows=1))
    assert row == 2
    assert reason.endswith("(the file ends here, without a newline: truncated?)")


def test_a_whole_last_line_needs_no_newline(tmp_path, read):
    path = tmp_path / "a.jsonl"
    path.write_bytes(encoded("jsonl")[:-1])
    assert prompts(read(path)) == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "row", "says"),
    [
        ('[{"prompt": "a"}, {"prompt": "b"', 2, "truncated"),
        ('[{"prompt": "a"}, {"prompt": "b"}', 2, "truncated"),
        ('[{"prompt": "a"}, {prompt: "b"}, {"prompt": "c"}]', 2, "Expecting property name"),
        ('[{"prompt": "a"},]', 2, "JSON"),
        ("[", 1, "truncated"),
    ],
)
def test_a_damaged_json_array_names_the_row_whatever_the_budget(tmp_path, read, text, row, says):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        read(path, max_bad_rows=10)
    assert f"{path}, row {row}: not valid JSON" in str(error.value)
    assert says in str(error.value)
    assert ".jsonl" in str(error.value)


def test_invalid_utf8_in_a_json_array_or_csv_spoils_only_its_row(tmp_path, read):
    (tmp_path / "a.json").write_bytes(b'[{"prompt": "one"}, {"prompt": "t\xe9"}, {"prompt": "three"}]')
    (tmp_path / "a.csv").write_bytes(b"prompt\none\nt\xe9\nthree\n")
    for name in ("a.json", "a.csv"):
        rows = read(tmp_path / name, max_bad_rows=1)
        assert reasons(rows) == [(2, "invalid UTF-8 (byte 0xe9)")]
        assert prompts(rows) == ["one", "three"]


def test_csv_fields_may_hold_newlines_quotes_and_more_than_the_default_limit(tmp_path, read):
    path = tmp_path / "a.csv"
    long = "x" * 200_000
    path.write_text(f'prompt,solution\n"say ""hi""\nthere",1\n"{long}",2\n')
    rows = read(path)
    assert prompts(rows) == ['say "hi"\nthere', long]
    assert [row.id for row in rows] == ["a:1", "a:2"]


def test_the_unnamed_index_column_of_pandas_is_left_out(tmp_path, read):
    path = tmp_path / "a.csv"
    path.write_text(",prompt,level\n0,one,3\n")
    assert read(path)[0].value.columns == {"level": "3"}


def test_a_csv_row_with_too_few_fields_or_an_open_quote_is_named(tmp_path, read):
    path = tmp_path / "a.csv"
    path.write_text('prompt,solution\none,1\ntwo\nthree,3\n"four,4\n')
    rows = read(path, max_bad_rows=2)
    assert reasons(rows) == [(2, "has 1 fields, the header names 2"), (4, "not valid CSV: unexpected end of data")]
    assert prompts(rows) == ["one", "three"]


def test_a_csv_header_that_repeats_a_name_is_refused(tmp_path, read):
    path = tmp_path / "a.csv"
    path.write_text("prompt,level,level\none,1,2\n")
    with pytest.raises(DataError, match="the header names level more than once"):
        read(path)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(encoded("jsonl"), mtime=0)[:-12]),
        ("a.jsonl.gz", b"not gzip"),
        ("a.parquet", b"PAR1 not parquet"),
    ],
)
def test_a_file_that_is_damaged_as_a_whole_is_named(tmp_path, read, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=name) as error:
        read(tmp_path / name)
    assert "Fetch it again" in str(error.value)


@pytest.mark.parametrize(
    ("name", "data"), [("a.jsonl", b""), ("a.json", b"[]"), ("a.csv", b"prompt\n"), ("a.txt", b"\n")]
)
def test_an_empty_file_is_an_error(tmp_path, read, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match="holds no rows"):
        read(tmp_path / name)


def test_another_kind_of_file_is_refused_with_the_kinds_there_are(tmp_path, read):
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"\.jsonl.*\.parquet"):
        read(tmp_path / "a.xlsx")
