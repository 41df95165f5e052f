"""Liger's kernels, compiled on a GPU or run by Triton's interpreter: the numbers are those of plain torch.

Triton decides when it is imported whether to compile, so each test's program has a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rlflow.actors.train_engines import liger
from rlflow.actors.train_engines.packed_attention import PackedLayout
from rlflow.actors.train_engines.token_model import load_token_model
from rlflow.recipe import ModelBlock

needs_liger = pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is missing")

PROGRAM = """
import json, sys
import numpy as np, torch
import triton.language as tl
from liger_kernel.ops import rms_norm
from torch import nn
from triton.runtime import interpreter
from rlflow.actors.train_engines import liger
from rlflow.actors.train_engines.packed_attention import PackedLayout
from rlflow.actors.train_engines.token_model import load_token_model
from rlflow.recipe import ModelBlock

# The interpreter has no CUDA library, and leaves a kernel's float arguments as Python's; compiled they are tensors.
device = torch.device(sys.argv[2])
convert = interpreter._implicit_cvt
def converted(argument):
    if not isinstance(argument, float):
        return convert(argument)
    return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
if device.type == "cpu":
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)
    interpreter._implicit_cvt = converted
torch.set_default_device(device)

def apart(one, other):
    return max(((a - b).abs().max() / (b.abs().max() + 1e-9)).item() for a, b in zip(one, other))

def plain(hidden, head, targets):
    return torch.log_softmax(head(hidden), -1).gather(1, targets[:, None]).squeeze(1)

torch.manual_seed(0)
found = {}
for bias in (False, True):
    head, hidden = nn.Linear(16, 50, bias=bias), torch.randn(21, 16, requires_grad=True)
    targets, weights = torch.randint(50, (21,)), torch.linspace(-1, 1, 21)
    results = []
    for function in (liger.token_logprobs, plain):
        logprobs = function(hidden, head, targets)
        gradients = torch.autograd.grad((logprobs * weights).sum(), [hidden, *head.parameters()])
        results.append([logprobs.detach(), *gradients])
    found[f"bias {bias}"] = apart(*results)

empty = liger.token_logprobs(torch.randn(0, 16), nn.Linear(16, 50), torch.zeros(0, dtype=torch.long))
assert empty.shape == (0,) and empty.requires_grad

results = []
for uses_liger in (False, True):
    model = load_token_model(ModelBlock(path=sys.argv[1], liger=uses_liger), seed=0, device=device)
    layout = PackedLayout(np.array([0, 5, 12]), device)
    positions = torch.cat([torch.arange(5), torch.arange(7)])
    tokens = torch.arange(12) * 5 % model.model.config.vocab_size
    logprobs = model(tokens, positions, layout, positions > 0, 1.0, "none").logprobs
    gradients = torch.autograd.grad((logprobs * torch.linspace(-1, 1, 12)).sum(), list(model.parameters()))
    results.append([logprobs.detach(), *gradients])
found["model"] = apart(*results)
assert model.model.get_decoder().norm._get_name() == "LigerRMSNorm"
print(json.dumps(found))
"""


@needs_liger
@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_logprobs_and_gradients_are_those_of_plain_torch(device: str, tiny_model_dir: Path):
    command = [sys.executable, "-c", PROGRAM, str(tiny_model_dir), device]
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize(("temperature", "entropies"), [(0.7, "none"), (1.0, "values"), (1.0, "gradient")])
def test_what_the_fused_kernel_cannot_compute_is_left_to_the_chunks(
    temperature, entropies, tiny_model_dir, monkeypatch
):
    def refuse(*_: object) -> None:
        raise AssertionError("called")

    monkeypatch.setattr(liger, "token_logprobs", refuse)
    module = load_token_model(ModelBlock(path=str(tiny_model_dir)), seed=0, device=torch.device("cpu"))
    module.uses_liger = True
    positions = torch.arange(4)
    layout = PackedLayout(np.array([0, 4]), torch.device("cpu"))
    arguments = (positions, positions, layout, positions > 0)
    assert module(*arguments, temperature, entropies).logprobs.isfinite().all()
    with pytest.raises(AssertionError, match="called"):
        module(*arguments, 1.0, "none")
    # It has no place for ids that get no probability.
    module.leave_out(np.array([7]))
    assert module(*arguments, 1.0, "none").logprobs.isfinite().all()


def test_a_missing_library_or_an_unknown_architecture_is_said(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch):
    model = load_token_model(ModelBlock(path=str(tiny_model_dir)), seed=0, device=torch.device("cpu")).model
    if importlib.util.find_spec("liger_kernel") is not None:
        monkeypatch.setattr(model.config, "model_type", "own")
        with pytest.raises(ValueError, match="Liger has no kernels for own: remove it"):
            liger.apply_kernels(model)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    with pytest.raises(ValueError, match="pip install liger-kernel"):
        liger.apply_kernels(model)
