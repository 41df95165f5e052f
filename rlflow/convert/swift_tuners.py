"""ms-swift's tuners, as the adapter block of a recipe: LoRA in short words, others by PEFT's own fields."""

from __future__ import annotations

from typing import Any

from rlflow.convert import folds
from rlflow.convert.given import Draft, Given
from rlflow.recipe.foreign.rows import as_list
from rlflow.recipe.prepared_starts import INIT, prepared_start

PEFT = {
    "vera": (
        "VERA",
        {"r": "vera_rank", "d_initial": "vera_d_initial", "projection_prng_key": "vera_projection_prng_key"},
    ),
    "boft": ("BOFT", {"boft_block_size": "boft_block_size", "boft_block_num": "boft_block_num"}),
    "adalora": (
        "ADALORA",
        {
            "lora_alpha": "lora_alpha",
            **{name: f"adalora_{name}" for name in ("target_r", "init_r", "tinit", "tfinal", "deltaT")},
            **{name: f"adalora_{name}" for name in ("beta1", "beta2", "orth_reg_weight")},
        },
    ),
    "fourierft": ("FOURIERFT", {"n_frequency": "fourier_n_frequency", "scaling": "fourier_scaling"}),
}
"""ms-swift's tuner -> PEFT's, and which of its options is which field."""
_AS_LORA = ("lora", "qlora", "longlora", "lora_llm", "dora")
_STARTS = ("gaussian", "orthogonal")
_LORA_GA = {"direction": "lora_ga_direction", "scale": "lora_ga_scale", "stable_gamma": "lora_ga_stable_gamma"}
_WHY_NOT = {
    "longlora": "it shifts attention, which transformers 5 does not; LoRA is written",
    "adapter": "bottleneck adapters are not PEFT's: train LoRA",
    "reft": "representations are not tuned here: train LoRA",
    "bone": "PEFT calls it MISS: set model.adapter: {peft: {peft_type: MISS}}",
}


def is_adapted(tuner: Any) -> bool:
    """Whether an adapter is trained, and not the model."""
    return tuner in _AS_LORA or tuner in PEFT


def note_tuner(given: Given, draft: Draft, flag: str) -> None:
    """Says of a tuner that there is none of its kind here."""
    tuner = given[flag]
    if tuner not in ("full", "lora", "llamapro", *PEFT):
        # A LoRA in 4 bits, or with lengths of rows, by its other name.
        written = "LoRA is written" if tuner in _AS_LORA else "train LoRA, or all weights"
        draft.note("missing", f"{given.text(flag)}: {_WHY_NOT.get(str(tuner), written)}")


def set_expansion(given: Given, draft: Draft) -> None:
    """Writes the block of a command that trains new layers."""
    draft.set("model.expand.new_layers", given["llamapro_num_new_blocks"], given.text("llamapro_num_new_blocks"))
    if groups := given["llamapro_num_groups"]:
        # There a group gets one layer, however many are asked for.
        draft.set("model.expand.new_layers", groups, given.text("llamapro_num_groups"))


def set_tuner(given: Given, draft: Draft, family: str, flag: str) -> None:
    """Writes the adapter block of a command that trains one.

    Args:
        family: The recipe's, or ``head`` where a model with a head of its own is trained.
    """
    tuner = given[flag]
    targets = as_list(given["target_modules"] or given["lora_target_modules"])
    named = [] if targets in (["all-linear"], ["ALL"]) else targets  # ALL up to version 2
    origin = given.texts("target_modules", "lora_target_modules")
    if family == "head" and tuner in PEFT:
        draft.note("missing", f"{given.text(flag)}: a model with a head takes LoRA and DoRA; LoRA is written")
    if family != "head" and tuner in PEFT:
        _set_method(given, draft, *PEFT[tuner], given.text(flag))
        if named:
            draft.set("model.adapter.peft.target_modules", named, origin)
    elif family != "head" and (given["target_parameters"] or _start(given) is not None):
        _set_lora(given, draft, family)
        if named:
            draft.set("model.adapter.peft.target_modules", named, origin)
    else:
        folds.set_adapter(given, draft, family, rank="lora_rank")
        if named:
            draft.set("model.adapter.target_modules", named, origin)
    if given["init_weights"] not in (True, "true", None) and (family == "head" or _start(given) is None):
        draft.note("missing", f"{given.text('init_weights')}: A is random and B 0 here")
    if (ratio := given["lorap_lr_ratio"]) and tuner in _AS_LORA:
        draft.set("model.adapter.lora_plus_ratio", float(ratio), given.text("lorap_lr_ratio"))
    if given["quant_bits"] == 4 and tuner in _AS_LORA:
        draft.set("model.adapter.quantize", "nf4", given.texts("quant_bits", "quant_method"))
    elif given["quant_bits"] == 8 and given["quant_method"] in (None, "bnb") and tuner in _AS_LORA:
        draft.set("model.adapter.quantize", "int8", given.texts("quant_bits", "quant_method"))
    elif given["quant_bits"]:
        draft.note("missing", f"{given.text('quant_bits')}: a base is trained in 4 bits (nf4, with LoRA) or whole")


def _set_method(given: Given, draft: Draft, method: str, fields: dict[str, str], origin: str) -> None:
    draft.set("model.adapter.peft.peft_type", method, origin)
    for field, option in fields.items():
        if given[option] is not None:
            draft.set(f"model.adapter.peft.{field}", given[option], given.text(option))
    if method == "VERA":
        draft.set("model.dtype", "float32", origin)
        draft.note("default", f"{origin}: PEFT computes VeRA in float32, so model.dtype is that")
    if method == "FOURIERFT":
        draft.note("default", f"{origin}: it starts as its base here; there it starts from random weights")


def _set_lora(given: Given, draft: Draft, family: str) -> None:
    """In PEFT's own fields, which say more."""
    draft.set("model.adapter.peft.peft_type", "LORA", given.texts("target_parameters", "init_weights"))
    for field, option in {"r": "lora_rank", "lora_alpha": "lora_alpha"}.items():
        draft.set(f"model.adapter.peft.{field}", given[option], given.text(option))
    start = _start(given)
    prepared = prepared_start({INIT: start})
    if prepared is not None and prepared.is_subtracted and given["lora_dropout"]:
        draft.note("default", f"{given.text('lora_dropout')}: {start} starts from the base's weights, without dropout")
    elif family == "sft" and given["lora_dropout"]:
        draft.set("model.adapter.peft.lora_dropout", given["lora_dropout"], given.text("lora_dropout"))
    for option in ("use_dora", "use_rslora"):
        if given[option]:
            draft.set(f"model.adapter.peft.{option}", True, given.text(option))
    if parameters := as_list(given["target_parameters"]):
        draft.set("model.adapter.peft.target_parameters", parameters, given.text("target_parameters"))
    if start is not None:
        draft.set("model.adapter.peft.init_lora_weights", start, given.text("init_weights"))
    if start == "lora_ga":
        for field, option in _LORA_GA.items():
            if given[option] is not None:
                draft.set(f"model.adapter.peft.lora_ga_config.{field}", given[option], given.text(option))


def _start(given: Given) -> str | None:
    """Of a LoRA, as PEFT calls it; None where A is random and B 0, or where there is no such start here."""
    start = str(given["init_weights"]).lower().replace("-", "_")
    return start if start in _STARTS or prepared_start({INIT: start}) is not None else None
