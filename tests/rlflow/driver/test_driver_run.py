"""Whole runs with real Ray and the torch engine, on a model of some ten thousand parameters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import rlflow
from rlflow.actor_groups import Actors
from rlflow.actors.actor_group import ActorFailure
from rlflow.driver.errors import RunError
from rlflow.driver.learner import Learner
from rlflow.driver.window import Window
from rlflow.tracking.rollouts import read_rollouts

pytestmark = pytest.mark.ray

RECIPE = """
run: {{output_dir: {out}, seed: 3}}
model:
  characters: "0123456789+="
  architecture:
    {{model_type: qwen3, architectures: [Qwen3ForCausalLM], hidden_size: 32, intermediate_size: 64, head_dim: 16,
     num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 4096}}
rollout: {{engine: torch, max_new_tokens: 4}}
tracking: [jsonl]
evaluation: {{data: {{generator: arithmetic, args: {{digits: 1, split: heldout}}}}, reward: {{name: exact_match}}}}
stages:
  - name: sft
    algorithm: {{name: sft}}
    data: {{train: {{generator: arithmetic, args: {{digits: 1}}}}, prompts_per_step: 8, max_tokens: 16}}
    trainer: {{learning_rate: 1.0e-2}}
    run: {{steps: 2}}
  - name: grpo
    algorithm: {{name: grpo, group_size: 4}}
    data: {{train: {{generator: arithmetic, args: {{digits: 1}}}}, prompts_per_step: 4, max_prompt_tokens: 8}}
    rewards: [{{plugin: "{plugin}:length"}}]
    trainer: {{learning_rate: 1.0e-3}}
    run: {{steps: 4, save_every: 2, keep_checkpoints: 5}}
"""

PLUGIN = """
def length(prompts, completions, completion_ids, **columns):
    return [float(len(text)) for text in completions]
