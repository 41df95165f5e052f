"""An option belongs to an algorithm or to a kind of block: elsewhere it cannot be written, and the error says where."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from rlflow.recipe import ALGORITHMS, RecipeError, algorithm_of, load_recipe
from rlflow.recipe.yaml_source import dump


def write(path: Path, algorithm: str) -> Path:
    online = ALGORITHMS[algorithm.split(",")[0]].family == "online"
    lines = [
        f"algorithm: {{name: {algorithm}}}",
        "model: {path: a/b}",
        "data: {train: {path: a/b}}",
        f"rewards: [{'{name: exact_match}' if online else ''}]",
        "run: {steps: 1}",
    ]
    path.write_text("\n".join([*lines, ""]))
    return path


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        load_recipe(path, overrides)
    return [str(problem) for problem in raised.value.problems]


@pytest.mark.parametrize(
    ("algorithm", "key", "says"),
    [
        ("dpo, kl: {coef: 0.1}", "kl", "belongs to online algorithms, not to dpo, cpo, simpo, orpo: remove it"),
        ("dpo, correction: {mode: mask}", "correction", "belongs to online algorithms"),
        (
            "dpo, loss: {clip_low: 0.1}",
            "loss.clip_low",
            "loss.kind clip, loss.kind cispo, loss.kind gmpo, loss.kind clip_cov",
        ),
        ("dpo, loss: {reduction: sequence}", "loss.reduction", "has no effect without preference.sft_coef"),
        ("dpo, advantage: {whiten: true}", "advantage", "belongs to online algorithms"),
        ("dpo, groups: {updates_per_step: 2}", "groups", "belongs to online algorithms"),
        ("dpo, group_size: 4", "group_size", "belongs to online algorithms"),
        ("dpo, preference: {center_coef: 0.1}", "preference.center_coef", "belongs to reward_model, not to pref"),
        ("dpo, preference: {desirable_weight: 2.0}", "preference.desirable_weight", "belongs to kto"),
        ("dpo, preference: {loss: hinge, gamma: 1.0}", "preference.gamma", "belongs to preference.loss sigmoid, not"),
        (
            "dpo, preference: {loss: ipo, label_smoothing: 0.1}",
            "preference.label_smoothing",
            "preference.loss robust, preference.loss aot, aot_unpaired",
        ),
        ("sft, kl: {coef: 0.1}", "kl", "belongs to online algorithms, not to sft, pretrain"),
        ("sft, loss: {entropy_coef: 0.1}", "loss.entropy_coef", "belongs to loss.kind clip"),
        ("sft, critic: {clip: 0.1}", "critic", "belongs to online algorithms"),
        ("kto, loss: {reduction: token}", "loss", "belongs to online algorithms, sft, pretrain, dpo"),
        ("kto, preference: {loss: ipo}", "preference.loss", "belongs to preference.loss sigmoid"),
        ("kto, preference: {reference_free: true}", "preference.reference_free", "not to kto"),
        ("kto, preference: {sft_coef: 1.0}", "preference.sft_coef", "not to kto"),
        ("reward_model, preference: {beta: 0.5}", "preference.beta", "not to reward_model"),
        (
            "grpo, preference: {beta: 0.5}",
            "preference",
            "belongs to dpo, cpo, simpo, orpo, kto, apo_zero_unpaired, reward_model",
        ),
        ("grpo, critic: {workers: 2}", "critic", "belongs to advantage.estimator gae, not group_mean: remove it"),
        ("ppo, critic: null", "critic", "gae takes its values from: give one"),
        ("grpo, advantage: {gamma: 0.9}", "advantage.gamma", "advantage.estimator return, advantage.estimator gae"),
        ("ppo, advantage: {scale: batch_std}", "advantage.scale", "advantage.estimator group_mean, leave_one_out, b"),
        ("grpo, groups: {max_resamples: 5}", "groups.max_resamples", "has no effect without require_signal"),
        ("grpo, groups: {overlong_penalty: 0.5}", "groups.overlong_penalty", "without overlong_buffer"),
        ("grpo, kl: {horizon: 500}", "kl.horizon", "has no effect without target: remove it, or set it to 10000"),
        ("sapo, loss: {clip_high: 0.3}", "loss.clip_high", "loss.kind gmpo, loss.kind clip_cov, not to loss.kind sapo"),
        ("cispo, loss: {dual_clip: 3.0}", "loss.dual_clip", "belongs to loss.kind clip, not to loss.kind cispo"),
        ("gspo, loss: {tau_negative: 2.0}", "loss.tau_negative", "belongs to loss.kind sapo, not to loss.kind clip"),
        ("gspo, loss: {tau_negativ: 2.0}", "loss.tau_negativ", "did you mean tau_negative? It belongs to loss"),
        ("gspo, loss: {sapo_tau_negative: 2.0}", "loss.sapo_tau_negative", "did you mean tau_negative? It belongs to"),
        ("sapo, loss: {sapo_tau_negative: 2.0}", "loss.sapo_tau_negative", "did you mean tau_negative?)"),
        ("dapo, kl: {estimator: k1}", "kl.coef", "is missing: Weight of the KL to the reference"),
        ("ppo, kl: {unbiased_gradient: true}", "kl.unbiased_gradient", "is of the KL in the loss: set placement: loss"),
        ("grpo, correction: {mode: none, low: 0.1}", "correction.low", "belongs to correction.mode truncate, mask"),
        ("grpo, correction: {old_policy: engine, level: token}", "correction.level", "not to correction.mode none"),
    ],
)
def test_an_option_of_another_kind_is_refused_and_the_error_says_whose_it_is(algorithm, key, says, tmp_path: Path):
    path = write(tmp_path / "recipe.yaml", algorithm)
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}:1: algorithm.{key}: ")
    assert says in problem


@pytest.mark.parametrize(
    ("algorithm", "overrides", "block", "expected"),
    [
        # An option alone is of the row's kind.
        ("grpo", ["loss.clip_high=0.28"], "loss", {"kind": "clip", "clip_high": 0.28, "reduction": "sequence"}),
        # Another kind has its own defaults, and the row's word for what all kinds have.
        ("grpo", ["loss.kind=cispo"], "loss", {"clip_low": 1.0, "clip_high": 4.0, "reduction": "sequence"}),
        ("cispo", ["loss.kind=clip"], "loss", {"clip_low": 0.2, "clip_high": 0.2, "reduction": "token"}),
        ("gspo", ["loss.kind=sapo"], "loss", {"ratio": "sequence", "tau_positive": 1.0}),
        ("grpo", ["loss={kind: sapo, tau_positive: 2.0}"], "loss", {"tau_positive": 2.0, "tau_negative": 1.05}),
        # What was given below stays where the new kind has it, and goes where it has not.
        (
            "grpo, loss: {clip_high: 0.3, dual_clip: 3.0}",
            ["loss.kind=cispo"],
            "loss",
            {"clip_high": 0.3, "clip_low": 1.0},
        ),
        ("grpo, loss: {clip_high: 0.3, reduction: token}", ["loss.kind=sapo"], "loss", {"reduction": "token"}),
        ("grpo, correction: {mode: mask, low: 0.1}", ["correction.mode=none"], "correction", {"mode": "none"}),
        ("grpo, correction: {mode: mask, low: 0.1}", ["correction.mode=truncate"], "correction", {"low": 0.1}),
        ("grpo", ["correction.old_policy=engine"], "correction", {"mode": "none", "old_policy": "engine"}),
        ("grpo", ["advantage.estimator=leave_one_out"], "advantage", {"scale": "group_std"}),
        ("grpo", ["advantage.estimator=return"], "advantage", {"gamma": 1.0, "whiten": False}),
        ("grpo", ["advantage.estimator=gae"], "critic", {"clip": 0.2}),
        ("simpo", ["preference.loss=hinge"], "preference", {"beta": 2.0, "reference_free": True}),
        ("dpo", ["preference.loss=exo_pair"], "preference", {"label_smoothing": 1e-3}),
        ("dpo", ["preference.loss=orpo"], "preference", {"reference_free": True, "length_normalized": True}),
        # Switched off on purpose, as for an ablation, an option may stay.
        ("grpo, kl: {estimator: k1, placement: reward}", ["kl.coef=0"], "kl", {"coef": 0, "estimator": "k1"}),
        ("dapo, groups: {max_resamples: 5}", ["groups.require_signal=false"], "groups", {"max_resamples": 5}),
        ("cpo, loss: {reduction: sequence}", ["preference.sft_coef=0"], "loss", {"reduction": "sequence"}),
    ],
)
def test_a_kind_that_is_named_brings_its_own_defaults(algorithm, overrides, block, expected, tmp_path: Path):
    path = write(tmp_path / "recipe.yaml", algorithm)
    (recipe,) = load_recipe(path, [f"algorithm.{override}" for override in overrides])
    found = getattr(recipe.algorithm, block).model_dump()
    assert {key: found[key] for key in expected} == expected


def test_a_kind_and_an_option_of_another_kind_in_one_place_exclude_each_other(tmp_path: Path):
    path = write(tmp_path / "recipe.yaml", "grpo")
    (problem,) = problems_of(path, "algorithm.loss.clip_low=0.1", "algorithm.loss.kind=sapo")
    assert problem.startswith("command line: algorithm.loss.clip_low: belongs to loss.kind clip, loss.kind cispo, ")


def test_an_extending_recipe_leaves_the_options_of_another_kind_behind_and_adds_none_of_them(tmp_path: Path):
    base, child = write(tmp_path / "base.yaml", "grpo, loss: {clip_low: 0.1, ratio: sequence}"), tmp_path / "child.yaml"
    child.write_text("extends: base.yaml\nalgorithm: {loss: {kind: sapo}}\n")
    (recipe,) = load_recipe(child)
    assert recipe.online.loss.model_dump() == {
        "kind": "sapo",
        "ratio": "sequence",
        "reduction": "sequence",
        "entropy_coef": 0.0,
        "tau_positive": 1.0,
        "tau_negative": 1.05,
    }
    write(base, "grpo, loss: {kind: sapo}")
    child.write_text("extends: base.yaml\nalgorithm: {loss: {clip_low: 0.1}}\n")
    (problem,) = problems_of(child)
    assert problem.startswith(f"{child}:2: algorithm.loss.clip_low: belongs to loss.kind clip")


@pytest.mark.parametrize(
    ("algorithm", "override", "expected"),
    [
        ("grpo, group_size: 4, kl: {coef: 0.1}", "name=sft", {"name": "sft", "loss": {"reduction": "token"}}),
        (
            "grpo, loss: {clip_low: 0.1, reduction: prompt}",
            "name=sft",
            {"name": "sft", "loss": {"reduction": "prompt"}},
        ),
        ("grpo, group_size: 4, loss: {clip_low: 0.1}", "name=sapo", {"group_size": 4}),
        ("ppo, critic: {workers: 2}", "advantage.estimator=return", {"critic": None}),
        ("ppo, critic: {workers: 2}", "name=reinforce++", {"critic": None}),
    ],
)
def test_an_algorithm_that_is_named_leaves_behind_what_it_does_not_have(algorithm, override, expected, tmp_path: Path):
    rewards = ["rewards=[]"] if override == "name=sft" else []
    (recipe,) = load_recipe(write(tmp_path / "recipe.yaml", algorithm), [f"algorithm.{override}", *rewards])
    found = recipe.algorithm.model_dump()
    assert {key: found[key] for key in expected} == expected


def test_a_misspelt_option_is_not_left_behind(tmp_path: Path):
    path = write(tmp_path / "recipe.yaml", "grpo, loss: {clip_hihg: 0.3}")
    (problem,) = problems_of(path, "algorithm.loss.kind=cispo")
    assert problem.startswith(f"{path}:1: algorithm.loss.clip_hihg: unknown key here (did you mean clip_high?")


def test_an_option_of_an_extended_recipe_is_reported_where_it_stands(tmp_path: Path):
    base, child = write(tmp_path / "base.yaml", "dapo, kl: {estimator: k1}"), tmp_path / "child.yaml"
    child.write_text("extends: base.yaml\nalgorithm: {name: gspo}\n")
    (problem,) = problems_of(child)
    assert problem.startswith(f"{base}:1: algorithm.kl.coef: is missing")


def test_a_stage_leaves_the_shared_options_of_another_kind_behind(tmp_path: Path):
    path = write(tmp_path / "recipe.yaml", "grpo, loss: {clip_low: 0.1}")
    path.write_text(path.read_text() + "stages: [{name: a}, {name: b, algorithm: {loss: {kind: sapo}}}]\n")
    first, second = load_recipe(path)
    assert (first.online.loss.kind, second.online.loss.kind) == ("clip", "sapo")


def test_an_option_for_all_stages_is_refused_in_one_that_has_no_use_for_it(tmp_path: Path):
    path = write(tmp_path / "recipe.yaml", "grpo, kl: {coef: 0.1}")
    path.write_text(path.read_text() + "stages: [{name: a, algorithm: {name: sft}, rewards: []}, {name: b}]\n")
    assert load_recipe(path)[1].online.kl.coef == 0.1
    (problem,) = problems_of(path, "algorithm.kl.coef=0.2")
    assert problem == (
        "command line: algorithm.kl: belongs to online algorithms, not to sft, pretrain: remove it "
        "(in stage a; stages.<name>.algorithm.kl is of one stage)"
    )
    assert load_recipe(path, ["stages.b.algorithm.kl.coef=0.2"])[1].online.kl.coef == 0.2


def test_a_misspelt_kind_is_the_only_problem_that_is_told(tmp_path: Path):
    path = write(tmp_path / "recipe.yaml", "grpo, loss: {kind: sappo, tau_positive: 2.0}")
    (problem,) = problems_of(path)
    assert problem.startswith(
        f"{path}:1: algorithm.loss.kind: must be one of clip, cispo, sapo, gmpo, dppo, clip_cov, kl_cov, function; "
        "is sappo (did you mean"
    )


@pytest.mark.parametrize("kind", ["3", "null", "[clip]", "{a: b}"])
def test_a_kind_that_is_no_word_is_named(kind: str, tmp_path: Path):
    path = write(tmp_path / "recipe.yaml", f"grpo, loss: {{kind: {kind}}}")
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}:1: algorithm.loss.kind: ")


@pytest.mark.parametrize(
    ("options", "key", "says"),
    [
        ("reward_scaling: normalize_each", "reward_scaling", "1 completion normalised is 0: set group_size to 2"),
        ("require_signal: true", "require_signal", "no group of 1 completion has rewards that differ: set group_size"),
    ],
)
@pytest.mark.parametrize("name", ["ppo", "reinforce++"])
def test_groups_of_one_are_refused_where_a_group_is_compared(name: str, options: str, key: str, says: str, tmp_path):
    path = write(tmp_path / "recipe.yaml", f"{name}, groups: {{{options}}}")
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}:1: algorithm.groups.{key}: {says}")
    assert load_recipe(path, ["algorithm.group_size=2"])


def test_algorithms_made_in_python_are_held_to_the_same_rules():
    with pytest.raises(ValidationError, match="preference"):
        algorithm_of("sft", preference={"beta": 0.5})
    with pytest.raises(ValidationError, match="set group_size to 2 or more"):
        algorithm_of("grpo", group_size=1)
    assert algorithm_of("grpo", loss={"kind": "sapo"}).loss.tau_negative == 1.05


OF_ALL = {
    "group_size": 1,
    "advantage": {"estimator": "group_mean", "scale": "none", "ddof": 1, "eps": 1e-4, "whiten": False, "gamma": 1.0}
    | {"gae_lambda": 0.95},
    "loss": {"kind": "clip", "ratio": "token", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}
    | {"reduction": "token", "entropy_coef": 0.0, "sapo_tau_positive": 1.0, "sapo_tau_negative": 1.05},
    "kl": {"coef": 0.0, "estimator": "k3", "placement": "loss", "unbiased_gradient": False, "target": None}
    | {"horizon": 10000},
    "correction": {"old_policy": "trainer", "mode": "truncate", "level": "token", "low": 0.0, "high": 2.0},
    "groups": {"updates_per_step": 1},
    "critic": {"learning_rate": 1e-5, "clip": 0.2, "path": None, "warmup_steps": 0, "workers": 1},
    "preference": {"loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "sft_coef": 0.0, "gamma": 0.0}
    | {"reference_free": False, "length_normalized": False, "center_coef": 0.0}
    | {"desirable_weight": 1.0, "undesirable_weight": 1.0},
}
"""The algorithm block of a resolved recipe as it was when every algorithm had the options of all of them."""


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        (
            "sapo",
            {"group_size": 4, "loss": {"kind": "sapo", "sapo_tau_positive": 3.0}},
            {"loss": {"tau_positive": 3.0}},
        ),
        ("grpo", {"group_size": 4, "kl": {"coef": 0.0, "estimator": "k1"}}, {"group_size": 4, "critic": None}),
        ("ppo", {"advantage": {"estimator": "gae"}, "critic": {"workers": 2}}, {"critic": {"workers": 2}}),
        ("grpo", {"group_size": 4, "correction": {"mode": "none", "high": 9.0}}, {"correction": {"mode": "none"}}),
        ("simpo", {"preference": {"gamma": 0.7, "reference_free": True}}, {"preference": {"gamma": 0.7}}),
        ("kto", {"preference": {"desirable_weight": 1.5}}, {"preference": {"desirable_weight": 1.5}}),
        ("reward_model", {"preference": {"center_coef": 0.1}}, {"preference": {"center_coef": 0.1}}),
        ("sft", {"loss": {"reduction": "sequence"}}, {"loss": {"reduction": "sequence"}}),
    ],
)
def test_a_resolved_recipe_that_has_the_options_of_all_algorithms_still_loads(name, changes, expected, tmp_path: Path):
    path = write(tmp_path / "recipe.yaml", name)
    given = {key: {**OF_ALL[key], **value} if isinstance(value, dict) else value for key, value in changes.items()}
    others = path.read_text().splitlines(keepends=True)[1:]
    path.write_text("".join([dump({"algorithm": {"name": name, **OF_ALL, **given}}), *others]))
    (recipe,) = load_recipe(path)
    found = recipe.algorithm.model_dump()
    for key, value in expected.items():
        assert found[key] == value if not isinstance(value, dict) else value.items() <= found[key].items()
