"""The policy losses of verl that are kinds of ours with numbers of their own."""

from __future__ import annotations

from rlflow.convert.given import Draft, Given
from rlflow.recipe.foreign.verl import ACTOR

KINDS = {"geo_mean": "gmpo", "dppo_tv": "dppo", "dppo_kl": "dppo", "clip_cov": "clip_cov", "kl_cov": "kl_cov"}
"""``loss_mode`` -> ``algorithm.loss.kind``, which is the name of its row, too."""
_NUMBERS = {
    "dppo": {"bound_low": "clip_ratio_low", "bound_high": "clip_ratio_high", "max_weight": "clip_ratio_c"},
    "clip_cov": {
        "share": "policy_loss.clip_cov_ratio",
        "covariance_low": "policy_loss.clip_cov_lb",
        "covariance_high": "policy_loss.clip_cov_ub",
    },
    "kl_cov": {"share": "policy_loss.kl_cov_ratio", "coef": "policy_loss.ppo_kl_coef"},
}
"""Kind -> our number: verl's key below the actor."""


def set_kind(given: Given, draft: Draft, mode: str, name: str) -> None:
    """What a loss of `KINDS` has beside the clip that others have.

    Args:
        mode: verl's ``loss_mode``.
        name: The row of the estimator.
    """
    kind, why = KINDS[mode], given.text(f"{ACTOR}.policy_loss.loss_mode")
    if name != "grpo":
        draft.set("algorithm.loss.kind", kind, why)
    if kind == "dppo":
        draft.set("algorithm.loss.divergence", mode.removeprefix("dppo_"), why)
        draft.set("algorithm.correction.old_policy", "trainer", "but with rollout_correction.bypass_mode")
    plain = given[f"{ACTOR}.clip_ratio"]
    for ours, theirs in _NUMBERS.get(kind, {}).items():
        flag = f"{ACTOR}.{theirs}"
        value = plain if given[flag] is None else given[flag]
        draft.set(f"algorithm.loss.{ours}", float(value), given.text(flag))
    if kind == "kl_cov" and draft.values["algorithm.groups.updates_per_step"] == 1:
        draft.set("algorithm.groups.epochs_per_step", 2, "in a step's first update the KL of kl_cov is 0")
        draft.note("trap", f"{why}: with one update a step its KL does nothing there; here a step has two passes")