"""


def run(tmp_path: Path, name: str, resume: bool = False, **overrides) -> Path:
    (tmp_path / "reward.py").write_text(PLUGIN)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(out=tmp_path / name, plugin=tmp_path / "reward.py"))
    rlflow.run(path, overrides=overrides, resume=resume)
    return tmp_path / name


def metrics_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def weights_of(directory: Path) -> dict:
    return load_file(directory / "final" / "model.safetensors")


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


@pytest.fixture(scope="module")
def finished(ray_session, tmp_path_factory):
    return run(tmp_path_factory.mktemp("driver"), "first")


def test_a_run_leaves_what_the_design_promises(finished):
    sft, grpo = metrics_of(finished / "sft"), metrics_of(finished / "grpo")
    assert [line["step"] for line in sft] == [0, 1, 2]
    assert [line["step"] for line in grpo] == [0, 1, 2, 3, 4]
    assert "eval/heldout/pass@1" in sft[0] and "eval/heldout/pass@1" in grpo[-1]
    assert grpo[1]["reward/length/mean"] == pytest.approx(grpo[1]["reward/mean"])
    assert grpo[1]["staleness/max"] == 0
    for name in ("recipe.yaml", "final/config.json", "final/tokenizer.json", "checkpoints/latest/manifest.json"):
        assert (finished / "grpo" / name).exists()
    records = read_rollouts(finished / "grpo" / "rollouts" / "step_000001.parquet")
    assert len(records) == 16


def test_the_engine_and_the_trainer_agree_on_every_sampled_token(finished):
    assert all(line["mismatch/logprob_abs_diff"] < 1e-5 for line in metrics_of(finished / "grpo")[1:])


def test_the_second_stage_starts_where_the_first_ended(finished):
    sft, grpo = metrics_of(finished / "sft"), metrics_of(finished / "grpo")
    assert sft[-1]["eval/heldout/pass@1"] == grpo[0]["eval/heldout/pass@1"]


def test_the_same_recipe_and_seed_give_the_same_parameters_to_the_bit(finished, tmp_path):
    again = run(tmp_path, "again")
    assert equal(weights_of(finished / "sft"), weights_of(again / "sft"))
    assert equal(weights_of(finished / "grpo"), weights_of(again / "grpo"))


def test_a_worker_that_is_killed_in_a_step_is_replaced_and_changes_no_parameter(finished, monkeypatch, tmp_path):
    release = Window.release

    def killing(window: Window, step: int) -> None:
        release(window, step)
        if step == 1:
            window.pool.workers.transport.kill(window.pool.workers.handles[0])

    monkeypatch.setattr(Window, "release", killing)
    directory = run(tmp_path, "killed")
    assert equal(weights_of(finished / "grpo"), weights_of(directory / "grpo"))
    lines = metrics_of(directory / "grpo")
    assert [line.get("fleet/restarts") for line in lines[1:]] == [0, 1, 1, 1]
    assert lines[-1]["group/issued"] == lines[-1]["group/trained"] == 16


def test_a_run_resumed_from_a_checkpoint_ends_like_one_never_stopped(finished, tmp_path):
    from rlflow import checkpoint

    directory = run(tmp_path, "stopped")
    grpo = directory / "grpo"
    # As after a crash in step 3: only the checkpoint of step 2 is there.
    for path in (grpo / "checkpoints").glob("step_000004*"):
        path.rename(tmp_path / path.name)
    (grpo / "final").rename(tmp_path / "final")
    checkpoint.link(grpo / "checkpoints", "latest", grpo / "checkpoints" / "step_000002")
    run(tmp_path, "stopped", resume=True)
    assert equal(weights_of(finished / "grpo"), weights_of(grpo))
    assert [line["step"] for line in metrics_of(grpo)] == [0, 1, 2, 3, 4]


def test_two_trainer_ranks_two_workers_and_one_step_off_run_to_the_end(ray_session, tmp_path):
    overrides = {"trainer.workers": 2, "rollout.workers": 2, "run.max_staleness": 1, "reward_server.workers": 2}
    directory = run(tmp_path, "wide", **overrides)
    lines = metrics_of(directory / "grpo")
    assert [line["staleness/max"] for line in lines[1:]] == [0, 1, 1, 1]


@pytest.mark.slow
def test_one_of_two_trainer_ranks_that_is_killed_in_an_update_changes_no_parameter(ray_session, monkeypatch, tmp_path):
    undisturbed = run(tmp_path, "undisturbed", **{"trainer.workers": 2})
    update, begun = Learner.update, []

    def killing(learner: Learner, *args: Any) -> dict[str, float]:
        if learner.recipe.stage == "grpo":
            begun.append(args[1])
            if len(begun) == 4:
                trainers = learner._models["trainer"].actors
                threading.Timer(0.01, trainers.transport.kill, [trainers.handles[1]]).start()
        return update(learner, *args)

    monkeypatch.setattr(Learner, "update", killing)
    directory = run(tmp_path, "killed", **{"trainer.workers": 2})
    assert begun == [0, 1, 2, 3, 2, 3]
    assert equal(weights_of(undisturbed / "grpo"), weights_of(directory / "grpo"))
    assert metrics_of(directory / "grpo")[-1]["fleet/stage_restarts"] == 1


@pytest.mark.parametrize("sequence_parallel", [1, 2])
def test_two_ranks_train_like_one(sequence_parallel, finished, tmp_path):
    import numpy as np

    ranks = {"trainer.workers": 2, "trainer.sequence_parallel": sequence_parallel}
    directory = run(tmp_path, "ranks", **ranks)
    one, two = weights_of(finished / "sft"), weights_of(directory / "sft")
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=1e-5)
    assert all(line["mismatch/logprob_abs_diff"] < 1e-5 for line in metrics_of(directory / "grpo")[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_a_gpu_trains_what_a_cpu_trains(engine, finished, tmp_path):
    import numpy as np

    shares = {"trainer.gpus_per_worker": 0.5, "rollout.gpus_per_worker": 0.5}
    directory = run(tmp_path, "gpu", **shares, **{"trainer.engine": engine})
    on_cpu, on_gpu = weights_of(finished / "sft"), weights_of(directory / "sft")
    for name in on_cpu:
        # Where a gradient is almost 0, Adam divides rounding by rounding; a step is 1e-2.
        np.testing.assert_allclose(on_cpu[name], on_gpu[name], atol=1e-3)
    assert all(line["mismatch/logprob_abs_diff"] < 1e-3 for line in metrics_of(directory / "grpo")[1:])


@pytest.mark.slow
def test_deepspeed_trains_like_the_default_engine(finished, tmp_path):
    import numpy as np

    engine = {"trainer.engine": "deepspeed", "trainer.deepspeed.stage": 3, "trainer.workers": 2}
    directory = run(tmp_path, "zero", **engine)
    one, other = weights_of(finished / "sft"), weights_of(directory / "sft")
    assert one.keys() == other.keys()
    for name in one:
        # Where a gradient is almost 0, Adam divides rounding by rounding; a step is 1e-2.
        np.testing.assert_allclose(one[name], other[name], atol=1e-4)
    assert all(line["mismatch/logprob_abs_diff"] < 1e-5 for line in metrics_of(directory / "grpo")[1:])


def test_actors_that_cannot_all_be_placed_give_everything_back(ray_session, tmp_path, monkeypatch):
    import ray
    from ray.util import placement_group_table

    def fail(actors, recipe):
        raise ActorFailure("trainer[1]", "rendezvous", "no answer within 1 s")

    monkeypatch.setattr(Actors, "begin_setup", fail)
    free = ray.available_resources()["CPU"]  # less than at the end where an earlier run is still giving back
    with pytest.raises(RunError, match="rendezvous"):
        run(tmp_path, "unplaced")
    assert {group["state"] for group in placement_group_table().values()} == {"REMOVED"}
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < free:
        assert time.monotonic() < deadline, "the actors still hold their CPUs"
        time.sleep(0.1)


def test_sigterm_ends_a_run_with_a_checkpoint_and_exit_code_3(tmp_path):
    (tmp_path / "reward.py").write_text(PLUGIN)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(out=tmp_path / "out", plugin=tmp_path / "reward.py"))
    command = [sys.executable, "-m", "rlflow", "run", str(recipe), "stages.sft.run.steps=100000"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(command, cwd=Path(rlflow.__file__).parents[1], env=environment)
    try:
        metrics = tmp_path / "out" / "sft" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 3
    finally:
        process.kill()
    assert (tmp_path / "out" / "sft" / "checkpoints" / "latest" / "manifest.json").exists()
