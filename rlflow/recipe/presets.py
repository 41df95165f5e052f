"""The algorithm table: a name is a row, a row is data. Functions are bound to the words in rlflow.algorithms.

Defaults are those of the paper that defines the name; every one can be overridden in the recipe. docs/algorithms.md
gives the equation of each row and where each default stands. Group sizes are the exception: papers use what their
machines hold (GRPO 64, DAPO 16, Dr. GRPO 8), the rows 8.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Learning:
    """What algorithms that learn from the same kind of row have in common, from the row to the loss."""

    family: Literal["online", "sft", "preference"]
    """online: rollouts and rewards; sft: demonstrations; preference: judged answers."""
    objective: Literal["policy", "sft", "preference", "kto", "reward_model"]
    """What the trainer minimises: a key of rlflow.algorithms.objectives.OBJECTIVES."""
    data_row: Literal["prompt", "example", "pair", "margin_pair", "labelled"]
    """What a row of data is: a prompt, an example, two answers of which one is better (with a margin by which it should
    win), or an answer with a label."""
    head: Literal["token", "scalar"] = "token"
    """What the trained model puts out: logits of every token, or one score."""
    batch_targets: Literal["none", "pair_loss", "mismatched_kl"] = "none"
    """What the loss needs to know of the whole batch, from a forward pass before the update: what ``preference.loss``
    asks for, or KTO's KL. A key of rlflow.algorithms.batch_targets.BATCH_TARGETS."""
    weights: Literal["all", "chosen"] = "all"
    """Whose tokens ``loss.reduction`` weighs: those of all samples, or of the chosen answers, whose likelihood a
    preference loss may add. A key of rlflow.algorithms.weighing.WEIGHTS."""
    has_entropies: bool = True
    """Whether the entropy of the policy is among the metrics."""

    @property
    def unit_size(self) -> int:
        """Samples that the objective must see together, in order: a pair's two."""
        return 2 if self.data_row in ("pair", "margin_pair") else 1


FROM_ROLLOUTS = Learning("online", "policy", "prompt")
FROM_EXAMPLES = Learning("sft", "sft", "example")
FROM_PAIRS = Learning(
    "preference", "preference", "pair", batch_targets="pair_loss", weights="chosen", has_entropies=False
)
FROM_LABELS = Learning("preference", "kto", "labelled", batch_targets="mismatched_kl", has_entropies=False)
REWARDS_FROM_PAIRS = Learning(
    "preference", "reward_model", "margin_pair", head="scalar", weights="chosen", has_entropies=False
)


@dataclass(frozen=True, slots=True)
class AlgorithmRow:
    learning: Learning
    summary: str
    source: str
    """The paper that defines the row."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Recipe keys under ``algorithm`` that differ from the schema's neutral defaults."""

    @property
    def family(self) -> Literal["online", "sft", "preference"]:
        return self.learning.family

    @property
    def objective(self) -> Literal["policy", "sft", "preference", "kto", "reward_model"]:
        return self.learning.objective

    def value(self, key: str, otherwise: Any) -> Any:
        """The row's default of a dotted key; ``otherwise`` where it has none of its own."""
        value: Any = self.defaults
        for part in key.split("."):
            if part not in value:
                return otherwise
            value = value[part]
        return value


_GROUP_STD = {"estimator": "group_mean", "scale": "group_std", "ddof": 1}

