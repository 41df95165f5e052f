"""Whole runs that learn from a teacher, in this process: of a tiny policy, whose teacher has other weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_runs import RunRecipe, metrics_of, same_weights
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from rlflow.actors.actor_group import ActorFailure
from rlflow.driver.learner import Learner
from rlflow.recipe.yaml_source import merge

pytestmark = pytest.mark.slow

RECIPE: dict[str, Any] = {
    "algorithm": {"name": "opd"},
    "data": {"prompts_per_step": 6, "max_prompt_tokens": 32, "max_tokens": 48},
    "rollout": {"engine": "torch", "max_new_tokens": 5},
    "trainer": {"learning_rate": 3e-3},
    "run": {"steps": 6, "save_every": 3},
}
GKD = {"algorithm": {"name": "gkd"}}


@pytest.fixture
def run(run_recipe: RunRecipe, tmp_path: Path, tiny_model_dir: Path, tiny_teacher_dir: Path) -> Callable[..., Path]:
    """Runs RECIPE with the changes of ``blocks`` into ``tmp_path / name``; keywords are keys of the recipe."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}+1=", "response": str(i + 1)}) + "\n" for i in range(12)))

    def run(name: str, blocks: dict[str, Any] | None = None, **overrides: Any) -> Path:
        models = {"model": {"path": str(tiny_model_dir)}, "teacher": {"path": str(tiny_teacher_dir)}}
        data = {"data": {"train": {"path": str(rows)}}}
        return run_recipe(merge(merge(merge(RECIPE, models), data), blocks or {}), name, **overrides)

    return run


def series(directory: Path, name: str) -> list[float]:
    return [row[name] for row in metrics_of(directory) if name in row]


def test_opd_without_rewards_brings_the_policy_nearer_to_the_teacher(run: Callable[..., Path]):
    directory = run("run", algorithm__group_size=16, run__steps=16)
    kl = series(directory, "kl/teacher")
    assert np.mean(kl[-4:]) < 0.6 * np.mean(kl[:2])
    assert not series(directory, "reward/mean"), "there are no rewards"


@pytest.mark.parametrize(
    "distill", [{"on_policy": 0.0}, {"on_policy": 0.5}, {"on_policy": 1.0, "beta": 1.0}, {"on_policy": 0.5, "top_k": 5}]
)
def test_gkd_lowers_the_divergence(run: Callable[..., Path], distill: dict[str, Any]):
    directory = run("run", merge(GKD, {"algorithm": {"distill": distill}}), run__steps=20)
    divergence = series(directory, "distill/divergence")
    assert np.mean(divergence[-5:]) < 0.6 * np.mean(divergence[:2])
    assert bool(list((directory / "rollouts").iterdir())) == (distill["on_policy"] > 0)


def test_a_share_of_the_rows_is_answered_by_the_data_and_the_others_by_the_policy(run: Callable[..., Path]):
    import pyarrow.parquet as pq

    directory = run("run", GKD)
    rollouts = [row for file in sorted((directory / "rollouts").iterdir()) for row in pq.read_table(file).to_pylist()]
    assert len(rollouts) == 36
    is_answer = [row["completion"] == json.loads(row["columns"])["response"] for row in rollouts]
    assert 0.25 < np.mean(is_answer) < 0.75


