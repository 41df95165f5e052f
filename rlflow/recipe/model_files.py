"""Whether the files of a model's directory can be read, as a copy or a download that was cut off leaves them. No torch.

Of weights the headers alone are read, so that a model of any size takes milliseconds. Those of safetensors are 8 bytes
of length, then JSON with each tensor's dtype, shape and place (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
_WITH_FIELDS = ("config.json", "generation_config.json", "tokenizer_config.json")
_NUMBERS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
"""Of a generation config, where it has them."""
LFS_POINTER = b"version https://git-lfs"


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a JSON file.

    Raises:
        ValueError: It cannot be read or is no JSON object, with the remedy.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON, it may be cut off: fetch it again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no fields: fetch it again")
    return fields


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, by their names, and how many bytes it has when it is whole.

    Raises:
        ValueError: It cannot be read or is no safetensors file, with the remedy.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
            length = struct.unpack("<Q", start[:8])[0]
            file.seek(8)
            header = json.loads(file.read(length)) if length <= path.stat().st_size else None
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}  # pyright: ignore
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, AttributeError, TypeError, struct.error) as error:
        what = "is a pointer of Git LFS to the weights" if start == LFS_POINTER else "is no safetensors file"
        remedy = "run `git lfs pull` there" if start == LFS_POINTER else "it may be cut off: fetch it again"
        raise ValueError(f"{path} {what}, {remedy}") from error
    return tensors, 8 + length + end


def files_problem(directory: Path) -> str | None:
    """What is wrong with the files of a model or an adapter, and what to do; None where all that are there are whole.

    Which files there must be is the user's business: an adapter has no config.json, an old model other weights.
    """
    try:
        for name in _WITH_FIELDS:
            if (directory / name).exists():
                fields = read_fields(directory / name)
                if name == "generation_config.json" and (problem := _generation_problem(fields)):
                    return f"{directory / name}: {problem}: correct it, or remove the file"
        if missing := _missing_shards(directory):
            return f"{directory} lacks {', '.join(missing)}, which its index names: fetch it again"
        for path in sorted(directory.glob("*.safetensors")):
            size, whole = path.stat().st_size, read_header(path)[1]
            if size < whole:
                return f"{path} is cut off: {size:,} of {whole:,} bytes: fetch it again"
    except ValueError as error:
        return str(error)
    return None


def _generation_problem(fields: dict[str, Any]) -> str | None:
    ends = fields.get("eos_token_id")
    if not all(type(end) is int for end in (ends if isinstance(ends, list) else [] if ends is None else [ends])):
        return f"eos_token_id is {json.dumps(ends)}, not a token's id or a list of them"
    for name in _NUMBERS:
        value = fields.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            return f"{name} is {json.dumps(value)}, not a number"
    return None


def _missing_shards(directory: Path) -> list[str]:
    """Weight files that the index names and that are not there.

    Raises:
        ValueError: The index cannot be read.
    """
    index = directory / INDEX
    if not index.exists():
        return []
    named = read_fields(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"{index} has no weight_map: fetch it again")
    return sorted(name for name in set(named.values()) if not (directory / name).exists())
