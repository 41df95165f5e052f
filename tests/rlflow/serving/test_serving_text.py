"""Tokens to text while they come, against whole decoding by transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlflow.data.answer_text import AnswerText
from rlflow.serving.text import Thoughts, hidden_ids

TEXTS = [
    "Once upon a time, there were 3 kings.  Two spaces,\n\nand two lines.",
    "Grüße aus Köln: 你好,世界! 👩‍👩‍👧 und 🇩🇪 — naïve café",
    "日本語のテキスト と 한국어",
    "don 't clean , this up .",
]


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's: a character outside ASCII is several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXTS[0]] * 4, trainer)
    return finished(backend, clean_up_tokenization_spaces=True)


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: words begin with a space, of which a text loses the first; unknown characters are bytes."""
    pieces = {f"<0x{byte:02X}>": byte + 1 for byte in range(256)} | {"<unk>": 0}
    pieces |= {
        piece: len(pieces) + i for i, piece in enumerate(["▁", *"abcdefghijklmnopqrstuvwxyz", "▁t", "he", "▁the"])
    }
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    backend = Tokenizer(models.BPE(pieces, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return finished(backend)


def finished(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", **options)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<|user|>"]})
    return tokenizer


@pytest.fixture(scope="module", params=[byte_level, sentencepiece], ids=lambda make: make.__name__)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.param()


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def pieces_of(decoder: AnswerText, ids: list[int]) -> Iterator[str]:
    yield from (decoder.push([id_]) for id_ in ids)
    yield decoder.finish()


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_whole_text_and_hold_whole_characters(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = ids_of(tokenizer, text)
    pieces = list(pieces_of(AnswerText(tokenizer, hidden_ids(tokenizer)), ids))
    assert "".join(pieces) == text == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len(pieces) > 5 and sum(map(bool, pieces)) > 5


def test_a_space_is_kept_where_the_text_goes_on_from_a_prompt_and_not_where_it_begins() -> None:
    tokenizer = sentencepiece()
    the, words = ids_of(tokenizer, "the"), ids_of(tokenizer, "the the")
    assert "".join(pieces_of(AnswerText(tokenizer, frozenset()), the)) == "the"
    assert "".join(pieces_of(AnswerText(tokenizer, frozenset(), context=words), the)) == " the"


def test_many_spaces_stay_as_they_are() -> None:
    tokenizer = sentencepiece()
    for text in ("a    b", " the", "   "):
        ids = ids_of(tokenizer, text)
        shown = "".join(pieces_of(AnswerText(tokenizer, frozenset()), ids))
        assert shown == text == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_text_goes_on_from_half_a_character_of_its_prompt() -> None:
    tokenizer = byte_level()
    ids = ids_of(tokenizer, "ющёк")
    whole = tokenizer.decode(ids)
    decoder = AnswerText(tokenizer, frozenset(), context=ids[:1])
    assert whole.endswith("".join(pieces_of(decoder, ids[1:]))[1:])


def test_a_character_that_lacks_bytes_at_the_end_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = ids_of(tokenizer, "ab 你")
    assert "".join(pieces_of(AnswerText(tokenizer, frozenset()), ids[:-1])) == "ab "


def test_special_tokens_are_not_shown_but_those_of_thoughts(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = ids_of(tokenizer, "<think>the<|user|></think>he<|end|>")
    assert "".join(pieces_of(AnswerText(tokenizer, hidden_ids(tokenizer)), ids)) in (
        "<think>the</think>he",
        "<think> the</think> he",
    )


def test_bytes_that_are_no_text_come_as_transformers_decodes_them() -> None:
    tokenizer, rng = byte_level(), np.random.default_rng(0)
    for _ in range(20):
        ids = [*rng.integers(0, 256, size=30).tolist(), *ids_of(tokenizer, "end")]
        shown = "".join(pieces_of(AnswerText(tokenizer, frozenset()), ids))
        assert shown == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    ("stop", "shown"),
    [(["kings"], "Once upon a time, there were 3 "), (["time", "a t"], "Once upon "), (["there are"], TEXTS[0])],
)
def test_a_text_ends_before_the_first_stop_string(stop: list[str], shown: str) -> None:
    tokenizer = byte_level()
    decoder = AnswerText(tokenizer, frozenset(), stop)
    text = ""
    for piece in pieces_of(decoder, ids_of(tokenizer, TEXTS[0])):
        text += piece
        assert shown.startswith(text), "what may be the beginning of a stop string is held back"
    assert text == shown
    assert decoder.is_stopped == (shown != TEXTS[0])


def test_a_stop_string_that_ends_with_the_answer_is_found() -> None:
    tokenizer = byte_level()
    decoder = AnswerText(tokenizer, frozenset(), ["END"])
    assert "".join(pieces_of(decoder, ids_of(tokenizer, "the END"))) == "the " and decoder.is_stopped


def parts_of(text: str, opened: str = "", size: int = 1) -> list[tuple[str, bool]]:
    """Said and thought, pieces of one kind joined."""
    thoughts, joined = Thoughts(opened), []
    for start in range(0, len(text), size):
        joined += thoughts.push(text[start : start + size])
    joined += thoughts.finish()
    merged: list[tuple[str, bool]] = []
    for piece, is_thought in joined:
        if merged and merged[-1][1] == is_thought:
            merged[-1] = (merged[-1][0] + piece, is_thought)
        else:
            merged.append((piece, is_thought))
    return merged


@pytest.mark.parametrize("size", [1, 3, 100])
def test_thoughts_are_parted_from_what_is_said_wherever_pieces_end(size: int) -> None:
    text = "Hm <think>a < b</think>so <b>[THINK]x[/THINK]."
    assert parts_of(text, size=size) == [
        ("Hm ", False),
        ("<think>a < b</think>", True),
        ("so <b>", False),
        ("[THINK]x[/THINK]", True),
        (".", False),
    ]
    assert parts_of("a</think>b <thi", "<think>\n", size) == [("a</think>", True), ("b <thi", False)]
    assert parts_of("never closed </thin", "<think>", size) == [("never closed </thin", True)]
