"""What keeps a rollout worker from generating: its death, and new weights.

    python benchmarks/interruptions.py [--tokens 200] [--runs 3]

A GRPO run with Ray and the torch engine, of the quickstart's model.

Death: the only worker is killed while it generates the second step's rollouts, in a synchronous run. From the kill on:

* noticed: until the pool asks for a fresh one;
* start-up: until that has answered for the first time (its process, imports, the model);
* weights, prompts: until its engine steps.

New weights: with max_staleness 2 they come while the worker generates. The pause is what lies between the last step
before them and the first with them, beside the load itself; of all updates that came so, the median and the most. Those
that came while the worker waited for something to generate are left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import rlflow
from rlflow.driver.leases import Member
from rlflow.driver.pool import RolloutPool
from rlflow.driver.window import Window
from rlflow.tracking.spans import Span

QUICKSTART = Path(__file__).resolve().parents[1] / "recipes" / "quickstart.yaml"


def measure_death(tokens: int, directory: Path) -> tuple[float, float, float]:
    """Seconds until the death is noticed, of the fresh worker's start-up, and from there to its engine's first step."""
    at: dict[str, float] = {}
    release, replace, begin_again = Window.release, RolloutPool._replace, Member.begin_again

    def kill(window: Window) -> None:
        at["killed"] = time.time()
        window.pool.workers.transport.kill(window.pool.workers.handles[0])

    def killing(window: Window, step: int) -> None:
        release(window, step)
        if step == 1:
            threading.Timer(0.3, kill, [window]).start()

    def noticing(pool: RolloutPool, member: Member, reason: str) -> None:
        at["noticed"] = time.time()
        replace(pool, member, reason)

    def beginning(member: Member) -> None:
        begin_again(member)
        threading.Thread(target=wait_for_answer, args=(member,), daemon=True).start()

    def wait_for_answer(member: Member) -> None:
        while not member.is_up:
            time.sleep(0.01)
        at["up"] = time.time()

    Window.release, RolloutPool._replace, Member.begin_again = killing, noticing, beginning
    try:
        rlflow.run(QUICKSTART, overrides=overrides(tokens, directory))
    finally:
        Window.release, RolloutPool._replace, Member.begin_again = release, replace, begin_again
    after = [span for span in spans_of(directory) if span.name == "generate" and span.began > at["noticed"]]
    generating = min(span.began for span in after)
    return at["noticed"] - at["killed"], at["up"] - at["noticed"], generating - at["up"]


def measure_pauses(tokens: int, directory: Path) -> list[float]:
    """Seconds between two steps of the engine that new weights came between, less those of the load."""
    changes = {"run.max_staleness": 2, "stages.grpo.run.steps": 12}
    rlflow.run(QUICKSTART, overrides={**overrides(tokens, directory), **changes})
    spans = sorted(spans_of(directory), key=lambda span: span.began)
    pauses = []
    for before, load, after in zip(spans, spans[1:], spans[2:], strict=False):
        if [span.name for span in (before, load, after)] == ["generate", "load_weights", "generate"]:
            pauses.append(load.began - before.ended + after.began - load.ended)
    return pauses


def overrides(tokens: int, directory: Path) -> dict[str, Any]:
    return {
        "run.output_dir": str(directory),
        "stages.sft.run.steps": 1,
        "stages.sft.evaluation": None,
        "stages.sft.run.stop_at_score": None,
        "stages.grpo.evaluation": None,
        "stages.grpo.rewards": [{"plugin": f"{Path(__file__).with_name('against_trl.py').resolve()}:digit_share"}],
        "stages.grpo.run.steps": 3,
        "stages.grpo.run.log_rollouts_every": 1,
        "rollout.max_new_tokens": tokens,
        "model.architecture.max_position_embeddings": 1024,
        "tracking": ["jsonl"],
    }


def spans_of(directory: Path) -> list[Span]:
    """Those of the rollout worker."""
    found = []
    for path in (directory / "grpo" / "traces").glob("step_*.json"):
        events = json.loads(path.read_text())["traceEvents"]
        actor_of = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
        for event in events:
            if event["ph"] == "X" and actor_of[event["tid"]] == "rollout[0]":
                began = event["ts"] / 1e6
                found.append(Span("rollout[0]", event["name"], began, began + event["dur"] / 1e6))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=200, help="of a completion, so that there is something to kill")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    print("| run | noticed | start-up | weights, prompts | all but start-up |\n|---|---|---|---|---|")
    for run in range(1, arguments.runs + 1):
        with tempfile.TemporaryDirectory(prefix="interruptions_") as directory:
            noticed, startup, rest = measure_death(arguments.tokens, Path(directory) / "run")
        print(f"| {run} | {noticed:.2f} s | {startup:.2f} s | {rest:.2f} s | {noticed + rest:.2f} s |", flush=True)
    with tempfile.TemporaryDirectory(prefix="interruptions_") as directory:
        pauses = [1e3 * seconds for seconds in measure_pauses(arguments.tokens, Path(directory) / "run")]
    print(f"\npause beside the load, {len(pauses)} updates: {median(pauses):.1f} ms, at most {max(pauses):.1f} ms")


if __name__ == "__main__":
    main()
