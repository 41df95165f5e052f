"""The rows that learn from a teacher."""

from __future__ import annotations

from rlflow.recipe.rows.online import FROM_ROLLOUTS
from rlflow.recipe.rows.row import AlgorithmRow, Learning

FROM_ANSWERS = Learning("sft", "policy", "example", batch_targets="no_rewards")
"""What FROM_ROLLOUTS becomes where all that is trained are the data's answers."""

ROWS: dict[str, AlgorithmRow] = {
    "opd": AlgorithmRow(
        "distillation",
        FROM_ROLLOUTS,
        "on-policy distillation: the teacher's logprob minus the policy's as the advantage of each of its own tokens",
        "arXiv 2306.08543",
        {
            "advantage": {"estimator": "batch_mean"},
            "loss": {"reduction": "token"},
            "distill": {"kind": "advantage", "coef": 1.0},
        },
    ),
    "gkd": AlgorithmRow(
        "distillation",
        FROM_ROLLOUTS,
        "generalised Jensen-Shannon divergence to a teacher, on the policy's own answers and on the data's",
        "arXiv 2306.13649",
        {
            "advantage": {"estimator": "batch_mean"},
            "loss": {"reduction": "token"},
            "correction": {"mode": "none"},
            "distill": {"kind": "divergence", "coef": 1.0, "beta": 0.5, "on_policy": 0.5},
        },
    ),
}
