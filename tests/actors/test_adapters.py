"""Adapters in place: their arithmetic against the papers' formulas, what is trained, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

from rlflow.actors import adapters, quantized_bases
from rlflow.actors.learning_rates import learning_rate_shares
from rlflow.actors.merged_weights import merged_weights
from rlflow.actors.policy_trainer import PolicyTrainer
from rlflow.actors.reference_model import ReferenceModel
from rlflow.actors.train_engines.optimizers import AdamW, decay_groups, set_learning_rate, trained_rates
from rlflow.actors.train_engines.token_model import TokenModel, load_token_model
from rlflow.recipe import AdapterBlock, ModelBlock, OptimizerBlock, TrainerBlock, algorithm_of
from rlflow.types import Denominators, MicroBatch
from tests.actors.train_engines.architectures import PADDED, write

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LAYER = "model.layers.1.mlp.up_proj"


def adapted(directory: Path, dtype: Any = "float32", **adapter: Any) -> Any:
    given: dict[str, Any] = {"rank": 4, "alpha": 6, **adapter}
    block = ModelBlock(path=str(directory), dtype=dtype, adapter=AdapterBlock(**given))
    return adapters.load_adapted(block, seed=0, device=torch.device("cpu"))


@torch.no_grad()
def randomize(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in adapters.adapter_parameters(model).values():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def parts(model: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
    """W, A, B of one layer, and the layer."""
    layer = model.get_submodule(LAYER)
    return layer.base_layer.weight, layer.lora_A.default.weight, layer.lora_B.default.weight, layer


def trainer_of(directory: Path, adapter: AdapterBlock, reference: Path | None = None, **trainer: Any) -> PolicyTrainer:
    block = ModelBlock(path=str(directory), adapter=adapter)
    held = None if reference is None else str(reference)
    made = PolicyTrainer(block, TrainerBlock(**trainer), rank=0, world_size=1, num_threads=1, seed=0, reference=held)
    made.setup(None)
    return made


def micro_batch(seed: int = 0) -> MicroBatch:
    tokens = np.random.default_rng(seed).integers(2, 60, size=24).astype(np.int32)
    positions = np.concatenate([np.arange(10), np.arange(14)]).astype(np.int32)
    return MicroBatch(
        token_ids=tokens,
        position_ids=positions,
        cu_seqlens=np.array([0, 10, 24], dtype=np.int32),
        loss_mask=positions > 0,
        loss_weights=(positions > 0).astype(np.float32),
        sample_indices=np.arange(2, dtype=np.int32),
        labels=np.zeros(2, dtype=np.float32),
    )


def train(trainer: PolicyTrainer, steps: int = 2, learning_rate: float = 1e-2) -> None:
    for step in range(steps):
        trainer.forward_backward([micro_batch(step)], algorithm_of("sft"), Denominators(22, 2, 2))
        trainer.optim_step(learning_rate)


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_adds_the_scaled_product(tiny_model_dir: Path, rslora: bool):
    model = adapted(tiny_model_dir, rslora=rslora)
    randomize(model)
    w, a, b, layer = parts(model)
    scale = 6 / 4**0.5 if rslora else 6 / 4
    x = torch.randn(5, w.shape[1])
    torch.testing.assert_close(layer(x), x @ (w + scale * b @ a).T, rtol=0, atol=1e-5)


def test_dora_scales_each_row_to_its_trained_length(tiny_model_dir: Path):
    model = adapted(tiny_model_dir, kind="dora")
    randomize(model)
    w, a, b, layer = parts(model)
    moved = w + 6 / 4 * b @ a
    lengths = layer.lora_magnitude_vector.default.weight
    x = torch.randn(5, w.shape[1])
    torch.testing.assert_close(layer(x), x @ (lengths[:, None] * moved / moved.norm(dim=1, keepdim=True)).T)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_fresh_adapter_changes_nothing_and_is_the_same_for_every_rank(tiny_model_dir: Path, kind: str):
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir)(ids).logits
        one, other = adapted(tiny_model_dir, kind=kind), adapted(tiny_model_dir, kind=kind)
        torch.testing.assert_close(one(ids).logits, plain, rtol=0, atol=0 if kind == "lora" else 1e-4)
    assert torch.equal(parts(one)[1], parts(other)[1])
    assert parts(one)[1].abs().min() > 0


def test_an_adapter_is_float32_on_a_base_of_16_bits(tiny_model_dir: Path):
    model = adapted(tiny_model_dir, dtype="bfloat16")
    w, a, b, _ = parts(model)
    assert (w.dtype, a.dtype, b.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert not w.requires_grad
    assert len(adapters.adapter_parameters(model)) == 28


def test_layers_that_are_more_than_linear_get_no_adapter(tmp_path: Path):
    """Llama 4's routers return two tensors: PEFT takes them for linear layers, as by their class they are."""
    model = write(tmp_path, "llama4_text", PADDED["llama4_text"])
    made = adapted(tmp_path)
    layers = {name for name, layer in made.named_modules() if isinstance(layer, BaseTunerLayer)}
    assert any(name.endswith("self_attn.q_proj") for name in layers)
    assert not any(name.endswith("router") for name in layers)
    tokens = torch.tensor([[3, 7, 5, 9]])
    with torch.no_grad():
        torch.testing.assert_close(made(tokens).logits, model(tokens).logits)


