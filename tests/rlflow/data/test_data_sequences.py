"""Rows of classified texts, related texts and rankings: what each becomes, and what is refused with its place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from rlflow.data.class_labels import with_labels
from rlflow.data.errors import DataError
from rlflow.data.sequence_format import format_of, reading_texts
from rlflow.data.sequences import load_sequences
from rlflow.recipe import Recipe, SourceBlock, algorithm_of

END = "<|im_end|>"
CLASSES = {"classification": {"labels": ["bad", "good"]}}
NUMBER = {"classification": {"problem": "regression"}}
SHOWN: list[Any] = [{"type": "image", "image": "a.png"}]
SHOWN_ALONE: list[Any] = [{"role": "user", "content": SHOWN}]
NEAR = {"embedding": {"loss": "contrastive"}}


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def texts_of(row: Any, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(ids) for ids in row.token_ids]


def load(make_data: Any, tokenizer: Any, rows: list[dict[str, Any]], name: str, **options: Any) -> Any:
    settings = {key: options.pop(key) for key in ("max_tokens", "overlong") if key in options}
    return load_sequences(make_data(rows, **settings), tokenizer, 0, algorithm=algorithm_of(name, **options))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "Hi", "label": "good"}, f"Hi{END}"),
        ({"messages": user("Hi"), "label": "good"}, f"Hi{END}"),
        ({"messages": [{"role": "system", "content": "Be"}, *user("Hi")], "label": 1}, f"Be Hi{END}"),
        ({"sentence1": "Hi", "sentence2": "Yes", "label": "1"}, f"Hi\nYes{END}"),
        (
            {"messages": [*user("Hi"), {"role": "assistant", "content": "Yes"}], "label": "good"},
            f"<|im_start|>user\nHi{END}\n<|im_start|>assistant\nYes{END}\n",
        ),
    ],
    ids=["text", "one message", "behind a system message", "two texts", "a conversation"],
)
def test_a_classified_text_is_read_as_it_will_be_served(make_data, tokenizer, row, expected):
    (found,) = load(make_data, tokenizer, [row], "classification", **CLASSES)
    assert texts_of(found, tokenizer) == [expected]
    assert found.targets.tolist() == [1.0]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": user("q"), "positive_messages": [user("p")], "negative_messages": [user("n"), user("m")]},
        {"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": "m"},
        {"query": "q", "positive": ["p"], "negative": ["n", "m"]},
    ],
    ids=["ms-swift", "sentence-transformers", "lists"],
)
def test_related_texts_are_an_anchor_its_positives_and_its_negatives(make_data, tokenizer, row):
    (found,) = load(make_data, tokenizer, [row], "embedding", embedding={"query_prompt": "? "})
    assert texts_of(found, tokenizer) == [f"? q{END}", f"p{END}", f"n{END}", f"m{END}"]
    assert found.labels == (0.0, 1.0, -1.0, -1.0)


def test_a_scored_pair_has_its_score_at_both_texts(make_data, tokenizer):
    row = {"messages": user("a"), "positive_messages": [user("b")], "label": 0.8}
    (found,) = load(make_data, tokenizer, [row], "embedding", embedding={"loss": "cosine_similarity"})
    assert texts_of(found, tokenizer) == [f"a{END}", f"b{END}"] and found.labels == (0.8, 0.8)


@pytest.mark.parametrize(
    ("row", "texts", "labels"),
    [
        ({"query": "q", "positive": "p", "negative": ["n"]}, ["q\np", "q\nn"], (1.0, 0.0)),
        ({"query": "q", "documents": ["d", "e"], "labels": [0.25, 1]}, ["q\nd", "q\ne"], (0.25, 1.0)),
        ({"query": "q", "document": "d", "label": 0}, ["q\nd"], (0.0,)),
        (
            {"query": "[q", "positive": "[1]", "negative": '["n", "[m]"]'},
            ["[q\n[1]", "[q\nn", "[q\n[m]"],
            (1.0, 0.0, 0.0),
        ),
        ({"query": "q", "positive": [], "negative": ["n", "m"]}, ["q\nn", "q\nm"], (0.0, 0.0)),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: p", "rejected": "\n\nHuman: q\n\nAssistant: n"},
            ["q\np", "q\nn"],
            (1.0, 0.0),
        ),
    ],
    ids=[
        "positives and negatives",
        "documents and labels",
        "one document",
        "brackets",
        "negatives alone",
        "preferences",
    ],
)
def test_a_ranking_is_a_query_with_each_of_its_documents(make_data, tokenizer, row, texts, labels):
    (found,) = load(make_data, tokenizer, [row], "reranker")
    assert texts_of(found, tokenizer) == [f"{text}{END}" for text in texts] and found.labels == labels


def test_a_tokenizer_that_reads_texts_has_the_ids_that_were_trained(make_data, tokenizer):
    rows = [{"query": "What is two", "document": " plus two?\n", "label": 1}]
    for name in ("reranker", "generative_reranker"):
        algorithm = algorithm_of(name, answers={"positive": "y", "negative": "n"}) if "gen" in name else None
        algorithm = algorithm or algorithm_of(name)
        (found,) = load_sequences(make_data(rows), tokenizer, 0, algorithm=algorithm)
        reads = reading_texts(tokenizer, format_of(tokenizer, algorithm))
        assert reads("What is two", " plus two?\n").input_ids == found.token_ids[0].tolist()


WORDS = "What is two plus two? " * 9
"""Many more than ten tokens."""
PAIRWISE = {"reranking": {"loss": "pairwise"}}


@pytest.mark.parametrize(
    ("name", "options", "row", "says"),
    [
        ("reranker", {}, {"query": WORDS, "document": "p", "label": 1}, "leaves no room for the second"),
        ("classification", CLASSES, {"text": WORDS, "text_pair": "p", "label": 1}, "leaves no room for the second"),
        ("reranker", PAIRWISE, {"query": "q", "positive": WORDS, "negative": f"{WORDS}!"}, "1 and 2 are the same"),
        ("embedding", {}, {"anchor": "q", "positive": WORDS, "negative": ["n", f"{WORDS}!"]}, "1 and 3 are the same"),
    ],
    ids=["a document", "a pair", "a ranking", "a negative"],
)  # fmt: skip
def test_a_row_that_says_nothing_once_it_is_cut_is_left_out(make_data, tokenizer, name, options, row, says):
    short = {"query": "q", "text": "q", "positive": "p", "negative": "n", "label": 1}
    kept = load(make_data, tokenizer, [row, short], name, max_tokens=10, overlong="truncate", **options)
    (skipped,) = kept.skipped
    assert skipped.row == 1 and says in skipped.reason and len(kept) == 1


def test_what_is_cut_keeps_its_end(make_data, tokenizer):
    row = {"text": "What is two plus two? " * 9, "label": 0}
    (found,) = load(make_data, tokenizer, [row], "classification", max_tokens=6, overlong="truncate", **CLASSES)
    assert len(found.token_ids[0]) == 6 and found.token_ids[0][-1] == tokenizer.eos_token_id
    with pytest.raises(DataError, match=r"row 1: \d+ tokens, data.max_tokens is 6"):
        load(make_data, tokenizer, [row], "classification", max_tokens=6, **CLASSES)


@pytest.mark.parametrize(
    ("name", "options", "row", "says"),
    [
        ("classification", CLASSES, {"text": "Hi", "label": 2}, "the label 2 is out of range: there are 2 classes"),
        ("classification", CLASSES, {"text": "Hi", "label": "goood"}, "none of the classes bad, good.*Nearest: good"),
        ("classification", CLASSES, {"text": "Hi", "label": ["good"]}, "a text has one class"),
        ("classification", CLASSES, {"text": "Hi"}, "it has no `label`"),
        ("classification", CLASSES, {"text": " ", "label": 0}, "`text` is empty"),
        ("classification", CLASSES, {"messages": user(""), "label": 0}, "is empty"),
        ("classification", CLASSES, {"text": "Hi", "label": 0, "images": ["a.png"]}, "takes text alone"),
        ("embedding", {}, {"anchor": "q", "positive": "p", "positive_images": ["a.png"]}, "embedded"),
        ("embedding", {}, {"anchor": "q", "positive": [SHOWN_ALONE]}, "show pictures"),
        ("reranker", {}, {"query": SHOWN_ALONE, "positive": "p", "negative": "n"}, "show pictures"),
        ("classification", NUMBER, {"text": "Hi", "label": "nan"}, "not a finite"),
        ("embedding", {}, {"anchor": "q"}, "it has none of the columns positive_messages"),
        ("embedding", {}, {"anchor": "q", "positive": ""}, "`positive` is empty"),
        ("embedding", {}, {"anchor": "q", "positive": "p", "negative": ["n", "p"]}, "documents 1 and 3 are the same"),
        ("embedding", {}, {"anchor": "q", "positive": "p", "label": 0}, "infonce learns from related texts"),
        ("embedding", {"embedding": {"in_batch_negatives": False}}, {"anchor": "q", "positive": "p"}, "no negative"),
        ("embedding", NEAR, {"sentence1": "a", "sentence2": "b", "label": 0.5}, "0 or 1"),
        ("embedding", {"embedding": {"loss": "cosine_similarity"}}, {"sentence1": "a", "sentence2": "b"}, "no `label`"),
        ("reranker", {}, {"query": "q", "positive": []}, "`positive` is empty"),
        ("reranker", {}, {"query": "q", "positive": "p", "negative": "n", "label": 0}, "`label` is 0, and"),
        ("reranker", {"reranking": {"loss": "pairwise"}}, {"query": "q", "negative": ["n"]}, "no positive document"),
        ("reranker", {}, {"query": "q", "document": "d", "label": 2}, "`label` is 2, out of range"),
        ("reranker", {"reranking": {"loss": "listwise"}}, {"query": "q", "positive": "p"}, "all worth the same"),
        ("reranker", {}, {"query": "q", "documents": ["d"], "labels": [1, 0]}, "not one for each of its 1 documents"),
        ("reranker", {}, {"query": "q", "documents": ["d", "d"], "labels": [1, 0]}, "documents 1 and 2 are the same"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_named(make_data, tokenizer, name, options, row, says):
    with pytest.raises(DataError, match=rf"row 1: .*{says}"):
        load(make_data, tokenizer, [row], name, **options)


def recipe_of(path: Any, **problem: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "algorithm": algorithm_of("classification", classification=problem),
            "model": {"path": "somewhere"},
            "data": {"train": SourceBlock(path=str(path))},
            "run": {"steps": 1},
        }
    )


@pytest.mark.parametrize(
    ("labels", "problem", "expected"),
    [
        (["b", "a", "b"], {}, ["a", "b"]),
        ([2, 0, 2], {}, ["0", "1", "2"]),
        ([["x"], [], ["y", "x"]], {"problem": "multi_label"}, ["x", "y"]),
        ([True, False], {}, ["0", "1"]),
    ],
    ids=["names", "ids, of which one is missing", "lists", "true and false"],
)
def test_the_classes_are_those_that_the_rows_name(write_jsonl, labels, problem, expected):
    path = write_jsonl([{"text": "Hi", "label": label} for label in labels])
    pinned = with_labels(recipe_of(path, **problem))
    assert pinned.algorithm.classification.labels == expected  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["a", 1], "others give a number"),
        ([0, 0], "all rows have one class"),
        ([0, -1], "row 2: .*from 0"),
        ([0, 0.5], "row 2: .*not a class"),
    ],
)
def test_labels_that_are_no_classes_are_refused(write_jsonl, labels, says):
    path = write_jsonl([{"text": "Hi", "label": label} for label in labels])
    with pytest.raises(DataError, match=says):
        with_labels(recipe_of(path))


def test_several_labels_are_a_number_for_each_class(make_data, tokenizer):
    options = {"classification": {"problem": "multi_label", "labels": ["a", "b", "c"]}}
    rows = [{"text": "Hi", "label": ["c", "a"]}, {"text": "Ho", "label": []}]
    found = load(make_data, tokenizer, rows, "classification", **options)
    assert np.stack([row.targets for row in found]).tolist() == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
