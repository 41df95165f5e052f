"""Which ids of a model's vocabulary are tokens, and whether two tokenizers mean the same by an id.

Embeddings are often padded (Qwen2.5 has 151,936 rows and 151,665 tokens): ids beyond the tokenizer stand for nothing,
and yet softmax gives them a probability. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlflow.data.tokenizer import character_vocabulary, load_tokenizer
from rlflow.recipe import ModelBlock
from rlflow.recipe.hub_files import hub_text
from rlflow.recipe.local_paths import is_hub_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Vocabulary = Mapping[str, int]
"""Token -> id, added tokens included."""

OTHER_MODALITIES = ("<image_soft_token>",)
"""Tokens for which a text-only model has no row, though it shares a tokenizer with models that see (Gemma 3)."""
_TOKENIZER = "tokenizer.json"
_OTHER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tiktoken.model")


def read_vocabulary(model: ModelBlock) -> Vocabulary | None:
    """The vocabulary of a model in a directory, in the hub's cache or on the hub, or of a new one's characters.

    Returns:
        None where there are no tokenizer files, or the hub cannot be reached.

    Raises:
        ValueError: The files are damaged.
    """
    if model.path is None:
        return character_vocabulary(model.characters or "")
    text = _tokenizer_text(model.path, model.revision)
    if text is not None:
        if (vocabulary := _vocabulary_in(text)) is not None:
            return vocabulary
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
        except Exception as error:
            # Whatever a damaged file makes the tokenizers library raise, it is about that file.
            raise ValueError(f"{model.path}/{_TOKENIZER} cannot be read: {error}: fetch it again") from error
    if not any((Path(model.path) / name).is_file() for name in _OTHER_FILES):
        return None
    return load_tokenizer(model).get_vocab()


def difference(policy: Vocabulary, other: Vocabulary) -> str | None:
    """What keeps ``other`` from meaning the same by every id of ``policy``, as a sentence; None where nothing does.

    Tokens that only ``other`` has do no harm: the policy never writes them.
    """
    moved = {token: id_ for token, id_ in policy.items() if other.get(token) != id_}
    if not moved:
        return None
    token, id_ = min(moved.items(), key=lambda pair: pair[1])
    there = f"{other[token]} there" if token in other else "missing there"
    return f"{len(moved)} of its {len(policy)} tokens have another id or none: {token!r} is {id_} here and {there}"


def tokens_without_row(vocabulary: Vocabulary, num_rows: int) -> list[str]:
    """The tokens for which an embedding of ``num_rows`` has no row, by their ids."""
    beyond = {token: id_ for token, id_ in vocabulary.items() if id_ >= num_rows and token not in OTHER_MODALITIES}
    return sorted(beyond, key=lambda token: beyond[token])


@lru_cache(maxsize=1)
def token_table(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """bool [V], V the largest id of the tokenizer and one: which ids are tokens."""
    ids = np.fromiter(tokenizer.get_vocab().values(), dtype=np.int64)
    is_token = np.zeros(ids.max() + 1, dtype=bool)
    is_token[ids] = True
    return is_token


def placeholder_ids(config: Any) -> list[int]:
    """The ids of a transformers config that stand for pictures, video and sound: a model reads them, and one that wrote
    them would ask for features that nobody has."""
    fields: Mapping[str, Any] = config.to_dict()
    names = [f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")]
    given = {fields[name] for name in names if isinstance(fields.get(name), int)}
    return sorted(id_ for id_ in given if 0 <= id_ < config.get_text_config().vocab_size)


def ids_without_token(tokenizer: PreTrainedTokenizerFast, num_rows: int) -> np.ndarray:
    """int64: the ids below ``num_rows``, a model's vocabulary, that are no token of its tokenizer; ascending."""
    ids = np.fromiter(tokenizer.get_vocab().values(), dtype=np.int64)
    is_token = np.zeros(num_rows, dtype=bool)
    is_token[ids[ids < num_rows]] = True
    return np.flatnonzero(~is_token)


def _vocabulary_in(text: str) -> Vocabulary | None:
    """That of a tokenizer.json, without building the tokenizer, which takes three times as long; None where only
    building it tells."""
    try:
        content = json.loads(text)
        vocabulary: dict[str, int] = dict(content["model"]["vocab"].items())
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    if any(vocabulary.get(token, id_) != id_ for token, id_ in added.items()):
        return None
    return vocabulary | added


def _tokenizer_text(path: str, revision: str | None) -> str | None:
    """None where there is no tokenizer.json, or the hub cannot be reached."""
    try:
        if Path(path).is_dir() or not is_hub_id(path):
            return (Path(path) / _TOKENIZER).read_text(encoding="utf-8", errors="replace")
        return hub_text(path, _TOKENIZER, revision)
    except OSError:
        return None
