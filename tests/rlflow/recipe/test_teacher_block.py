"""Teachers: what a recipe must say, and what it rules out."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlflow.planning import make_plans
from rlflow.recipe import RecipeError, load_recipe

RECIPE = """\
algorithm: {name: opd}
model: {path: org/model}
teacher: {path: org/teacher}
data: {train: {generator: arithmetic}}
run: {steps: 1}
"""
URL = "teacher: {url: http://a:8000}"
GKD = "algorithm: {name: gkd}"


def write(tmp_path: Path, **lines: str) -> Path:
    """The recipe with other lines, by their first key."""
    text = "".join(lines.pop(line.partition(":")[0], line) + "\n" for line in RECIPE.splitlines())
    path = tmp_path / "recipe.yaml"
    path.write_text(text + "".join(f"{line}\n" for line in lines.values()))
    return path


def test_a_teacher_has_a_place_of_its_own_and_no_reward_is_needed(tmp_path: Path):
    (recipe,) = load_recipe(write(tmp_path, teacher="teacher: {path: org/teacher, workers: 2, gpus_per_worker: 1}"))
    (plan,) = make_plans([recipe])
    (role,) = (planned.role for planned in plan.roles if planned.role.name == "teacher")
    assert (role.workers, role.gpus) == (2, 1)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ({}, "teacher    org/teacher, float32; the logprob of each token"),
        ({"teacher": URL}, "teacher    http://a:8000, asked for the logprob of each token over HTTP"),
        ({"algorithm": GKD}, "teacher    org/teacher, float32; whole distributions"),
        (
            {
                "algorithm": "algorithm: {name: gkd, distill: {top_k: 9}}",
                "teacher": "teacher: {path: a/b, dtype: bfloat16}",
            },
            "teacher    a/b, bfloat16; its 9 most probable tokens",
        ),
    ],
)
def test_the_plan_says_who_teaches_what(tmp_path: Path, lines: dict[str, str], says: str):
    assert says in str(make_plans(load_recipe(write(tmp_path, **lines)))[0])


def test_the_plan_counts_the_teachers_weights_and_its_head_in_the_trainer(
    tmp_path: Path, tiny_model_dir: Path, tiny_teacher_dir: Path
):
    models = {"model": f"model: {{path: {tiny_model_dir}}}", "teacher": f"teacher: {{path: {tiny_teacher_dir}}}"}
    (plan,) = make_plans(load_recipe(write(tmp_path, **models, algorithm=GKD)))
    parts = {planned.role.name: planned.parts or {} for planned in plan.roles}
    assert not isinstance(plan.shape, str)
    assert parts["teacher"]["weights"] == 4 * plan.shape.parameters
    assert parts["trainer"]["teacher's head"] == 4 * plan.shape.vocabulary * plan.shape.hidden
    assert parts["trainer"]["divergence"] > 0


def test_gkd_on_the_datas_answers_alone_needs_no_engine(tmp_path: Path):
    (recipe,) = load_recipe(write(tmp_path, algorithm="algorithm: {name: gkd, distill: {on_policy: 0.0}}"))
    assert recipe.family == "sft" and not recipe.needs_rollouts and recipe.places_teacher


def test_the_base_of_a_new_adapter_is_no_second_copy(tmp_path: Path):
    lines = {
        "model": "model: {path: org/model, adapter: {rank: 8}}",
        "teacher": "teacher: {path: org/model}",
        "rewards": "rewards: [{name: exact_match}]",
    }
    (recipe,) = load_recipe(write(tmp_path, **lines))
    assert recipe.needs_teacher and not recipe.places_teacher
    (recipe,) = load_recipe(write(tmp_path, **{**lines, "teacher": "teacher: {path: org/other}"}))
    assert recipe.places_teacher


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ({"teacher": ""}, r"recipe.yaml.*teacher.path: the policy learns from a teacher: give path or url"),
        ({"teacher": "teacher: {path: a/b, url: http://a:1}"}, "give path or url, not both"),
        ({"teacher": "teacher: {url: a:1}"}, "a:1 is no address"),
        ({"teacher": "teacher: {url: http://a:1, gpus_per_worker: 1}"}, "is the server's own: remove it"),
        ({"teacher": "teacher: {path: a/b, served_model: c}"}, "is of a server: give url, or remove it"),
        ({"teacher": "teacher: {path: org/model}"}, "is what the policy starts from, which has nothing to learn"),
        ({"algorithm": "algorithm: {name: grpo}", "rewards": "rewards: [{name: exact_match}]"}, "grpo asks no teacher"),
        ({"teacher": URL, "rollout": "rollout: {temperature: 0.9}"}, "prompt logprobs are of temperature 1"),
        ({"teacher": URL, "algorithm": GKD}, "a server gives its most probable tokens alone: set it, e.g. to 20"),
        (
            {"teacher": URL, "algorithm": "algorithm: {name: gkd, distill: {top_k: 5, temperature: 0.9}}"},
            "a server's logprobs are of temperature 1",
        ),
        ({"algorithm": GKD, "rewards": "rewards: [{name: exact_match}]"}, "rewards are of the policy's own answers"),
        (
            {"algorithm": "algorithm: {name: gkd, correction: {mode: truncate}}"},
            "no engine has sampled the data's answers: set it to none",
        ),
        (
            {"algorithm": "algorithm: {name: opd, group_size: 2, groups: {require_signal: true}}"},
            "is of rewards, and there are none",
        ),
        ({"algorithm": "algorithm: {name: opd, advantage: {estimator: return}}"}, "is of rewards, and there are none"),
        ({"algorithm": "algorithm: {name: opd, distill: {coef: 0.0}}"}, "must be more than 0"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(tmp_path: Path, lines: dict[str, str], says: str):
    with pytest.raises(RecipeError, match=says):
        load_recipe(write(tmp_path, **lines))
