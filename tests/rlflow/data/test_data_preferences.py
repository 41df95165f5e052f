"""Pairs and labelled answers: what is trained in each, and what cannot be learned from."""

from __future__ import annotations

import pytest

from rlflow.data.errors import DataError
from rlflow.data.preferences import load_labelled, load_pairs

HI = {"role": "user", "content": "Hi"}
WHY = {"role": "user", "content": "Why?"}
HELLO = {"role": "assistant", "content": "Hello"}
NO = {"role": "assistant", "content": "No"}
ROW = {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}


def texts(tokenizer, example):
    """The whole text, and the part that is trained."""
    return tokenizer.decode(example.token_ids), tokenizer.decode(example.token_ids[example.loss_mask])


def test_both_sides_share_the_prompt_and_only_the_answers_are_trained(make_data, tokenizer):
    (pair,) = load_pairs(make_data([ROW]), tokenizer, 0)
    head = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert texts(tokenizer, pair.chosen) == (f"{head}Hello<|im_end|>\n", "Hello<|im_end|>")
    assert texts(tokenizer, pair.rejected) == (f"{head}No<|im_end|>\n", "No<|im_end|>")
    assert (pair.id, pair.margin) == ("rows:1", 0.0)


def test_turns_that_both_sides_share_are_not_trained(make_data, tokenizer):
    row = {"chosen": [HI, HELLO, WHY, HELLO], "rejected": [HI, HELLO, WHY, NO]}
    (pair,) = load_pairs(make_data([row]), tokenizer, 0)
    assert texts(tokenizer, pair.chosen)[1] == "Hello<|im_end|>"
    assert texts(tokenizer, pair.rejected)[1] == "No<|im_end|>"


def test_every_turn_after_the_sides_part_is_trained(make_data, tokenizer):
    row = {"chosen": [HI, HELLO], "rejected": [HI, NO, WHY, NO]}
    (pair,) = load_pairs(make_data([row], system="Be brief."), tokenizer, 0)
    assert texts(tokenizer, pair.chosen)[1] == "Hello<|im_end|>"
    assert texts(tokenizer, pair.rejected)[1] == "No<|im_end|>No<|im_end|>"


def test_the_system_message_is_before_both_sides(make_data, tokenizer):
    (pair,) = load_pairs(make_data([ROW], system="Be brief."), tokenizer, 0)
    for side, answer in ((pair.chosen, "Hello<|im_end|>"), (pair.rejected, "No<|im_end|>")):
        whole, trained = texts(tokenizer, side)
        assert whole.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi") and trained == answer


@pytest.mark.parametrize(("value", "margin"), [(1.5, 1.5), (2, 2.0), ("0.5", 0.5), (None, 0.0), ("", 0.0)])
def test_the_margin_is_a_column(make_data, tokenizer, value, margin):
    pairs = load_pairs(make_data([ROW | {"margin": value}]), tokenizer, 0, for_reward_model=True)
    assert pairs[0].margin == margin


def test_a_margin_that_no_loss_looks_at_is_refused(make_data, tokenizer):
    with pytest.raises(DataError, match=r"a column `margin`, which only the loss of a reward_model looks at"):
        load_pairs(make_data([ROW | {"margin": 0.5}]), tokenizer, 0)
    renamed = make_data([ROW | {"margin": 0.5}], {"columns": {"unused": "margin"}})
    assert load_pairs(renamed, tokenizer, 0)[0].margin == 0.0


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "No"}, "the chosen and the rejected answer are identical"),
        ({"rejected": None}, "`rejected` is null, not text"),
        ({"rejected": ""}, "`rejected` is empty"),
        ({"margin": "wide"}, "`margin` is 'wide', not a finite number"),
        ({"margin": float("nan")}, "`margin` is nan, not a finite number"),
        ({"margin": float("-inf")}, "`margin` is -inf, not a finite number"),
        ({"margin": "Infinity"}, "`margin` is 'Infinity', not a finite number"),
        ({"prompt": None, "chosen": [HI, HELLO], "rejected": [WHY, NO]}, "are to different prompts"),
        ({"prompt": None, "chosen": [HI, HELLO, WHY], "rejected": [HI, NO]}, "does not end with an assistant's answer"),
        ({"prompt": None, "chosen": [HI, HELLO], "rejected": [HI]}, "does not end with an assistant's answer"),
    ],
)
def test_a_pair_that_teaches_nothing_is_a_bad_row(make_data, tokenizer, row, reason):
    pairs = load_pairs(make_data([ROW, ROW | row, ROW], {"max_bad_rows": 1}), tokenizer, 0)
    assert [pair.id for pair in pairs] == ["rows:1", "rows:3"]
    ((bad),) = pairs.skipped
    assert bad.row == 2 and reason in bad.reason


