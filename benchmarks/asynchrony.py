"""How much of a step's generation and training overlap, for every staleness: engines and trainer that sleep.

    python benchmarks/asynchrony.py [--steps 30] [--staleness 0 1 2 4] [--slow 1]

Four workers write completions of lognormal lengths, a token of every one under way in each step of their engine.
Training sleeps as long as generation takes the fleet when it is never idle, so the two are balanced, and no run can
take less than the larger. Reported is the run's wall time over that bound; with ``--slow F`` one of the workers takes F
times as long for a token, and the bound is what the fleet can still write.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from rlflow.driver.window import Window
from rlflow.recipe import Recipe
from rlflow.tracking.tracker import Trackers
from rlflow.types import Prompt, SampleRequest, SamplingParams
from tests.rlflow.driver.fleets import Fleet

LONGEST, MEAN, SIGMA = 200, 50, 0.7
"""Tokens of a completion: lognormal, cut at the longest."""
PROMPTS, GROUP, WORKERS, SLOTS = 16, 4, 4, 4
STEP_S = 0.004


def length_of(request: SampleRequest) -> int:
    """Tokens by the seed, from a lognormal distribution."""
    normal = np.random.default_rng(request.seed).normal(np.log(MEAN) - SIGMA**2 / 2, SIGMA)
    return int(np.clip(np.exp(normal), 1, LONGEST))


def recipe_of(staleness: int, hedge: bool) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"output_dir": "unused", "steps": 1000, "max_staleness": staleness},
            "model": {"path": "unused"},
            "algorithm": {"name": "grpo", "group_size": GROUP, "kl": {"coef": 0.0}},
            "data": {"train": {"path": "unused"}, "prompts_per_step": PROMPTS},
            "rewards": [{"name": "length"}],
            "rollout": {"max_new_tokens": LONGEST, "max_num_seqs": SLOTS, "recovery": {"hedge": hedge}},
        }
    )


def measure(staleness: int, steps: int, slow: float, hedge: bool = True) -> dict[str, float]:
    """Seconds of a run's steps over the bound, and what its tokens' ages were."""

    def script(rank: int) -> dict[str, Any]:
        step_s = STEP_S * (slow if rank == 0 else 1.0)
        return {"max_num_seqs": SLOTS, "length": length_of, "step_s": step_s}

    recipe = recipe_of(staleness, hedge)
    fleet = Fleet(WORKERS, rollout=recipe.rollout.model_dump(), script_of=script)
    prompts = [Prompt(f"p:{i}", np.zeros(1, dtype=np.int32), [], {}) for i in range(4 * PROMPTS)]
    window = Window(
        fleet.pool,
        recipe,
        prompts,
        SamplingParams(max_new_tokens=LONGEST),
        steps,
        Trackers(),
    )
    # Tokens a second that the fleet writes when no slot is idle.
    rate = SLOTS / STEP_S * (WORKERS - 1 + 1 / slow)
    train_s = PROMPTS * GROUP * MEAN / rate
    tokens, ages, began = 0, [], time.perf_counter()
    for step in range(steps):
        window.release(step)
        groups, _ = window.take(step)
        for rollout in (rollout for group in groups for rollout in group.rollouts):
            tokens += int(rollout.is_sampled.sum())
            ages.append(step - rollout.versions[rollout.is_sampled])
        time.sleep(train_s)
        fleet.publish(step + 1)
    seconds = time.perf_counter() - began
    hedged, refused = fleet.pool.hedged, fleet.pool.refused
    fleet.close()
    age = np.concatenate(ages)
    bound = max(tokens / rate, steps * train_s)
    return {
        "over the bound": seconds / bound,
        "generation / training": tokens / rate / (steps * train_s),
        "age, mean": float(age.mean()),
        "age, max": float(age.max()),
        "hedged": float(hedged),
        "refused": float(refused),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--slow", type=float, default=1.0, help="one worker takes so many times as long")
    arguments = parser.parse_args()
    for staleness in arguments.staleness:
        for hedge in (False, True) if arguments.slow > 1 and staleness else (True,):
            numbers = measure(staleness, arguments.steps, arguments.slow, hedge)
            told = ", ".join(f"{name} {value:.2f}" for name, value in numbers.items())
            print(f"staleness {staleness}{'' if hedge else ', no hedging'}: {told}", flush=True)


if __name__ == "__main__":
    main()