def test_layers_that_share_a_weight_get_no_adapter_which_would_make_several_of_it(tiny_model_dir: Path):
    def tied() -> Any:
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
        return model

    block = ModelBlock(path=str(tiny_model_dir), adapter=AdapterBlock(rank=2))
    model = tied()
    adapters.inject(model, block, seed=0)
    merged = dict(merged_weights(model))
    assert merged.keys() == dict(tied().named_parameters()).keys()
    assert sum(isinstance(module, BaseTunerLayer) for module in model.modules()) == 2 * 7 - 2
    block = ModelBlock(path=str(tiny_model_dir), adapter=AdapterBlock(rank=2, target_modules=["q_proj", "up_proj"]))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj has its weight together with"):
        adapters.inject(tied(), block, seed=0)


def test_lora_plus_multiplies_the_learning_rate_of_b(tiny_model_dir: Path):
    model = adapted(tiny_model_dir, kind="dora")
    block = ModelBlock(path=str(tiny_model_dir), adapter=AdapterBlock(lora_plus_ratio=16.0))
    rates = trained_rates(TokenModel(model), learning_rate_shares(model, block, 1e-3))
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {rate for p, rate in rates.items() if ".lora_B." in names[p]} == {16.0}
    assert {rate for p, rate in rates.items() if ".lora_B." not in names[p]} == {1.0}
    groups = decay_groups(rates, 0.1)
    set_learning_rate(groups, 1e-3)
    found = {(group["params"][0].ndim, group["lr"], group["weight_decay"]) for group in groups}
    assert found == {(2, 1e-3, 0.1), (2, 16e-3, 0.1), (1, 1e-3, 0.0)}


def test_lora_plus_moves_b_as_much_farther(tiny_model_dir: Path):
    """Adam's first step is the learning rate, whatever the gradient."""
    moved = {}
    for ratio in (None, 8.0):
        trainer = trainer_of(tiny_model_dir, AdapterBlock(rank=4, lora_plus_ratio=ratio))
        train(trainer, steps=1, learning_rate=1e-3)
        moved[ratio] = parts(trainer.module.model)[2].abs().max().item()
    assert moved[None] == pytest.approx(1e-3, rel=1e-3)
    assert moved[8.0] == pytest.approx(8e-3, rel=1e-3)


