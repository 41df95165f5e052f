"""Calls in a policy's text: what is one, what is none, and what cannot be read."""

from __future__ import annotations

import json

import pytest
from trl.chat_template_utils import qwen3_template

from rlflow.data.call_reader import CallReader, require_readable
from rlflow.data.chat import Chat
from rlflow.data.errors import RowError
from rlflow.data.tokenizer import build_character_tokenizer
from tests.rlflow.data.conversations import CHATML, FAMILIES, GEMMA, Conversation, tokenizer_of

PLAIN = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"


@pytest.fixture(scope="module")
def reader():
    """Of a template that writes no calls."""
    return CallReader(Chat(build_character_tokenizer("ab", PLAIN)))


def functions(said) -> list:
    return [call["function"] for call in said.message.get("tool_calls", ())]


def test_text_without_a_call_stays_as_it_is(reader):
    said = reader.read(" 1 < 2 {x} \n")
    assert said.message == {"role": "assistant", "content": " 1 < 2 {x} \n"}
    assert said.problems == ()


def test_several_calls_in_hermes_form_are_read_where_the_template_writes_none(reader):
    said = reader.read(
        'Look: <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>{"name": "sub", "arguments": "{\\"b\\": 2}"}</tool_call>'
    )
    assert functions(said) == [{"name": "add", "arguments": {"a": 1}}, {"name": "sub", "arguments": {"b": 2}}]
    assert said.message["content"] == "Look:"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('<tool_call>{"name": "add", "arguments": {</tool_call>', "Expecting property name"),
        ("<tool_call>add(1, 2)</tool_call>", "Expecting value"),
        ('<tool_call>{"arguments": {}}</tool_call>', "without a name"),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "the arguments of add are not an object"),
        ('<tool_call>{"name": {"a": 1}, "arguments": {}}</tool_call>', "without a name"),
        ('<tool_call>{"name": "add", "arguments": {}}\n{"name": "add", "arguments": {}}</tool_call>', "another call"),
        ("<tool_call>", "Expecting value"),
        ("<tool_call>" + "[" * 100_000, "recursion"),
    ],
)
def test_a_call_that_cannot_be_read_is_a_problem_for_the_policy_to_hear(reader, text, reason):
    said = reader.read(f"Well. {text}")
    assert functions(said) == []
    (problem,) = said.problems
    assert problem.startswith("a call could not be read (")
    assert reason in problem
    assert len(problem) < 500


def test_a_good_call_before_a_bad_one_is_read(reader):
    said = reader.read('<tool_call>{"name": "add", "arguments": {}}</tool_call><tool_call>oh</tool_call>')
    assert functions(said) == [{"name": "add", "arguments": {}}]
    assert len(said.problems) == 1


CODER = (
    "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=s>\n007\n</parameter>\n"
    "<parameter=o>\n12\n</parameter>\n<parameter=l>\n[1, 2]\n</parameter>\n</function>\n</tool_call>"
)
OR_NONE = {"anyOf": [{"type": "string"}, {"type": "null"}]}
SCHEMA = {"a": {"type": "integer"}, "s": {"type": "string"}, "o": OR_NONE, "l": {"type": "array"}}
TYPED = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": SCHEMA}}}


@pytest.mark.parametrize("parser", ["auto", pytest.param("qwen3_coder", marks=pytest.mark.slow)])
def test_arguments_that_are_written_as_text_have_the_types_of_the_tools_schema(parser):
    reader = CallReader(Conversation("qwen3.5").chat, parser)
    for _ in range(2):
        arguments = {"a": 1, "s": "007", "o": "12", "l": [1, 2]}
        assert functions(reader.read(CODER, [TYPED])) == [{"name": "add", "arguments": arguments}]


def test_a_whole_number_that_is_written_as_a_fraction_is_whole_where_the_schema_says_so():
    said = CallReader(Conversation("qwen3.5").chat).read(CODER.replace("\n1\n", "\n1.0\n"), [TYPED])
    (function,) = functions(said)
    assert repr(function["arguments"]["a"]) == "1"


