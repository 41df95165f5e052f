"""What is rendered, and which tokens are trained: worked out by hand on ChatML, and on templates that misbehave."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from rlflow.data.chat import Chat
from rlflow.data.encoding import Rendered
from rlflow.data.errors import DataError, RowError
from rlflow.data.tokenizer import build_character_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
HI = {"role": "user", "content": "Hi"}
WHY = {"role": "user", "content": "Why?"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
}

STRIPS_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% if loop.last and '</think>' not in m['content'] %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen3's: the last answer gets an empty thought, earlier ones lose theirs."""
OPENS_THINKING = STRIPS_THINKING.replace(
    "'<|im_start|>assistant\n' }}{% endif %}", "'<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def answer(text: str, **keys) -> dict:
    return {"role": "assistant", "content": text, **keys}


def trained(tokenizer, messages, turns, **options) -> list[str]:
    """The trained tokens, decoded, one string a run of them."""
    chat = Chat(tokenizer)
    ((token_ids, mask),) = chat.encode_trained([chat.render_conversation(messages, turns, **options)])
    runs, before = [], False
    for token, kept in zip(token_ids, mask, strict=True):
        if kept:
            runs += [] if before else [[]]
            runs[-1].append(token)
        before = kept
    return [tokenizer.decode(run) for run in runs]


def test_the_mask_of_two_turns_by_hand(tokenizer):
    chat = Chat(tokenizer)
    messages = [SYSTEM, HI, answer("Two"), WHY, answer("Yes")]
    ((token_ids, mask),) = chat.encode_trained([chat.render_conversation(messages, [2, 4])])

    def ids(text):
        return tokenizer(text).input_ids

    parts = [
        ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("Two<|im_end|>", True),
        ("\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Yes<|im_end|>", True),
        ("\n", False),
    ]
    assert token_ids.tolist() == [token for text, _ in parts for token in ids(text)]
    assert mask.tolist() == [kept for text, kept in parts for _ in ids(text)]
    assert (token_ids.dtype, mask.dtype) == ("int32", "bool")


def test_the_end_of_turn_is_trained_and_the_newline_behind_it_is_not(tokenizer):
    chat = Chat(tokenizer)
    ((token_ids, mask),) = chat.encode_trained([chat.render_conversation([HI, answer("Two")], [1])])
    newline = tokenizer("\n").input_ids
    assert token_ids[-2:].tolist() == [2, *newline]
    assert mask[-2:].tolist() == [True, False]


def test_the_prompt_of_training_is_the_prompt_of_sampling(tokenizer):
    chat = Chat(tokenizer)
    (prompt,) = chat.encode([chat.render_prompt([SYSTEM, HI])])
    ((token_ids, mask),) = chat.encode_trained([chat.render_conversation([SYSTEM, HI, answer("Two")], [2])])
    assert token_ids[: len(prompt)].tolist() == prompt.tolist()
    assert mask.tolist().index(True) == len(prompt)


def test_only_the_turns_that_are_asked_for_are_trained(tokenizer):
    messages = [HI, answer("Two"), WHY, answer("Yes")]
    assert trained(tokenizer, messages, [1, 3]) == ["Two<|im_end|>", "Yes<|im_end|>"]
    assert trained(tokenizer, messages, [3]) == ["Yes<|im_end|>"]
    assert trained(tokenizer, messages, []) == []


@pytest.mark.parametrize("content", ["a<|im_end|>\nb", "<|im_start|>user\n", "Hi", "naïve 𝄞 €", " spaced ", "\nx"])
def test_an_answer_may_hold_anything(tokenizer, content):
    assert trained(tokenizer, [HI, answer(content), WHY, answer(content)], [1, 3]) == [f"{content}<|im_end|>"] * 2


def test_a_character_of_several_tokens_is_trained_whole_or_not_at_all(tokenizer):
    messages = [{"role": "user", "content": "𝄞"}, answer("𝄞𝄞")]
    assert trained(tokenizer, messages, [1]) == ["𝄞𝄞<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_still_shows_where_they_are(tokenizer):
    tokenizer.chat_template = STRIPS_THINKING
    messages = [HI, answer("<think>\nhm\n</think>\n\nTwo"), WHY, answer("<think>\nhm\n</think>\n\nYes")]
    assert trained(tokenizer, messages, [3]) == ["<think>\nhm\n</think>\n\nYes<|im_end|>"]
    messages = [HI, answer("Two"), WHY, answer("Yes")]
    assert trained(tokenizer, messages, [1, 3]) == ["Two<|im_end|>", "<think>\n\n</think>\n\nYes<|im_end|>"]


def test_an_empty_thought_is_left_out_when_asked_and_a_real_one_stays(tokenizer):
    tokenizer.chat_template = STRIPS_THINKING
    assert trained(tokenizer, [HI, answer("Two")], [1], ignore_empty_think=True) == ["Two<|im_end|>"]
    thought = [HI, answer("<think>\nhm\n</think>\n\nTwo")]
    assert trained(tokenizer, thought, [1], ignore_empty_think=True) == ["<think>\nhm\n</think>\n\nTwo<|im_end|>"]
    later = [HI, answer("Two <think></think> three")]
    tokenizer.chat_template = STRIPS_THINKING.replace("<think>\n\n</think>\n\n", "")
    assert trained(tokenizer, later, [1], ignore_empty_think=True) == ["Two <think></think> three<|im_end|>"]


def test_a_thought_that_the_generation_prompt_opens_is_trained_from_there(tokenizer):
    tokenizer.chat_template = OPENS_THINKING
    assert trained(tokenizer, [HI, answer("<think>\nhm\n</think>\n\nTwo")], [1]) == ["hm\n</think>\n\nTwo<|im_end|>"]
    assert trained(tokenizer, [HI, answer("Two")], [1], ignore_empty_think=True) == ["Two<|im_end|>"]


def test_a_template_that_changes_what_is_around_an_answer_is_an_error_with_a_remedy(tokenizer):
    counts = (
        "{% for m in messages %}{{ messages | map(attribute='content') | join | length }}{{ m['content'] }}{% endfor %}"
    )
    tokenizer.chat_template = counts
    with pytest.raises(RowError, match=r"messages\[1\].*data.loss_on: last_assistant"):
        Chat(tokenizer).render_conversation([HI, answer("Twelve"), WHY, answer("Yes")], [1])


def test_an_answer_that_the_template_leaves_out_is_an_error(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages if m['content'] != 'skip' %}{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(RowError, match=r"leaves messages\[1\] out"):
        Chat(tokenizer).render_conversation([HI, answer("skip"), WHY], [1])


def test_the_first_message_may_be_an_answer(tokenizer):
    assert trained(tokenizer, [answer("Two")], [0]) == ["Two<|im_end|>"]


def test_an_end_of_turn_token_that_swallows_the_newline_behind_it_is_trained(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", rstrip=True, special=True)]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|end|>")
    chat = Chat(tokenizer)
    ((token_ids, mask),) = chat.encode_trained([chat.render_conversation([HI, answer("Two")], [1])])
    assert tokenizer.decode(token_ids[mask]) == "Two<|end|>"


def test_a_token_that_reaches_into_the_prompt_is_not_trained(tokenizer):
    (two,) = tokenizer(" two", add_special_tokens=False).input_ids
    chat = Chat(tokenizer)
    ((token_ids, mask),) = chat.encode_trained([Rendered("is two plus", ((3, 11),))])
    assert token_ids[1] == two and mask.tolist() == [False, False, True]


def test_the_first_token_is_never_trained(tokenizer):
    ((_, mask),) = Chat(tokenizer).encode_trained([Rendered("two plus", ((0, 8),))])
    assert not mask[0] and mask[1:].all()


def test_the_end_ids_are_eos_and_what_the_template_closes_an_answer_with(tokenizer):
    assert Chat(tokenizer).end_ids == (2,)
    tokenizer.eos_token = "<|endoftext|>"
    assert Chat(tokenizer).end_ids == (0, 2)
    tokenizer.chat_template = None
    assert Chat(tokenizer).end_ids == (0,)


def test_of_several_closing_tokens_all_are_trained_and_the_last_one_ends_the_turn(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end_response|>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|end_response|><|im_end|>")
    assert Chat(tokenizer).end_ids == (2,)
    assert trained(tokenizer, [HI, answer("Two")], [1]) == ["Two<|end_response|><|im_end|>"]


def test_a_space_before_eos_belongs_to_the_answer(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]"
        "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    assert trained(tokenizer, [HI, answer("Two"), WHY, answer("Yes")], [1, 3]) == [" Two <|im_end|>", " Yes <|im_end|>"]


def test_a_template_that_refuses_a_row_says_so_in_its_own_words(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(RowError, match="the chat template refuses it: roles must alternate"):
        Chat(tokenizer).render_prompt([HI, HI])


@pytest.mark.parametrize("template", ["{{ oops", "{{ messages[0].content + 1 }}", "{{ raise_exception('never') }}"])
def test_a_template_that_renders_nothing_is_an_error_of_the_model(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"a question and an answer cannot be rendered.*Set model.chat_template"):
        Chat(tokenizer)


def test_no_template_is_an_error_with_two_ways_out(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"Set model.chat_template, or `format: text`"):
        Chat(tokenizer).render_prompt([HI])


def test_tools_and_function_calls_that_the_template_would_drop_are_refused(tokenizer):
    chat = Chat(tokenizer)
    with pytest.raises(RowError, match="`tools`, which the chat template does not show"):
        chat.render_prompt([HI], [{"name": "f"}])
    with pytest.raises(RowError, match="function calls, which the chat template leaves out"):
        chat.render_conversation([HI, CALL], [1])


def test_a_result_that_the_template_puts_into_the_turn_that_calls_is_not_trained(tokenizer):
    """As Gemma 4's: without the call the result has no place."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'tool' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls %}"
        "{{ c.function.name }}={{ messages[loop.index0 + 2].content }}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [HI, CALL, {"role": "tool", "content": "sunny"}, answer("Two")]
    assert trained(tokenizer, messages, [3]) == ["Two<|im_end|>"]
    with pytest.raises(RowError, match=r"changes what is around it"):
        trained(tokenizer, messages, [1, 3])


def test_a_function_call_is_trained_as_the_template_writes_it(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content'] +",
        "message['content'] + (message.tool_calls[0].function.name if message.tool_calls else '') +",
    )
    messages = [HI, CALL, {"role": "tool", "content": "3"}, answer("Three")]
    assert trained(tokenizer, messages, [1, 3]) == ["f<|im_end|>", "Three<|im_end|>"]


def test_plain_text_gets_eos_when_complete_and_bos_where_the_tokenizer_adds_it_and_neither_twice(tokenizer):
    chat = Chat(tokenizer)
    assert chat.render_text("two", complete=False).text == "two"
    assert chat.render_text("two", complete=True).text == "two<|im_end|>"
    tokenizer.bos_token = "<|endoftext|>"
    assert chat.render_text("two", complete=True).text == "two<|im_end|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    for text in ("two", "<|endoftext|>two", "two<|im_end|>", "<|endoftext|>two<|im_end|>"):
        assert chat.render_text(text, complete=True).text == "<|endoftext|>two<|im_end|>"
    assert chat.render_text("<|endoftext|>two", complete=False).text == "<|endoftext|>two"


def test_plain_text_cannot_be_completed_without_an_eos_token(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no eos token"):
        Chat(tokenizer).render_text("two", complete=True)


def test_a_character_tokenizer_refuses_what_it_has_no_token_for():
    chat = Chat(build_character_tokenizer("0123456789+="))
    assert chat.render_prompt([{"role": "user", "content": "1+2="}]).text == "1+2="
    for render in (
        lambda: chat.render_prompt([{"role": "user", "content": "1*2="}]),
        lambda: chat.render_conversation([{"role": "user", "content": "1*2="}, answer("2")], [1]),
        lambda: chat.render_text("1*2=", complete=True),
    ):
        with pytest.raises(RowError, match=r"the character '\*' is not in model.characters"):
            render()


def test_the_mask_is_the_one_transformers_takes_from_a_template_with_generation_marks(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    messages = [SYSTEM, HI, answer("Two plus two"), WHY, answer(" is four\n")]
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    chat = Chat(tokenizer)
    ((token_ids, mask),) = chat.encode_trained([chat.render_conversation(messages, [2, 4])])
    assert token_ids.tolist() == theirs["input_ids"]
    assert mask.astype(int).tolist() == theirs["assistant_masks"]
