"""What a vision-language model's directory has beside weights and tokenizer: how pictures are read."""

from __future__ import annotations

import shutil
from pathlib import Path

from rlflow.recipe import ModelBlock

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""As transformers and vLLM look for them."""


def copy_processor_files(model: ModelBlock, directory: Path) -> None:
    """Copies a model's files on pictures as they are; of a model without any, and of one on the hub whose processor was
    never loaded, none."""
    assert model.path is not None
    source = Path(model.path)
    for name in PROCESSOR_FILES:
        found = source / name if source.is_dir() else _cached(model.path, name, model.revision)
        if found is not None and found.is_file():
            shutil.copyfile(found, directory / name)


def _cached(path: str, name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, name, revision=revision)
    return Path(found) if isinstance(found, str) else None
