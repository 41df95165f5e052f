"""Evaluation that goes on while the next step is trained: with max_staleness, before newer weights are published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_runs import NEW_MODEL, RunRecipe, metrics_of
from fleets import Fleet

from rlflow.driver.errors import StopRequested
from rlflow.driver.learner import Learner
from rlflow.driver.pass_evaluation import PassEvaluator
from rlflow.driver.pool import RolloutPool
from rlflow.recipe import EvaluationBlock, RewardBlock, SourceBlock
from rlflow.tracking.jsonl import read_metrics
from rlflow.tracking.tracker import Trackers
from rlflow.types import Prompt, SamplingParams

DATA = {"generator": "arithmetic", "args": {"digits": 1}}
EXACT = {"name": "exact_match"}
RECIPE: dict[str, Any] = {
    "model": NEW_MODEL,
    "algorithm": {"name": "reinforce++", "kl": {"coef": 0.0}},
    "data": {"train": DATA, "prompts_per_step": 2, "max_prompt_tokens": 16},
    "rollout": {"engine": "torch", "max_new_tokens": 4, "max_num_seqs": 16},
    "run": {"steps": 4, "max_staleness": 1, "save_every": 1, "keep_checkpoints": 9},
    "evaluation": [
        {
            "name": "one",
            "data": {**DATA, "args": {"digits": 1, "split": "heldout"}, "rows": 2},
            "every": 1,
            "reward": EXACT,
        },
        {"name": "two", "data": {**DATA, "rows": 2}, "every": 2, "samples": 2, "temperature": 1.0, "reward": EXACT},
    ],
}

MEASURE = PassEvaluator.measure


@pytest.fixture
def run(run_recipe: RunRecipe, tmp_path: Path) -> Callable[..., Path]:
    def make(*, resume: bool = False, **run_block: Any) -> Path:
        plugin = tmp_path / "rewards.py"
        plugin.write_text(
            "def some(completion_ids, **_):\n    return [float(sum(ids) % 7) for ids in completion_ids]\n"
        )
        rewards = [{"plugin": f"{plugin}:some"}]
        return run_recipe({**RECIPE, "rewards": rewards, "run": {**RECIPE["run"], **run_block}}, resume=resume)

    return make


def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in its order; evaluations measure what is scripted."""
    events: list[str] = []

    def note(cls: type, name: str, say: Callable[..., str]) -> None:
        method = getattr(cls, name)

        def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
            events.append(say(self, *args))
            return method(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, noting)

    note(PassEvaluator, "begin", lambda one: f"ask {one.block.name} of {one.pool.version}")
    note(Learner, "update", lambda _, samples, step, *rest: f"train {step + 1}")
    note(RolloutPool, "publish", lambda _, weights, version: f"publish {version}")
    generate = PassEvaluator._generate

    def generated(evaluator: PassEvaluator) -> Any:
        groups = generate(evaluator)
        events.append(f"measure {evaluator.block.name} at {sorted({g.oldest_version for g, _ in groups})}")
        newest = {int(rollout.versions.max()) for g, _ in groups for rollout in g.rollouts}
        assert newest == {g.oldest_version for g, _ in groups}
        return groups

    monkeypatch.setattr(PassEvaluator, "_generate", generated)
    return events


def script_scores(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    """What the first set measures, from that before the first step on."""
    left: Iterator[float] = iter(scores)

    def scripted(evaluator: PassEvaluator) -> dict[str, float]:
        found = MEASURE(evaluator)
        return found | ({evaluator.metric: next(left)} if evaluator.block.name == "one" else {})

    monkeypatch.setattr(PassEvaluator, "measure", scripted)


def best_of(directory: Path) -> str:
    return (directory / "checkpoints" / "best").readlink().name


def test_a_step_is_trained_while_the_weights_before_it_are_measured_and_no_newer_ones_are_published(
    run: Callable[..., Path], monkeypatch
):
    events = noted(monkeypatch)
    script_scores(monkeypatch, [0.0, 0.25, 0.75, 0.5, 0.25])
    directory = run()
    place = events.index
    # Both sets of step 2 are asked for at once, and step 3 is trained before their results are waited for.
    assert place("ask one of 2") < place("ask two of 2") < place("train 3") < place("measure one at [2]")
    assert place("measure one at [2]") < place("measure two at [2]") < place("publish 3")
    # After the last step they are waited for.
    assert events[-4:] == ["ask one of 4", "measure one at [4]", "ask two of 4", "measure two at [4]"]
    metrics = read_metrics(directory / "metrics.jsonl")
    assert [row["eval/one/pass@1"] for row in metrics] == [0.0, 0.25, 0.75, 0.5, 0.25]
    assert ["eval/two/pass@2" in row for row in metrics] == [True, False, True, False, True]
    assert all("train/loss" in row or "loss/total" in row for row in metrics[1:])
    assert best_of(directory) == "step_000002"


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"max_staleness": 0}, {"stop_at_score": 1.0}])
def test_without_staleness_or_with_a_score_that_ends_the_stage_it_is_waited_for(
    change: dict[str, Any], run: Callable[..., Path], monkeypatch
):
    events = noted(monkeypatch)
    run(steps=2, **change)
    assert events.index("measure one at [1]") < events.index("train 2")


@pytest.mark.slow
def test_what_a_process_that_died_had_not_measured_is_measured_when_the_run_goes_on(
    run: Callable[..., Path], monkeypatch
):
    script_scores(monkeypatch, [0.0, 0.5, 0.75])
    update = Learner.update

    def dies(learner: Learner, samples: Any, step: int, *rest: Any) -> Any:
        if step == 2:
            raise KeyboardInterrupt
        return update(learner, samples, step, *rest)

    monkeypatch.setattr(Learner, "update", dies)
    with pytest.raises(StopRequested):
        run()
    monkeypatch.setattr(Learner, "update", update)
    script_scores(monkeypatch, [0.75, 0.25, 0.5])
    directory = run(resume=True)
    metrics = read_metrics(directory / "metrics.jsonl")
    assert [row["eval/one/pass@1"] for row in metrics] == [0.0, 0.5, 0.75, 0.25, 0.5]
    assert [line["step"] for line in metrics_of(directory)][:4] == [0, 1, 1, 2]
    assert "group/resampled" in metrics[2] and "eval/two/pass@2" in metrics[2]
    assert best_of(directory) == "step_000002"


def test_a_worker_that_dies_while_it_is_measured_changes_no_result():
    """Its prompts are asked of the other."""
    made = Fleet(2, script={"step_s": 0.002})
    prompts = [Prompt(f"p:{i}", np.array([1, 2], np.int32), [{"role": "user", "content": "?"}], {}) for i in range(8)]
    block = EvaluationBlock(data=SourceBlock(generator="arithmetic"), samples=2, temperature=1.0, threshold=1.0)
    evaluator = PassEvaluator(
        made.pool, block, RewardBlock(name="length"), prompts, SamplingParams(8), 0, Trackers(), is_pinned=False
    )
    calm = evaluator.run()
    assert calm.score == 0.5  # of two samples the server gives one 0 and one 1
    evaluator.begin()
    made.workers.transport.kill(made.workers.handles[1])
    assert evaluator.run().metrics == calm.metrics
    assert made.pool.metrics()["fleet/restarts"] == 1.0
    assert made.pool.counts() == {"queued": 0, "running": 0, "scoring": 0}
    made.close()
