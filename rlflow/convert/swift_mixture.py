"""CHORD's flags of ms-swift: demonstrations beside rollouts."""

from __future__ import annotations

from rlflow.convert import folds
from rlflow.convert.given import Draft, Given
from rlflow.convert.swift_sources import sources_of
from rlflow.recipe.foreign.rows import as_list

_NUMBERS = {
    "mu_peak": "chord_mu_peak",
    "mu_valley": "chord_mu_valley",
    "mu_warmup_steps": "chord_mu_warmup_steps",
    "mu_decay_steps": "chord_mu_decay_steps",
    "phi": "chord_enable_phi_function",
}
"""Ours of ``algorithm.mixture`` -> ms-swift's."""


def set_mixture(given: Given, draft: Draft, machines: folds.Machines) -> None:
    """The demonstrations and their weight, where the command names some."""
    sources = [source for text in as_list(given["chord_sft_dataset"]) for source in sources_of(str(text), given)]
    if not sources:
        return
    why = given.text("chord_sft_dataset")
    if draft.values["algorithm.name"] == "grpo":
        draft.set("algorithm.name", "chord", why)
    draft.set("demonstrations.train", sources[0] if len(sources) == 1 else sources, why)
    world = max(1, machines.gpus)
    per_device, accumulation = given["chord_sft_per_device_train_batch_size"], given["gradient_accumulation_steps"] or 1
    per_step = (per_device or 1) * accumulation * world * draft.values["algorithm.groups.updates_per_step"]
    sizes = given.texts("chord_sft_per_device_train_batch_size", "gradient_accumulation_steps")
    draft.set("demonstrations.per_step", per_step, f"{sizes}, {world} processes, every update of the step")
    for ours, theirs in _NUMBERS.items():
        if given[theirs] is not None:
            value = float(given[theirs]) if ours in ("mu_peak", "mu_valley") else given[theirs]
            draft.set(f"algorithm.mixture.{ours}", value, given.text(theirs))
