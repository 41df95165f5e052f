"""Every one of PEFT's methods that a recipe may name: it starts as its base, is trained, is off where it should be, and
what engines, PEFT and a later run get of it are the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM

from rlflow.actors import adapters
from rlflow.actors.merged_weights import merged_weights
from rlflow.recipe import AdapterBlock, ModelBlock
from rlflow.recipe.peft_methods import METHODS

SIZES: dict[str, dict[str, Any]] = {
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 20},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "HRA": {"r": 4},
    "LORA": {"r": 4, "init_lora_weights": "orthogonal"},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 16},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [3, 4, 5]},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 20},
}
"""What fits a model as small as this one."""
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
IDS = torch.arange(2, 40)[None]


def load(directory: Path, adapter: dict[str, Any], dtype: Any = "float32", **options: Any) -> Any:
    block = ModelBlock(path=str(directory), dtype=dtype, adapter=AdapterBlock(**adapter))
    return adapters.load_adapted(block, seed=0, device=torch.device("cpu"), **options).eval()


def peft(method: str) -> dict[str, Any]:
    return {"peft": {"peft_type": method, **SIZES.get(method, {})}}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits.float()


def train(model: Any) -> None:
    optimizer = torch.optim.Adam(adapters.adapter_parameters(model).values(), 1e-2)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).abs().max()) < 3e-5


@pytest.fixture
def directory(method: str, tiny_model_dir: Path, tiny_moe_dir: Path) -> Path:
    """Of a base; where tokens are trained, one whose head has weights of its own."""
    return tiny_moe_dir if method == "TRAINABLE_TOKENS" else tiny_model_dir


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_trains_is_the_same_merged_in_peft_and_in_a_later_run(
    directory: Path, tmp_path: Path, method: str
):
    base = AutoModelForCausalLM.from_pretrained(directory).eval()
    before = logits(base)
    model = load(directory, peft(method))
    assert close(logits(model), before)
    train(model)
    trained, kept = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert float((trained - before).abs().max()) > 1e-2
    with adapters.as_reference(model):
        assert torch.equal(logits(model), before)

    merged = dict(merged_weights(model))
    assert merged.keys() == dict(base.named_parameters()).keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), trained)
    base.load_state_dict(merged, strict=False)
    assert close(logits(base), trained)

    adapters.write(tmp_path, model, adapters.adapter_parameters(model).items())
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), str(tmp_path)).eval()
    filled = theirs.load_adapter(str(tmp_path), "default")
    assert not [*filled.missing_keys, *filled.unexpected_keys]
    assert close(logits(theirs), trained)
    assert close(logits(theirs.merge_and_unload(safe_merge=True)), trained)

    if METHODS[method].goes_on:
        later = load(directory, {"path": str(tmp_path)}, reference=str(tmp_path))
        train(later)
        assert not close(logits(later), trained)
        with adapters.as_reference(later):
            assert torch.equal(logits(later), trained)
    else:
        with pytest.raises(ValueError, match="of which a model holds one alone: merge it"):
            load(directory, {"path": str(tmp_path)})


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.in_16_bits])
def test_a_method_is_trained_in_float32_beside_a_base_of_16_bits(directory: Path, method: str):
    model = load(directory, peft(method), dtype="bfloat16")
    assert {parameter.dtype for parameter in adapters.adapter_parameters(model).values()} == {torch.float32}
    before = logits(model)
    train(model)
    assert float((logits(model) - before).abs().max()) > 1e-2
    assert {tensor.dtype for _, tensor in merged_weights(model)} == {torch.bfloat16}


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.in_16_bits])
def test_methods_that_are_refused_in_16_bits_fail_there(directory: Path, method: str):
    model = load(directory, peft(method), dtype="bfloat16")
    with pytest.raises(RuntimeError, match="dtype"):
        train(model)


def test_experts_are_adapted_by_the_names_of_their_parameters(tiny_moe_dir: Path, tmp_path: Path):
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = {"peft_type": "LORA", "r": 2, "target_parameters": targets, "target_modules": ["q_proj"]}
    model = load(tiny_moe_dir, {"peft": config})
    base = AutoModelForCausalLM.from_pretrained(tiny_moe_dir).eval()
    before = logits(base)
    assert close(logits(model), before)
    train(model)
    trained = logits(model)
    assert any(".experts." in name for name in adapters.adapter_parameters(model))
    merged = dict(merged_weights(model))
    assert not torch.equal(merged["model.layers.0.mlp.experts.down_proj"], base.model.layers[0].mlp.experts.down_proj)
    base.load_state_dict(merged)
    assert close(logits(base), trained)
    assert torch.equal(logits(model), trained)
    with adapters.as_reference(model):
        assert torch.equal(logits(model), before)
    adapters.write(tmp_path, model, adapters.adapter_parameters(model).items())
    assert close(logits(load(tiny_moe_dir, {"path": str(tmp_path)})), trained)


def test_all_linear_leaves_out_what_mambas_kernels_multiply_by_themselves(tmp_path: Path):
    sizes = {"hidden_size": 32, "vocab_size": 64, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16}
    Mamba2ForCausalLM(Mamba2Config(**sizes, state_size=8, n_groups=1, chunk_size=8)).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", {"rank": 2})
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert adapted == {f"backbone.layers.{layer}.mixer.in_proj" for layer in (0, 1)}
    adapters.write(tmp_path, model, adapters.adapter_parameters(model).items())
    assert adapters.adapter_parameters(load(tmp_path / "base", {"path": str(tmp_path)})).keys() == (
        adapters.adapter_parameters(model).keys()
    )


def test_an_adapter_that_eva_prepared_is_gone_on_from(tiny_model_dir: Path, tmp_path: Path):
    """PEFT has measured its A by then: what is left of it is a LoRA."""
    model = load(tiny_model_dir, {"rank": 4})
    train(model)
    adapters.write(tmp_path, model, adapters.adapter_parameters(model).items())
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}))
    assert close(logits(load(tiny_model_dir, {"path": str(tmp_path)})), logits(model))


@pytest.mark.filterwarnings("ignore:The following|You have passed")
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"rank_pattern": {"q_proj": 4, "k_proj": 2}},
            "rank_pattern: no layer with an adapter ends in k_proj: they end ",
        ),
        (
            {"alpha_pattern": {"^q_proj": 4}},
            "alpha_pattern: no layer with an adapter ends in ^q_proj: they end in q_proj",
        ),
        ({"layers_to_transform": [0, 3]}, "layers_to_transform: no layer with an adapter is in number 3"),
        ({"exclude_modules": ["layers.1.self_attn.q_proj", "qq"]}, "exclude_modules: the model has no qq to leave out"),
        ({"exclude_modules": "model.*z"}, "exclude_modules: the model has no model.*z to leave out"),
        ({"target_parameters": ["mlp.experts.down_proj", "mlp.experts.x"]}, "target_parameters: the model has no "),
    ],
)
def test_what_names_nothing_in_a_config_is_refused(tiny_moe_dir: Path, fields: dict[str, Any], says: str):
    """PEFT passes over it."""
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], **fields}
    with pytest.raises(ValueError, match=r"model\.adapter\.peft\.") as raised:
        load(tiny_moe_dir, {"peft": config})
    assert says in str(raised.value)


def test_patterns_layers_and_parameters_that_are_there_are_taken(tiny_moe_dir: Path):
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    named = {"rank_pattern": {"^model.layers.0.*q_proj": 4}, "exclude_modules": ["layers.1.self_attn.q_proj"]}
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "target_parameters": both, **named}
    model = load(tiny_moe_dir, {"peft": config})
    ranks = {layer.r["default"] for _, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    assert ranks == {2, 4}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "FOURIERFT", "target_modules": ["q_prj"]}, "is called q_prj (did you mean q_proj?"),
        ({"peft_type": "C3A", "block_size": 7}, "C3A: The block size should be a factor"),
        ({"peft_type": "IA3", "feedforward_modules": ["up_proj"], "target_modules": ["q_proj"]}, "should be a subset"),
        ({"peft_type": "TRAINABLE_TOKENS", "token_indices": [3], "target_modules": ["nothing"]}, "nothing"),
        ({"peft_type": "TRAINABLE_TOKENS", "token_indices": [3]}, "the head shares the embedding's weights"),
    ],
)
def test_what_peft_does_not_take_is_an_error_with_the_recipes_key(
    tiny_model_dir: Path, config: dict[str, Any], says: str
):
    with pytest.raises(ValueError, match=r"model\.adapter") as raised:
        load(tiny_model_dir, {"peft": config})
    assert says in str(raised.value)