@pytest.mark.parametrize("top_k", [None, 5])
def test_rows_that_pad_the_policys_embedding_are_in_no_divergence(
    run: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path, top_k: int | None
):
    """Whoever writes the answers; the rows have large logits, as rows that nobody has trained may."""
    padded = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    embedding = padded.resize_token_embeddings(padded.config.vocab_size + 24)
    with torch.no_grad():
        embedding.weight[-24:] = embedding.weight[5] * 1.5
    for file in tiny_model_dir.iterdir():
        (tmp_path / "padded").mkdir(exist_ok=True)
        (tmp_path / "padded" / file.name).write_bytes(file.read_bytes())
    padded.save_pretrained(tmp_path / "padded")
    blocks = merge(GKD, {"algorithm": {"distill": {"on_policy": 0.0, "top_k": top_k}}})
    found = [
        series(run(name, blocks, run__steps=1, model__path=str(path)), "distill/divergence")
        for name, path in (("plain", tiny_model_dir), ("more", tmp_path / "padded"))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_stopped_gkd_run_goes_on_to_the_same_weights(run: Callable[..., Path]):
    whole = run("whole", GKD)
    run("stopped", GKD, run__steps=3)
    assert same_weights(whole, run("stopped", GKD, resume=True))


def test_teacher_reference_and_rewards_go_together(run: Callable[..., Path], tmp_path: Path):
    (tmp_path / "shortness.py").write_text(
        "def shortness(completions, **columns):\n    return [-len(text) for text in completions]\n"
    )
    blocks = {
        "algorithm": {"name": "grpo", "group_size": 2, "distill": {"kind": "advantage", "coef": 0.5}},
        "rewards": [{"plugin": f"{tmp_path}/shortness.py:shortness"}],
    }
    directory = run("run", blocks, run__steps=1)
    assert series(directory, "kl/ref") == pytest.approx([0.0], abs=1e-6), "the reference is the start"
    assert abs(series(directory, "kl/teacher")[0]) > 1e-2
    assert len(series(directory, "reward/mean")) == 1


def test_an_adapter_has_its_base_as_teacher_without_a_second_copy(
    run: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path
):
    (tmp_path / "shortness.py").write_text(
        "def shortness(completions, **columns):\n    return [-len(text) for text in completions]\n"
    )
    blocks = {
        "model": {"adapter": {"rank": 4}},
        "algorithm": {"name": "grpo", "group_size": 2, "kl": {"coef": 0.0}, "distill": {"kind": "advantage"}},
        "teacher": {"path": str(tiny_model_dir)},
        "rewards": [{"plugin": f"{tmp_path}/shortness.py:shortness"}],
    }
    directory = run("run", blocks, run__steps=3)
    kl = series(directory, "kl/teacher")
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and abs(kl[-1]) > 1e-6
    assert not list((directory / "logs").glob("teacher*"))


def test_a_teacher_that_dies_is_started_again_and_nothing_of_the_run_is_lost(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    whole = run("whole", GKD)
    update, begun = Learner.update, []

    def killing(learner: Learner, *args: Any) -> dict[str, float]:
        begun.append(args[1])
        if len(begun) == 4:
            group = learner._models["teacher"].actors
            group.transport.kill(group.handles[0])
        return update(learner, *args)

    monkeypatch.setattr(Learner, "update", killing)
    assert same_weights(whole, run("lost", GKD))
    assert begun == [0, 1, 2, 3, 4, 5], "the step that it was asked in had not begun its update"


def test_a_teacher_of_damaged_weights_is_refused_by_name(run: Callable[..., Path], tiny_teacher_dir: Path):
    weights = load_file(tiny_teacher_dir / "model.safetensors")
    broken = tiny_teacher_dir.with_name("broken")
    broken.mkdir(exist_ok=True)
    for file in tiny_teacher_dir.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights["model.norm.weight"] = np.full_like(weights["model.norm.weight"], np.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ActorFailure, RuntimeError), match=r"teacher\[0\].ready.*Choose another model"):
        run("run", {"teacher": {"path": str(broken)}})


@pytest.mark.ray
def test_on_ray_teacher_and_reference_are_actors_of_their_own_and_say_what_they_say_in_one_process(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
):
    (tmp_path / "shortness.py").write_text(
        "def shortness(completions, **columns):\n    return [-len(text) for text in completions]\n"
    )
    blocks = {
        "algorithm": {"name": "grpo", "group_size": 2, "distill": {"kind": "divergence", "beta": 0.3}},
        "rewards": [{"plugin": f"{tmp_path}/shortness.py:shortness"}],
    }
    one = run("one", blocks, run__steps=2)
    monkeypatch.undo()
    other = run("other", blocks, run__steps=2)
    logged = {path.stem for path in (other / "logs").iterdir()}
    assert {"teacher-0", "reference-0", "trainer-0"} <= logged
    for name in ("distill/divergence", "kl/ref", "reward/mean", "trainer/grad_norm"):
        assert series(other, name) == pytest.approx(series(one, name), rel=1e-4, abs=1e-6), name
    assert all(value > 1e-3 for value in series(other, "distill/divergence"))
