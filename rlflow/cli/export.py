"""`rlflow export`: what a run has trained, as a directory for others: a model, or an adapter merged into its base."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlflow.cli.common import parser_of
from rlflow.data.errors import DataError
from rlflow.recipe.adapter_files import WEIGHTS, base_of, is_adapter, read_config

SUMMARY = "copy a run's model, or merge its adapter into the base model"

_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt", "added_tokens.json")


def make_parser() -> argparse.ArgumentParser:
    parser = parser_of("export", SUMMARY, "rlflow export runs/gsm8k merged/gsm8k --merge")
    parser.add_argument("directory", metavar="DIRECTORY", type=Path, help="a run, or a model or adapter directory")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="a new directory")
    parser.add_argument("--merge", action="store_true", help="write a plain model: base plus adapter")
    parser.add_argument("--base", metavar="PATH", help="the base model, when it is no longer where the run found it")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of merged weights; the base's when left out. The sum is computed in float32",
    )
    return parser


def execute(arguments: argparse.Namespace) -> int:
    source = arguments.directory
    source = source / "final" if (source / "final").is_dir() else source
    if not arguments.merge:
        if not (is_adapter(source) or (source / "config.json").exists()):
            raise DataError(f"{source} holds no model and no adapter: name a finished run, or its final/")
        _publish(arguments.output, lambda directory: shutil.copytree(source, directory, dirs_exist_ok=True))
    else:
        if not is_adapter(source):
            raise DataError(f"{source} holds no adapter to merge: leave out --merge to copy a model")
        _publish(arguments.output, lambda directory: _merge(source, directory, arguments.base, arguments.dtype))
    print(arguments.output)
    return 0


def _publish(output: Path, write: Callable[[Path], Any]) -> None:
    """Has a directory written under another name first: what bears ``output`` is whole."""
    if output.exists():
        raise DataError(f"{output} exists already: name a new directory")
    temporary = output.with_name(f".{output.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    temporary.rename(output)


def _merge(source: Path, directory: Path, base: str | None, dtype: str | None) -> None:
    """
    Raises:
        DataError: The base model is not there, or not the one the adapter was trained on.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    try:
        path = base or base_of(read_config(source))
        if path is None:
            raise DataError(f"{source} does not say which model it is an adapter of: give --base")
        if not (source / WEIGHTS).exists():
            raise DataError(f"{source} has no {WEIGHTS}")
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        stored = model.dtype
        adapted = PeftModel.from_pretrained(model.float(), str(source))
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{source} cannot be merged: {error}\nGive the model it was trained on with --base") from error
    merged.to(stored if dtype is None else getattr(torch, dtype)).save_pretrained(directory)
    for pattern in _TOKENIZER:
        for file in source.glob(pattern):
            shutil.copy(file, directory)
