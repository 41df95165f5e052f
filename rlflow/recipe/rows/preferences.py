"""The rows that learn from judged answers."""

from __future__ import annotations

from rlflow.recipe.rows.row import AlgorithmRow, Learning

FROM_PAIRS = Learning(
    "preference", "preference", "pair", batch_targets="pair_loss", weights="chosen", has_entropies=False
)
FROM_LABELS = Learning("preference", "kto", "labelled", batch_targets="mismatched_kl", has_entropies=False)
FROM_LABELS_ALONE = Learning("preference", "kto", "judged", batch_targets="zero_kl", has_entropies=False)

ROWS: dict[str, AlgorithmRow] = {
    "dpo": AlgorithmRow(
        "preferences",
        FROM_PAIRS,
        "logistic loss on the implicit reward's margin; preference.loss has the other pairwise losses",
        "arXiv 2305.18290",
        {"preference": {"loss": "sigmoid", "beta": 0.1}},
    ),
    "cpo": AlgorithmRow(
        "preferences",
        FROM_PAIRS,
        "DPO without a reference, and the chosen answers' likelihood",
        "arXiv 2401.08417",
        {"preference": {"loss": "sigmoid", "beta": 0.1, "reference_free": True, "sft_coef": 1.0}},
    ),
    "simpo": AlgorithmRow(
        "preferences",
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
        "preferences",
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
        "preferences",
        FROM_LABELS,
        "desirable and undesirable answers, unpaired, against the batch's KL",
        "arXiv 2402.01306",
        {"preference": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}},
    ),
    "apo_zero_unpaired": AlgorithmRow(
        "preferences",
        FROM_LABELS_ALONE,
        "desirable and undesirable answers, unpaired, against the reference alone: KTO's loss without a KL",
        "arXiv 2408.06266, eq. 7",
        {"preference": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}},
    ),
}
