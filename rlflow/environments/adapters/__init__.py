"""Environments that people have, as rlflow's: each imports its package when it is used."""

from __future__ import annotations

ADAPTERS: dict[str, str] = {
    "verifiers": f"{__name__}.verifiers:verifiers_environment",
    "openenv": f"{__name__}.openenv:OpenEnvEnvironment",
    "reasoning_gym": f"{__name__}.reasoning_gym:ReasoningGymEnvironment",
}
"""Name -> ``module:class``."""
