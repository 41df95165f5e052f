"""What the flags of GRPO and its kin are together, in TRL and in ms-swift: batches, loss, advantages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rlflow.convert.given import Draft, Given

ROWS = {"dr_grpo": "dr_grpo", "cispo": "cispo", "sapo": "sapo"}
"""``loss_type`` -> algorithm; grpo for all others."""
REDUCTIONS = {
    "grpo": "sequence",
    "sapo": "sequence",
    "bnpo": "token",
    "dapo": "token",
    "cispo": "token",
    "dr_grpo": "fixed_length",
}
SCALES = {
    "group": "group_std",
    "batch": "batch_std",
    "none": "none",
    "gdpo": "none",
    "True": "group_std",
    "False": "none",
}
LEVELS = {"token": "token", "sequence": "sequence", "sequence_token": "sequence_token"}
CORRECTIONS = {
    "token_truncate": ("truncate", "token"),
    "token_mask": ("weighted_mask", "token"),
    "sequence_truncate": ("truncate", "sequence"),
    "sequence_mask": ("weighted_mask", "sequence"),
}


@dataclass(frozen=True, slots=True)
class Batch:
    """A step of rlflow: the prompts of one generation, and the optimizer updates that are made of it."""

    prompts: int
    updates: int
    """That the others call steps, with all passes over the generation."""


WHOLE_SAMPLING = {
    "rollout.top_p": 1.0,
    "rollout.top_k": 0,
    "sampling.min_p": 0.0,
    "sampling.repetition_penalty": 1.0,
}
"""With which the engine draws from the trainer's distribution."""


def set_batch(given: Given, draft: Draft, world: int, per_device: int, accumulation: int) -> Batch:
    """Prompts a step of a command that counts completions.

    A generation has ``generation_batch_size`` completions, per device, process and micro-step of
    ``steps_per_generation``, which is ``gradient_accumulation_steps`` unless it is given; an optimizer step takes
    ``per device x accumulation x world`` of them. Where a generation is smaller than that, several make one step.
    """
    group = given["num_generations"]
    of_update = per_device * accumulation * world
    per_generation = given["steps_per_generation"] or accumulation
    generated = given["generation_batch_size"] or per_device * world * per_generation
    passes = given["num_iterations"] or 1
    completions = max(generated, of_update)
    updates = max(1, round(completions / of_update))
    prompts = max(1, round(completions / group))
    if prompts % updates:
        draft.note(
            "trap",
            f"{updates} updates of {_many(prompts, 'prompt')} cut groups apart there; here an update has "
            f"whole groups, so that there are {math.gcd(prompts, updates)}: raise data.prompts_per_step for more",
        )
        updates = math.gcd(prompts, updates)
    sizes = f"{per_device} x {accumulation} accumulated x {world} processes"
    of_generation = given.texts("generation_batch_size", "steps_per_generation")
    why = f"{sizes} = {of_update} completions an update, / {group} generations = {_number(of_update / group)}"
    if completions != of_update:
        why += f"; {completions} completions a generation ({of_generation})"
    draft.set("data.prompts_per_step", prompts, why)
    draft.set("algorithm.group_size", group, given.text("num_generations"))
    draft.set(
        "algorithm.groups.updates_per_step", updates, f"{completions} completions a generation / {of_update} an update"
    )
    draft.set("algorithm.groups.epochs_per_step", passes, given.text("num_iterations"))
    if completions % group:
        draft.note(
            "trap", f"{completions} completions are no multiple of {group} a prompt: the framework refuses this command"
        )
    elif of_update <= group:
        share = "one prompt" if of_update == group else f"{_number(of_update / group)} of a prompt's group"
        draft.note(
            "trap",
            f"{sizes} = {of_update} completions with {group} a prompt is {share} an optimizer step, whose gradient is "
            f"mostly noise. Here a step has {_many(prompts, 'prompt')} and {_many(updates, 'update')}, as there; "
            "raise data.prompts_per_step to 16 or more and divide the steps by as much",
        )
    return Batch(prompts, updates * passes)


