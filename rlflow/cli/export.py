"""`rlflow export`: what a run has trained, for others: a copy, merged, quantised, pushed to a hub."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlflow.checkpoint import share_weights
from rlflow.cli.common import parser_of
from rlflow.cli.hubs import hub_target, open_repository
from rlflow.cli.quantizing import add_quantize_arguments, check_quantize_arguments, quantize
from rlflow.data.errors import DataError
from rlflow.data.processor_files import PROCESSOR_FILES, copy_processor_files
from rlflow.driver.args_json import write_merged_args
from rlflow.driver.errors import RunError
from rlflow.model_source import ModelSource, find_model
from rlflow.recipe import AlgorithmBlock, ModelBlock
from rlflow.recipe.adapter_files import CONFIG, WEIGHTS, base_of, is_adapter, read_config, same_model
from rlflow.tracking.history import HistoryError
from rlflow.tracking.model_card import write_card

SUMMARY = "copy a run's model, merge its adapter into the base model, quantise it, push it to a hub"

_KEPT = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "generation_config.json",
)
"""Of an adapter's directory, what the merged model's has as well."""


def make_parser() -> argparse.ArgumentParser:
    example = (
        "rlflow export runs/gsm8k merged/gsm8k --merge\n"
        "  rlflow export runs/gsm8k models/gsm8k-12 --checkpoint 12\n"
        "  rlflow export runs/gsm8k small/gsm8k --quantize fp8\n"
        "  HF_TOKEN=... rlflow export runs/gsm8k --push hf:organisation/gsm8k --private"
    )
    parser = parser_of("export", SUMMARY, example)
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="a run, one of its checkpoints, or a model or adapter directory"
    )
    parser.add_argument(
        "output", metavar="OUTPUT", type=Path, nargs="?", help="a new directory; may be left out with --push"
    )
    parser.add_argument("--adapters", metavar="DIR", help="NAME in ms-swift's words: then the first argument is OUTPUT")
    parser.add_argument(
        "--checkpoint", metavar="N", help="of a run: best, latest or a step, in the place of its final/"
    )
    parser.add_argument("--merge", action="store_true", help="write a plain model: base plus adapter")
    parser.add_argument("--base", metavar="PATH", help="the base model, when it is no longer where the run found it")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the base model's files bring")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of merged weights; the base's when left out. The sum is computed in float32. With --quantize: of what is "
        "not quantised, bfloat16 where the model is in float32",
    )
    add_quantize_arguments(parser)
    parser.add_argument(
        "--push",
        metavar="HUB:ID",
        type=hub_target,
        help="upload to hf:organisation/name (token: HF_TOKEN) or modelscope:organisation/name "
        "(MODELSCOPE_API_TOKEN; needs modelscope-hub); a repository that is not there is made",
    )
    parser.add_argument("--private", action="store_true", help="with --push: nobody else sees the repository")
    parser.add_argument("--revision", metavar="BRANCH", help="with --push: the branch, the hub's default when left out")
    return parser


def execute(arguments: argparse.Namespace) -> int:
    """Checks everything first, then opens the repository: a token that is refused costs no merge."""
    _name_the_source(arguments)
    _check_arguments(arguments)
    source = _source(arguments)
    directory, output, target = Path(source.path), arguments.output, arguments.push
    repository = None
    if target is not None:
        repository = open_repository(target, directory, private=arguments.private, revision=arguments.revision)
    if arguments.quantize is not None:
        quantize(source, arguments, _merge)
    elif arguments.merge:
        _publish(output, lambda written: _merge(source, written, arguments))
    elif output is not None and directory != output:
        _publish(output, lambda written: shutil.copytree(directory, written, dirs_exist_ok=True))
    if output is not None:
        print(output)
    if repository is None:
        return 0
    _warn_of_local_base(output or directory)
    try:
        print(repository.upload(output or directory))
    except (DataError, RunError) as error:
        again = shlex.join(["rlflow", "export", str(output or directory), "--push", str(target)])
        raise type(error)(f"{error}\n`{again}` sends the same files again") from error
    return 0


def _name_the_source(arguments: argparse.Namespace) -> None:
    """Has ``name`` and ``output`` be what they are where --adapters names the source."""
    if arguments.adapters is None:
        if arguments.name is None:
            raise DataError("name what to export: a run, one of its checkpoints, or a model or adapter directory")
        return
    if arguments.output is not None:
        raise DataError(f"--adapters {arguments.adapters} and {arguments.name} are both to be exported: leave one out")
    arguments.output = None if arguments.name is None else Path(arguments.name)
    arguments.name = arguments.adapters


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Those that do not go together, before a checkpoint is written as a model for nothing."""
    output = arguments.output
    check_quantize_arguments(arguments)
    if output is None and (arguments.merge or arguments.quantize or arguments.push is None):
        what = " for the quantised model" if arguments.quantize else " for the merged model"
        raise DataError(
            "name OUTPUT, a new directory" + (what if arguments.merge or arguments.quantize else ", or --push")
        )
    if output is not None and output.exists():
        raise DataError(f"{output} exists already: name a new directory")
    if arguments.push is None and (arguments.private or arguments.revision):
        raise DataError("--private and --revision are of --push hf:organisation/name: add it")


