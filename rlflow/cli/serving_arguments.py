"""What `rlflow infer` and `rlflow serve` have in common: which model, how it is held, how answers are drawn."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from rlflow.data.errors import DataError, nearest

if TYPE_CHECKING:
    from rlflow.model_source import ModelSource
    from rlflow.recipe import RewardBlock
    from rlflow.serving.models import ServedModel, Settings


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a run, a checkpoint of one, a model's or adapter's directory, or a hub id"
    )
    parser.add_argument(
        "--checkpoint", metavar="WHICH", help="of a run: best, latest or a step; its final model when left out"
    )
    parser.add_argument(
        "--engine",
        choices=["auto", "torch", "vllm"],
        default="auto",
        help="auto: vllm where it is installed and there is a GPU, torch elsewhere",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the weights; auto: what the model's config names",
    )
    parser.add_argument(
        "--max-model-len",
        metavar="TOKENS",
        type=positive,
        help="longest prompt and answer together; the model's own when left out",
    )
    parser.add_argument(
        "--max-num-seqs", metavar="N", type=positive, default=64, help="answers that are written at a time (64)"
    )
    parser.add_argument(
        "--max-pixels",
        metavar="PIXELS",
        type=positive,
        help="width times height: larger pictures are scaled down; as the run's recipe says when left out",
    )
    parser.add_argument("--chat-template", metavar="FILE", help="a Jinja template in the place of the tokenizer's")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the model's files bring")
    parser.add_argument(
        "--tensor-parallel-size", metavar="N", type=positive, default=1, help="vllm: GPUs the model is split over"
    )
    parser.add_argument(
        "--gpu-memory-fraction", metavar="SHARE", type=float, default=0.85, help="vllm: of a GPU's memory (0.85)"
    )
    parser.add_argument(
        "--kv-cache-gib", metavar="GIB", type=float, default=2.0, help="vllm on a CPU: key-value cache (2)"
    )


def settings_of(arguments: argparse.Namespace) -> Settings:
    from rlflow.serving.models import Settings

    return Settings(
        dtype=arguments.dtype,
        max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.max_num_seqs,
        max_pixels=arguments.max_pixels,
        chat_template=arguments.chat_template,
        trust_remote_code=arguments.trust_remote_code,
        tensor_parallel_size=arguments.tensor_parallel_size,
        gpu_memory_fraction=arguments.gpu_memory_fraction,
        kv_cache_gib=arguments.kv_cache_gib,
    )


def find_named_model(arguments: argparse.Namespace) -> ModelSource:
    """
    Raises:
        DataError: There is no such model.
    """
    from rlflow.model_source import find_model

    with quiet_libraries():
        return find_model(arguments.model, checkpoint=arguments.checkpoint)


def read_named_model(source: ModelSource, settings: Settings) -> ServedModel:
    """
    Raises:
        DataError: It cannot be used.
    """
    from rlflow.serving.models import read_model

    with quiet_libraries():
        return read_model(source, settings)


def read_models(
    model: ServedModel, adapters: Mapping[str, str], settings: Settings
) -> tuple[dict[str, ServedModel], dict[str, Path]]:
    """The model and adapters beside it, by their names, and the directories of those adapters.

    Args:
        adapters: Names -> what the user calls them.

    Raises:
        DataError: One is none, or of another model, or two models would bear one name.
    """
    from rlflow.model_source import find_model
    from rlflow.serving.models import models_by_name

    with quiet_libraries():
        sources = {name: find_model(path) for name, path in adapters.items()}
        models = models_by_name(model, sources, settings)
    return models, {name: source.directory for name, source in sources.items() if source.directory is not None}


@contextmanager
def loading(model: ServedModel, engine: str) -> Iterator[None]:
    """Within, the weights are being loaded: it is said, on stderr."""
    print(f"loading {model.source.path} ({engine}, {model.base.dtype})", file=sys.stderr, flush=True)
    with quiet_libraries():
        yield


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within, transformers shows no bars and no warnings, and what libraries print goes to stderr: standard output is
    for answers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # PEFT imports it with any adapter, and on a CPU it asks for a kernel that 4-bit weights alone need.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with redirect_stdout(sys.stderr):
        yield


def reward_named(word: str, option: str) -> RewardBlock:
    """A reward of rlflow's by its name, or a function of the user's.

    Raises:
        DataError: There is no such reward, or it is named otherwise than ``file.py:function``.
    """
    from pydantic import ValidationError

    from rlflow.recipe import RewardBlock
    from rlflow.rewards import REWARDS

    if ":" not in word and word not in REWARDS:
        raise DataError(f"{option} {word}: there is none; file.py:function names your own.{nearest(word, REWARDS)}")
    try:
        return RewardBlock.model_validate({"plugin" if ":" in word else "name": word})
    except ValidationError as error:
        raise DataError(f"{option} {word}: is not of the form file.py:function") from error


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value
