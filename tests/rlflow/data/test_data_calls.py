"""Function calls and tools reach the template as it wants them; turns that are not to be trained are not."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlflow.data.chat import Chat
from rlflow.data.errors import DataError, RowError
from rlflow.data.examples import load_examples
from rlflow.data.messages import to_message
from rlflow.data.preferences import load_pairs
from rlflow.recipe import DataBlock, SourceBlock

AS_OBJECT = (
    "{% for t in tools or [] %}{{ 'TOOL ' + (t | tojson) + '\n' }}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name + ' ' + (c.function.arguments | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen2.5's."""
AS_TEXT = AS_OBJECT.replace("(c.function.arguments | tojson)", "c.function.arguments")
"""As DeepSeek-V3's."""
PRINTED = AS_TEXT.replace(
    "{{ c.function.name + ' ' + c.function.arguments }}", "{{ c.function.name }} {{ c.function.arguments }}"
)
ASK = {"role": "user", "content": "Time?"}
RESULT = {"role": "tool", "content": "12:00"}
DONE = {"role": "assistant", "content": "Noon."}


def call(name: str, arguments, **message) -> dict:
    function = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [function], **message}


def tool(name: str, **properties) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}


@pytest.mark.parametrize("template", [AS_OBJECT, AS_TEXT, PRINTED])
@pytest.mark.parametrize("arguments", ['{"city": "Rome", "é": null}', {"city": "Rome", "é": None}])
def test_arguments_are_written_as_json_once_whatever_the_row_and_the_template_have(
    make_data, tokenizer, template, arguments
):
    tokenizer.chat_template = template
    (example,) = load_examples(make_data([{"messages": [ASK, call("clock", arguments), RESULT, DONE]}]), tokenizer, 0)
    trained = tokenizer.decode(example.token_ids[example.loss_mask])
    assert trained == 'clock {"city": "Rome", "é": null}<|im_end|>Noon.<|im_end|>'


def test_arguments_that_a_user_writes_as_python_does_are_still_an_object_in_the_call(make_data, tokenizer):
    tokenizer.chat_template = AS_OBJECT
    ask = {"role": "user", "content": "Call it with {'city': 'Rome'}."}
    (example,) = load_examples(make_data([{"messages": [ask, call("clock", {"city": "Rome"})]}]), tokenizer, 0)
    assert tokenizer.decode(example.token_ids[example.loss_mask]) == 'clock {"city": "Rome"}<|im_end|>'


def test_the_error_of_a_template_is_that_of_the_arguments_it_is_written_for(tokenizer):
    refuses = "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}{% for c in"
    tokenizer.chat_template = AS_OBJECT.replace("{% for c in", refuses).replace(
        "arguments |", "arguments.items() | list |"
    )
    with pytest.raises(RowError, match="no tools here"):
        Chat(tokenizer).render_prompt([ASK, call("clock", {"city": "Rome"}), RESULT])


@pytest.mark.parametrize(
    ("item", "calls"),
    [
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": None}]}, [("f", {})]),
        ({"role": "assistant", "tool_calls": json.dumps([{"name": "f", "arguments": '{"a": 1}'}])}, [("f", {"a": 1})]),
        ({"role": "tool_call", "content": '{"name": "f", "arguments": {"a": 1}}'}, [("f", {"a": 1})]),
        ({"from": "function_call", "value": '[{"name": "f"}, {"name": "g"}]'}, [("f", {}), ("g", {})]),
    ],
)
def test_a_message_with_calls_needs_no_content(item, calls):
    message = to_message(item, "messages[1]")
    assert message["content"] == "" and message["role"] == "assistant"
    assert [(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]] == calls


@pytest.mark.parametrize("calls", [("tool_call", "role", "content"), ("function_call", "from", "value")])
def test_calls_in_messages_of_their_own_are_one_turn_with_the_answer_before_them(make_data, tokenizer, calls):
    tokenizer.chat_template = AS_OBJECT
    role, role_key, content_key = calls
    clock, add = {"name": "clock", "arguments": {"city": "Rome"}}, {"name": "sum", "arguments": '{"x": 1}'}
    messages = [
        ASK,
        {"role": "assistant", "content": "Let me see. "},
        {role_key: role, content_key: json.dumps(clock)},
        {role_key: role, content_key: [add]},
        RESULT,
        RESULT,
        {role_key: role, content_key: clock},
        RESULT,
        DONE,
    ]
    (example,) = load_examples(make_data([{"messages": messages}]), tokenizer, 0)
    assert tokenizer.decode(example.token_ids[example.loss_mask]) == (
        'Let me see. clock {"city": "Rome"}sum {"x": 1}<|im_end|>clock {"city": "Rome"}<|im_end|>Noon.<|im_end|>'
    )
    messages[1]["loss"], messages[3]["loss"] = False, True
    with pytest.raises(DataError, match=r"`messages\[3\]` is a call of the turn before it, and one of them is trained"):
        load_examples(make_data([{"messages": messages}]), tokenizer, 0)


