"""The rows that train a model which judges answers."""

from __future__ import annotations

from rlflow.recipe.rows.row import AlgorithmRow, Learning

REWARDS_FROM_PAIRS = Learning(
    "preference", "reward_model", "margin_pair", head="scalar", weights="chosen", has_entropies=False
)

ROWS: dict[str, AlgorithmRow] = {
    "reward_model": AlgorithmRow(
        "reward_model",
        REWARDS_FROM_PAIRS,
        "Bradley-Terry loss on pairs, with margins and centring",
        "arXiv 2203.02155",
        {"preference": {"center_coef": 0.0}},
    ),
}
