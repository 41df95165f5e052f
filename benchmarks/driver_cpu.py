"""CPU time that the driver spends on a rollout sample: window, pool, scoring, assembly, the rollout file.

    python benchmarks/driver_cpu.py [--workers 1 4 16 64] [--steps 10] [--tokens 128] [--ray]

Workers and the reward server run by script, nothing is trained. Without ``--ray`` they are threads of this process, and
the driver's two threads are counted by their own CPU clocks: what is left out is what Ray takes to move things. With it
they are processes, and this one's whole CPU time is counted, Ray's threads included.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from rlflow.driver import assemble
from rlflow.driver.window import Window
from rlflow.recipe import Recipe
from rlflow.tracking.rollouts import write_rollouts
from rlflow.tracking.tracker import Trackers
from rlflow.types import Prompt, SampleRequest, SamplingParams
from tests.rlflow.driver.fleets import Fleet

GROUP, PROMPTS_PER_WORKER, LEAST_PROMPTS, PROMPT_TOKENS = 8, 8, 64, 64
"""A step has 64 prompts, and with more than eight workers eight for each."""


def full_length(request: SampleRequest) -> int:
    return request.params.max_new_tokens


def recipe_of(tokens: int, prompts: int) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"output_dir": "unused", "steps": 1000},
            "model": {"path": "unused"},
            "algorithm": {"name": "grpo", "group_size": GROUP, "kl": {"coef": 0.0}},
            "data": {"train": {"path": "unused"}, "prompts_per_step": prompts},
            "rewards": [{"name": "length"}],
            "rollout": {"max_new_tokens": tokens},
        }
    )


def measure(workers: int, steps: int, tokens: int, on_ray: bool) -> dict[str, float]:
    """CPU milliseconds of a sample, by part."""
    prompts_per_step = max(LEAST_PROMPTS, PROMPTS_PER_WORKER * workers)
    recipe = recipe_of(tokens, prompts_per_step)
    script = {"max_num_seqs": 4096, "tokens_per_step": tokens, "length": full_length}
    fleet = Fleet(workers, rollout=recipe.rollout.model_dump(), script=script, on_ray=on_ray)
    prompts = [Prompt(f"p:{i}", np.zeros(PROMPT_TOKENS, dtype=np.int32), [], {}) for i in range(4 * prompts_per_step)]
    window = Window(fleet.pool, recipe, prompts, SamplingParams(max_new_tokens=tokens), steps + 1, Trackers())
    [pool_thread] = [thread for thread in threading.enumerate() if thread.name == "rollout-pool"]
    assert pool_thread.ident is not None
    pool_clock = time.pthread_getcpuclockid(pool_thread.ident)
    parts = {"window and pool": 0.0, "assembly": 0.0, "rollout file": 0.0}
    with tempfile.TemporaryDirectory() as directory:
        for step in range(steps + 1):
            marks = [(time.process_time() if on_ray else time.thread_time(), time.clock_gettime(pool_clock))]

            def mark(marks: list[tuple[float, float]] = marks) -> None:
                marks.append((time.process_time() if on_ray else time.thread_time(), time.clock_gettime(pool_clock)))

            window.release(step)
            groups, _ = window.take(step)
            fleet.publish(step + 1)
            mark()
            batch = assemble.assemble(groups, recipe.algorithm, tokens)
            assemble.rollout_metrics(batch, step)
            samples = assemble.with_advantages(batch, batch.samples, recipe.algorithm)
            mark()
            path = Path(directory) / "step.parquet"
            write_rollouts(path, batch.groups, assemble.rollout_advantages(batch, samples, recipe.online), batch.states)
            mark()
            if step:
                # The first step warms up.
                for name, before, after in zip(parts, marks, marks[1:], strict=False):
                    parts[name] += after[0] - before[0] + (0.0 if on_ray else after[1] - before[1])
    fleet.close()
    milliseconds = {name: 1e3 * seconds / (steps * prompts_per_step * GROUP) for name, seconds in parts.items()}
    return {"all": sum(milliseconds.values()), **milliseconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--ray", action="store_true")
    arguments = parser.parse_args()
    for workers in arguments.workers:
        numbers = measure(workers, arguments.steps, arguments.tokens, arguments.ray)
        told = ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())
        print(f"{workers} workers, CPU ms a sample: {told}", flush=True)


if __name__ == "__main__":
    main()
