"""Ids that are tokens and ids that are none."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rlflow.data.vocabulary import difference, ids_without_token, read_vocabulary, tokens_without_row
from rlflow.recipe import ModelBlock

WITH_A_HOLE = {"a": 0, "b": 1, "c": 4}


def test_ids_without_token_are_holes_and_what_lies_beyond():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(WITH_A_HOLE)))
    assert ids_without_token(tokenizer, 7).tolist() == [2, 3, 5, 6]
    assert ids_without_token(tokenizer, 4).tolist() == [2, 3]
    assert ids_without_token(tokenizer, 2).tolist() == []


def test_tokens_without_a_row_are_in_the_order_of_their_ids():
    assert tokens_without_row({"x": 9, "y": 3, "z": 5}, 4) == ["z", "x"]
    assert tokens_without_row(WITH_A_HOLE, 5) == []


def test_a_difference_names_the_first_token_that_another_id_stands_for():
    assert difference(WITH_A_HOLE, WITH_A_HOLE | {"d": 2}) is None
    told = difference(WITH_A_HOLE, {"a": 0, "c": 1, "b": 4})
    assert told == "2 of its 3 tokens have another id or none: 'b' is 1 here and 4 there"


def test_a_damaged_tokenizer_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(ValueError, match=rf"^{tmp_path}/tokenizer.json cannot be read: .*: fetch it again$"):
        read_vocabulary(ModelBlock(path=str(tmp_path)))
    (tmp_path / "tokenizer.json").unlink()
    assert read_vocabulary(ModelBlock(path=str(tmp_path))) is None


@pytest.mark.parametrize(
    "model",
    [
        models.BPE({"a": 0, "b": 1, "ab": 2, "<eos>": 3}, [("a", "b")]),
        models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}),
        models.WordLevel(WITH_A_HOLE),
        models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], 0),
    ],
    ids=["BPE", "WordPiece", "WordLevel", "Unigram"],
)
def test_a_vocabulary_is_the_one_that_the_tokenizers_library_builds(tmp_path, model):
    tokenizer = Tokenizer(model)
    tokenizer.add_tokens(["new", "a"])
    tokenizer.add_special_tokens(["<eos>", "<pad>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = read_vocabulary(ModelBlock(path=str(tmp_path)))
    assert vocabulary == tokenizer.get_vocab(with_added_tokens=True) and "<pad>" in vocabulary
