"""What a row says and the chat template leaves out is named; what only looks different is not."""

from __future__ import annotations

import pytest

from rlflow.data.chat import Chat
from rlflow.data.errors import DataError, RowError
from rlflow.data.examples import load_examples
from rlflow.data.preferences import load_pairs
from rlflow.data.prompts import load_prompts

ONLY_TALK = (
    "{% for m in messages if m['role'] in ('user', 'assistant') %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Neither system messages nor tool results."""
LAST_THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m.reasoning_content and (loop.last or preserve_thinking) %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}"
    "{% if m['role'] != 'assistant' or loop.last or preserve_thinking %}{{ m['content'] }}"
    "{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen3's: the thoughts of earlier turns are cut, unless preserve_thinking."""
SYSTEM = {"role": "system", "content": "Be brief."}
HI = {"role": "user", "content": "Hi"}
WHY = {"role": "user", "content": "Why?"}
RESULT = {"role": "tool", "content": "12:00"}


def answer(text: str, **keys) -> dict:
    return {"role": "assistant", "content": text, **keys}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([SYSTEM, HI, answer("Two")], r"messages\[0\].content, what the system says"),
        ([HI, answer("One"), RESULT, answer("Two")], r"messages\[2\].content, what the tool says"),
    ],
)
def test_a_system_text_or_a_tool_result_that_the_template_leaves_out_is_a_bad_row(make_data, tokenizer, messages, said):
    tokenizer.chat_template = ONLY_TALK
    data = make_data([{"messages": messages}])
    for load in (lambda: load_examples(data, tokenizer, 0), lambda: load_prompts(data.train, data, tokenizer, 0)):
        with pytest.raises(DataError, match=f"row 1: the chat template leaves out {said}"):
            load()


def test_so_is_the_system_text_of_the_recipe(make_data, tokenizer):
    tokenizer.chat_template = ONLY_TALK
    pair = {"prompt": "Hi", "chosen": "Two", "rejected": "One"}
    with pytest.raises(DataError, match=r"leaves out messages\[0\].content, what the system says"):
        load_pairs(make_data([pair], system="Be brief."), tokenizer, 0)


@pytest.mark.parametrize(
    "thought", [{"content": "<think>hm</think>Two"}, {"content": "Two", "reasoning_content": "hm"}]
)
def test_a_thought_that_is_trained_and_left_out_is_a_bad_row_with_the_setting_that_keeps_it(tokenizer, thought):
    tokenizer.chat_template = LAST_THOUGHT
    messages = [HI, {"role": "assistant", **thought}, WHY, answer("Yes")]
    with pytest.raises(RowError) as error:
        Chat(tokenizer).render_conversation(messages, [1, 3])
    field = "reasoning_content" if "reasoning_content" in thought else "content"
    assert str(error.value) == (
        f"the chat template leaves out messages[1].{field}, a thought that is to be trained: "
        "model.chat_template_kwargs: {preserve_thinking: true} keeps it, model.chat_template sets another template, "
        "and data.loss_on: last_assistant trains the last turn alone"
    )


def test_a_thought_of_an_earlier_turn_that_is_not_trained_is_told_with_its_row(make_data, tokenizer):
    tokenizer.chat_template = LAST_THOUGHT
    row = {"messages": [HI, answer("<think>hm</think>Two"), WHY, answer("Yes")]}
    data = make_data([{"messages": [HI, answer("Two")]}, row], loss_on="last_assistant")
    note = "the chat template leaves out messages[1].content, a thought of a turn that is not trained"
    for rows in (load_examples(data, tokenizer, 0), load_prompts(data.train, data, tokenizer, 0)):
        assert len(rows) == 2 and [(bad.row, bad.reason) for bad in rows.notes] == [(2, note)]


