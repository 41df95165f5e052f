"""Weights in 4 bits that are fitted to texts, in the file formats of AWQ and GPTQ, by auto-round."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlflow.data.errors import DataError
from rlflow.quantization.compressed import require_finite, shapes_in, weight_files
from rlflow.quantization.linear_layers import find_layers, read_config
from rlflow.quantization.schemes import Scheme, group_size_for

STEPS = 200
"""Of SignRound, a decoder layer: what auto-round takes when it is told nothing."""
DTYPE = "float16"
"""Of scales in both formats, and so of all that is not quantised."""
ROW_TOKENS = 512
"""Texts are joined and cut into rows of one length, as GPTQ's authors do (arXiv 2210.17323, section 4)."""


def check(dtype: str | None) -> None:
    """
    Raises:
        DataError: A package is missing, or another dtype is asked for.
    """
    if dtype not in (None, DTYPE):
        raise DataError(f"--dtype {dtype}: --quantize awq and gptq have their scales in {DTYPE}: leave it out")
    if find_spec("auto_round") is None:
        raise DataError(
            "--quantize awq and gptq need auto-round: pip install 'rlflow[quantize]'. --quantize w4a16 has 4 bits "
            "without it"
        )
    if find_spec("vllm") is None:
        raise DataError(
            "--quantize awq and gptq are measured by vLLM, which reads their formats, and it is not installed: install "
            "rlflow[gpu] or rlflow[cpu], or take --quantize w4a16"
        )


def rows_of(texts: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """The texts one behind the other, cut into rows of ``length`` tokens; one shorter row where they have no more."""
    stream = [token for ids in texts for token in ids]
    whole = len(stream) // length
    return [stream[row * length : (row + 1) * length] for row in range(whole)] or [stream]


def round_directory(
    source: Path,
    directory: Path,
    scheme: Scheme,
    texts: Sequence[Sequence[int]],
    *,
    trust_remote_code: bool,
) -> int:
    """Writes the weights of ``source`` and its config.json into a directory that exists.

    Args:
        texts: Token ids that the rounding is fitted to.

    Returns:
        The group size.

    Raises:
        DataError: The model cannot be quantised.
        OSError: The directory cannot be written.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlflow.actors.pretrained import load_whole

    config = read_config(source)
    layers = find_layers(source, shapes_in(weight_files(source)), scheme, trust_remote_code=trust_remote_code)
    group_size = group_size_for(layers.widths)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    model = load_whole(AutoModelForCausalLM, str(source), dtype=torch.float16, **options)
    for name, weight in model.named_parameters():
        require_finite(name, weight, torch.float16)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    rows = torch.tensor(rows_of(texts, ROW_TOKENS))
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows]
    os.environ.setdefault("AR_LOG_LEVEL", "WARNING")
    rounded = import_module("auto_round").AutoRound(
        model,
        tokenizer,
        bits=4,
        group_size=group_size,
        sym=scheme.name == "gptq",
        dataset=batches,
        iters=STEPS,
        nsamples=len(batches),
        seqlen=rows.shape[1],
        batch_size=min(8, len(batches)),
        device_map="cuda" if torch.cuda.is_available() else "cpu",
        enable_torch_compile=False,
    )
    inside = directory / ".rounded"
    rounded.quantize_and_save(str(inside), format=scheme.file_format)
    _take_files(inside, directory, config)
    return group_size


def _take_files(inside: Path, directory: Path, config: dict[str, Any]) -> None:
    """Takes weights from where auto-round wrote them, and adds what it says of them to the model's own config.json:
    the names that its own lacks are those that transformers 4 reads."""
    from safetensors.torch import load_file, save_file

    [written] = inside.rglob("config.json")
    for file in written.parent.glob("*.safetensors"):
        # What is not quantised is in float32 there.
        tensors = {
            name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(file).items()
        }
        save_file(tensors, directory / file.name, metadata={"format": "pt"})
    for index in written.parent.glob("*.safetensors.index.json"):
        index.rename(directory / index.name)
    said = json.loads(written.read_text(encoding="utf-8"))
    config |= {"quantization_config": said["quantization_config"], "dtype": DTYPE, "torch_dtype": DTYPE}
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.rmtree(inside)