def _source(arguments: argparse.Namespace) -> ModelSource:
    """What to export.

    Raises:
        DataError: There is no such thing, or nothing to merge.
    """
    # What is only copied is written where it shall be at once.
    is_changed = arguments.merge or arguments.quantize is not None
    output = None if is_changed or arguments.push is not None else arguments.output
    source = find_model(arguments.name, checkpoint=arguments.checkpoint, output=output)
    if source.directory is None:
        raise DataError(f"{arguments.name} is no directory here: name a run, or a model's or an adapter's directory")
    if arguments.merge and not source.is_adapter:
        raise DataError(f"{source.directory} holds no adapter to merge: leave out --merge to copy a model")
    if source.is_adapter and is_changed:
        _check_merge(source.directory, source.base, arguments.base)
    return source


def _base_of(adapter: Path) -> str | None:
    """
    Raises:
        DataError: The adapter's config cannot be read.
    """
    try:
        return base_of(read_config(adapter))
    except ValueError as error:
        raise DataError(str(error)) from error


def _check_merge(source: Path, base: str | None, given: str | None) -> None:
    """As far as names tell.

    Raises:
        DataError: There is nothing to merge, or it is to be merged into another model than it was trained on.
    """
    if base is None and given is None:
        raise DataError(f"{source} does not say which model it is an adapter of: give --base")
    if base is not None and given is not None and not same_model(base, given):
        raise DataError(
            f"{source} is an adapter of {base}, and --base is {given}. Give the model it was trained on, or, where "
            f"they are the same, correct base_model_name_or_path in {CONFIG}"
        )
    if not (source / WEIGHTS).exists():
        raise DataError(f"{source} has no {WEIGHTS}: fetch it, or save the adapter as safetensors")


def _warn_of_local_base(directory: Path) -> None:
    """An adapter whose base is a directory of this machine is of little use to others."""
    base = _base_of(directory) if is_adapter(directory) else None
    if base is not None and Path(base).is_dir():
        print(
            f"note: {directory} is an adapter of {base}, which others do not have: push the merged model (--merge), or "
            "name the base's hub id in adapter_config.json",
            file=sys.stderr,
        )


