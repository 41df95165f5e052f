"""Options that do nothing in an algorithm are refused, where they were set; at a default they may stand."""

from __future__ import annotations

import ast
import inspect
import typing
from pathlib import Path

import pytest

from rlflow.algorithms import objectives
from rlflow.recipe import ALGORITHMS, AlgorithmBlock, PreferenceBlock, RecipeError, load_recipe
from rlflow.recipe.reference import options
from rlflow.recipe.used_options import OBJECTIVE, USES, can_have_effect
from rlflow.recipe.yaml_source import merge


def resolved(name: str) -> AlgorithmBlock:
    return AlgorithmBlock.model_validate(merge(ALGORITHMS[name].defaults, {"name": name}))


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


def test_the_table_has_every_option_and_no_other():
    keys = [option.key for option in options(resolved("grpo")) if option.key != "name"]
    assert sorted(USES) == sorted(keys)


def test_the_table_names_values_that_there_are():
    block = resolved("grpo")
    for whens in USES.values():
        for when in whens:
            if when.key == OBJECTIVE:
                assert set(when.values) <= {row.objective for row in ALGORITHMS.values()}
                continue
            *blocks, field = when.key.split(".")
            hint = typing.get_type_hints(type(getattr(block, *blocks)))[field]
            assert not when.values or set(when.values) <= set(typing.get_args(hint))


@pytest.mark.parametrize("option", ["label_smoothing", "gamma"])
def test_the_losses_that_take_a_number_are_those_that_are_given_it(option: str):
    (table,) = (
        node.value
        for node in ast.parse(inspect.getsource(objectives)).body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "PREFERENCE_LOSSES"
    )
    assert isinstance(table, ast.Dict)
    losses = {
        key.value
        for key, function in zip(table.keys, table.values, strict=True)
        if isinstance(key, ast.Constant) and f"b.{option}" in ast.unparse(function)
    }
    (when,) = USES[f"preference.{option}"]
    assert set(when.values) == losses


@pytest.mark.parametrize(
    ("algorithm", "key", "says"),
    [
        ("dpo, kl: {coef: 0.1}", "kl.coef", "dpo has no use for it: remove it, or set it to 0.0"),
        ("dpo, correction: {mode: mask}", "correction.mode", "dpo has no use for it"),
        ("dpo, loss: {clip_low: 0.1}", "loss.clip_low", "dpo has no use for it: remove it, or set it to 0.2"),
        ("dpo, loss: {reduction: sequence}", "loss.reduction", "has no effect without preference.sft_coef"),
        ("dpo, advantage: {whiten: true}", "advantage.whiten", "dpo has no use for it"),
        ("dpo, groups: {mask_truncated: true}", "groups.mask_truncated", "dpo has no use for it"),
        ("dpo, group_size: 4", "group_size", "dpo has no use for it: remove it, or set it to 1"),
        ("dpo, preference: {center_coef: 0.1}", "preference.center_coef", "dpo has no use for it"),
        ("dpo, preference: {desirable_weight: 2.0}", "preference.desirable_weight", "dpo has no use for it"),
        ("dpo, preference: {loss: hinge, gamma: 1.0}", "preference.gamma", "without preference.loss sigmoid: remove"),
        ("dpo, preference: {loss: hinge, label_smoothing: 0.1}", "preference.label_smoothing", "sigmoid/robust/aot"),
        ("sft, kl: {coef: 0.1}", "kl.coef", "sft has no use for it"),
        ("sft, loss: {entropy_coef: 0.1}", "loss.entropy_coef", "sft has no use for it"),
        ("sft, critic: {clip: 0.1}", "critic.clip", "sft has no use for it"),
        ("kto, preference: {reference_free: true}", "preference.reference_free", "kto has no use for it"),
        ("kto, preference: {sft_coef: 1.0}", "preference.sft_coef", "kto has no use for it"),
        ("kto, preference: {length_normalized: true}", "preference.length_normalized", "kto has no use for it"),
        ("kto, preference: {label_smoothing: 0.1}", "preference.label_smoothing", "kto has no use for it"),
        ("kto, preference: {gamma: 0.1}", "preference.gamma", "kto has no use for it"),
        ("reward_model, preference: {beta: 0.5}", "preference.beta", "reward_model has no use for it"),
        ("reward_model, preference: {sft_coef: 0.5}", "preference.sft_coef", "reward_model has no use for it"),
        ("grpo, preference: {beta: 0.5}", "preference.beta", "grpo has no use for it: remove it, or set it to 0.1"),
        ("grpo, critic: {workers: 2}", "critic.workers", "has no effect without advantage.estimator gae"),
        ("grpo, advantage: {gamma: 0.9}", "advantage.gamma", "has no effect without advantage.estimator return/gae"),
        ("dr_grpo, advantage: {ddof: 0}", "advantage.ddof", "or advantage.whiten: remove it, or set it to 1"),
        ("ppo, advantage: {scale: batch_std}", "advantage.scale", "without advantage.estimator group_mean/leave_one"),
        ("grpo, groups: {max_resamples: 5}", "groups.max_resamples", "has no effect without groups.require_signal"),
        ("grpo, groups: {overlong_penalty: 0.5}", "groups.overlong_penalty", "without groups.overlong_buffer"),
        ("sapo, loss: {clip_high: 0.3}", "loss.clip_high", "has no effect without loss.kind clip/cispo"),
        ("sapo, loss: {dual_clip: 3.0}", "loss.dual_clip", "has no effect without loss.kind clip"),
        ("cispo, loss: {dual_clip: 3.0}", "loss.dual_clip", "remove it, or set it to null"),
        ("gspo, loss: {sapo_tau_negative: 2.0}", "loss.sapo_tau_negative", "has no effect without loss.kind sapo"),
        ("dapo, kl: {estimator: k1}", "kl.estimator", "has no effect without kl.coef: remove it, or set it to k3"),
        ("ppo, kl: {unbiased_gradient: true}", "kl.unbiased_gradient", "has no effect without kl.placement loss"),
    ],
)
def test_an_option_that_does_nothing_is_refused(algorithm: str, key: str, says: str, tmp_path: Path):
    path = write(tmp_path / "recipe.yaml", algorithm)
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}:1: algorithm.{key}: ")
    assert says in problem


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_option_may_stand_at_the_rows_default_or_the_schemas(name: str):
    neutral = AlgorithmBlock.model_construct(name=name).model_dump()
    for option in USES:
        if can_have_effect(name, option):
            continue
        *blocks, field = option.split(".")
        given = neutral[blocks[0]][field] if blocks else neutral[field]
        nested = {blocks[0]: {field: given}} if blocks else {field: given}
        AlgorithmBlock.model_validate(merge(merge(ALGORITHMS[name].defaults, {"name": name}), nested))


