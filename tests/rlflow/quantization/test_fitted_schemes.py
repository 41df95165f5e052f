"""What auto-round writes in the formats of GPTQ and AWQ is, unpacked by hand, the model that vLLM reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config

from rlflow.cli.main import main
from rlflow.quantization import exporting, rounding
from rlflow.quantization.likelihood import by_vllm
from tests.conftest import _write_model

AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where each of eight neighbours stands in 32 bits (AutoAWQ's gemm format)."""


def unpacked(packed: torch.Tensor, dim: int, order: list[int] | range = range(8)) -> torch.Tensor:
    """int32 -> eight times as many numbers of 4 bits along ``dim``, 0 or 1."""
    parts = [(packed >> 4 * place) & 15 for place in order]
    return torch.stack(parts, dim=dim + 1).flatten(dim, dim + 1)


def weight_of(layer: dict[str, torch.Tensor], scheme: str) -> torch.Tensor:
    """[out, in] of a layer: (number - zero) times the scale of its group of inputs."""
    scales = layer["scales"].float()
    if scheme == "gptq":
        # GPTQ stores zeros less one.
        numbers, zeros = unpacked(layer["qweight"], 0), unpacked(layer["qzeros"], 1) + 1
    else:
        numbers, zeros = unpacked(layer["qweight"], 1, AWQ_ORDER), unpacked(layer["qzeros"], 1, AWQ_ORDER)
    size = len(numbers) // len(scales)
    return ((numbers - zeros.repeat_interleave(size, 0)) * scales.repeat_interleave(size, 0)).T


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["awq", "gptq"])
def test_vllm_reads_what_a_hand_unpacks(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("auto_round")
    pytest.importorskip("vllm")
    monkeypatch.setattr(rounding, "STEPS", 2)
    # What the card says is not looked at here, and vLLM is started twice for it.
    monkeypatch.setattr(exporting, "by_vllm", lambda directory, texts, **options: [1.0] * len(texts))
    source, output, rows = tmp_path / "model", tmp_path / scheme, tmp_path / "rows.jsonl"
    _write_model(source, Qwen3Config, 0.15, hidden_size=64, tie_word_embeddings=True, num_hidden_layers=2)
    rows.write_text("".join(json.dumps({"text": f"{number}+{number}={2 * number} "}) + "\n" for number in range(40)))
    assert main(["export", str(source), str(output), "--quantize", scheme, "--calibration", str(rows)]) == 0

    layers: dict[str, dict[str, torch.Tensor]] = {}
    plain = {}
    for name, tensor in load_file(output / "model.safetensors").items():
        layer, _, part = name.rpartition(".")
        if part in ("qweight", "qzeros", "scales"):
            layers.setdefault(layer, {})[part] = tensor
        elif part != "g_idx":
            plain[name] = tensor.float()
    plain |= {f"{name}.weight": weight_of(layer, scheme) for name, layer in layers.items()}
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not model.load_state_dict(plain, strict=False).unexpected_keys
    for name in layers:
        moved = (plain[f"{name}.weight"] - before[f"{name}.weight"]).abs().max() / before[f"{name}.weight"].abs().max()
        assert 1e-3 < moved < 0.2

    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(4, 60, (length,), generator=generator) for length in (40, 25, 12)]
    with torch.no_grad():
        expected = [model(ids[None], labels=ids[None]).loss.item() for ids in texts]
    sums = by_vllm(output, [ids.tolist() for ids in texts], trust_remote_code=False)
    found = [total / (len(ids) - 1) for total, ids in zip(sums, texts, strict=True)]
    assert found == pytest.approx(expected, abs=0.05)