def test_rows_without_a_rejected_answer_are_named(make_data, tokenizer):
    with pytest.raises(DataError, match="row 1: it has no rejected answer"):
        load_pairs(make_data([{"messages": [HI, HELLO]}]), tokenizer, 0)


def test_a_pair_is_as_long_as_its_longer_side(make_data, tokenizer):
    rows = [ROW, ROW | {"rejected": "x" * 100}]
    with pytest.raises(DataError, match=r"row 2: 1\d\d tokens, data.max_tokens is 60"):
        load_pairs(make_data(rows, max_tokens=60), tokenizer, 0)
    assert [pair.id for pair in load_pairs(make_data(rows, max_tokens=60, overlong="drop"), tokenizer, 0)] == ["rows:1"]
    cut = load_pairs(make_data(rows, max_tokens=60, overlong="truncate"), tokenizer, 0)[1]
    assert len(cut.rejected.token_ids) == 60 and texts(tokenizer, cut.chosen)[1] == "Hello<|im_end|>"


def test_a_pair_that_is_cut_to_the_same_tokens_is_left_out(make_data, tokenizer):
    same = ROW | {"chosen": "x" * 100 + "a", "rejected": "x" * 100 + "b"}
    pairs = load_pairs(make_data([ROW, same], max_tokens=60, overlong="truncate"), tokenizer, 0)
    assert [pair.id for pair in pairs] == ["rows:1"]
    assert [str(bad).partition("row ")[2] for bad in pairs.skipped] == [
        "2: the chosen and the rejected answer are identical in their 60 tokens"
    ]
    with pytest.raises(DataError, match=r"no pair is left:\n.*row 1: the chosen.*identical"):
        load_pairs(make_data([same], max_tokens=60, overlong="truncate"), tokenizer, 0)


def test_a_labelled_answer_trains_its_last_turn(make_data, tokenizer):
    rows = [
        {"messages": [HI, HELLO, WHY, HELLO], "label": True},
        {"messages": [HI, NO], "label": False},
    ]
    first, second = load_labelled(make_data(rows, system="Be brief."), tokenizer, 0)
    assert (first.id, first.label, second.label) == ("rows:1", True, False)
    assert texts(tokenizer, first.example)[1] == "Hello<|im_end|>"
    assert texts(tokenizer, second.example)[1] == "No<|im_end|>"


@pytest.mark.parametrize("label", [True, False])
def test_labels_of_one_kind_only_are_an_error(make_data, tokenizer, label):
    rows = [{"prompt": "Hi", "completion": "Hello", "label": label}] * 2
    with pytest.raises(DataError, match=f"all 2 rows have the label {str(label).lower()}. KTO compares"):
        load_labelled(make_data(rows), tokenizer, 0)


def test_rows_without_a_label_or_an_answer_are_named(make_data, tokenizer):
    with pytest.raises(DataError, match="row 1: it has no `label`"):
        load_labelled(make_data([{"prompt": "Hi", "response": "Hello"}]), tokenizer, 0)
    with pytest.raises(DataError, match="row 1: it does not end with an assistant's answer"):
        load_labelled(make_data([{"prompt": "Hi", "label": True}], {"format": "kto"}), tokenizer, 0)