def test_what_a_row_sets_by_itself_may_lose_its_effect(tmp_path: Path):
    (recipe,) = load_recipe(write(tmp_path / "recipe.yaml", "ppo, kl: {coef: 0.0}"))
    assert recipe.algorithm.kl.estimator == "k1"
    assert load_recipe(write(tmp_path / "recipe.yaml", "gspo, loss: {kind: sapo}"))


@pytest.mark.parametrize(
    ("algorithm", "override"),
    [
        ("grpo, kl: {estimator: k1, placement: reward}", "algorithm.kl.coef=0"),
        ("dapo, groups: {max_resamples: 5}", "algorithm.groups.require_signal=false"),
        ("grpo, correction: {mode: mask, level: sequence, low: 0.1, high: 3.0}", "algorithm.correction.mode=none"),
    ],
)
def test_what_is_switched_off_on_purpose_may_keep_its_options(algorithm: str, override: str, tmp_path: Path):
    assert load_recipe(write(tmp_path / "recipe.yaml", algorithm), [override])


def test_an_option_of_an_extended_recipe_is_reported_where_it_stands(tmp_path: Path):
    base = write(tmp_path / "base.yaml", "grpo, kl: {estimator: k1}")
    child = tmp_path / "child.yaml"
    child.write_text("extends: base.yaml\nalgorithm: {name: dapo}\n")
    assert problems_of(child) == [
        f"{base}:1: algorithm.kl.estimator: has no effect without kl.coef: remove it, or set it to k3"
    ]
    child.write_text("extends: base.yaml\nalgorithm: {name: dapo, kl: {estimator: k3}}\n")
    assert load_recipe(child)


def test_an_option_for_all_stages_is_refused_in_one_that_has_no_use_for_it(tmp_path: Path):
    path = write(tmp_path / "recipe.yaml", "grpo, kl: {coef: 0.1}")
    path.write_text(path.read_text() + "stages: [{name: a, algorithm: {name: sft}, rewards: []}, {name: b}]\n")
    assert [recipe.algorithm.kl.coef for recipe in load_recipe(path)] == [0.0, 0.1]
    (problem,) = problems_of(path, "algorithm.kl.coef=0.2")
    assert problem == (
        "command line: algorithm.kl.coef: sft has no use for it: remove it, or set it to 0.0 "
        "(in stage a; stages.<name>.algorithm.kl.coef is of one stage)"
    )
    assert load_recipe(path, ["stages.b.algorithm.kl.coef=0.2"])[1].algorithm.kl.coef == 0.2


def test_a_misspelt_setting_does_not_make_what_it_decides_wrong(tmp_path: Path):
    path = write(tmp_path / "recipe.yaml", "grpo, loss: {kind: sappo, sapo_tau_positive: 2.0}")
    (problem,) = problems_of(path)
    assert "did you mean sapo?" in problem


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


def test_blocks_made_in_python_are_held_to_the_same_rules():
    with pytest.raises(ValueError, match=r"preference\.beta: sft has no use for it"):
        AlgorithmBlock(name="sft", preference=PreferenceBlock(beta=0.5))
