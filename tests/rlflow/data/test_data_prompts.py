"""Rows to prompts: what is rendered, what reward functions get, and what is too long."""

from __future__ import annotations

import numpy as np
import pytest

from rlflow.data.errors import DataError
from rlflow.data.prompts import load_prompts, opened_tag
from rlflow.data.tokenizer import build_character_tokenizer
from rlflow.recipe.data_blocks import DataBlock, SourceBlock

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}


@pytest.fixture
def load(make_data, tokenizer):
    def load(rows, source=None, **fields):
        data = make_data(rows, source, **fields)
        return load_prompts(data.train, data, tokenizer, 0)

    return load


def test_a_prompt_is_rendered_up_to_where_the_policy_writes(load, tokenizer):
    (prompt,) = load([{"prompt": "Hi"}])
    assert tokenizer.decode(prompt.token_ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.token_ids.dtype == np.int32
    assert (prompt.id, list(prompt.messages)) == ("rows:1", [HI])


@pytest.mark.parametrize(
    ("text", "opened"),
    [
        ("user: Hi\nassistant: <think>\n", "<think>\n"),
        ("Let me think. <reasoning>", "<reasoning>"),
        ("[INST]Hi[/INST][THINK]", "[THINK]"),
        ("assistant: <think>\n\n</think>\n\n", ""),
        ("Write <think> first.\nassistant:", ""),
        ("<|im_start|>assistant\n", ""),
    ],
)
def test_a_thought_that_a_prompt_opens_is_told_from_one_that_it_mentions(text, opened):
    assert opened_tag(text) == opened


def test_a_prompt_says_what_the_generation_prompt_has_opened(load, tokenizer):
    assert load([{"prompt": "Hi <think>"}])[0].opened == ""
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    assert load([{"prompt": "Hi"}])[0].opened == "<think>\n"


def test_the_last_answer_is_taken_off_and_offered_as_response(load):
    (prompt,) = load([{"messages": [HI, HELLO, HI, HELLO], "solution": "42"}])
    assert list(prompt.messages) == [HI, HELLO, HI]
    assert prompt.columns == {"response": "Hello", "solution": "42"}


def test_a_response_column_of_the_row_stays(load):
    (prompt,) = load([{"messages": [HI, HELLO], "response": "mine"}])
    assert prompt.columns == {"response": "mine"}


def test_every_other_column_reaches_the_reward_functions_as_it_is(load):
    row = {"prompt": "Hi", "solution": "42", "tests": [{"in": 1}], "level": None}
    assert load([row])[0].columns == {"solution": "42", "tests": [{"in": 1}], "level": None}


def test_the_prompt_of_a_preference_row_is_what_comes_before_the_answers(load):
    (prompt,) = load([{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}])
    assert list(prompt.messages) == [HI]


def test_the_system_message_is_put_before_prompts_that_have_none(load, tokenizer):
    system = {"role": "system", "content": "Be long."}
    first, second = load([{"prompt": "Hi"}, {"prompt": "Hi", "system": "Be long."}], system="Be brief.")
    assert tokenizer.decode(first.token_ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    assert list(second.messages) == [system, HI]


def test_plain_text_is_a_prompt_without_a_template(make_data, tokenizer):
    tokenizer.chat_template = None
    data = make_data([{"text": "def f():\n", "test": "x"}])
    (prompt,) = load_prompts(data.train, data, tokenizer, 0)
    assert tokenizer.decode(prompt.token_ids) == "def f():\n"
    assert prompt.columns == {"test": "x"}


def test_a_model_without_a_chat_template_is_an_error_with_two_ways_out(make_data, tokenizer):
    tokenizer.chat_template = None
    data = make_data([{"prompt": "Hi"}])
    with pytest.raises(DataError, match=r"Set model.chat_template, or `format: text`"):
        load_prompts(data.train, data, tokenizer, 0)


def test_a_row_without_a_question_is_bad(load):
    with pytest.raises(DataError, match="row 1: no user message is left when the answer is taken off"):
        load([{"messages": [HELLO]}])


def test_a_row_that_the_template_refuses_counts_against_the_budget(make_data, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] == 'bad' %}{{ raise_exception('not this') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    data = make_data([{"prompt": "Hi"}, {"prompt": "bad"}], {"max_bad_rows": 1})
    prompts = load_prompts(data.train, data, tokenizer, 0)
    assert [(bad.row, bad.reason) for bad in prompts.skipped] == [(2, "the chat template refuses it: not this")]
    assert [prompt.id for prompt in prompts] == ["rows:1"]


def test_characters_a_model_lacks_name_their_rows(make_data):
    data = make_data([{"prompt": "1+2="}, {"prompt": "1*2="}])
    with pytest.raises(DataError, match=r"row 2: the character '\*' is not in model.characters"):
        load_prompts(data.train, data, build_character_tokenizer("0123456789+="), 0)


def num_tokens(tokenizer, text):
    return len(tokenizer(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n").input_ids)


def test_overlong_prompts_are_an_error_that_names_rows_counts_limit_and_remedy(load, tokenizer, tmp_path):
    long = num_tokens(tokenizer, "x" * 50)
    with pytest.raises(DataError) as error:
        load([{"prompt": "Hi"}, {"prompt": "x" * 50}], max_prompt_tokens=long - 1)
    assert str(error.value) == (
        f"1 overlong row:\n  {tmp_path}/rows.jsonl, row 2: {long} tokens, data.max_prompt_tokens is {long - 1}\n"
        "Raise data.max_prompt_tokens, or set data.overlong: drop (or truncate)."
    )
    assert len(load([{"prompt": "Hi"}, {"prompt": "x" * 50}], max_prompt_tokens=long)) == 2


def test_overlong_prompts_may_be_dropped_outside_the_budget_of_bad_rows(load):
    prompts = load([{"prompt": "Hi"}, {"prompt": "x" * 500}], max_prompt_tokens=100, overlong="drop")
    assert [prompt.id for prompt in prompts] == ["rows:1"]
    assert [(bad.row, bad.reason[-34:]) for bad in prompts.skipped] == [
        (2, "tokens, data.max_prompt_tokens is 100"[-34:])
    ]


def test_overlong_prompts_may_be_cut_from_the_left(load, tokenizer):
    (prompt,) = load([{"prompt": "x" * 500}], max_prompt_tokens=20, overlong="truncate")
    assert len(prompt.token_ids) == 20
    assert tokenizer.decode(prompt.token_ids).endswith("x<|im_end|>\n<|im_start|>assistant\n")


def test_dropping_every_prompt_is_an_error(load):
    with pytest.raises(DataError, match=r"no row is left:\n.*row 1: .* tokens.*\nRaise data.max_prompt_tokens"):
        load([{"prompt": "Hi"}], max_prompt_tokens=2, overlong="drop")


@pytest.mark.slow
def test_a_prompt_of_a_million_tokens_is_overlong_like_any_other(load):
    with pytest.raises(DataError, match=r"row 2: 1,\d\d\d,\d\d\d tokens, data.max_prompt_tokens is 1,024"):
        load([{"prompt": "Hi"}, {"prompt": "€" * 500_000}])


def test_loading_twice_gives_the_same_prompts_and_the_same_skipped_rows(load):
    rows = [{"prompt": f"q{n}"} for n in range(20)] + [{"prompt": ""}]
    first, again = (load(rows, {"rows": 7, "max_bad_rows": 1}) for _ in range(2))
    assert [prompt.id for prompt in first] == [prompt.id for prompt in again]
    assert first.skipped == again.skipped and len(first.skipped) == 1


def test_generated_problems_become_prompts_of_characters():
    source = SourceBlock(generator="arithmetic", args={"digits": 2, "rows": 5})
    tokenizer = build_character_tokenizer("0123456789+=")
    prompts = load_prompts(source, DataBlock(train=source), tokenizer, 0)
    assert [prompt.id for prompt in prompts] == [f"arithmetic:{n}" for n in range(1, 6)]
    for prompt in prompts:
        a, b = tokenizer.decode(prompt.token_ids).rstrip("=").split("+")
        assert prompt.columns == {"response": str(int(a) + int(b)), "solution": str(int(a) + int(b))}
