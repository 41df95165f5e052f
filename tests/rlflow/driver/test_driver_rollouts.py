"""Dynamic sampling in whole runs: groups without signal are replaced, within bounds, and no other is lost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import rlflow
from rlflow import checkpoint
from rlflow.tracking.rollouts import read_rollouts
from tests.local_actors import use_local_actors

pytestmark = pytest.mark.slow

RECIPE = """
run: {{output_dir: {out}, seed: 3, steps: 4}}
model: {{path: {model}}}
algorithm: {{name: dapo, group_size: 2, groups: {{max_resamples: {resamples}, overlong_buffer: 0.0}}}}
data: {{train: {{path: {rows}}}, prompts_per_step: 3, max_prompt_tokens: 32}}
rewards: [{{plugin: "{plugin}:scripted"}}]
rollout: {{engine: torch, max_new_tokens: 4}}
trainer: {{learning_rate: 1.0e-3}}
tracking: [jsonl]
"""

PLUGIN = """
import json
from pathlib import Path

def scripted(prompts, completions, kind, **columns):
    # A lively prompt's first completion is right and its second wrong; a dull one's are both right.
    rewards = [float(kind[i] == "dull" or i % 2 == 0) for i in range(len(kind))]
    with (Path(__file__).parent / "scored.jsonl").open("a") as file:
        for i in range(0, len(kind), 2):
            file.write(json.dumps({"prompt": prompts[i][-1]["content"], "kind": kind[i]}) + "\\n")
    return rewards
"""


@pytest.fixture
def run(monkeypatch, tmp_path, tiny_model_dir):
    use_local_actors(monkeypatch)

    def run(
        kinds: list[str], resamples: int, resume: bool = False, **overrides
    ) -> tuple[list[dict], list[list], list[dict]]:
        """Metrics and trained rollouts of each step, and every group that was scored."""
        rows, plugin, out = tmp_path / "rows.jsonl", tmp_path / "rewards.py", tmp_path / "out"
        plugin.write_text(PLUGIN)
        lines = [{"prompt": f"Say {number}.", "kind": kind} for number, kind in enumerate(kinds)]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
        recipe = tmp_path / "recipe.yaml"
        given = {"out": out, "model": tiny_model_dir, "rows": rows, "plugin": plugin, "resamples": resamples}
        recipe.write_text(RECIPE.format(**given))
        rlflow.run(recipe, overrides=overrides, resume=resume)
        metrics = read_lines(out / "metrics.jsonl")[1:]
        trained = [read_rollouts(path) for path in sorted((out / "rollouts").glob("*.parquet"))]
        return metrics, trained, read_lines(tmp_path / "scored.jsonl")

    return run


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_groups_without_signal_are_replaced_and_all_others_are_trained(run):
    metrics, trained, scored = run(["dull", "lively", "dull", "lively", "lively"] * 3, resamples=10)
    lively = [group["prompt"] for group in scored if group["kind"] == "lively"]
    dull = len(scored) - len(lively)
    assert dull > 0
    # Every step trains three groups with signal, in the order in which they were generated.
    assert [rollout.prompt for step in trained for rollout in step][::2] == lively
    assert all(np.ptp([first.reward, second.reward]) == 1 for step in trained for first, second in pairs(step))
    assert [len(step) for step in trained] == [6] * 4
    assert sum(line["group/resampled"] for line in metrics) == dull
    last = metrics[-1]
    assert last["group/issued"] == len(scored) == last["group/trained"] + last["group/filtered"]
    assert last["group/in_flight"] == 0


def pairs(step: list) -> list[tuple]:
    return list(zip(step[::2], step[1::2], strict=True))


def test_replacing_is_bounded_and_the_step_is_trained_with_what_there_is(run):
    metrics, trained, scored = run(["dull"] * 27 + ["lively"] * 3, 2, **{"data.shuffle": False})
    # Three groups, and twice three in their place, in each of three steps.
    assert [line["group/resampled"] for line in metrics] == [6.0] * 3 + [0.0]
    assert len(scored) == 3 * 9 + 3
    assert [len(step) for step in trained] == [6] * 4
    assert all(rollout.advantage == 0 for step in trained[:3] for rollout in step)


def test_with_too_few_groups_of_signal_those_without_fill_up_in_the_order_drawn(run):
    """So that each of a step's updates gets its share of both."""
    _, trained, _ = run(["dull", "lively", "dull", "lively", "dull", "dull", "dull"], 1, **{"data.shuffle": False})
    assert [rollout.prompt for rollout in trained[0]][::2] == ["Say 0.", "Say 1.", "Say 3."]


def test_a_resumed_run_trains_the_prompts_of_one_never_stopped(run, tmp_path):
    """Those in flight at a checkpoint, and none a second time that had taken another's place."""
    kinds = ["lively", "dull", "dull", "lively", "lively", "lively"] * 4
    overrides = {"data.shuffle": False, "run.max_staleness": 1, "run.save_every": 1, "run.keep_checkpoints": 5}
    _, whole, _ = run(kinds, 5, **overrides)
    out = tmp_path / "out"
    for path in out.glob("rollouts/*.parquet"):
        path.unlink()
    for step in (2, 3, 4):
        (out / "checkpoints" / f"step_{step:06d}").rename(tmp_path / f"step_{step}")
    (out / "final").rename(tmp_path / "final")
    checkpoint.link(out / "checkpoints", "latest", out / "checkpoints" / "step_000001")
    _, resumed, _ = run(kinds, 5, resume=True, **overrides)
    prompts = [[rollout.prompt for rollout in step] for step in whole]
    assert prompts[0][::2] == ["Say 0.", "Say 6.", "Say 9."]
    assert [[rollout.prompt for rollout in step] for step in resumed] == prompts[1:]


def test_a_group_that_was_kept_waits_for_those_that_are_replaced(run):
    # Of the first three prompts one has signal, the next two have: nothing is generated beyond what is missing.
    metrics, _, scored = run(["lively", "dull", "dull", "lively", "lively", "dull"] * 3, 5, **{"data.shuffle": False})
    assert [group["kind"] for group in scored[:5]] == ["lively", "dull", "dull", "lively", "lively"]
    assert metrics[0]["group/resampled"] == 2


def test_a_prompt_has_new_samples_in_every_epoch(run):
    _, (first, second), _ = run(["lively"] * 3, 1, **{"run.steps": 2, "trainer.learning_rate": 1e-12})
    assert {row.prompt_id for row in first} == {row.prompt_id for row in second}
    for row in first:
        again = [other.token_ids.tolist() for other in second if other.prompt_id == row.prompt_id]
        assert len(again) == 2 and row.token_ids.tolist() not in again
