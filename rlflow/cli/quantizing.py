"""The part of `rlflow export` that quantises: its arguments, what it refuses, and what it prints."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from rlflow.data.errors import DataError
from rlflow.driver.errors import RunError
from rlflow.model_source import ModelSource
from rlflow.quantization.schemes import SCHEMES

Merge = Callable[[ModelSource, Path, argparse.Namespace], None]


def add_quantize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantize",
        choices=list(SCHEMES),
        help="in 8 or 4 bits; an adapter is merged first. The loss on held-out text is printed and in the card",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help="with --quantize: rows like those that it shall answer; awq and gptq are fitted to them, and what is held "
        "out of them measures the loss. Of a run, its own rollouts when left out",
    )
    parser.add_argument(
        "--held-out",
        metavar="FILE",
        type=Path,
        help="with --quantize: rows that the loss is measured on, in place of the run's evaluation data",
    )


def check_quantize_arguments(arguments: argparse.Namespace) -> None:
    """
    Raises:
        DataError: One is given without another that it needs.
    """
    if arguments.quantize is None and (arguments.calibration is not None or arguments.held_out is not None):
        raise DataError("--calibration and --held-out are of --quantize: add it")


def quantize(source: ModelSource, arguments: argparse.Namespace, merge: Merge) -> None:
    """Writes the quantised model, and says what it lost.

    Args:
        merge: Writes an adapter with its base as a plain model.

    Raises:
        DataError: It cannot be quantised, or not so.
        RunError: It cannot be written.
    """
    from rlflow.quantization.card import error_of
    from rlflow.quantization.exporting import Request, check_request, export_quantized
    from rlflow.serving.models import refuse_reward_model

    refuse_reward_model(source)
    output, directory = arguments.output, source.directory
    assert directory is not None
    scheme = SCHEMES[arguments.quantize]
    if scheme.preset is not None:
        # The libraries' bars are drawn over ours; auto-round has the only one.
        os.environ.setdefault("TQDM_DISABLE", "1")
    request = Request(scheme, arguments.dtype, arguments.calibration, arguments.held_out, arguments.trust_remote_code)
    base = Path(str(arguments.base or source.base)) if source.is_adapter else directory
    if base.is_dir():
        check_request(base, request)
    merged = output.with_name(f".{output.name}.merged")
    try:
        if source.is_adapter:
            shutil.rmtree(merged, ignore_errors=True)
            merged.mkdir(parents=True)
            merge(source, merged, arguments)
        outcome = export_quantized(merged if source.is_adapter else directory, output, source, request, _tell)
    except OSError as error:
        raise RunError(
            f"{output} cannot be written: {error}; name a directory with room where you may write"
        ) from error
    finally:
        shutil.rmtree(merged, ignore_errors=True)
    sizes = f"{outcome.bytes_before / 1e6:,.1f} MB -> {outcome.bytes_after / 1e6:,.1f} MB"
    _tell(f"{outcome.stored}; {sizes} in {outcome.seconds:.0f} s")
    loss, texts = outcome.loss, outcome.measured_on
    if loss is None or texts is None:
        _tell("note: the loss of quality is not measured: --held-out FILE with rows to measure it on")
        return
    _tell(
        f"{loss.mean_before:.4f} -> {loss.mean_after:.4f} nats a token, {loss.mean:+.4f}{error_of(loss)}, on "
        f"{loss.tokens:,} tokens of {texts.origin}"
    )
    if outcome.warning is not None:
        _tell(f"warning: {outcome.warning}")


def _tell(text: str) -> None:
    print(text, file=sys.stderr)
