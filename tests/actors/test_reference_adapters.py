"""A reference that is another adapter of the policy's base: PEFT's numbers of it, whatever is trained beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from peft import LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from test_adapters import micro_batch, train, trainer_of
from transformers import AutoModelForCausalLM

from rlflow.actor_groups import constructor_of
from rlflow.actors.merged_weights import merged_weights
from rlflow.recipe import AdapterBlock, ModelBlock, load_recipe
from rlflow.roles import roles


def write_adapter(base: Path, directory: Path, config: PeftConfig, seed: int = 0) -> Any:
    """PEFT's model with an adapter of random weights, which is also in the directory."""
    torch.manual_seed(seed)
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(str(directory))
    return model


@torch.no_grad()
def logprobs_of(model: Any) -> np.ndarray:
    """Of the two sequences in ``micro_batch(5)``, each by itself, 0 at first tokens."""
    batch, found = micro_batch(5), []
    for begin, end in ((0, 10), (10, 24)):
        ids = torch.from_numpy(batch.token_ids[begin:end].astype(np.int64))
        logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        found += [torch.zeros(1), logprobs.gather(1, ids[1:, None]).squeeze(1)]
    return torch.cat(found).numpy()


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), LoraConfig(r=8, target_modules=["q_proj", "up_proj"])),
        (LoraConfig(r=4, target_modules=["q_proj"]), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)),
        (LoKrConfig(r=4, target_modules=["q_proj"]), LoKrConfig(r=2, target_modules=["q_proj", "down_proj"])),
    ],
    ids=["other layers", "dora", "lokr"],
)
def test_a_reference_on_other_layers_is_what_peft_computes_and_changes_nothing_else(
    tiny_model_dir: Path, tmp_path: Path, mine: PeftConfig, theirs: PeftConfig
):
    write_adapter(tiny_model_dir, tmp_path / "mine", mine)
    expected = logprobs_of(write_adapter(tiny_model_dir, tmp_path / "theirs", theirs, seed=1))
    block, batch = AdapterBlock(path=str(tmp_path / "mine")), micro_batch(5)
    alone, beside = (trainer_of(tiny_model_dir, block, reference) for reference in (None, tmp_path / "theirs"))
    for trainer in (alone, beside):
        train(trainer)
    np.testing.assert_allclose(beside.reference_logprobs([batch]), expected, rtol=0, atol=2e-5)
    plain = logprobs_of(AutoModelForCausalLM.from_pretrained(tiny_model_dir))
    np.testing.assert_allclose(alone.reference_logprobs([batch]), plain, rtol=0, atol=2e-5)
    assert np.abs(plain - expected).max() > 1e-2
    np.testing.assert_array_equal(beside.logprobs([batch]), alone.logprobs([batch]))

    sent, merged, files = [], [], []
    for trainer, directory in ((alone, tmp_path / "alone"), (beside, tmp_path / "beside")):
        snapshot = trainer.weights(1)
        assert snapshot is not None
        sent.append([name for name, _, _ in snapshot.tensors])
        merged.append(dict(merged_weights(trainer.module.model)))
        trainer.export(directory)
        files.append([(directory / f"adapter_{of}").read_bytes() for of in ("config.json", "model.safetensors")])
    assert sent[0] == sent[1] and files[0] == files[1] and merged[0].keys() == merged[1].keys()
    assert all(torch.equal(tensor, merged[1][name]) for name, tensor in merged[0].items())


def test_a_reference_of_another_method_or_model_is_refused(tiny_model_dir: Path, tmp_path: Path):
    write_adapter(tiny_model_dir, tmp_path / "lokr", LoKrConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"reference\.adapter: .* of type LOKR, and the trained one of type LORA"):
        trainer_of(tiny_model_dir, AdapterBlock(rank=4), tmp_path / "lokr")
    with pytest.raises(ValueError, match=r"reference\.adapter: .* holds no adapter"):
        trainer_of(tiny_model_dir, AdapterBlock(rank=4), tmp_path)


RECIPE = {
    "algorithm": {"name": "dpo"},
    "model": {"path": "base", "adapter": {"path": "mine"}},
    "data": {"train": {"path": "rows.jsonl"}, "max_tokens": 64},
    "run": {"steps": 1},
}


@pytest.mark.parametrize(
    ("given", "held", "placed"),
    [
        ({}, "mine", None),
        ({"reference.adapter": "theirs"}, "theirs", None),
        ({"reference.path": "base"}, None, None),
        ({"reference.path": "base", "reference.adapter": "theirs"}, "theirs", None),
        ({"reference.path": "other", "reference.adapter": "theirs"}, None, ("other", "theirs")),
        ({"model.adapter": None, "reference.adapter": "theirs"}, None, ("base", "theirs")),
        ({"reference.path": "base", "model.adapter.quantize": "torchao_int8"}, None, ("base", None)),
        ({"algorithm.name": "simpo"}, None, None),
    ],
    ids=str,
)
def test_who_is_the_reference(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    held: str | None,
    placed: tuple[str, str | None] | None,
):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "mine", "theirs", "other"):
        (tmp_path / name).mkdir()
    (recipe,) = load_recipe(RECIPE, given)
    asked = {role.name: constructor_of(role, recipe, recipe.model, tmp_path, 64, 0)[1] for role in roles(recipe)}
    assert asked["trainer"]["reference"] == (held and str(tmp_path / held))
    assert ("reference" in asked) == (placed is not None)
    if placed is not None:
        block: ModelBlock = asked["reference"]["model"]
        assert block.path == str(tmp_path / placed[0])
        adapter = None if block.adapter is None else block.adapter.path
        assert adapter == (placed[1] and str(tmp_path / placed[1]))


def test_a_repository_with_adapters_in_folders_is_told_how_to_name_one(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda path, **options: str(tmp_path))
    with pytest.raises(ValueError, match=r"model\.adapter\.path: me/several has no adapter_config.json.*DIR/NAME"):
        trainer_of(tiny_model_dir, AdapterBlock(path="me/several"))
