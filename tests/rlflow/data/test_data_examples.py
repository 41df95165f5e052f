"""Supervised examples: which turns are trained, plain text, limits."""

from __future__ import annotations

import pytest

from rlflow.data.errors import DataError
from rlflow.data.examples import load_examples

HI = {"role": "user", "content": "Hi"}
WHY = {"role": "user", "content": "Why?"}


def answer(text, **keys):
    return {"role": "assistant", "content": text, **keys}


TWO_TURNS = [HI, answer("Two"), WHY, answer("Yes")]


@pytest.fixture
def trained(make_data, tokenizer):
    """The trained text of the only example."""

    def trained(row, **fields):
        (example,) = load_examples(make_data([row], **fields), tokenizer, 0)
        assert len(example.token_ids) == len(example.loss_mask)
        return tokenizer.decode(example.token_ids[example.loss_mask])

    return trained


def test_all_answers_are_trained_or_only_the_last(trained):
    assert trained({"messages": TWO_TURNS}) == "Two<|im_end|>Yes<|im_end|>"
    assert trained({"messages": TWO_TURNS}, loss_on="last_assistant") == "Yes<|im_end|>"


def test_a_loss_on_all_trains_everything_but_the_first_token(trained):
    assert trained({"messages": [HI, answer("Two")]}, loss_on="all") == (
        "user\nHi<|im_end|>\n<|im_start|>assistant\nTwo<|im_end|>\n"
    )


def test_what_a_message_says_about_its_loss_goes_first(trained):
    messages = [HI, answer("Two", loss=False), WHY, answer("Yes")]
    assert trained({"messages": messages}) == "Yes<|im_end|>"
    messages = [HI, answer("Two", loss=True), WHY, answer("Yes", loss=False)]
    assert trained({"messages": messages}, loss_on="last_assistant") == "Two<|im_end|>"
    with pytest.raises(DataError, match="row 1: `loss` is false in every assistant message"):
        trained({"messages": [HI, answer("Two", loss=False)]})


@pytest.mark.parametrize("row", [{"prompt": "Hi", "response": "Two"}, {"instruction": "Hi", "output": "Two"}])
def test_a_question_and_an_answer_are_a_conversation_of_one_turn(trained, row):
    assert trained(row) == "Two<|im_end|>"


def test_what_follows_the_last_answer_is_left_off_unless_all_is_trained(make_data, tokenizer):
    rows = [{"messages": [HI, answer("Two"), WHY]}]
    (example,) = load_examples(make_data(rows), tokenizer, 0)
    assert tokenizer.decode(example.token_ids).endswith("Two<|im_end|>\n")
    (example,) = load_examples(make_data(rows, loss_on="all"), tokenizer, 0)
    assert tokenizer.decode(example.token_ids[example.loss_mask]).endswith(f"{WHY['content']}<|im_end|>\n")


def test_the_system_message_is_seen_and_not_trained(make_data, tokenizer):
    (example,) = load_examples(make_data([{"messages": [HI, answer("Two")]}], system="Be brief."), tokenizer, 0)
    assert tokenizer.decode(example.token_ids).startswith("<|im_start|>system\nBe brief.")
    assert tokenizer.decode(example.token_ids[example.loss_mask]) == "Two<|im_end|>"


def test_an_empty_thought_is_left_out_when_asked(trained):
    row = {"messages": [HI, answer("<think>\n\n</think>\n\nTwo")]}
    assert trained(row) == "<think>\n\n</think>\n\nTwo<|im_end|>"
    assert trained(row, ignore_empty_think=True) == "Two<|im_end|>"


def test_plain_text_is_trained_whole_and_ends_with_eos(trained, tokenizer):
    first, *_ = tokenizer.convert_ids_to_tokens(tokenizer("two plus two").input_ids)
    assert trained({"text": "two plus two"}) == "two plus two<|im_end|>".removeprefix(first)


def test_a_row_without_an_answer_is_bad(trained):
    with pytest.raises(DataError, match="row 1: it has no assistant answer to learn"):
        trained({"prompt": "Hi"})


def test_overlong_examples_are_refused_dropped_or_cut_from_the_right(make_data, tokenizer):
    rows = [{"prompt": "Hi", "response": "Two"}, {"prompt": "Hi", "response": "x" * 100}]

    def load(overlong):
        return load_examples(make_data(rows, max_tokens=60, overlong=overlong), tokenizer, 0)

    with pytest.raises(DataError, match=r"row 2: 1\d\d tokens, data.max_tokens is 60\nRaise data.max_tokens"):
        load("error")
    dropped = load("drop")
    assert [example.id for example in dropped] == ["rows:1"] and [bad.row for bad in dropped.skipped] == [2]
    cut = load("truncate")[1]
    assert len(cut.token_ids) == len(cut.loss_mask) == 60
    assert set(tokenizer.decode(cut.token_ids[cut.loss_mask])) == {"x"}


def test_an_example_that_is_cut_before_its_answer_is_left_out_and_named(make_data, tokenizer):
    rows = [{"prompt": "Hi", "response": "Two"}, {"prompt": "x" * 100, "response": "Two"}]
    examples = load_examples(make_data(rows, max_tokens=60, overlong="truncate"), tokenizer, 0)
    assert [example.id for example in examples] == ["rows:1"]
    assert [(bad.row, bad.reason) for bad in examples.skipped] == [(2, "nothing is trained in its first 60 tokens")]
