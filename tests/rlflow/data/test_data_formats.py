"""Every format people bring, to messages; and which format a file is taken for."""

from __future__ import annotations

import json

import pytest

from rlflow.data.errors import DataError, RowError
from rlflow.data.formats import to_record
from rlflow.data.sources import Row

SYSTEM = {"role": "system", "content": "Be brief."}
EMPTY = {"role": "system", "content": ""}
HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}
WHY = {"role": "user", "content": "Why?"}
BECAUSE = {"role": "assistant", "content": "Because"}
NO = {"role": "assistant", "content": "No"}

CONVERSATIONS = [
    ({"messages": [SYSTEM, HI, HELLO]}, "messages", [SYSTEM, HI, HELLO]),
    ({"messages": [HI, HELLO], "system": "Be brief."}, "messages", [SYSTEM, HI, HELLO]),
    ({"messages": [SYSTEM, HI], "system": "Be long."}, "messages", [SYSTEM, HI]),
    ({"messages": [{"role": "system", "content": ""}, HI]}, "messages", [EMPTY, HI]),
    ({"messages": [{"role": "system", "content": ""}, HI], "system": "Be long."}, "messages", [EMPTY, HI]),
    ({"messages": json.dumps([HI, HELLO])}, "messages", [HI, HELLO]),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "value": "i"}]}]},
        "messages",
        [HI],
    ),
    (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        "sharegpt",
        [HI, HELLO],
    ),
    ({"conversations": [HI, HELLO]}, "sharegpt", [HI, HELLO]),
    (
        {
            "system": "Be brief.",
            "conversation": [{"human": "Hi", "assistant": "Hello"}, {"human": "Why?", "assistant": "Because"}],
        },
        "sharegpt",
        [SYSTEM, HI, HELLO, WHY, BECAUSE],
    ),
    (
        {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}]},
        "sharegpt",
        [SYSTEM, HI],
    ),
    (
        {"instruction": "Add", "input": "1 and 2", "output": "3", "system": "Be brief."},
        "instruction",
        [SYSTEM, {"role": "user", "content": "Add\n1 and 2"}, {"role": "assistant", "content": "3"}],
    ),
    ({"instruction": "Hi", "input": "", "output": ""}, "instruction", [HI]),
    ({"instruction": "Hi", "response": "Hello"}, "instruction", [HI, HELLO]),
    (
        {"instruction": "Hi", "context": "there", "completion": "Hello"},
        "instruction",
        [{"role": "user", "content": "Hi\nthere"}, HELLO],
    ),
    (
        {"instruction": "Why?", "output": "Because", "history": [["Hi", "Hello"]]},
        "instruction",
        [HI, HELLO, WHY, BECAUSE],
    ),
    ({"prompt": "Hi"}, "prompt", [HI]),
    ({"prompt": "Hi", "response": "Hello"}, "prompt", [HI, HELLO]),
    ({"prompt": "Hi", "completion": "Hello"}, "prompt", [HI, HELLO]),
    ({"prompt": [SYSTEM, HI], "completion": [HELLO]}, "prompt", [SYSTEM, HI, HELLO]),
    ({"query": "Hi", "response": "Hello"}, "prompt", [HI, HELLO]),
    ({"query": "Why?", "response": "Because", "history": [["Hi", "Hello"]]}, "prompt", [HI, HELLO, WHY, BECAUSE]),
    ({"query": "Why?", "history": '[["Hi", "Hello"]]', "system": "Be brief."}, "prompt", [SYSTEM, HI, HELLO, WHY]),
]

PREFERENCES = [
    ({"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, [HI, HELLO], [HI, NO]),
    ({"prompt": [SYSTEM, HI], "chosen": [HELLO], "rejected": [NO]}, [SYSTEM, HI, HELLO], [SYSTEM, HI, NO]),
    ({"chosen": [HI, HELLO], "rejected": [HI, NO]}, [HI, HELLO], [HI, NO]),
    ({"prompt": "Hi", "chosen": [HI, HELLO], "rejected": [HI, NO]}, [HI, HELLO], [HI, NO]),
    (
        {"prompt": "Hi", "chosen": [HI, HELLO], "rejected": [HI, NO], "system": "Be brief."},
        [SYSTEM, HI, HELLO],
        [SYSTEM, HI, NO],
    ),
    ({"messages": [SYSTEM, HI, HELLO], "rejected_response": "No"}, [SYSTEM, HI, HELLO], [SYSTEM, HI, NO]),
    ({"messages": [HI, HELLO], "rejected_messages": [HI, NO]}, [HI, HELLO], [HI, NO]),
    ({"messages": [SYSTEM, HI, HELLO], "rejected_messages": [HI, NO]}, [SYSTEM, HI, HELLO], [SYSTEM, HI, NO]),
    ({"chosen_messages": [HI, HELLO], "rejected_messages": [HI, NO]}, [HI, HELLO], [HI, NO]),
    (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: Because",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: No",
        },
        [HI, HELLO, WHY, BECAUSE],
        [HI, HELLO, WHY, NO],
    ),
    (
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "No"},
        },
        [HI, HELLO],
        [HI, NO],
    ),
    ({"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "No"}, [HI, HELLO], [HI, NO]),
]

LABELLED = [
    ({"messages": [HI, HELLO], "label": True}, True),
    ({"prompt": "Hi", "completion": "Hello", "label": False}, False),
    ({"query": "Hi", "response": "Hello", "label": 1}, True),
    ({"prompt": [HI], "completion": [HELLO], "label": "False"}, False),
    ({"prompt": "Hi", "response": "Hello", "label": True}, True),
    ({"instruction": "Hi", "output": "Hello", "label": False}, False),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "label": True}, True),
]