@pytest.mark.slow
def test_what_is_called_in_a_thought_is_no_call_by_a_parser_of_vllms_either():
    said = CallReader(Conversation("qwen3").chat, "hermes").read(f"<think>\nmaybe {CALL}\n</think>\n\nNo.", [TYPED])
    assert functions(said) == []
    said = CallReader(Conversation("qwen3").chat, "hermes").read(f"<think>\nyes\n</think>\n\n{CALL}", [TYPED])
    assert said.message["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    assert said.message["content"].startswith("<think>\nyes\n</think>")


@pytest.mark.parametrize("begins", ["", "<|python_tag|>"])
def test_llamas_call_is_all_that_a_turn_says_and_two_are_a_problem(begins):
    reader = CallReader(Conversation("llama3.1").chat)
    one = '{"name": "add", "parameters": {"a": 1}}'
    assert functions(reader.read(f"{begins}{one}")) == [{"name": "add", "arguments": {"a": 1}}]
    said = reader.read(f"{begins}{one}; {one}")
    assert functions(said) == []
    assert "another call follows" in said.problems[0]


@pytest.mark.slow
def test_a_parser_that_vllm_does_not_have_is_named():
    with pytest.raises(ValueError, match=r"environment\.call_parser: "):
        CallReader(Chat(build_character_tokenizer("ab", PLAIN)), "no_such_parser")


CALL = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "calls", "content"),
    [
        (f"<think>\nmaybe {CALL}\n</think>\n\nNo.", 0, None),
        (f"<think>\nmaybe {CALL}", 0, None),
        (f"<think>\nyes\n</think>\n\n{CALL}", 1, "<think>\nyes\n</think>"),
        (f"<b>yes</b> {CALL}", 1, "<b>yes</b>"),
    ],
)
def test_what_is_called_in_a_thought_is_no_call(reader, text, calls, content):
    said = reader.read(text)
    assert len(functions(said)) == calls
    assert said.message["content"] == (text if content is None else content)


def test_a_tokenizers_own_response_template_is_followed():
    tokenizer = build_character_tokenizer("ab", PLAIN)
    tokenizer.response_template = qwen3_template
    prompt = "<|im_start|>assistant\n"
    said = CallReader(Chat(tokenizer)).read(f"<think>\nso\n</think>\n\nHm.\n{CALL}", [], prompt)
    assert functions(said) == [{"name": "add", "arguments": {}}]
    assert said.message["content"].strip() == "Hm."
    assert said.message["reasoning_content"].strip() == "so"


ARGUMENTS = {
    **{"yes": True, "no": False, "count": None, "share": 2.5, "below": -3, "digits": "42", "empty": "", "word": "true"},
    **{"text": "a < \"b\" 'c'\n  d", "maybe": None, "nested": {"k": [1, {"z": None, "b": True}]}},
    "several": [1, "2", None],
}
TYPES = {
    **{"yes": "boolean", "no": "boolean", "count": "integer", "share": "number", "below": "integer", "text": "string"},
    **{"digits": "string", "empty": "string", "word": "string", "maybe": "string", "nested": "object"},
    "several": "array",
}
ACT = {"type": "function", "function": {"name": "act", "description": "Acts.", "parameters": {"type": "object"}}}
ACT["function"]["parameters"]["properties"] = {
    name: {"type": type_, "description": "d", "nullable": ARGUMENTS[name] is None} for name, type_ in TYPES.items()
}


@pytest.mark.parametrize("family", [*FAMILIES, "nemotron"])
def test_arguments_of_every_type_are_read_as_the_template_writes_them(family):
    template, special, ends = FAMILIES.get(family, ("nemotron_3_nano.jinja", CHATML, ["<|im_end|>"]))
    chat = Chat(tokenizer_of(template, special, ends))
    call = {"type": "function", "id": "call00000", "function": {"name": "act", "arguments": ARGUMENTS}}
    question = {"role": "user", "content": "go"}
    prompt = chat.renderer([ACT], generation_prompt=True)([question])
    whole = chat.renderer([ACT])([question, {"role": "assistant", "content": "", "tool_calls": [call]}])
    differs = (place for place, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other)
    turn = whole[next(differs, len(prompt)) :]
    turn = turn[: min(turn.index(end) for end in ends if end in turn)] if any(end in turn for end in ends) else turn
    said = CallReader(chat).read(turn, [ACT])
    assert said.problems == ()
    assert functions(said) == [{"name": "act", "arguments": ARGUMENTS}]
    # 1 is True for Python.
    assert json.dumps(said.message["tool_calls"][0]["function"]["arguments"]) == json.dumps(ARGUMENTS)
    require_readable(chat)


@pytest.mark.parametrize("template", ["gemma4.jinja", "lfm2_2_5.jinja"])
def test_a_template_whose_calls_would_be_read_as_something_else_is_refused(template):
    special = GEMMA if template.startswith("gemma4") else [*CHATML, "<|tool_call_start|>", "<|tool_call_end|>"]
    chat = Chat(tokenizer_of(template, special, [special[2] if special is GEMMA else "<|im_end|>"]))
    with pytest.raises(RowError, match=r"name vLLM's parser for this model as environment\.call_parser"):
        require_readable(chat)
    require_readable(chat, "gemma4")