def test_a_thought_of_the_last_turn_is_trained_where_the_template_shows_it(make_data, tokenizer):
    tokenizer.chat_template = LAST_THOUGHT
    data = make_data([{"messages": [HI, answer("Two", reasoning_content="hm")]}])
    (example,) = load_examples(data, tokenizer, 0)
    assert tokenizer.decode(example.token_ids[example.loss_mask]) == "<think>hm</think>Two<|im_end|>"


@pytest.mark.parametrize("later", ["<think>hm</think>Yes", "hm", "Yes"])
@pytest.mark.parametrize("thought", ["hm", "user", "Yes"])
def test_a_thought_is_left_out_though_the_same_words_are_shown_elsewhere(tokenizer, thought, later):
    tokenizer.chat_template = LAST_THOUGHT
    messages = [HI, answer("Two", reasoning_content=thought), WHY, answer(later)]
    with pytest.raises(RowError, match=r"leaves out messages\[1\].reasoning_content.*preserve_thinking: true"):
        Chat(tokenizer).render_conversation(messages, [1, 3])
    assert Chat(tokenizer).render_conversation(messages[:2], [1]).notes == ()


@pytest.mark.parametrize(
    "content", ["<think>hm</think>So<think>so</think>Two", "So <think>hm</think>Two", "So</think>Two"]
)
def test_what_stands_before_the_tag_at_which_a_template_cuts_an_answer_is_left_out(tokenizer, content):
    tokenizer.chat_template = LAST_THOUGHT.replace("or loop.last or", "or")
    with pytest.raises(RowError, match=r"leaves out messages\[1\].content"):
        Chat(tokenizer).render_conversation([HI, answer(content)], [1])


@pytest.mark.parametrize("change", ["| trim", "| upper", "| tojson", "| replace('e', '3')"])
def test_a_text_that_the_template_writes_in_its_own_way_is_not_left_out(tokenizer, change):
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", f"(message['content'] {change})")
    messages = [{"role": "system", "content": ' Be "brief"\nand é. '}, HI]
    assert Chat(tokenizer).render_prompt(messages).notes == ()


def test_a_text_in_whose_place_the_template_refuses_anything_else_is_not_left_out(tokenizer):
    wants = "{% if m.role == 'tool' and m.content[0] != '{' %}{{ raise_exception('no JSON') }}{% endif %}"
    tokenizer.chat_template = LAST_THOUGHT.replace("{% for m in messages %}", "{% for m in messages %}" + wants)
    messages = [HI, answer("One", reasoning_content="hm"), {**RESULT, "content": "{}"}, answer("Two")]
    rendered = Chat(tokenizer).render_conversation(messages, [3])
    assert rendered.notes == (
        "the chat template leaves out messages[1].reasoning_content, a thought of a turn that is not trained",
    )


def test_a_tool_that_the_template_does_not_show_is_refused(tokenizer):
    shows = "message['content'] + (message.tool_calls | string if message.tool_calls else '')"
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", shows)
    tokenizer.chat_template += "{{ tools[0].function.name if tools }}"
    chat = Chat(tokenizer)
    tools = [{"type": "function", "function": {"name": name}} for name in ("clock", "sum")]
    assert chat.render_prompt([HI], tools[:1]).text.endswith("clock")
    call = {"type": "function", "function": {"name": "sum", "arguments": {}}}
    for messages in ([HI], [{**HI, "content": "What is the sum?"}], [HI, answer("", tool_calls=[call]), RESULT]):
        with pytest.raises(RowError, match="`tools`, which the chat template does not show"):
            chat.render_prompt(messages, tools)


def test_a_call_that_the_template_does_not_show_is_refused_though_its_name_is_in_the_text(tokenizer):
    tokenizer.chat_template += "{{ tools[0].function.name if tools }}"
    clock = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    messages = [HI, answer("I look at the clock.", tool_calls=[clock]), RESULT, answer("Noon.")]
    with pytest.raises(RowError, match="function calls, which the chat template leaves out"):
        Chat(tokenizer).render_conversation(messages, [1, 3], [clock])
