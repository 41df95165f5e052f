"""What to change in a recipe that does not fit: each change is tried on the estimate, largest saving first."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from rlflow.actor_memory import longest_sequence
from rlflow.recipe import Recipe

LEAST_SAVING = 0.01
"""Changes that save less than this share are not worth a line."""


@dataclass(frozen=True, slots=True)
class Remedy:
    """An override of one key."""

    key: str
    value: Any
    saves: int
    """Bytes, by itself."""

    def __str__(self) -> str:
        """As it stands in a command line."""
        return shlex.quote(f"{self.key}={shown(self.value)}")


def remedies(recipe: Recipe, bytes_of: Callable[[Recipe], int]) -> list[Remedy]:
    """Changes of one key that each make a recipe smaller, the largest saving first.

    Args:
        bytes_of: The estimate of a whole recipe.
    """
    before = bytes_of(recipe)
    changes = ((key, value, _with(recipe, key, value)) for key, value in _candidates(recipe))
    found = [Remedy(key, value, before - bytes_of(changed)) for key, value, changed in changes if changed is not None]
    return sorted((remedy for remedy in found if remedy.saves > LEAST_SAVING * before), key=lambda one: -one.saves)


def enough(
    recipe: Recipe, found: Sequence[Remedy], bytes_of: Callable[[Recipe], int], limit: int
) -> list[Remedy] | None:
    """The first of these changes that together stay within ``limit``; None where all of them do not.

    Changes that exclude one before them, or save nothing beside those, are left out.
    """
    chosen = []
    for remedy in found:
        joined = _with(recipe, remedy.key, remedy.value)
        if joined is not None and bytes_of(joined) < bytes_of(recipe):
            recipe = joined
            chosen.append(remedy)
        if bytes_of(recipe) <= limit:
            return chosen
    return None


def _candidates(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """What could be less: workers and sizes half, switches on."""
    trainer, rollout, critic = recipe.trainer, recipe.rollout, recipe.critic
    if not trainer.gradient_checkpointing:
        yield "trainer.gradient_checkpointing", True
    if (budget := max(longest_sequence(recipe), trainer.tokens_per_micro_batch // 2)) < trainer.tokens_per_micro_batch:
        yield "trainer.tokens_per_micro_batch", budget
    if recipe.model.dtype == "float32":
        yield "model.dtype", "bfloat16"
        yield "trainer.fsdp.mixed_precision", True
    if not trainer.fsdp.reshard_after_forward:
        yield "trainer.fsdp.reshard_after_forward", True
    if recipe.model.adapter is None:
        yield "model.adapter", {"kind": "lora"}
    if trainer.gpus_per_worker:
        yield from _for_gpus(recipe)
    if critic is not None and critic.gpus_per_worker:
        yield "algorithm.critic.workers", critic.workers * 2
    workers = {
        "trainer": trainer.workers,
        "rollout": rollout.workers,
        "reference": recipe.reference.workers,
        "reward_server": recipe.reward_server.workers,
        "algorithm.critic": 1 if critic is None else critic.workers,
    }
    for block, count in workers.items():
        if count > 1:
            yield f"{block}.workers", count // 2
    if recipe.reward_server.children > 1:
        yield "reward_server.children", recipe.reward_server.children // 2
    if rollout.max_num_seqs > 1:
        yield "rollout.max_num_seqs", rollout.max_num_seqs // 2
    yield "rollout.kv_cache_gib", rollout.kv_cache_gib / 2
    if rollout.max_new_tokens > 1:
        yield "rollout.max_new_tokens", rollout.max_new_tokens // 2


def _for_gpus(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """What leaves a trainer's GPUs, or is shared by more of them."""
    trainer = recipe.trainer
    yield "trainer.workers", trainer.workers * 2
    if trainer.engine == "deepspeed":
        if trainer.deepspeed.stage < 3:
            yield "trainer.deepspeed.stage", 3
        if trainer.deepspeed.offload == "none":
            yield "trainer.deepspeed.offload", "optimizer"
        return
    if not trainer.fsdp.offload:
        yield "trainer.fsdp.offload", True
    if trainer.optimizer.kind == "adamw":
        yield "trainer.optimizer.kind", "adamw_8bit"


def _with(recipe: Recipe, key: str, value: Any) -> Recipe | None:
    """None where the value does not go together with others of the recipe."""
    data = recipe.model_dump()
    *blocks, last = key.split(".")
    block = data
    for name in blocks:
        block = block[name]
    block[last] = value
    try:
        return Recipe.model_validate(data)
    except ValidationError:
        return None


def shown(value: Any) -> str:
    """A value as YAML has it, in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(entry)}" for key, entry in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
