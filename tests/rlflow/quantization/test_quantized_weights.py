"""Rounded weights: by hand, and by transformers, which reads them with code of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from rlflow.data.errors import DataError
from rlflow.quantization.compressed import quantize_directory, round_weight
from rlflow.quantization.schemes import SCHEMES, group_size_for

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_hidden_layers": 2,
}


def write_model(directory: Path, make_config: Any = Qwen3Config, **sizes: Any) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(make_config(**SIZES | sizes)).save_pretrained(directory)
    return directory


def quantize(source: Path, directory: Path, name: str, dtype: str | None = "float32") -> int | None:
    directory.mkdir()
    options: dict[str, Any] = {"trust_remote_code": False, "progress": lambda done, total: None}
    return quantize_directory(source, directory, SCHEMES[name], dtype=dtype, **options)


def rounded(weight: torch.Tensor, name: str, group_size: int | None) -> torch.Tensor:
    """What a weight becomes: the definition, with no code of compressed-tensors."""
    rows = weight.reshape(len(weight), -1, group_size or weight.shape[1])
    largest = rows.abs().amax(-1, keepdim=True)
    if name == "fp8":
        scale = largest / 448
        return ((rows / scale).to(torch.float8_e4m3fn).float() * scale).reshape(weight.shape)
    steps = {8: 127.5, 4: 7.5}[SCHEMES[name].bits]
    scale = largest / steps
    return ((rows / scale).round().clamp(-steps - 0.5, steps - 0.5) * scale).reshape(weight.shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8", "int8", "w4a16"])
def test_transformers_reads_linear_layers_rounded_by_the_definition_and_all_else_as_it_was(name: str, tmp_path: Path):
    source, output = write_model(tmp_path / "model"), tmp_path / name
    group_size = quantize(source, output, name)
    before: Any = AutoModelForCausalLM.from_pretrained(source)
    after: Any = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    # Weights are unpacked at the first call.
    after(torch.arange(4)[None])
    values = after.state_dict()
    linear = 0
    for key, weight in before.state_dict().items():
        if key.startswith("model.layers.") and "proj" in key:
            weight, linear = rounded(weight, name, group_size), linear + 1
        torch.testing.assert_close(values[key], weight, rtol=1e-5, atol=1e-6, msg=key)
    assert linear == 14
    assert group_size == {"fp8": None, "int8": None, "w4a16": 32}[name]


def test_a_row_is_rounded_as_by_hand():
    from rlflow.quantization.compressed import _how

    weight = torch.tensor([[-127.5, 64.0, 0.4, 1.6]])
    tensors = round_weight(weight, _how(SCHEMES["int8"], None), torch.float32)
    assert tensors["weight"].tolist() == [[-128, 64, 0, 2]]
    assert tensors["weight_scale"].tolist() == [[1.0]]


def test_the_files_are_as_small_as_their_scheme(tmp_path: Path):
    source = write_model(tmp_path / "model")
    sizes = {}
    for name in ("fp8", "int8", "w4a16"):
        quantize(source, tmp_path / name, name)
        stored = load_file(tmp_path / name / "model.safetensors")
        layer = "model.layers.0.mlp.up_proj"
        tensors = {key: tensor for key, tensor in stored.items() if key.startswith(layer)}
        sizes[name] = {key.removeprefix(f"{layer}."): tensor.nbytes for key, tensor in tensors.items()}
    # 96 rows of 64: a byte a weight, or half of one; scales in float32, one a row or two groups a row.
    assert sizes["fp8"] == sizes["int8"] == {"weight": 96 * 64, "weight_scale": 96 * 4}
    assert sizes["w4a16"] == {"weight_packed": 96 * 32, "weight_scale": 96 * 2 * 4, "weight_shape": 16}


def test_a_model_in_shards_is_written_in_shards(tmp_path: Path):
    torch.manual_seed(0)
    source = tmp_path / "model"
    AutoModelForCausalLM.from_config(Qwen3Config(**SIZES)).save_pretrained(source, max_shard_size="100KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    quantize(source, tmp_path / "int8", "int8")
    quantize(write_model(tmp_path / "whole"), tmp_path / "int8_whole", "int8")
    ids = torch.arange(9)[None]
    logits = [AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("int8", "int8_whole")]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("widths", "size"),
    [({"a": 256, "b": 128}, 128), ({"a": 576, "b": 1536}, 64), ({"a": 96, "b": 64}, 32)],
    ids=str,
)
def test_groups_are_the_largest_that_divide_every_layer(widths: dict[str, int], size: int):
    assert group_size_for(widths) == size


def test_a_layer_that_no_group_divides_is_named():
    with pytest.raises(DataError, match=r"q_proj has 48 inputs, which groups of 32 .* --quantize fp8 or int8"):
        group_size_for({"k_proj": 64, "q_proj": 48})


@pytest.mark.parametrize("name", ["fp8", "w4a16"])
def test_experts_are_rounded_and_routers_are_not(name: str, tmp_path: Path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    source = write_model(tmp_path / "model", Qwen3MoeConfig, **experts)
    group_size = quantize(source, tmp_path / name, name, "bfloat16")
    before: Any = AutoModelForCausalLM.from_pretrained(source)
    after: Any = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto")
    was, now = before.model.layers[0].mlp, after.model.layers[0].mlp
    assert torch.equal(now.gate.weight, was.gate.weight.bfloat16())
    wanted = torch.stack([rounded(expert, name, group_size) for expert in was.experts.down_proj.detach()])
    # Scales and products are in bfloat16, off by 2**-9 each; here and there a quotient is rounded to its other side.
    is_close = torch.isclose(now.experts.down_proj.detach().float(), wanted, rtol=2**-7, atol=1e-6)
    assert is_close.float().mean() > 0.98
    ignored = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["lm_head", r"re:.*\.(gate|router|shared_expert_gate)$"]


def test_experts_in_a_scheme_that_transformers_does_not_read_for_them_are_refused(tmp_path: Path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    source = write_model(tmp_path / "model", Qwen3MoeConfig, **experts)
    with pytest.raises(DataError, match=r"is a mixture of experts.*--quantize fp8 or w4a16"):
        quantize(source, tmp_path / "int8", "int8")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "is quantised already (awq)"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "is a reward model"),
    ],
    ids=str,
)
def test_what_cannot_be_quantised_is_refused(change: dict, says: str, tmp_path: Path):
    source = write_model(tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(DataError) as error:
        quantize(source, tmp_path / "fp8", "fp8")
    assert says in str(error.value)


def test_a_model_in_float32_is_written_in_16_bits_unless_asked(tmp_path: Path):
    quantize(write_model(tmp_path / "model"), tmp_path / "fp8", "fp8", dtype=None)
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    assert (
        stored["model.norm.weight"].dtype == stored["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16
    )
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("weight", "dtype"), [(float("nan"), "bfloat16"), (float("inf"), "bfloat16"), (1e6, "float16")]
)
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers_are_named_and_not_rounded(tmp_path: Path, name: str, weight: float, dtype: str):
    """Integers have none of these: they would be some other number."""
    source = write_model(tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    weights[name].view(-1)[3] = weight
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=f"{name} holds weights that are not finite in {dtype}"):
        quantize(source, tmp_path / "out", "w4a16", dtype)