@pytest.mark.parametrize(("row", "name", "messages"), CONVERSATIONS)
def test_a_conversation_becomes_messages(read, write_jsonl, row, name, messages):
    row = row | {"solution": "42", "level": 3}
    detected = read(write_jsonl([row]))[0].value
    assert list(detected.messages) == messages
    assert detected.columns.keys() <= {"solution", "level", "input", "output", "system"}
    assert detected.columns["solution"] == "42" and detected.columns["level"] == 3
    assert to_record(Row(1, row), name) == detected


@pytest.mark.parametrize(("row", "chosen", "rejected"), PREFERENCES)
def test_a_preference_becomes_two_conversations(read, write_jsonl, row, chosen, rejected):
    record = read(write_jsonl([row | {"margin": 2}]))[0].value
    assert list(record.messages) == chosen
    assert list(record.rejected) == rejected
    assert record.columns["margin"] == 2


@pytest.mark.parametrize(("row", "label"), LABELLED)
def test_a_labelled_answer_becomes_a_conversation_and_a_label(read, write_jsonl, row, label):
    record = read(write_jsonl([row]), judged=True)[0].value
    assert (list(record.messages), record.label) == ([HI, HELLO], label)


@pytest.mark.parametrize(("row", "_label"), LABELLED)
def test_without_kto_a_label_is_a_column_like_any_other(read, write_jsonl, row, _label):
    record = read(write_jsonl([row | {"label": "12"}]))[0].value
    assert (list(record.messages), record.label, record.columns) == ([HI, HELLO], None, {"label": "12"})


@pytest.mark.parametrize("media", ["image", "images", "video", "videos", "audio", "audios"])
def test_rows_with_images_video_or_audio_are_refused(media):
    with pytest.raises(RowError, match=f"`{media}`.* the model takes text alone"):
        to_record(Row(1, {"prompt": "Hi", media: "dogs.png"}), "prompt")
    assert to_record(Row(1, {"prompt": "Hi", media: None}), "prompt").messages == [HI]


def test_text_is_left_as_it_is(read, write_jsonl):
    record = read(write_jsonl([{"text": " as it is\n"}]))[0].value
    assert (record.text, record.messages) == (" as it is\n", ())


def test_a_format_that_is_named_goes_before_the_columns(read, write_jsonl):
    path = write_jsonl([{"messages": [HI, HELLO], "label": "spam"}])
    record = read(path, format="messages")[0].value
    assert record.label is None and record.columns == {"label": "spam"}


def test_the_columns_that_most_rows_have_decide(read, write_jsonl):
    rows = [{"text": "odd one"}, {"prompt": "Hi", "text": None}, {"prompt": "Hi"}]
    loaded = read(write_jsonl(rows), max_bad_rows=1)
    assert [bad.row for bad in loaded.skipped] == [1]
    assert loaded.skipped[0].reason.endswith("(its columns are those of the format text, and most rows are of prompt)")


def test_a_file_of_several_formats_says_which_rows_have_which(read, write_jsonl):
    text, prompt, none = {"text": "a"}, {"prompt": "Hi"}, {"id": 3}
    path = write_jsonl([text, text, prompt, prompt, text, none])
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value) == (
        f"{path}: its rows are of several formats, of which a file has one:\n"
        "  text: row 1 to 2, 5\n  prompt: row 3 to 4\n  no format that is known: row 6\n"
        "Write a file for each, and name them all here, as in [{path: a.jsonl}, {path: b.jsonl}]."
    )
    path = write_jsonl([{"text": "a"}, {"prompt": "b"}] * 40)
    with pytest.raises(DataError, match=r"text: row 1, 3, 5, .* and \d+ more\n"):
        read(path)


