"""A byte-level BPE tokenizer with the ChatML template, and helpers that write tiny data files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlflow.data.errors import Rows
from rlflow.data.records import load_records
from rlflow.recipe.data_blocks import DataBlock, SourceBlock

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = ["user assistant system", "What is two plus two? Two plus two is four, and one more is five."] * 20


@pytest.fixture(scope="session")
def trained_tokenizer() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@pytest.fixture
def tokenizer(trained_tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """ids: <|endoftext|> 0, <|im_start|> 1, <|im_end|> 2 (eos), then bytes and merges."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained_tokenizer.to_str()),
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """write_jsonl(rows, name="rows.jsonl") -> path."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def make_data(write_jsonl: Callable[..., Path]) -> Callable[..., DataBlock]:
    """make_data(rows, {source fields}, **data fields) -> a DataBlock that reads these rows from rows.jsonl."""

    def make(rows: list[Any], source: dict[str, Any] | None = None, **fields: Any) -> DataBlock:
        return DataBlock(train=SourceBlock(path=str(write_jsonl(rows)), **(source or {})), **fields)

    return make


@pytest.fixture
def read() -> Callable[..., Rows[Any]]:
    """read(path, seed=0, judged=False, **source fields) -> the loaded records of one source."""

    def read(path: Path | None, seed: int = 0, judged: bool = False, **fields: Any) -> Rows[Any]:
        source = SourceBlock(path=None if path is None else str(path), **fields)
        return load_records(source, seed, lambda record: record, judged=judged)

    return read
