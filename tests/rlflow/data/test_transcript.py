"""An episode's tokens against its chat template: TRL's copies of the templates that models are published with."""

from __future__ import annotations

import numpy as np
import pytest

from rlflow.data.call_reader import CallReader
from rlflow.types import Completion
from tests.rlflow.data.conversations import FAMILIES, TOOL, Conversation, sequences_of


@pytest.mark.parametrize("family", FAMILIES)
def test_before_every_turn_the_policy_reads_what_the_template_writes_token_for_token(family):
    conversation = Conversation(family)
    conversation.play()
    sequences = sequences_of(conversation.transcript)
    # Each sequence is, but for the last turn's end, what the template had before one of the turns, and that turn.
    whole = [
        prompt.tolist() + written
        for prompt, written in zip(conversation.prompts, [*conversation.wrote, []], strict=True)
    ]
    for tokens, _ in sequences:
        assert tokens in whole, conversation.tokenizer.decode(tokens)
    assert conversation.transcript.token_ids.tolist() == conversation.prompts[-1].tolist()
    # All that the policy wrote is sampled, once, as it was written.
    sampled = [
        token for tokens, mask in sequences for token, is_sampled in zip(tokens, mask, strict=True) if is_sampled
    ]
    assert sampled == [token for written in conversation.wrote for token in written]


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3-2507", "llama3.1", "llama3.2", "mistral"])
def test_a_template_that_only_appends_makes_one_sequence(family):
    conversation = Conversation(family)
    conversation.play()
    assert len(sequences_of(conversation.transcript)) == 1


def test_a_template_that_cuts_thoughts_begins_a_sequence_where_it_does():
    conversation = Conversation("qwen3")
    conversation.play("<think>\nso\n</think>\n\n")
    first, second = sequences_of(conversation.transcript)
    decode = conversation.tokenizer.decode
    assert "so\n</think>" in decode(first[0])
    assert "so\n</think>" not in decode(second[0])
    assert sum(first[1]) == sum(len(written) for written in conversation.wrote)
    assert not any(second[1])
    assert second[0] == conversation.prompts[-1].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_is_read_as_the_template_writes_it(family):
    conversation = Conversation(family)
    arguments = {"a": 1, "b": {"c": ["x", 'y"{']}}
    call = {"type": "function", "id": "call00000", "function": {"name": "add", "arguments": arguments}}
    conversation.turn(
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "tool_call_id": "call00000", "content": "3"},
    )
    written = [token for token in conversation.wrote[0] if token not in conversation.stops]
    text = conversation.tokenizer.decode(written, skip_special_tokens=False)
    said = CallReader(conversation.chat).read(text)
    assert said.problems == ()
    assert [call["function"] for call in said.message["tool_calls"]] == [{"name": "add", "arguments": arguments}]
    assert "add" not in said.message["content"]


def test_calls_that_the_template_refuses_are_named_with_its_reason():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    transcript = Conversation("llama3.1").transcript
    assert transcript.refusal(message) is None
    assert transcript.refusal({"role": "assistant", "content": "3"}) is None
    refusal = transcript.refusal({**message, "tool_calls": [call, call]})
    assert "only supports single tool-calls at once" in str(refusal)


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("family", "written", "sequences"),
    [
        ("qwen2.5", CALL, 1),
        # The template writes the call with other spaces, and takes the thought that it puts before an answer out.
        ("qwen2.5", CALL.replace(": ", ":"), 2),
        ("qwen3, not thinking", CALL, 2),
    ],
)
def test_behind_a_turn_that_a_stop_string_ends_stands_what_the_template_writes(family, written, sequences):
    conversation = Conversation(family)
    token_ids = np.array(conversation.tokenizer(written, add_special_tokens=False)["input_ids"], dtype=np.int32)
    ones = np.ones(len(token_ids), dtype=np.int32)
    message = conversation.reader.read(written, [TOOL]).message
    heard = {"role": "tool", "name": "add", "content": "3"}
    conversation.transcript.wrote(Completion(0, token_ids, -ones.astype(np.float32), ones, "stop"), message)
    conversation.transcript.heard([heard])
    # The template as transformers renders it, tokenised whole.
    whole = conversation.tokenizer.apply_chat_template(
        [*conversation.messages, message, heard], tools=[TOOL], tokenize=False, add_generation_prompt=True
    )
    assert conversation.tokenizer.decode(conversation.transcript.token_ids, skip_special_tokens=False) == whole
    found = sequences_of(conversation.transcript)
    assert len(found) == sequences
    sampled = [token for tokens, mask in found for token, is_sampled in zip(tokens, mask, strict=True) if is_sampled]
    assert sampled == token_ids.tolist()
