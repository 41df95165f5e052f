"""A model's directory to a quantised one: weights, tokenizer, generation config, args.json, a card that says the loss.

directory --texts--> likelihood before --> weights in the scheme --> likelihood after --> card, manifest, name
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rlflow import checkpoint
from rlflow.data.errors import DataError
from rlflow.data.tokenizer import load_tokenizer
from rlflow.driver.args_json import ARGS, write_merged_args
from rlflow.driver.errors import RunError
from rlflow.model_source import ModelSource
from rlflow.progress import ProgressBar
from rlflow.quantization import rounding
from rlflow.quantization.card import Outcome, write_section
from rlflow.quantization.compressed import quantize_directory, weight_files
from rlflow.quantization.likelihood import Loss, by_transformers, by_vllm
from rlflow.quantization.linear_layers import read_config
from rlflow.quantization.schemes import Scheme
from rlflow.quantization.texts import Texts, choose_texts
from rlflow.recipe import ModelBlock

_NOT_COPIED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "config.json", ARGS)
"""Weights, and what is written anew."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asks for."""

    scheme: Scheme
    dtype: str | None = None
    """Of what is not quantised; the model's own, bfloat16 for one in float32. awq and gptq have float16."""
    calibration: Path | None = None
    held_out: Path | None = None
    trust_remote_code: bool = False


def check_request(model: Path, request: Request) -> None:
    """What can be known before anything is loaded or merged.

    Raises:
        DataError: The model cannot be quantised, or a package is missing.
    """
    if {"vision_config", "audio_config"} & read_config(model).keys():
        raise DataError(
            f"{model} has a tower beside its language model, and schemes are of language models: export it without "
            "--quantize and have vLLM quantise it as it loads (quantization='fp8')"
        )
    if request.scheme.preset is None:
        rounding.check(request.dtype)
    elif find_spec("compressed_tensors") is None:
        raise DataError(
            f"--quantize {request.scheme.name} needs compressed-tensors, which comes with vLLM: pip install "
            "'rlflow[quantize]'"
        )


def export_quantized(
    plain: Path, output: Path, source: ModelSource, request: Request, tell: Callable[[str], None]
) -> Outcome:
    """Writes ``output``, whole or not at all.

    Args:
        plain: A Hugging Face directory: the source's, or what its adapter was merged into.
        source: What the user named, for its run's texts.

    Raises:
        DataError: The model cannot be quantised so, or there is no text to calibrate on.
        RunError: The directory cannot be written, or vLLM cannot measure.
    """
    check_request(plain, request)
    files = weight_files(plain)
    tokenizer = load_tokenizer(ModelBlock(path=str(plain), trust_remote_code=request.trust_remote_code))
    texts = choose_texts(source, request.scheme, tokenizer, request.calibration, request.held_out, tell)
    fitted, measured = texts
    before = _likelihoods(plain, measured, request, "measuring the model as it is", tell)
    outcomes = []

    def write(directory: Path) -> None:
        ignored = shutil.ignore_patterns(*_NOT_COPIED, checkpoint.FINAL_MANIFEST)
        for file in plain.iterdir():
            if file.is_file() and not ignored(str(plain), [file.name]):
                shutil.copy(file, directory)
        write_merged_args(plain, directory)
        began = time.monotonic()
        group_size = _round(plain, directory, request, fitted)
        seconds = time.monotonic() - began
        after = _likelihoods(directory, measured, request, "measuring the quantised model", tell)
        loss = None
        if measured is not None:
            loss = Loss(before, after, [len(ids) - 1 for ids in measured.token_ids])
        was, now = (sum(map(os.path.getsize, of)) for of in (files, weight_files(directory)))
        outcomes.append(Outcome(request.scheme, group_size, fitted, measured, loss, was, now, seconds))
        write_section(directory, output.name, outcomes[0])

    try:
        checkpoint.publish_directory(output, {"quantized": request.scheme.name}, write, checkpoint.FINAL_MANIFEST)
    except checkpoint.DiskError as error:
        raise RunError(f"{error}; name a directory with room where you may write") from error
    return outcomes[0]


def _round(plain: Path, directory: Path, request: Request, fitted: Texts | None) -> int | None:
    options = {"trust_remote_code": request.trust_remote_code}
    if request.scheme.preset is None:
        assert fitted is not None
        return rounding.round_directory(plain, directory, request.scheme, fitted.token_ids, **options)
    with ProgressBar("quantising", "tensors") as bar:
        return quantize_directory(plain, directory, request.scheme, dtype=request.dtype, progress=bar.update, **options)


def _likelihoods(
    directory: Path, texts: Texts | None, request: Request, what: str, tell: Callable[[str], None]
) -> list[float]:
    if texts is None:
        return []
    options = {"trust_remote_code": request.trust_remote_code}
    if request.scheme.preset is None:
        tell(f"{what}: by vLLM, in a process of its own")
        return by_vllm(directory, texts.token_ids, **options)
    with ProgressBar(what, "texts") as bar:
        return by_transformers(directory, texts.token_ids, bar.update, **options)
