"""The rows that learn from rollouts and their rewards."""

from __future__ import annotations

from rlflow.recipe.rows.row import AlgorithmRow, Learning

FROM_ROLLOUTS = Learning("online", "policy", "prompt")

_GROUP_STD = {"estimator": "group_mean", "scale": "group_std", "ddof": 1}

ROWS: dict[str, AlgorithmRow] = {
    "grpo": AlgorithmRow(
        "online",
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
        "online",
        FROM_ROLLOUTS,
        "GRPO without its two biases: no division by the group's std, none by the answer's length",
        "arXiv 2503.20783",
        {"group_size": 8, "advantage": {"estimator": "group_mean"}, "loss": {"reduction": "fixed_length"}},
    ),
    "dapo": AlgorithmRow(
        "online",
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
        "online",
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
        "online",
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
        "online",
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
        "online",
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
        "online",
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
        "online",
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
        "online",
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
        "online",
        FROM_ROLLOUTS,
        "a smooth gate on the ratio instead of a clip",
        "arXiv 2511.20347",
        {
            "group_size": 8,
            "advantage": _GROUP_STD,
            "loss": {"kind": "sapo", "tau_positive": 1.0, "tau_negative": 1.05, "reduction": "sequence"},
        },
    ),
    "gmpo": AlgorithmRow(
        "online",
        FROM_ROLLOUTS,
        "the geometric mean of clipped token ratios",
        "arXiv 2507.20673",
        {
            "group_size": 8,
            "advantage": _GROUP_STD,
            "loss": {"kind": "gmpo", "clip_low": 0.4, "clip_high": 0.4, "reduction": "sequence"},
        },
    ),
    "dppo": AlgorithmRow(
        "online",
        FROM_ROLLOUTS,
        "a mask by how far a token's probability has moved instead of a clip of its ratio",
        "arXiv 2602.04879",
        {
            "group_size": 8,
            "advantage": {"estimator": "group_mean"},
            "loss": {"kind": "dppo", "divergence": "tv", "reduction": "fixed_length"},
            "correction": {"mode": "none", "old_policy": "engine"},
        },
    ),
    "maxrl": AlgorithmRow(
        "online",
        FROM_ROLLOUTS,
        "advantages divided by the group's mean reward: gradients of maximum likelihood, of rewards 0 and 1",
        "arXiv 2602.02710",
        {
            "group_size": 8,
            "advantage": {"estimator": "group_mean", "scale": "group_mean"},
            "loss": {"reduction": "token"},
        },
    ),
    "opo": AlgorithmRow(
        "online",
        FROM_ROLLOUTS,
        "the group's mean reward, weighted by length, as the baseline of least variance; one update a step",
        "arXiv 2505.23585",
        {"group_size": 8, "advantage": {"estimator": "length_weighted_mean"}, "loss": {"reduction": "token"}},
    ),
    "remax": AlgorithmRow(
        "online",
        FROM_ROLLOUTS,
        "REINFORCE with the reward of a greedy completion as baseline",
        "arXiv 2310.10505",
        {"group_size": 1, "advantage": {"estimator": "greedy"}, "loss": {"reduction": "token"}},
    ),
    "clip_cov": AlgorithmRow(
        "online",
        FROM_ROLLOUTS,
        "GRPO without some tokens whose logprob and advantage covary most, which keeps entropy up",
        "arXiv 2505.22617",
        {"group_size": 8, "advantage": _GROUP_STD, "loss": {"kind": "clip_cov", "reduction": "token"}},
    ),
    "kl_cov": AlgorithmRow(
        "online",
        FROM_ROLLOUTS,
        "a KL on the tokens whose logprob and advantage covary most, which keeps entropy up",
        "arXiv 2505.22617",
        {
            "group_size": 8,
            "advantage": _GROUP_STD,
            "loss": {"kind": "kl_cov", "reduction": "token"},
            "groups": {"updates_per_step": 2},
        },
    ),
    "chord": AlgorithmRow(
        "online",
        FROM_ROLLOUTS,
        "GRPO and demonstrations in one loss, whose weight falls from step to step",
        "arXiv 2508.11408",
        {
            "group_size": 8,
            "advantage": _GROUP_STD,
            "loss": {"reduction": "sequence"},
            "mixture": {"mu_peak": 0.9, "mu_valley": 0.05, "mu_decay_steps": 200},
        },
    ),
}