ALGORITHMS: dict[str, AlgorithmRow] = {
    "grpo": AlgorithmRow(
        FROM_ROLLOUTS,
        "group-normalised advantages, PPO clip, KL (k3) in the loss",
        "arXiv 2402.03300",
        {
            "group_size": 8,
            "advantage": _GROUP_STD,
            "loss": {"reduction": "sequence"},
            "kl": {"coef": 0.04, "estimator": "k3", "placement": "loss"},
        },
    ),
    "dr_grpo": AlgorithmRow(
        FROM_ROLLOUTS,
        "GRPO without its two biases: no division by the group's std, none by the answer's length",
        "arXiv 2503.20783",
        {"group_size": 8, "advantage": {"estimator": "group_mean"}, "loss": {"reduction": "fixed_length"}},
    ),
    "dapo": AlgorithmRow(
        FROM_ROLLOUTS,
        "clip-higher, dynamic sampling, soft overlong punishment, mean over all tokens, no KL",
        "arXiv 2503.14476",
        {
            "group_size": 8,
            "advantage": _GROUP_STD,
            "loss": {"clip_high": 0.28, "reduction": "token"},
            "groups": {"require_signal": True, "overlong_buffer": 0.2},
        },
    ),
    "gspo": AlgorithmRow(
        FROM_ROLLOUTS,
        "ratio and clip of whole sequences (geometric mean)",
        "arXiv 2507.18071",
        {
            "group_size": 8,
            "advantage": _GROUP_STD,
            "loss": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "reduction": "sequence"},
        },
    ),
    "gspo_token": AlgorithmRow(
        FROM_ROLLOUTS,
        "GSPO's ratio with a gradient for each token",
        "arXiv 2507.18071, section 4.3",
        {
            "group_size": 8,
            "advantage": _GROUP_STD,
            "loss": {"ratio": "sequence_token", "clip_low": 3e-4, "clip_high": 4e-4, "reduction": "sequence"},
        },
    ),
    "ppo": AlgorithmRow(
        FROM_ROLLOUTS,
        "a critic's advantages (GAE), PPO clip, KL (k1) in the reward, whitening",
        "arXiv 1707.06347, 2203.02155",
        {
            "advantage": {"estimator": "gae", "gamma": 1.0, "gae_lambda": 0.95, "whiten": True},
            "loss": {"reduction": "token"},
            "kl": {"coef": 0.02, "estimator": "k1", "placement": "reward"},
        },
    ),
    "rloo": AlgorithmRow(
        FROM_ROLLOUTS,
        "REINFORCE on whole answers, the mean of the group's other rewards as baseline, KL (k1) in the reward",
        "arXiv 2402.14740",
        {
            "group_size": 8,
            "advantage": {"estimator": "leave_one_out"},
            "loss": {"ratio": "sequence_product", "reduction": "sequence"},
            "kl": {"coef": 0.03, "estimator": "k1", "placement": "reward"},
        },
    ),
    "reinforce++": AlgorithmRow(
        FROM_ROLLOUTS,
        "no baseline, advantages whitened over the batch's tokens, KL (k1) in the reward, PPO clip",
        "arXiv 2501.03262",
        {
            "advantage": {"estimator": "return", "whiten": True},
            "loss": {"reduction": "token"},
            "kl": {"coef": 0.01, "estimator": "k1", "placement": "reward"},
        },
    ),
    "reinforce++_baseline": AlgorithmRow(
        FROM_ROLLOUTS,
        "the group's mean as baseline, advantages whitened over the batch's tokens, KL (k2) in the loss, PPO clip",
        "arXiv 2501.03262",
        {
            "group_size": 8,
            "advantage": {"estimator": "group_mean", "whiten": True},
            "loss": {"reduction": "token"},
            "kl": {"coef": 1e-3, "estimator": "k2", "placement": "loss"},
        },
    ),
    "cispo": AlgorithmRow(
        FROM_ROLLOUTS,
        "clipped importance weights under a stop-gradient: no token's gradient is lost",
        "arXiv 2506.13585",
        {
            "group_size": 8,
            "advantage": _GROUP_STD,
            "loss": {"kind": "cispo", "clip_low": 1.0, "clip_high": 4.0, "reduction": "token"},
        },
    ),
    "sapo": AlgorithmRow(
        FROM_ROLLOUTS,
        "a smooth gate on the ratio instead of a clip",
        "arXiv 2511.20347",
        {
            "group_size": 8,
            "advantage": _GROUP_STD,
            "loss": {"kind": "sapo", "tau_positive": 1.0, "tau_negative": 1.05, "reduction": "sequence"},
        },
    ),
    "sft": AlgorithmRow(FROM_EXAMPLES, "cross-entropy on the loss tokens of the batch", "arXiv 2203.02155"),
    "pretrain": AlgorithmRow(FROM_EXAMPLES, "cross-entropy on every token of plain text", "arXiv 2005.14165"),
    "dpo": AlgorithmRow(
        FROM_PAIRS,
        "logistic loss on the implicit reward's margin; preference.loss has the other pairwise losses",
        "arXiv 2305.18290",
        {"preference": {"loss": "sigmoid", "beta": 0.1}},
    ),
    "cpo": AlgorithmRow(
        FROM_PAIRS,
        "DPO without a reference, and the chosen answers' likelihood",
        "arXiv 2401.08417",
        {"preference": {"loss": "sigmoid", "beta": 0.1, "reference_free": True, "sft_coef": 1.0}},
    ),
    "simpo": AlgorithmRow(
        FROM_PAIRS,
        "mean logprobs as reward, a target margin, no reference",
        "arXiv 2405.14734",
        {
            "preference": {
                "loss": "sigmoid",
                "beta": 2.0,
                "gamma": 1.0,
                "length_normalized": True,
                "reference_free": True,
            }
        },
    ),
    "orpo": AlgorithmRow(
        FROM_PAIRS,
        "likelihood of the chosen answers and the log odds ratio to the rejected, no reference",
        "arXiv 2403.07691",
        {
            "loss": {"reduction": "sequence"},
            "preference": {
                "loss": "orpo",
                "beta": 0.1,
                "length_normalized": True,
                "reference_free": True,
                "sft_coef": 1.0,
            },
        },
    ),
    "kto": AlgorithmRow(
        FROM_LABELS,
        "desirable and undesirable answers, unpaired, against the batch's KL",
        "arXiv 2402.01306",
        {"preference": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}},
    ),
    "reward_model": AlgorithmRow(
        REWARDS_FROM_PAIRS,
        "Bradley-Terry loss on pairs, with margins and centring",
        "arXiv 2203.02155",
        {"preference": {"center_coef": 0.0}},
    ),
}