def test_an_optimizer_that_knows_no_adapters_has_the_groups_it_had():
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    groups = AdamW({matrix: 1.0, vector: 1.0}, OptimizerBlock(weight_decay=0.1)).inner.param_groups
    assert [(group["params"], group["weight_decay"]) for group in groups] == [([matrix], 0.1), ([vector], 0.0)]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_reference_within_the_trainer_equals_a_reference_model_to_the_bit(tiny_model_dir: Path, kind: Any):
    trainer = trainer_of(tiny_model_dir, AdapterBlock(kind=kind, rank=4))
    reference = ReferenceModel(ModelBlock(path=str(tiny_model_dir)), gpus=0, num_threads=1, seed=0)
    train(trainer)
    batches = [micro_batch(5), micro_batch(6)]
    before = trainer.logprobs(batches, 0.7)
    ours, theirs = trainer.reference_logprobs(batches, 0.7), reference.logprobs(batches, 0.7)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(before, trainer.logprobs(batches, 0.7))
    assert np.abs(before - ours).max() > 1e-3


def test_the_reference_of_a_run_that_goes_on_is_the_adapter_it_goes_on_from(tiny_model_dir: Path, tmp_path: Path):
    first = trainer_of(tiny_model_dir, AdapterBlock(rank=4))
    train(first)
    first.export(tmp_path)
    batches = [micro_batch(5)]
    started = first.logprobs(batches)
    second = trainer_of(tiny_model_dir, AdapterBlock(path=str(tmp_path)), reference=tmp_path)
    np.testing.assert_array_equal(second.logprobs(batches), started)
    assert len(adapters.adapter_parameters(second.module.model)) == 28
    train(second)
    assert np.abs(second.logprobs(batches) - started).max() > 1e-3
    np.testing.assert_array_equal(second.reference_logprobs(batches), started)
    snapshot = second.weights(1)
    assert snapshot is not None
    assert all(".default." in name for name, _, _ in snapshot.tensors)


def test_dropout_is_there_where_gradients_are_and_nowhere_else(tiny_model_dir: Path):
    trainer = trainer_of(tiny_model_dir, AdapterBlock(rank=4, dropout=0.5))
    train(trainer)
    algorithm, denominators = algorithm_of("sft"), Denominators(22, 2, 2)
    losses = [trainer.forward_backward([micro_batch()], algorithm, denominators) for _ in range(2)]
    assert losses[0] != losses[1]
    scored = [trainer.logprobs([micro_batch()]) for _ in range(2)]
    np.testing.assert_array_equal(scored[0], scored[1])
    held_out = [trainer.evaluate([micro_batch()], algorithm, denominators) for _ in range(2)]
    assert held_out[0] == held_out[1]


def test_what_is_exported_is_what_was_trained(tiny_model_dir: Path, tmp_path: Path):
    trainer = trainer_of(tiny_model_dir, AdapterBlock(rank=4, kind="dora", rslora=True))
    train(trainer)
    trainer.export(tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), str(tmp_path)).eval()
    batch = micro_batch(7)
    with torch.no_grad():
        logits = model(torch.from_numpy(batch.token_ids[:10].astype(np.int64))[None]).logits[0, :-1]
    theirs = logits.log_softmax(-1).gather(1, torch.from_numpy(batch.token_ids[1:10].astype(np.int64))[:, None])
    np.testing.assert_allclose(trainer.logprobs([batch])[1:10], theirs.squeeze(1).numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["q_prj"], "is called q_prj (did you mean q_proj?"),
        (["lm_head"], "no linear layer beside the head is called lm_head"),
        (["embed_tokens"], "is called embed_tokens"),
        (["q_proj", "zzz"], "is called zzz (They are called down_proj, gate_proj"),
    ],
)
def test_layers_that_cannot_get_an_adapter_are_refused(tiny_model_dir: Path, targets: list[str], says: str):
    with pytest.raises(ValueError, match=r"model\.adapter\.target_modules") as raised:
        adapted(tiny_model_dir, target_modules=targets)
    assert says in str(raised.value)


