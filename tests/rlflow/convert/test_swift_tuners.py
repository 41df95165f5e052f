"""ms-swift's tuners and what they start from, as adapter blocks; what has no counterpart is named."""

from __future__ import annotations

from typing import Any

import pytest

from rlflow.recipe.peft_methods import TYPE

SFT = "swift sft --model m --dataset d.jsonl "


def missing(conversion: Any) -> str:
    return "\n".join(note.text for note in conversion.notes if note.kind == "missing")


@pytest.mark.parametrize(
    ("flags", "peft"),
    [
        ("--train_type vera --vera_rank 64", {TYPE: "VERA", "r": 64}),
        ("--tuner_type boft --boft_block_size 8", {TYPE: "BOFT", "boft_block_size": 8}),
        (
            "--init_weights lora-ga --lora_ga_direction ArBr --lora_ga_batch_size 2",
            {
                TYPE: "LORA",
                "r": 8,
                "lora_alpha": 32,
                "init_lora_weights": "lora_ga",
                "lora_ga_config": {"direction": "ArBr"},
            },
        ),
        (
            "--init_weights eva --lora_dropout 0",
            {TYPE: "LORA", "r": 8, "lora_alpha": 32, "init_lora_weights": "eva"},
        ),
        (
            "--tuner_type adalora --adalora_init_r 24 --adalora_tinit 10 --adalora_deltaT 5",
            {TYPE: "ADALORA", "lora_alpha": 32, "init_r": 24, "tinit": 10, "deltaT": 5},
        ),
        (
            "--tuner_type fourierft --fourier_n_frequency 500 --target_modules q_proj",
            {TYPE: "FOURIERFT", "n_frequency": 500, "target_modules": ["q_proj"]},
        ),
        (
            "--tuner_type lora --lora_rank 4 --lora_alpha 8 --lora_dropout 0 --init_weights orthogonal",
            {TYPE: "LORA", "r": 4, "lora_alpha": 8, "init_lora_weights": "orthogonal"},
        ),
        (
            "--tuner_type lora --lora_dropout 0 --use_rslora true --target_parameters experts.down_proj",
            {
                TYPE: "LORA",
                "r": 8,
                "lora_alpha": 32,
                "use_rslora": True,
                "target_parameters": ["experts.down_proj"],
            },
        ),
    ],
)
def test_a_tuner_of_pefts_is_written_in_pefts_fields(converted, flags: str, peft: dict[str, Any]):
    recipe, conversion = converted(SFT + flags)
    assert recipe.model.adapter.peft == peft
    assert recipe.trainer.learning_rate == 1e-4
    assert recipe.model.dtype == ("float32" if peft[TYPE] == "VERA" else "bfloat16")
    assert missing(conversion) == ""


@pytest.mark.parametrize(
    ("flags", "says", "rank"),
    [
        ("--tuner_type longlora", "it shifts attention, which transformers 5 does not", 8),
        ("--tuner_type reft", "representations are not tuned here", None),
        ("--tuner_type adapter", "bottleneck adapters are not PEFT's", None),
        ("--tuner_type vera --task_type embedding", "a model with a head takes LoRA and DoRA; LoRA is written", 8),
        ("--init_weights loftq", "A is random and B 0 here", 8),
    ],
)
def test_what_has_no_counterpart_is_named(converted, flags: str, says: str, rank: int | None):
    recipe, conversion = converted(SFT + flags)
    assert says in missing(conversion)
    adapter = recipe.model.adapter
    assert (adapter and adapter.rank) == rank


def test_llama_pros_new_layers_are_those_of_the_recipe(converted):
    recipe, conversion = converted(SFT + "--tuner_type llamapro --llamapro_num_new_blocks 8 --llamapro_num_groups 4")
    # A group gets one layer there, whatever their number.
    assert (recipe.model.expand.new_layers, recipe.model.expand.num_groups) == (4, 4)
    assert converted(SFT + "--tuner_type llamapro")[0].model.expand.new_layers == 4
    assert (recipe.model.adapter, recipe.trainer.learning_rate, missing(conversion)) == (None, 1e-4, "")


def test_an_adapter_on_disk_settles_what_peft_was_told(converted):
    recipe, _ = converted(SFT + "--tuner_type vera --vera_rank 64 --adapters a/b")
    assert (recipe.model.adapter.path, recipe.model.adapter.peft) == ("a/b", None)


@pytest.mark.parametrize(
    ("flags", "path", "adapter"),
    [
        ("--adapters a/b", "m/x", None),
        ("--adapters a/b --ref_adapters a/b", None, None),
        ("--adapters a/b --ref_adapters c/d", None, "c/d"),
        ("--ref_model m/y --ref_adapters c/d", "m/y", "c/d"),
        ("--ref_adapters c/d", None, "c/d"),
        ("", None, None),
    ],
)
def test_the_reference_is_what_the_command_compares_with(converted, flags: str, path: str | None, adapter: str | None):
    command = "swift rlhf --rlhf_type dpo --model m/x --dataset d.jsonl --tuner_type lora "
    recipe, conversion = converted(command + flags)
    assert (recipe.reference.path, recipe.reference.adapter) == (path, adapter)
    assert missing(conversion) == ""


@pytest.mark.parametrize("flag", ["--target_modules all-linear", "--lora_target_modules ALL"])
def test_all_linear_layers_are_rlflows_own_default(converted, flag: str):
    recipe, conversion = converted(f"{SFT} --tuner_type lora {flag}")
    assert recipe.model.adapter.target_modules == "all-linear" and missing(conversion) == ""