def test_columns_of_no_format_list_the_formats_and_show_how_to_name_columns(read, write_jsonl):
    path = write_jsonl([{"question": "Hi", "answer": "Hello"}])
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value).startswith(
        f"{path}: no format has the columns answer, question. Formats by their columns: "
    )
    assert "columns: {prompt: question, solution: answer}" in str(error.value)


def test_function_calls_and_their_results_keep_their_roles(read, write_jsonl):
    row = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bern"}}'},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "Sunny."},
        ],
        "tools": '[{"name": "weather"}]',
    }
    record = read(write_jsonl([row]))[0].value
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
    assert record.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert record.messages[2] == {"role": "tool", "content": "sunny"}
    assert record.tools == [{"type": "function", "function": {"name": "weather"}}]


@pytest.mark.parametrize(
    ("row", "name", "reason"),
    [
        ({"messages": []}, "messages", "`messages` is empty, not a list of messages"),
        ({"messages": "Hi"}, "messages", "`messages` is text, not a list of messages"),
        ({"messages": "[{"}, "messages", "`messages` is not valid JSON"),
        ({"messages": ["Hi"]}, "messages", r"`messages\[0\]` is text, not a message"),
        ({"messages": [HI, {"role": "assistant"}]}, "messages", r"`messages\[1\]` lacks `content`"),
        ({"messages": [{"content": "Hi"}]}, "messages", r"`messages\[0\]` lacks `role`"),
        (
            {"messages": [{"role": "robot", "content": "Hi"}]},
            "messages",
            "has the role 'robot'; roles are system, user",
        ),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, "messages", "has the role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages", r"`messages\[0\].content` is a number, not text"),
        ({"messages": [HI, {"role": "assistant", "content": " "}]}, "messages", r"`messages\[1\]` is empty"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", r"`messages\[0\]` is empty"),
        ({"messages": [{"role": "system", "content": ""}]}, "messages", "only an empty system message"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages",
            r"`messages\[0\].content\[0\]` is a picture, and the model takes text alone",
        ),
        (
            {"conversation": [{"human": "Hi"}]},
            "sharegpt",
            r"`conversation\[0\]` is not an exchange: it has no 'assistant'",
        ),
        ({"conversations": [{"from": "human"}]}, "sharegpt", r"`conversations\[0\]` lacks `value`"),
        (
            {"conversations": [{"from": "function_call", "value": "{"}]},
            "sharegpt",
            "a function call that is not valid JSON",
        ),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "sharegpt", "a function call without a name"),
        ({"output": "x"}, "instruction", r"`instruction` is missing \(it has output\)"),
        ({"instruction": ["x"]}, "instruction", "`instruction` is a list, not text"),
        ({"prompt": "Hi", "history": ["Hi"]}, "prompt", r"`history\[0\]` is not an exchange: it has no 0"),
        ({"prompt": "Hi", "history": "Hi"}, "prompt", "`history` is text, not a list of exchanges"),
        ({"prompt": "Hi", "system": 3}, "prompt", "`system` is a number, not text"),
        ({"prompt": "Hi", "tools": "weather"}, "prompt", "`tools` is not a list of function descriptions"),
        ({"prompt": "Hi", "response": 3}, "prompt", "`response` is a number, not text"),
        ({"prompt": "Hi", "chosen": "Hello"}, "preference", "`rejected` is missing"),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": ""}, "preference", "`rejected` is empty"),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": None}, "preference", "`rejected` is null, not text"),
        ({"chosen": "Hello", "rejected": "No"}, "preference", "`chosen` does not begin with Human: or Assistant:"),
        (
            {"messages": [HI], "rejected_response": "No"},
            "preference",
            "does not end with the assistant's chosen answer",
        ),
        ({"messages": [HI, HELLO]}, "preference", "`rejected_response` is missing"),
        ({"messages": [HI, HELLO]}, "kto", "`label` is missing"),
        ({"messages": [HI, HELLO], "label": "good"}, "kto", "`label` is 'good', not true or false"),
        ({"messages": [HI, HELLO], "label": 2}, "kto", "`label` is 2, not true or false"),
        ({"messages": [HI, HELLO], "label": 1.0}, "kto", "`label` is 1.0, not true or false"),
        ({"text": ""}, "text", "`text` is empty"),
    ],
)
def test_a_row_that_does_not_fit_its_format_says_which_field_and_why(row, name, reason):
    with pytest.raises(RowError, match=reason):
        to_record(Row(1, row), name)
