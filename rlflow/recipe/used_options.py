"""Which options of the algorithm block do anything. One that does nothing may only stand at a default.

    option -> when: the row's objective, or another option, at one of these values

The deciding option must do something itself: a row that has no use for ``loss.kind`` has none for what it decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

from rlflow.recipe.block import Conflict
from rlflow.recipe.presets import ALGORITHMS
from rlflow.recipe.yaml_source import dump_value

if TYPE_CHECKING:
    from rlflow.recipe.algorithm_blocks import AlgorithmBlock

OBJECTIVE = "objective"
"""In place of a key: the objective of the row."""


class When(NamedTuple):
    key: str
    values: tuple[Any, ...] = ()
    """Any but zero, false and null where there are none."""

    def __str__(self) -> str:
        return f"{self.key} {'/'.join(map(dump_value, self.values))}".rstrip()


_POLICY = (When(OBJECTIVE, ("policy",)),)
_PAIRS = (When(OBJECTIVE, ("preference",)),)
_KTO = (When(OBJECTIVE, ("kto",)),)
_OF_ROLLOUT = (When("advantage.estimator", ("group_mean", "leave_one_out", "batch_mean")),)
_OF_CRITIC = (When("advantage.estimator", ("gae",)),)
_DIVIDED = (
    When("advantage.scale", ("group_std", "batch_std")),
    When("groups.reward_scaling", ("normalize_each", "normalize_sum")),
)
_CLIPPED = (When("loss.kind", ("clip", "cispo")),)
_SAPO = (When("loss.kind", ("sapo",)),)
_KL = (When("kl.coef"),)
_CORRECTED = (When("correction.mode", ("truncate", "mask", "weighted_mask")),)

USES: dict[str, tuple[When, ...]] = {
    "group_size": _POLICY,
    "advantage.estimator": _POLICY,
    "advantage.scale": _OF_ROLLOUT,
    "advantage.ddof": (*_DIVIDED, When("advantage.whiten")),
    "advantage.eps": _DIVIDED,
    "advantage.whiten": _POLICY,
    "advantage.gamma": (When("advantage.estimator", ("return", "gae")),),
    "advantage.gae_lambda": _OF_CRITIC,
    "loss.kind": _POLICY,
    "loss.ratio": _POLICY,
    "loss.clip_low": _CLIPPED,
    "loss.clip_high": _CLIPPED,
    "loss.dual_clip": (When("loss.kind", ("clip",)),),
    "loss.reduction": (When(OBJECTIVE, ("policy", "sft")), When("preference.sft_coef")),
    "loss.entropy_coef": _POLICY,
    "loss.sapo_tau_positive": _SAPO,
    "loss.sapo_tau_negative": _SAPO,
    "kl.coef": _POLICY,
    "kl.estimator": _KL,
    "kl.placement": _KL,
    "kl.unbiased_gradient": (When("kl.placement", ("loss",)),),
    "kl.target": _KL,
    "kl.horizon": (When("kl.target"),),
    "correction.old_policy": _POLICY,
    "correction.mode": _POLICY,
    "correction.level": _CORRECTED,
    "correction.low": _CORRECTED,
    "correction.high": _CORRECTED,
    "groups.require_signal": _POLICY,
    "groups.max_resamples": (When("groups.require_signal"),),
    "groups.mask_truncated": _POLICY,
    "groups.count_masked": _POLICY,
    "groups.overlong_buffer": _POLICY,
    "groups.overlong_penalty": (When("groups.overlong_buffer"),),
    "groups.updates_per_step": _POLICY,
    "groups.epochs_per_step": _POLICY,
    "groups.reward_scaling": _POLICY,
    "critic.learning_rate": _OF_CRITIC,
    "critic.clip": _OF_CRITIC,
    "critic.path": _OF_CRITIC,
    "critic.warmup_steps": _OF_CRITIC,
    "critic.workers": _OF_CRITIC,
    "critic.cpus_per_worker": _OF_CRITIC,
    "critic.gpus_per_worker": _OF_CRITIC,
    "preference.loss": _PAIRS,
    "preference.beta": (When(OBJECTIVE, ("preference", "kto")),),
    "preference.label_smoothing": (When("preference.loss", ("sigmoid", "robust", "aot", "aot_unpaired", "exo_pair")),),
    "preference.sft_coef": _PAIRS,
    "preference.reference_free": _PAIRS,
    "preference.length_normalized": _PAIRS,
    "preference.gamma": (When("preference.loss", ("sigmoid",)),),
    "preference.desirable_weight": _KTO,
    "preference.undesirable_weight": _KTO,
    "preference.center_coef": (When(OBJECTIVE, ("reward_model",)),),
}


def has_effect(algorithm: AlgorithmBlock, option: str) -> bool:
    """Whether an option does anything in the algorithm as it is set."""
    return any(_holds(algorithm, when) for when in USES[option])


def can_have_effect(name: str, option: str) -> bool:
    """Whether an option does anything in a row, whatever else is set."""
    return any(
        ALGORITHMS[name].objective in when.values if when.key == OBJECTIVE else can_have_effect(name, when.key)
        for when in USES[option]
    )


def needed(name: str, option: str) -> str:
    """What it takes in a row for an option to have an effect, in words; empty where nothing decides but the row."""
    settings = [when for when in USES[option] if when.key != OBJECTIVE and can_have_effect(name, when.key)]
    return " or ".join(map(str, settings))


def unused_options(algorithm: AlgorithmBlock) -> Iterator[Conflict]:
    """Options that were set and do nothing."""
    name = algorithm.name
    for option, uses in USES.items():
        value, neutral = _value_and_default(algorithm, option)
        default = ALGORITHMS[name].value(option, neutral)
        if value in (default, neutral) or has_effect(algorithm, option):
            continue
        # A coefficient of 0 that is to adapt is no ablation: it stays 0.
        if option != "kl.target" and any(_is_switched_off(algorithm, when) for when in uses):
            continue
        without = f"has no effect without {needed(name, option)}"
        why = without if can_have_effect(name, option) else f"{name} has no use for it"
        deciding = ("name" if when.key == OBJECTIVE else when.key for when in uses)
        yield Conflict((option, *deciding), f"{why}: remove it, or set it to {dump_value(default)}")


def _holds(algorithm: AlgorithmBlock, when: When) -> bool:
    if when.key == OBJECTIVE:
        return ALGORITHMS[algorithm.name].objective in when.values
    value, _ = _value_and_default(algorithm, when.key)
    return (value in when.values if when.values else bool(value)) and has_effect(algorithm, when.key)


def _is_switched_off(algorithm: AlgorithmBlock, when: When) -> bool:
    """Somebody set what decides to nothing, as for an ablation: what hangs on it may stay."""
    if when.key == OBJECTIVE or not has_effect(algorithm, when.key):
        return False
    *blocks, field = when.key.split(".")
    block = reduce(getattr, blocks, algorithm)
    return field in block.model_fields_set and getattr(block, field) in (0, False, None, "none")


def _value_and_default(algorithm: AlgorithmBlock, option: str) -> tuple[Any, Any]:
    """What an option is set to, and the schema's default."""
    *blocks, field = option.split(".")
    block = reduce(getattr, blocks, algorithm)
    return getattr(block, field), type(block).model_fields[field].default