def set_loss(given: Given, draft: Draft, *, high: str, absolute_cispo: bool = True) -> None:
    """The algorithm's row, the ratio, the clip and the reduction.

    Args:
        high: The flag of the upper clip, None where it is the lower one's.
        absolute_cispo: CISPO's bound is of the weight itself, and not of what it has more than 1.
    """
    kind, level = str(given["loss_type"] or "grpo"), given["importance_sampling_level"]
    if kind not in REDUCTIONS:
        draft.note("missing", f"{given.text('loss_type')}: there is no such loss; grpo's stands for it")
    name = ROWS.get(kind, "grpo")
    if level in ("sequence", "sequence_token") and name == "grpo":
        name = {"sequence": "gspo", "sequence_token": "gspo_token"}[level]
    draft.set("algorithm.name", name, given.texts("loss_type", "importance_sampling_level"))
    draft.set("algorithm.loss.reduction", REDUCTIONS.get(kind, "sequence"), given.text("loss_type"))
    draft.set("algorithm.loss.ratio", LEVELS.get(level, "token"), given.text("importance_sampling_level"))
    low, upper = given["epsilon"], given[high]
    upper = low if upper is None else upper
    if kind == "cispo":
        _set_cispo(given, draft, high, upper, absolute_cispo)
    elif kind != "sapo":
        draft.set("algorithm.loss.clip_low", low, given.text("epsilon"))
        draft.set("algorithm.loss.clip_high", upper, given.texts(high, "epsilon"))


def _set_cispo(given: Given, draft: Draft, high: str, upper: float, absolute: bool) -> None:
    bound = upper - 1 if absolute else upper
    if bound < 0:
        draft.note(
            "trap",
            f"{given.texts(high, 'epsilon')}: CISPO's bound is of the weight itself, and {upper:g} would "
            "cut every one; left at algorithm.loss.clip_high: 4, which is 5 there",
        )
        return
    draft.set("algorithm.loss.clip_high", round(bound, 9), f"{given.text(high)}: the bound is 1 + clip_high here")
    draft.set("algorithm.loss.clip_low", 1.0, "no lower bound")


def set_scale(given: Given, draft: Draft, default: str, normalize_each: bool) -> None:
    """What advantages are divided by. ``default``: where scale_rewards is not given."""
    value = str(given["scale_rewards"] if given["scale_rewards"] is not None else default)
    draft.set(
        "algorithm.advantage.scale",
        SCALES.get(value.lower(), SCALES.get(value, "group_std")),
        given.text("scale_rewards"),
    )
    if normalize_each or value == "gdpo":
        draft.set("algorithm.groups.reward_scaling", "normalize_each", given.texts("scale_rewards"))


def set_correction(draft: Draft, mode: str | None, why: str, *, low: float | None, high: float | None) -> None:
    """What is done where engine and trainer disagree; after all of sampling is set."""
    cut_by = next((key for key, whole in WHOLE_SAMPLING.items() if draft.values.get(key, whole) != whole), None)
    if mode is None or mode not in CORRECTIONS or cut_by is not None:
        if mode is not None and cut_by is not None:
            draft.note(
                "missing", f"{why}: {cut_by} changes what is sampled, so that engine and trainer cannot be compared"
            )
        draft.set("algorithm.correction.mode", "none", why)
        return
    kind, level = CORRECTIONS[mode]
    draft.set("algorithm.correction.mode", kind, why)
    draft.set("algorithm.correction.level", level, why)
    draft.set("algorithm.correction.high", high if high is not None else 1e6, why)
    draft.set("algorithm.correction.low", low or 0.0, why)


def set_rewards(draft: Draft, rewards: list[dict[str, Any]], weights: list[float] | None, why: str) -> None:
    for index, reward in enumerate(rewards):
        if weights and index < len(weights):
            reward["weight"] = weights[index]
    if rewards:
        draft.set("rewards", rewards, why)
    else:
        draft.note("to do", "no reward is named: `rewards` needs one, e.g. {name: math_accuracy}")


def _number(value: float) -> str:
    return f"{value:g}" if value == round(value, 3) else f"{value:.3f}"


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number > 1)}"
