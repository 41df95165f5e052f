"""Memory of one training step with a vocabulary of 49k at 8k tokens: whole logits, and rlflow's chunks. Linux only.

    python benchmarks/logits_memory.py models/SmolLM2-135M-Instruct

Both compute the same mean cross-entropy and its gradient, with gradient checkpointing, in a process of their own, with
the first four layers of the model: logits are what is compared. What counts is the largest resident memory beyond what
was resident before the step: model loaded, gradients allocated.
benchmarks/memory.md has the results.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from rlflow.actors.host_memory import allocator_environment
from rlflow.recipe import ModelBlock

SEQUENCES, LENGTH, LAYERS = 16, 512, 4
WAYS = {"whole": "transformers: model(input_ids, labels=labels).loss", "chunks": "rlflow: TokenModel"}


def whole(model_dir: str, token_ids: np.ndarray) -> tuple[Any, Any]:
    """transformers' own loss. Returns the model and what makes its loss."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlflow.actors.train_engines.token_model import recompute_layers

    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa")
    recompute_layers(model)
    ids = torch.from_numpy(token_ids).long()
    return model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss


def chunks(model_dir: str, token_ids: np.ndarray) -> tuple[Any, Any]:
    """rlflow's. Returns the model and what makes its loss."""
    import torch

    from rlflow.actors.train_engines.packed_attention import PackedLayout
    from rlflow.actors.train_engines.token_model import load_token_model

    cpu = torch.device("cpu")
    model = load_token_model(ModelBlock(path=model_dir), seed=0, device=cpu, checkpointing=True)
    sequences, length = token_ids.shape
    ids, positions = torch.from_numpy(token_ids).flatten(), torch.arange(length).repeat(sequences)
    layout = PackedLayout(np.arange(0, sequences * length + 1, length), cpu)
    wanted = positions > 0
    return model, lambda: -model(ids, positions, layout, wanted).logprobs.sum() / wanted.sum()


def measure(way: str, model_dir: str) -> str:
    """A row of the table."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    token_ids = np.random.default_rng(0).integers(5, 1000, (SEQUENCES, LENGTH)).astype(np.int32)
    model, loss_of = {"whole": whole, "chunks": chunks}[way](model_dir, token_ids)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter).add_(0.0)
    # https://docs.kernel.org/filesystems/proc.html: 5 resets VmHWM to the current resident set.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    loss = loss_of()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    extra = (_status("VmHWM") - before) / 2**30
    return f"| {WAYS[way]:52} | {extra:5.2f} GiB | {before / 2**30:.2f} GiB | {loss.item():.5f} | {norm.item():.4f} |"


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir")
    parser.add_argument("--way", choices=WAYS, help="one of them, in this process")
    given = parser.parse_args()
    if given.way:
        print(measure(given.way, given.model_dir))
        return
    with tempfile.TemporaryDirectory() as directory:
        compare(given.model_dir, directory)


def compare(model_dir: str, directory: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    code = (
        "import sys; from transformers import AutoModelForCausalLM, logging; logging.set_verbosity_error()\n"
        f"model = AutoModelForCausalLM.from_pretrained(sys.argv[1], num_hidden_layers={LAYERS})\n"
        "model.save_pretrained(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, model_dir, directory], check=True, env=environment)
    print("| step | extra | resident before | loss | gradient norm |\n|---|---|---|---|---|", flush=True)
    environment |= allocator_environment()
    for way in WAYS:
        subprocess.run([sys.executable, __file__, directory, "--way", way], check=True, env=environment)


if __name__ == "__main__":
    main()
