"""What each token of a rollout says, for people: with the tokenizer that a run's directory or its model has."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FILE = "tokenizer.json"
MOST_BYTES = 4
"""Of a character in UTF-8: so many tokens of a byte each complete one, or are none."""


def find_tokenizer(directory: Path, recipe: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer of a stage: of its final model, the one it was made with, or its model's; None without a fast one
    on this machine.

    Args:
        directory: The stage's.
        recipe: Its resolved recipe, as far as there is one.
    """
    for path in _places(directory, recipe):
        if path.is_file():
            return _load(path, path.stat().st_mtime_ns)
    return None


def token_texts(tokenizer: Tokenizer | None, token_ids: Sequence[int]) -> list[str]:
    """The text of every token; end to end they are the tokens' text, special tokens included.

    A token that ends within a character has the empty text: the one that completes it has all of it. Without a
    tokenizer, and for ids that it does not know, the text is the id.
    """
    if tokenizer is None:
        return [f"[{token}]" for token in token_ids]
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    texts: list[str] = []
    begun: list[int] = []
    for token in token_ids:
        if tokenizer.id_to_token(token) is None:
            texts.append(f"[{token}]")
            continue
        begun.append(token)
        try:
            text, is_lost = stream.step(tokenizer, token), len(begun) >= MOST_BYTES
        except Exception:  # the library raises no narrower class where bytes that are no UTF-8 change what came before
            text, is_lost = None, True
        if not text and is_lost:
            stream = DecodeStream(skip_special_tokens=False)
            text = tokenizer.decode(begun, skip_special_tokens=False)
        texts.append(text or "")
        begun = [] if text else begun
    if begun and texts:
        texts[-1] += tokenizer.decode(begun, skip_special_tokens=False)
    return texts


def _places(directory: Path, recipe: Mapping[str, Any]) -> Iterable[Path]:
    yield directory / "final" / _FILE
    yield directory / "initial_model" / _FILE
    model = recipe.get("model")
    name = model["path"] if isinstance(model, Mapping) and "path" in model else None
    if not isinstance(name, str):
        return
    if os.path.isdir(name):
        yield Path(name) / _FILE
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, _FILE)
    except HFValidationError:
        return
    if isinstance(cached, str):
        yield Path(cached)


@lru_cache(maxsize=8)
def _load(path: Path, changed: int) -> Tokenizer | None:
    """None where the file is none that this version of the library reads; ``changed`` makes a new file a new one."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception:  # the library has no narrower class: what it cannot read is data of others
        return None