def _publish(output: Path, write: Callable[[Path], Any]) -> None:
    """Has a directory written under another name first: what bears ``output`` is whole.

    Raises:
        RunError: It cannot be written.
    """
    temporary = output.with_name(f".{output.name}.writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        share_weights(temporary)
        temporary.rename(output)
    except OSError as error:
        # Of a copy of several files shutil says what became of each.
        said = error.args[0][0][-1] if isinstance(error, shutil.Error) else error
        raise RunError(f"{output} cannot be written: {said}; name a directory with room where you may write") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _merge(model_source: ModelSource, directory: Path, arguments: argparse.Namespace) -> None:
    """
    Raises:
        DataError: The base model is not there, or not the one the adapter was trained on.
    """
    import torch

    from rlflow.actors.model_files import save_model
    from rlflow.actors.tied_heads import untie_what_is_adapted

    source = model_source.directory
    assert source is not None
    config, options = read_config(source), {"trust_remote_code": arguments.trust_remote_code}
    path = arguments.base or model_source.base
    assert path is not None
    if arguments.base is None:
        options["revision"] = config.get("revision")
    try:
        model, stored = _with_adapter(source, path, _of_sequences(model_source), **options)
        untie_what_is_adapted(model.get_base_model())
        merged = model.merge_and_unload(safe_merge=True)
    except (OSError, ValueError, RuntimeError) as error:
        remedy = "Give the model it was trained on with --base"
        raise DataError(f"{source} cannot be merged into {path}: {error}\n{remedy}") from error
    save_model(merged.to(stored if arguments.dtype is None else getattr(torch, arguments.dtype)), directory)
    base = ModelBlock(path=path, revision=options.get("revision"))
    copy_processor_files(base, directory)
    if not any(source.glob("tokenizer*")):
        _write_tokenizer_of(base, directory)
    for pattern in (*_KEPT, *PROCESSOR_FILES):
        for file in source.glob(pattern):
            shutil.copy(file, directory)
    if (algorithm := _of_sequences(model_source)) is not None:
        from rlflow.actors.sequence_files import write_readers
        from rlflow.data.tokenizer import load_tokenizer

        write_readers(directory, load_tokenizer(ModelBlock(path=str(source))), ModelBlock(path=path), algorithm)
    write_merged_args(source, directory)
    if (run := model_source.run) is None:
        return
    try:
        write_card(directory, run, model_source.step)
    except HistoryError as error:
        print(f"note: the merged model has no model card: {error}", file=sys.stderr)


def _write_tokenizer_of(base: ModelBlock, directory: Path) -> None:
    """Writes the tokenizer of an adapter's base, for an adapter that has none beside it, as PEFT saves them."""
    from rlflow.data.tokenizer import load_tokenizer, save_tokenizer

    assert base.path is not None
    if not Path(base.path).is_dir():
        save_tokenizer(load_tokenizer(base), directory)
        return
    for pattern in _KEPT:
        for file in Path(base.path).glob(pattern):
            shutil.copy(file, directory)


def _of_sequences(source: ModelSource) -> AlgorithmBlock | None:
    """The algorithm of a model that says something of whole sequences, whose head is no language model's."""
    algorithm = None if source.recipe is None else source.recipe.algorithm
    return None if algorithm is None or algorithm.learning.head == "token" else algorithm


def _with_adapter(source: Path, base: str, algorithm: AlgorithmBlock | None, **options: Any) -> tuple[Any, Any]:
    """The base model in float32 with the adapter, and the dtype that the base is stored in.

    Args:
        algorithm: Of a model of sequences.

    Raises:
        ValueError: The adapter has weights for what the base has not, or lacks some; PEFT itself only warns.
    """
    import warnings

    from peft import PeftModel

    from rlflow.actors.pretrained import load_language_model

    if algorithm is None:
        model = load_language_model(base, dtype="auto", **options)
    else:
        from rlflow.actors.sequence_files import pad_model
        from rlflow.actors.train_engines.sequence_model import read_sequence_model

        block = ModelBlock(path=base, **options)
        model = read_sequence_model(block, algorithm, seed=0)
        pad_model(model, block)
    stored = model.dtype
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        adapted = PeftModel.from_pretrained(model.float(), str(source))
    # The same weights once more: this way PEFT says which found no place.
    filled = adapted.load_adapter(str(source), "default")
    if strange := sorted({*filled.missing_keys, *filled.unexpected_keys}):
        where = "the adapter lacks" if strange[0] in filled.missing_keys else "the model has no place for"
        more = f" (and {len(strange) - 1} more)" if len(strange) > 1 else ""
        raise ValueError(f"{where} {strange[0].removeprefix('base_model.model.')}{more}")
    return adapted, stored
