"""Starts that PEFT computes before training: the policy starts as its base, is trained as PEFT trains it, and what is
exported, merged and served is what was trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import AutoModelForCausalLM

from rlflow.actors import adapters, prepared_adapters
from rlflow.actors.merged_weights import merged_weights
from rlflow.actors.model_files import write_trained
from rlflow.actors.prepared_adapters import write_prepared
from rlflow.recipe import AdapterBlock, ModelBlock
from rlflow.recipe.prepared_starts import _STARTS

IDS = torch.arange(2, 40)[None]
GENERATOR = torch.Generator().manual_seed(3)
TEXTS = [torch.randint(2, 60, (40,), generator=GENERATOR) for _ in range(12)]
STARTS = ["pissa", "pissa_niter_4", "olora", "lora_ga", "corda", "eva"]
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.slow]


def prepared(base: Path, directory: Path, start: str, dtype: Any = "float32", **fields: Any) -> ModelBlock:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "init_lora_weights": start, **fields}
    block = ModelBlock(path=str(base), dtype=dtype, adapter=AdapterBlock(peft=config))
    texts = [(text, torch.ones(len(text), dtype=torch.bool)) for text in TEXTS]
    write_prepared(block, texts, directory, seed=0)
    assert block.adapter is not None
    return block.model_copy(update={"adapter": block.adapter.model_copy(update={"path": str(directory)})})


def load(block: ModelBlock) -> Any:
    return adapters.load_adapted(block, seed=0, device=torch.device("cpu")).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits.float()


def train(model: Any) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def close(one: torch.Tensor, other: torch.Tensor, limit: float = 2e-4) -> bool:
    return float((one - other).abs().max()) < limit


def as_peft_documents_it(base: Path, start: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=start, target_modules=LAYERS, task_type="CAUSAL_LM")
    batches = [{"input_ids": torch.stack(TEXTS[first : first + 8])} for first in (0, 8)]
    batches = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in batches]
    torch.manual_seed(0)
    if start == "eva":
        config.eva_config = peft.EvaConfig()
        adapted = get_peft_model(model, config)
        peft.initialize_lora_eva_weights(adapted, batches, show_progress_bar=False)
        return adapted
    if start == "lora_ga":
        config.lora_ga_config = peft.LoraGAConfig()
        learn = lambda: [model(**batch, labels=batch["input_ids"]).loss.backward() for batch in batches]  # noqa: E731
        preprocess_loraga(model, config, learn)
    if start == "corda":
        config.corda_config = CordaConfig()
        preprocess_corda(model, config, torch.no_grad()(lambda: [model(text[None]) for text in TEXTS]))
    return get_peft_model(model, config)


@pytest.mark.parametrize("start", STARTS)
def test_a_prepared_start_is_trained_as_pefts_is_and_served_as_trained(
    tiny_model_dir: Path, tmp_path: Path, start: str
):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    before = logits(base)
    block = prepared(tiny_model_dir, tmp_path / "start", start)
    model, theirs = load(block), as_peft_documents_it(tiny_model_dir, start).eval()
    assert close(logits(model), before) and close(logits(theirs), before)
    train(model)
    train(theirs)
    trained = logits(model)
    assert not close(trained, before, 0.1) and close(trained, logits(theirs), 5e-3)
    with adapters.as_reference(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), trained)

    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base.load_state_dict(dict(merged_weights(model)), strict=False)
    assert close(logits(base), trained)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())

    (tmp_path / "final").mkdir()
    write_trained(model, block, tmp_path / "final", adapters.adapter_parameters(model))
    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), str(tmp_path / "final"))
    assert close(logits(served.eval()), trained)
    assert served.peft_config["default"].init_lora_weights is True
    assert not any(dict(served.peft_config["default"].to_dict())[name] for name in ("eva_config", "corda_config"))


@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_exported_is_pefts_own_conversion(tiny_model_dir: Path, tmp_path: Path, rslora: bool):
    block = prepared(tiny_model_dir, tmp_path / "start", "pissa", use_rslora=rslora)
    model = load(block)
    train(model)
    (tmp_path / "final").mkdir()
    write_trained(model, block, tmp_path / "final", adapters.adapter_parameters(model))
    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), str(tmp_path / "final"))
    layer = ours.base_model.model.model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    mine = model.model.layers[0].mlp.up_proj
    assert (a.shape[0], b.shape[1]) == (8, 8)
    assert torch.equal(a[:4], mine.lora_A["default"].weight) and torch.equal(b[:, 4:], mine.lora_B["subtracted"].weight)
    assert layer.scaling["default"] == pytest.approx(6 / 2 if rslora else 6 / 4)
    assert close(logits(ours.eval()), logits(model))


def test_what_is_taken_away_leaves_nothing_of_its_rounding_in_16_bits(tiny_model_dir: Path, tmp_path: Path):
    block = prepared(tiny_model_dir, tmp_path / "start", "pissa", dtype="bfloat16")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    merged = dict(merged_weights(load(block)))
    assert all(torch.equal(merged[name], parameter) for name, parameter in base.named_parameters())


def test_layers_that_an_expression_names_are_the_ones_that_are_prepared(tiny_model_dir: Path, tmp_path: Path):
    model = load(prepared(tiny_model_dir, tmp_path / "start", "pissa", target_modules=r".*\.1\..*q_proj"))
    (name, *others) = {name.rpartition(".lora_")[0] for name in adapters.adapter_parameters(model)}
    assert (name, others) == ("model.layers.1.self_attn.q_proj", [])


def test_a_search_that_does_not_converge_ends(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prepared_adapters, "_MOST_PASSES", 2)
    with pytest.raises(ValueError, match="have not converged in 2 forward passes: more or longer rows"):
        prepared(tiny_model_dir, tmp_path / "start", "eva")
    with pytest.raises(ValueError, match=r"init_lora_weights: eva: `tau` must be between"):
        prepared(tiny_model_dir, tmp_path / "start", "eva", eva_config={"tau": 1.1})


def test_the_options_of_starts_are_pefts():
    configs: dict[str, Callable[..., Any]] = {
        "eva": peft.EvaConfig, "lora_ga": peft.LoraGAConfig, "corda": CordaConfig
    }  # fmt: skip
    for name, config in configs.items():
        assert _STARTS[name].fields.keys() <= {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
