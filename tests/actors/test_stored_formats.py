"""Bases in few bits on disk: trained from as the numbers that their files stand for, computed here by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_adapters import micro_batch, train
from transformers import AutoConfig, AutoModelForCausalLM

from rlflow.actors.policy_trainer import PolicyTrainer
from rlflow.actors.train_engines.token_model import read_language_model
from rlflow.quantization.compressed import quantize_directory
from rlflow.quantization.schemes import SCHEMES
from rlflow.recipe import AdapterBlock, ModelBlock, TrainerBlock
from rlflow.recipe.stored_formats import format_problem

pytest.importorskip("compressed_tensors")


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_model_dir`` of a width that groups of 32 divide."""
    directory = tmp_path_factory.mktemp("base")
    shutil.copytree(tiny_model_dir, directory, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(tiny_model_dir, hidden_size=64)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


def stored(base: Path, directory: Path, scheme: str) -> Path:
    """A directory with the model's weights in few bits."""
    directory.mkdir()
    for file in base.iterdir():
        if not file.name.startswith("model"):
            shutil.copy(file, directory)
    options: dict[str, Any] = {"trust_remote_code": False, "progress": lambda done, of: None}
    quantize_directory(base, directory, SCHEMES[scheme], dtype="float32", **options)
    return directory


def numbers_of(directory: Path) -> dict[str, torch.Tensor]:
    """What a directory's tensors stand for: integers or float8 times a scale a row; 4 bits, eight in 32 bits, with 8
    for 0, times a scale a group."""
    tensors = load_file(directory / "model.safetensors")
    found = {}
    for name, tensor in tensors.items():
        layer = name.rpartition(".")[0]
        if name.endswith(".weight_packed"):
            rows, columns = tensors[f"{layer}.weight_shape"].tolist()
            bits = torch.stack([(tensor >> 4 * place) & 15 for place in range(8)], dim=-1).reshape(rows, -1) - 8
            scale = tensors[f"{layer}.weight_scale"]
            of_column = scale.repeat_interleave(columns // scale.shape[1], dim=1)
            found[f"{layer}.weight"] = bits[:, :columns] * of_column
        elif name.endswith(".weight") and f"{layer}.weight_scale" in tensors:
            found[name] = tensor.float() * tensors[f"{layer}.weight_scale"]
        elif not name.endswith((".weight_scale", ".weight_shape")):
            found[name] = tensor
    return found


def plain(base: Path, small: Path, directory: Path) -> Path:
    """The model of those numbers, in full precision."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    unknown = model.load_state_dict(numbers_of(small), strict=False)
    assert not unknown.unexpected_keys and set(unknown.missing_keys) <= {"lm_head.weight"}
    model.save_pretrained(directory)
    return directory


def trainer_of(path: Path, **block: Any) -> PolicyTrainer:
    made = PolicyTrainer(
        ModelBlock(path=str(path), **block), TrainerBlock(), rank=0, world_size=1, num_threads=1, seed=0
    )
    made.setup(None)
    return made


@pytest.mark.parametrize("scheme", ["fp8", "int8", "w4a16"])
@pytest.mark.parametrize("adapter", [AdapterBlock(rank=4), None], ids=["adapter", "whole"])
def test_what_is_trained_on_few_bits_is_what_is_trained_on_their_numbers(
    base: Path, tmp_path: Path, scheme: str, adapter: AdapterBlock | None
):
    small = stored(base, tmp_path / "small", scheme)
    paths = small, plain(base, small, tmp_path / "plain")
    trainers = [trainer_of(path, adapter=adapter) for path in paths]
    batch = micro_batch(5)
    for trainer in trainers:
        train(trainer)
    ours, theirs = (dict(trainer.module.model.named_parameters()) for trainer in trainers)
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=0, atol=1e-6)
    logprobs = [torch.from_numpy(trainer.logprobs([batch])) for trainer in trainers]
    torch.testing.assert_close(*logprobs, rtol=0, atol=1e-5)

    if adapter is None:
        trainers[0].export(tmp_path / "final")
        assert "quantization_config" not in json.loads((tmp_path / "final" / "config.json").read_text())
        again = trainer_of(tmp_path / "final")
        torch.testing.assert_close(torch.from_numpy(again.logprobs([batch])), logprobs[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", ["fp8", "w4a16"])
def test_experts_in_few_bits_are_read_as_their_numbers(tiny_moe_dir: Path, tmp_path: Path, scheme: str):
    small = stored(tiny_moe_dir, tmp_path / "small", scheme)
    block = ModelBlock(path=str(small))
    ours = dict(read_language_model(block, seed=0).named_parameters())
    numbers = numbers_of(small)
    assert {parameter.dtype for parameter in ours.values()} == {torch.float32}
    for name, parameter in ours.items():
        if ".experts." not in name:
            torch.testing.assert_close(parameter.detach(), numbers[name])
        elif name.endswith("down_proj"):
            each = [numbers[name.replace("down_proj", f"{expert}.down_proj.weight")] for expert in range(8)]
            # transformers multiplies experts by their scales in bfloat16.
            torch.testing.assert_close(parameter.detach(), torch.stack(each), rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("method", "has_adapter", "rounds", "says"),
    [
        (None, False, True, None),
        ("compressed-tensors", False, False, None),
        ("mxfp4", True, True, "model.adapter.quantize rounds what is in full precision"),
        ("bitsandbytes", True, False, "set model.adapter.quantize: nf4"),
        ("torchao", True, False, "set model.adapter.quantize: torchao_int8"),
        ("gptq", True, False, "pip install gptqmodel optimum, or name the model that it was made of"),
        ("hqq", True, False, "from which nothing is trained here"),
    ],
)
def test_a_format_is_trained_from_or_refused_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, method: str | None, has_adapter: bool, rounds: bool, says: str | None
):
    there = {"compressed_tensors": True}
    monkeypatch.setattr("rlflow.recipe.stored_formats.find_spec", there.get)
    problem = format_problem("m", method, has_adapter=has_adapter, rounds=rounds)
    assert problem is None if says is None else problem is not None and says in problem


def test_gptq_is_the_base_of_an_adapter_where_its_packages_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlflow.recipe.stored_formats.find_spec", lambda package: True)
    assert format_problem("m", "gptq", has_adapter=True) is None
    assert "set model.adapter" in str(format_problem("m", "gptq", has_adapter=False))
