"""The policy's tokenizer: the model's own, or one made of single characters for a model made from scratch.

Neither importing this module nor loading a tokenizer from a directory imports torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlflow.data.chat import Chat
from rlflow.data.errors import DataError, nearest_beside
from rlflow.data.template import with_defaults
from rlflow.recipe.schema import ModelBlock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERATION_CONFIG = "generation_config.json"
_NEW_PAD = "<|pad|>"
_UNUSED = re.compile("pad|reserved|unused", flags=re.IGNORECASE)
"""In the name of a special token that no text and no template has."""
CHARACTER_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Contents end to end, an answer closed by eos."""


def load_tokenizer(model: ModelBlock) -> PreTrainedTokenizerFast:
    """The tokenizer of ``model.path``, or one of ``model.characters`` when there is no path.

    Raises:
        DataError: there is no tokenizer, it is not a fast one, ``chat_template`` names a file that is not there, or the
            template does not read one of ``chat_template_kwargs``.
    """
    if model.path is not None:
        tokenizer = _from_path(model)
    elif model.characters is not None:
        tokenizer = build_character_tokenizer(model.characters)
    else:
        raise DataError("the model has no tokenizer: give model.path, or model.characters for a new one.")
    if model.chat_template is not None:
        tokenizer.chat_template = _template(model.chat_template)
    tokenizer.chat_template = with_defaults(tokenizer.chat_template, model.chat_template_kwargs)
    return tokenizer


def build_character_tokenizer(characters: str, chat_template: str = CHARACTER_TEMPLATE) -> PreTrainedTokenizerFast:
    """A token a character, in the order given, behind ``<pad>`` (id 0) and ``<eos>`` (id 1).

    It saves to a directory that AutoTokenizer and vLLM load.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(character_vocabulary(characters)))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def character_vocabulary(characters: str) -> dict[str, int]:
    """Token -> id of the tokenizer that is made of them."""
    return {token: number for number, token in enumerate(dict.fromkeys(["<pad>", "<eos>", *characters]))}


def give_own_pad(tokenizer: PreTrainedTokenizerFast, model: ModelBlock) -> int:
    """Sees to it that no conversation ends in the token that fills up a batch, and returns that token's id.

    transformers' classifiers score the last token that is no padding: of a tokenizer that pads with eos, the one before
    an answer's end. Another special token that only such use is for takes its place, or a new one.
    """
    ends = stop_token_ids(tokenizer, model)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        unused = [
            token.content
            for id_, token in sorted(tokenizer.added_tokens_decoder.items())
            if token.special and id_ not in ends and _UNUSED.search(token.content)
        ]
        tokenizer.add_special_tokens({"pad_token": unused[0] if unused else _NEW_PAD})
    assert isinstance(tokenizer.pad_token_id, int)
    return tokenizer.pad_token_id


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """``save_pretrained`` in the words that version 4 of transformers knows, and version 5 still reads."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings["tokenizer_class"] == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    # Of where it was loaded from, not of what it is.
    for name in ("backend", "is_local", "local_files_only"):
        settings.pop(name, None)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def stop_token_ids(tokenizer: PreTrainedTokenizerFast, model: ModelBlock) -> tuple[int, ...]:
    """The tokens that end a completion: eos, the chat template's end of turn, and those of generation_config.json."""
    ids = set(Chat(tokenizer).end_ids)
    if model.path is not None:
        ids.update(_stop_tokens_in(generation_settings(model.path, model.revision)))
    return tuple(sorted(ids))


def write_stop_tokens(directory: Path, stop_token_ids: Iterable[int]) -> None:
    """Has what loads a model directory stop where the rollouts stopped: adds to ``eos_token_id`` in
    generation_config.json. A directory without that file, of a model that generates nothing, stays as it is."""
    path = directory / GENERATION_CONFIG
    if not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    ids = sorted({*stop_token_ids, *_stop_tokens_in(settings)})
    settings["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    # The mark of settings that only repeat config.json's.
    settings.pop("_from_model_config", None)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def generation_settings(path: str, revision: str | None) -> Mapping[str, Any]:
    """Of a directory or a hub id; empty where there are none."""
    directory = Path(os.path.expanduser(path))
    found = directory / GENERATION_CONFIG if directory.is_dir() else _from_hub(path, revision)
    return json.loads(found.read_text(encoding="utf-8")) if found is not None and found.is_file() else {}


@cache
def _from_hub(model_id: str, revision: str | None) -> Path | None:
    """A copy of the hub's generation config, asked for once a process: a run wants it at every step."""
    from transformers.utils.hub import cached_file

    found = cached_file(
        model_id,
        GENERATION_CONFIG,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _stop_tokens_in(settings: Mapping[str, Any]) -> list[int]:
    """Of a generation config."""
    stop = settings.get("eos_token_id")
    return stop if isinstance(stop, list) else [] if stop is None else [stop]


def _from_path(model: ModelBlock) -> PreTrainedTokenizerFast:
    assert model.path is not None
    directory = Path(os.path.expanduser(model.path))
    if model.path.startswith((".", "/", "~")) and not directory.is_dir():
        raise DataError(f"model.path: there is no directory {directory}.{nearest_beside(directory)}")
    try:
        if (directory / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast

            tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
            tokenizer.chat_template = _processor_template(directory) or tokenizer.chat_template
            return tokenizer
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            directory if directory.is_dir() else model.path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
        )
    except Exception as error:
        # Whatever a damaged file makes the tokenizers library raise, it is about that file.
        has_none = directory.is_dir() and not (directory / "tokenizer.json").is_file()
        said = "it has no tokenizer.json" if has_none else " ".join(str(error).split()).rstrip(". ")
        raise DataError(
            f"model.path: no tokenizer can be loaded from {model.path}: {said}. Give a directory with tokenizer.json, "
            "or a hub id that this machine can reach."
        ) from error
    if not tokenizer.is_fast:
        raise DataError(
            f"model.path: the tokenizer of {model.path} has no tokenizer.json and cannot be made into one; "
            "rlflow needs its character offsets. Convert it with transformers and save it to a directory."
        )
    return tokenizer


def _processor_template(directory: Path) -> str | None:
    """The template of a model's processor, where it is a file of its own that no tokenizer reads: one of pictures."""
    path = directory / "chat_template.json"
    if (directory / "chat_template.jinja").is_file() or not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))["chat_template"]


def _template(value: str) -> str:
    """A template is text with Jinja in it; anything else is the name of a file."""
    if "{" in value:
        return value
    path = Path(os.path.expanduser(value))
    if not path.is_file():
        raise DataError(f"model.chat_template: {value} is neither a Jinja template nor a file.{nearest_beside(path)}")
    return path.read_text(encoding="utf-8")
