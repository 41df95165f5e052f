"""Agent data of every format that people bring: what the assistant wrote is trained, as its template has it, and the
sequences are those that a rollout of the same conversation has."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlflow.data.errors import DataError
from rlflow.data.examples import load_examples, render_examples
from rlflow.data.formats import Record
from rlflow.data.preferences import load_pairs
from rlflow.recipe import DataBlock, SourceBlock
from tests.rlflow.data.conversations import FAMILIES, TOOL, Conversation, sequences_of, tokenizer_of

ADD = {"name": "add", "arguments": {"a": 1}}
WRITTEN = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
"""As Qwen2.5's template has it, and Hermes' data."""
BARE = TOOL["function"]
ASK = {"role": "user", "content": "1 + 2?"}
RESULT = {"role": "tool", "content": "3"}
DONE = {"role": "assistant", "content": "It is 3."}
THOUGHT = "<think>\nhm\n</think>\n\n"


def conversation(*between: dict[str, Any], tools: Any = None) -> dict[str, Any]:
    return {"messages": [ASK, *between, DONE], "tools": tools or [TOOL]}


def sharegpt(*between: dict[str, Any], tools: Any) -> dict[str, Any]:
    said = [{"from": "human", "value": "1 + 2?"}, *between, {"from": "gpt", "value": "It is 3."}]
    return {"conversations": said, "tools": tools}


def called(key: str, **call: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, key: call if key == "function_call" else [call]}


AS_TEXT = json.dumps(ADD)
OBSERVED = {"from": "observation", "value": "3"}
ROWS: dict[str, dict[str, Any]] = {
    "openai": conversation(
        called("tool_calls", id="c1", type="function", function={"name": "add", "arguments": '{"a": 1}'}),
        {**RESULT, "tool_call_id": "c1"},
    ),
    "openai before tools": conversation(
        called("function_call", name="add", arguments='{"a": 1}'), {"role": "function", "name": "add", "content": "3"}
    ),
    "llama": conversation(
        called("tool_calls", name="add", parameters={"a": 1}), {"role": "ipython", "content": "3"}, tools=TOOL
    ),
    "ms-swift, tools as text": conversation(
        {"role": "tool_call", "content": AS_TEXT}, {"role": "tool_response", "content": "3"}, tools=json.dumps([TOOL])
    ),
    "ms-swift, tools as texts": conversation(
        {"role": "tool_call", "content": AS_TEXT}, RESULT, tools=[json.dumps(TOOL)]
    ),
    "ms-swift, objects": conversation({"role": "tool_call", "content": ADD}, {"role": "tool", "content": {"sum": 3}}),
    "a list as result": conversation({"role": "tool_call", "content": ADD}, {"role": "tool", "content": [3, 4]}),
    "one tool as text": conversation({"role": "tool_call", "content": ADD}, RESULT, tools=json.dumps(TOOL)),
    "llama-factory's glaive": sharegpt({"from": "function_call", "value": AS_TEXT}, OBSERVED, tools=json.dumps([BARE])),
    "llama-factory's parts": conversation(
        {"role": "assistant", "content": [{"type": "tool_call", "value": AS_TEXT}]},
        {"role": "tool", "content": [{"type": "text", "value": "3"}]},
        tools=json.dumps([BARE]),
    ),
    "hermes, rendered": {
        "conversations": [
            {"from": "system", "value": f"<tools>\n{json.dumps(TOOL)}\n</tools>"},
            {"from": "human", "value": "1 + 2?"},
            {"from": "gpt", "value": WRITTEN},
            {"from": "tool", "value": "<tool_response>\n3\n</tool_response>"},
            {"from": "gpt", "value": "It is 3."},
        ]
    },
}


@pytest.fixture(scope="module")
def tokenizers():
    made: dict[str, Any] = {}
    return lambda family: made.setdefault(family, tokenizer_of(*FAMILIES[family]))


@pytest.mark.parametrize("form", ROWS)
def test_calls_and_answers_are_trained_and_results_are_not_whatever_the_format_is(form, make_data, tokenizers):
    tokenizer = tokenizers("qwen2.5")
    (example,) = load_examples(make_data([ROWS[form]]), tokenizer, 0)
    assert tokenizer.decode(example.token_ids[example.loss_mask]) == f"{WRITTEN}<|im_end|>It is 3.<|im_end|>"
    text = tokenizer.decode(example.token_ids)
    assert "Adds two numbers." in text and "<tool_response>\n" in text and text.count("<|im_start|>user") == 2


@pytest.mark.parametrize(
    "call",
    [
        {"from": "function_call", "value": THOUGHT + AS_TEXT},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [ADD]},
        {
            "role": "assistant",
            "content": [{"type": "reasoning", "value": "hm"}, {"type": "tool_call", "value": AS_TEXT}],
        },
    ],
)
def test_a_thought_before_a_call_is_trained_with_it_in_every_form(call, make_data, tokenizers):
    tokenizer = tokenizers("qwen3")
    (example,) = load_examples(make_data([{"messages": [ASK, call], "tools": [TOOL]}]), tokenizer, 0)
    assert tokenizer.decode(example.token_ids[example.loss_mask]) == f"{THOUGHT}{WRITTEN}<|im_end|>"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize(
    ("family", "trained"),
    [
        ("qwen3", f"{THOUGHT}It is 3.<|im_end|>"),
        (
            "gpt-oss",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>It is 3.<|return|>",
        ),
    ],
)
def test_a_thought_reaches_the_template_under_the_key_that_it_reads(family, trained, key, make_data, tokenizers):
    tokenizer = tokenizers(family)
    (example,) = load_examples(make_data([{"messages": [ASK, {**DONE, key: "hm"}]}]), tokenizer, 0)
    assert tokenizer.decode(example.token_ids[example.loss_mask], skip_special_tokens=False) == trained


@pytest.mark.parametrize("family", ["qwen2.5", "llama3.1"])
def test_a_thought_that_a_template_reads_under_no_key_is_named_with_the_setting_that_writes_it_in_the_text(
    family, make_data, tokenizers
):
    tokenizer = tokenizers(family)
    rows = [{"messages": [ASK, {**DONE, "reasoning_content": "hm"}]}]
    with pytest.raises(
        DataError, match=r"leaves out messages\[1\].reasoning_content.*`reasoning: inline` in its source"
    ):
        load_examples(make_data(rows), tokenizer, 0)
    (example,) = load_examples(make_data(rows, {"reasoning": "inline"}), tokenizer, 0)
    trained = tokenizer.decode(example.token_ids[example.loss_mask])
    assert trained in (f"{THOUGHT}It is 3.<|im_end|>", f"{THOUGHT}It is 3.<|eot_id|>")


def test_thoughts_of_both_sides_of_a_pair_are_written_in_the_text(make_data, tokenizers):
    tokenizer = tokenizers("qwen2.5")
    sides = {"chosen": [ASK, {**DONE, "reasoning": "hm"}], "rejected": [ASK, {**DONE, "thinking": "so"}]}
    (pair,) = load_pairs(make_data([sides], {"reasoning": "inline"}), tokenizer, 0)
    assert [tokenizer.decode(side.token_ids[side.loss_mask]) for side in (pair.chosen, pair.rejected)] == [
        f"{THOUGHT}It is 3.<|im_end|>",
        f"{THOUGHT.replace('hm', 'so')}It is 3.<|im_end|>",
    ]


def trained_like(played: Conversation) -> list[tuple[list[int], list[bool]]]:
    """What SFT makes of the messages of a conversation, up to the last token that is trained."""
    record = Record({}, played.transcript.messages, tools=[TOOL])
    texts = render_examples(record, DataBlock(train=SourceBlock(path="some.jsonl")), played.chat)
    encoded = played.chat.encode_trained(texts)
    return [up_to_the_last(token_ids.tolist(), mask.tolist()) for token_ids, mask in encoded]


def up_to_the_last(tokens: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
    size = len(mask) - mask[::-1].index(True) if any(mask) else 0
    return tokens[:size], mask[:size]


def sampled_in(played: Conversation) -> list[tuple[list[int], list[bool]]]:
    """The sequences of the rollout in which something was sampled, as far."""
    return [up_to_the_last(tokens, mask) for tokens, mask in sequences_of(played.transcript) if any(mask)]


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3-2507", "qwen3.5", "llama3.1", "gpt-oss", "glm-4.5", "mistral"])
def test_the_messages_of_an_episode_are_trained_as_the_tokens_that_the_rollout_has(family):
    played = Conversation(family)
    played.play()
    assert trained_like(played) == sampled_in(played)
    assert sum(sum(mask) for _, mask in trained_like(played)) == sum(len(written) for written in played.wrote)


def test_a_prompt_that_ends_otherwise_than_history_has_it_makes_sequences_of_a_row_as_of_a_rollout():
    played = Conversation("qwen3, not thinking")
    for index in range(2):
        played.turn({"role": "assistant", "content": f"It is {index}."}, {"role": "user", "content": "Sure?"})
    assert trained_like(played) == sampled_in(played)
    assert len(trained_like(played)) == 2


@pytest.mark.parametrize(("family", "num_sequences"), [("qwen3", 3), ("glm-4.5", 3), ("qwen3.5", 3), ("llama3.1", 1)])
def test_thoughts_that_a_template_cuts_make_as_many_sequences_of_a_row_as_of_a_rollout(family, num_sequences):
    played = Conversation(family)
    for index in range(3):
        said = {"role": "assistant", "content": f"{THOUGHT}It is {index}."}
        played.turn(said, {"role": "user", "content": "Sure?"})
    assert trained_like(played) == sampled_in(played)
    assert len(trained_like(played)) == num_sequences
