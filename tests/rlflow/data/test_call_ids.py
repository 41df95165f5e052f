"""Function calls by a template that refuses those without an id of nine characters, as Mistral's are published."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from rlflow.data.call_ids import with_ids
from rlflow.data.call_reader import CallReader
from rlflow.data.chat import Chat
from rlflow.data.transcript import Transcript
from rlflow.types import Completion
from tests.rlflow.data.conversations import MISTRAL, TOOL, tokenizer_of

STRICT = (
    "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}{{ raise_exception('no id') }}{% endif %}"
    '[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}{{ (c.function | tojson)[:-1] }}"
    "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('no id') }}{% endif %}"
    ', "id": "{{ c.id }}"}{{ \', \' if not loop.last }}{% endfor %}]{{ eos_token }}'
    "{% else %} {{ m.content.strip() }}{{ eos_token }}{% endif %}{% endfor %}"
)
OF_X = hashlib.blake2b(b"x").hexdigest()[:9]
QUESTION = {"role": "user", "content": "What is 1 + 2?"}


@pytest.fixture(scope="module")
def chat():
    return Chat(tokenizer_of(STRICT, [*MISTRAL, "[TOOL_RESULTS]", "[/TOOL_RESULTS]"], ["</s>"]))


def call(**of_call):
    return {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}, **of_call}


@pytest.mark.parametrize(
    ("id_", "read"),
    [(', "id": "abc123DEF"', "abc123DEF"), (', "id": "x"', OF_X), (', "id": 7', "000001000"), ("", "000001000")],
)
def test_a_call_is_answered_whatever_id_the_policy_has_written(chat, id_, read):
    tokenizer = chat.tokenizer
    prompt = chat.renderer([TOOL], generation_prompt=True)([QUESTION])
    transcript = Transcript(chat, [tokenizer.eos_token_id], [QUESTION], [TOOL], np.array(tokenizer(prompt).input_ids))
    written = f'[TOOL_CALLS] [{{"name": "add", "arguments": {{"a": 1}}{id_}}}]'
    said = CallReader(chat).read(written, [TOOL])
    assert said.problems == ()
    (found,) = said.message["tool_calls"]
    assert found["function"] == {"name": "add", "arguments": {"a": 1}}
    token_ids = np.array(tokenizer(f"{written}</s>", add_special_tokens=False).input_ids)
    ones = np.ones(len(token_ids), np.int32)
    transcript.wrote(Completion(0, token_ids, -ones.astype(np.float32), ones, "stop"), said.message)
    answer = {"role": "tool", "name": "add", "content": "3"}
    transcript.heard([answer | ({"tool_call_id": found["id"]} if isinstance(found.get("id"), str) else {})])
    # One sequence, with what the policy wrote as it wrote it.
    assert transcript.stream()[-1] == (0,)
    text = tokenizer.decode(transcript.token_ids, skip_special_tokens=False)
    assert text == f'{prompt}{written}</s>[TOOL_RESULTS] {{"content": 3, "call_id": "{read}"}}[/TOOL_RESULTS]'


def test_rows_without_ids_and_with_those_of_others_are_trained_with_ids_that_the_template_takes(chat):
    long_id = "call_Zb9c31xyz"
    messages = [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call(), call(id=long_id)]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4", "tool_call_id": long_id},
        {"role": "assistant", "content": "", "tool_calls": [call()]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "7"},
    ]
    made = hashlib.blake2b(long_id.encode()).hexdigest()[:9]

    def calls(*ids):
        texts = [f'{{"name": "add", "arguments": {{"a": 1}}, "id": "{id_}"}}' for id_ in ids]
        return f"[TOOL_CALLS] [{', '.join(texts)}]</s>"

    def result(content, id_):
        return f'[TOOL_RESULTS] {{"content": {content}, "call_id": "{id_}"}}[/TOOL_RESULTS]'

    rendered = chat.render_conversation(messages, [1, 4, 6])
    trained = [calls("000001000", made), calls("000004000"), " 7</s>"]
    assert [rendered.text[start:end] for start, end in rendered.spans] == trained
    first = f"{trained[0]}{result(3, '000001000')}{result(4, made)}{trained[1]}"
    assert rendered.text.endswith(f"{first}{result(5, '000004000')} 7</s>")


def test_ids_that_every_template_takes_stay_and_those_of_results_with_them():
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [call(id="abc123DEF")]},
        {"role": "tool", "content": "3", "tool_call_id": "abc123DEF"},
    ]
    assert with_ids(messages) == messages