def test_thoughts_texts_and_calls_may_be_parts_of_a_content():
    parts = [
        {"type": "reasoning", "value": "hm"},
        {"type": "text", "value": "Let me see."},
        {"type": "tool_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"type": "tool_call", "value": '{"name": "g", "arguments": {}}'},
    ]
    message = to_message({"role": "assistant", "content": parts}, "messages[1]")
    calls = message.pop("tool_calls")
    assert message == {"role": "assistant", "content": "Let me see.", "reasoning_content": "hm"}
    assert [(c["function"]["name"], c["function"]["arguments"]) for c in calls] == [("f", {"a": 1}), ("g", {})]
    with pytest.raises(RowError, match=r"messages\[1\].content\[1\]`: reasoning comes behind text"):
        to_message({"role": "assistant", "content": [parts[1], parts[0]]}, "messages[1]")
    with pytest.raises(RowError, match="of type 'reasoning'; only text and a user's pictures are supported"):
        to_message({"role": "user", "content": parts}, "messages[0]")


@pytest.mark.parametrize(
    "tools",
    [
        [{"name": "clock", "parameters": {}}],
        [{"type": "function", "name": "clock", "parameters": {}}],
        ['{"name": "clock", "parameters": {}}'],
        '[{"type": "function", "function": {"name": "clock", "parameters": {}}}]',
    ],
)
def test_tools_reach_the_template_in_the_form_that_it_is_written_for(make_data, tokenizer, tools):
    tokenizer.chat_template = AS_OBJECT
    (example,) = load_examples(make_data([{"messages": [ASK, DONE], "tools": tools}]), tokenizer, 0)
    shown = tokenizer.decode(example.token_ids).partition("\n")[0]
    assert shown == 'TOOL {"type": "function", "function": {"name": "clock", "parameters": {}}}'


@pytest.mark.parametrize(
    ("arguments", "says"),
    [("{", "the arguments of f are not valid JSON"), ("[1]", "the arguments of f are not an object")],
)
def test_arguments_that_are_no_object_are_a_bad_row(arguments, says):
    with pytest.raises(RowError, match=says):
        to_message({"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}, "messages[1]")


def test_keys_that_parquet_fills_with_null_vanish_and_those_of_json_stay(tmp_path, write_jsonl, tokenizer):
    tokenizer.chat_template = AS_OBJECT
    rows = [
        {
            "messages": [ASK, call("clock", {"city": "Rome"}), RESULT, DONE],
            "tools": [tool("clock", city={"default": 1})],
        },
        {"messages": [ASK, call("sum", {"x": 1}), RESULT, DONE], "tools": [tool("sum", x={"default": 2})]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    from_json = [{**rows[0], "tools": [tool("clock", city={"default": None})]}, rows[1]]
    texts = []
    for path in (tmp_path / "rows.parquet", write_jsonl(rows), write_jsonl(from_json, "nulls.jsonl")):
        data = DataBlock(train=SourceBlock(path=str(path)))
        texts.append([tokenizer.decode(example.token_ids) for example in load_examples(data, tokenizer, 0)])
    assert texts[0] == texts[1]
    assert '"default": null' in texts[2][0] and '"default": 1' in texts[1][0]


@pytest.mark.parametrize(
    "weight", [{"weight": 0}, {"loss_weight": 0.0}, {"loss_scale": "0"}, {"loss": False}, {"loss": "False"}]
)
def test_a_turn_of_weight_0_is_not_trained(make_data, tokenizer, weight):
    messages = [ASK, {**DONE, "content": "BAD", **weight}, ASK, {**DONE, "weight": 1}]
    (example,) = load_examples(make_data([{"messages": messages}]), tokenizer, 0)
    assert tokenizer.decode(example.token_ids[example.loss_mask]) == "Noon.<|im_end|>"


def test_nor_is_one_of_a_pair(make_data, tokenizer):
    said = [{**DONE, "content": "One", "weight": 0}, ASK, DONE]
    row = {"chosen": [ASK, *said], "rejected": [ASK, *said[:2], {**DONE, "content": "No."}]}
    row["chosen"][1] = {**said[0], "content": "Two"}
    (pair,) = load_pairs(make_data([row]), tokenizer, 0)
    assert tokenizer.decode(pair.chosen.token_ids[pair.chosen.loss_mask]) == "Noon.<|im_end|>"
    assert tokenizer.decode(pair.rejected.token_ids[pair.rejected.loss_mask]) == "No.<|im_end|>"


def test_a_weight_between_is_a_bad_row(make_data, tokenizer):
    with pytest.raises(DataError, match=r"row 1: `messages\[1\].weight` is 0.5: a message is trained .* or not"):
        load_examples(make_data([{"messages": [ASK, {**DONE, "weight": 0.5}]}]), tokenizer, 0)


def test_an_empty_system_message_is_rendered(tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}DEFAULT{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }} "
        "{% endfor %}"
    )
    chat = Chat(tokenizer)
    assert chat.render_prompt([{"role": "system", "content": ""}, ASK]).text == "system: user:Time? "
    assert chat.render_prompt([ASK]).text == "DEFAULTuser:Time? "