def test_an_adapter_of_another_model_is_refused(tiny_model_dir: Path, tmp_path: Path):
    trainer_of(tiny_model_dir, AdapterBlock(rank=4)).export(tmp_path)
    path = tmp_path / "adapter_config.json"
    given = json.loads(path.read_text())
    path.write_text(json.dumps(given | {"base_model_name_or_path": "org/else"}))
    with pytest.raises(ValueError, match=r"is an adapter of org/else.*set model.path to that"):
        adapted(tiny_model_dir, rank=16, alpha=32, path=str(tmp_path))
    path.write_text(json.dumps(given | {"r": 8}))
    with pytest.raises(
        ValueError, match=r"is of another model: .*lora_A.* has shape \[4, \d+\] there, \[8, \d+\] here"
    ):
        adapted(tiny_model_dir, rank=16, alpha=32, path=str(tmp_path))


def test_four_bits_need_a_gpu(tiny_model_dir: Path):
    if torch.cuda.is_available():
        pytest.skip("about machines without a GPU")
    with pytest.raises(ValueError, match=r"nf4 needs (a GPU|bitsandbytes).*set none"):
        adapted(tiny_model_dir, quantize="nf4")


def test_checkpointing_recomputes_an_adapter(tiny_model_dir: Path):
    """Recomputed in the backward pass, the layers give the gradients they give otherwise."""
    gradients = []
    for checkpointing in (False, True):
        block = ModelBlock(path=str(tiny_model_dir), adapter=AdapterBlock(rank=4))
        module = load_token_model(block, seed=0, device=torch.device("cpu"), checkpointing=checkpointing)
        module.model.train()
        module.of_batch(micro_batch(), torch.device("cpu")).logprobs.sum().backward()
        gradients.append(parts(module.model)[2].grad)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("gpus", [0.0, pytest.param(1.0, marks=[pytest.mark.gpu, NEEDS_GPU])], ids=["cpu", "gpu"])
def test_an_adapter_trains_on_a_base_of_four_bits(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, gpus: float):
    pytest.importorskip("bitsandbytes")
    if not gpus:
        monkeypatch.setattr(adapters, "check_quantized", lambda kind: None)
    trainer = trainer_of(tiny_model_dir, AdapterBlock(rank=4, quantize="nf4"), gpus_per_worker=gpus)
    w, a, b, _ = parts(trainer.module.model)
    assert (w.dtype, a.dtype, b.dtype) == (torch.uint8, torch.float32, torch.float32)
    before, packed = trainer.logprobs([micro_batch(5)]), w.clone()
    train(trainer)
    assert np.abs(trainer.logprobs([micro_batch(5)]) - before).max() > 1e-3
    np.testing.assert_array_equal(trainer.reference_logprobs([micro_batch(5)]), before)
    assert torch.equal(parts(trainer.module.model)[0], packed)


@pytest.mark.parametrize("has_kernel", [False, True])
def test_four_bits_are_the_same_numbers_on_every_cpu(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, has_kernel: bool
):
    """bitsandbytes has a kernel for CPUs with AVX512_BF16 that rounds to bfloat16 and fails on layers of this size."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: has_kernel)
    monkeypatch.setattr(adapters, "check_quantized", lambda kind: None)
    model = adapted(tiny_model_dir, quantize="nf4").eval()
    stored = parts(model)[0].clone()
    tokens = torch.arange(2, 20)[None]
    with torch.no_grad():
        ours = model(tokens).logits
        assert torch.equal(parts(model)[0], stored)
        options = {"quantization_config": quantized_bases.quantized("nf4", torch.float32), "dtype": torch.float32}
        plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, **options).dequantize()
        torch.testing.assert_close(ours, plain(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("targets", ["all-linear", ["up_proj", "q_proj"], ["model.layers.1.mlp.up_proj"]], ids=str)
def test_an_adapters_config_names_layers_by_their_ends_where_it_may(tiny_model_dir: Path, tmp_path: Path, targets: Any):
    model = adapted(tiny_model_dir, target_modules=targets)
    adapters.write(tmp_path, model, adapters.adapter_parameters(model).items())
    written = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    every = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert written == (every if targets == "all-linear" else sorted(targets))
    again = adapted(tiny_model_dir, rank=16, alpha=32, path=str(tmp_path))
    assert adapters.adapter_parameters(again).keys() == adapters.adapter_parameters(model).keys()
