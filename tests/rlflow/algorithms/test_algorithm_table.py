import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from rlflow.algorithms import preference_objectives
from rlflow.algorithms.advantages import BASELINES, SCALES
from rlflow.algorithms.corrections import CORRECTIONS, LEVELS
from rlflow.algorithms.kl import KL_ESTIMATORS
from rlflow.algorithms.objectives import OBJECTIVES, objective_of
from rlflow.algorithms.policy_losses import RATIOS
from rlflow.algorithms.policy_objectives import POLICY_LOSSES
from rlflow.algorithms.preference_objectives import PREFERENCE_LOSSES
from rlflow.algorithms.reductions import REDUCTIONS
from rlflow.recipe import ALGORITHMS, PairBlock, algorithm_of
from rlflow.recipe.block import kinds_in
from rlflow.recipe.explain import blocks_at

DOCS = Path(__file__).parents[3] / "docs" / "algorithms.md"


@pytest.mark.parametrize(
    ("path", "name", "bound", "without"),
    [
        ("advantage", "estimator", BASELINES, {"gae", "return", "function"}),
        ("advantage", "scale", SCALES, {"none"}),
        ("loss", "kind", POLICY_LOSSES, {"function"}),
        ("loss", "ratio", RATIOS, set()),
        ("loss", "reduction", REDUCTIONS, set()),
        ("kl", "estimator", KL_ESTIMATORS, set()),
        ("correction", "mode", CORRECTIONS, {"none"}),
        ("correction", "level", LEVELS, set()),
        ("preference", "loss", PREFERENCE_LOSSES, set()),
    ],
)
def test_every_word_of_the_schema_is_bound_to_a_function_and_no_function_is_without_a_word(path, name, bound, without):
    fields = [block.model_fields.get(name) for block in blocks_at()[f"algorithm.{path}"]]
    words = {word for info in fields if info is not None for word in get_args(info.annotation)}
    assert words - without == set(bound)


@pytest.mark.parametrize("option", ["label_smoothing", "gamma"])
def test_the_losses_that_take_a_number_are_those_that_are_given_it(option: str):
    (table,) = (
        node.value
        for node in ast.parse(inspect.getsource(preference_objectives)).body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "PREFERENCE_LOSSES"
    )
    assert isinstance(table, ast.Dict)
    given = {
        key.value
        for key, function in zip(table.keys, table.values, strict=True)
        if isinstance(key, ast.Constant) and f"b.{option}" in ast.unparse(function)
    }
    assert given == {n for n, kind in kinds_in(PairBlock)["preference"].names.items() if option in kind.model_fields}


@pytest.mark.parametrize("name", [name for name, row in ALGORITHMS.items() if row.objective != "none"])
def test_every_row_is_a_valid_block_with_an_objective(name):
    block = algorithm_of(name)
    assert objective_of(block) is OBJECTIVES[ALGORITHMS[name].objective]
    assert f"`{name}`" in DOCS.read_text(), "docs/algorithms.md explains every row"


@pytest.mark.parametrize("word", [*PREFERENCE_LOSSES, *RATIOS, *REDUCTIONS, *BASELINES, *LEVELS])
def test_every_option_is_documented(word):
    assert f"`{word}`" in DOCS.read_text()


def test_the_defaults_are_the_papers():
    assert algorithm_of("grpo").kl.coef == 0.04
    assert (algorithm_of("dapo").loss.clip_low, algorithm_of("dapo").loss.clip_high) == (0.2, 0.28)
    assert algorithm_of("dapo").groups.overlong_buffer * 20480 == 4096
    assert (algorithm_of("gspo").loss.clip_low, algorithm_of("gspo").loss.clip_high) == (3e-4, 4e-4)
    assert algorithm_of("dr_grpo").advantage.scale == "none"
    assert algorithm_of("ppo").advantage.gae_lambda == 0.95
    assert algorithm_of("sapo").loss.tau_negative == 1.05
    assert algorithm_of("dpo").preference.beta == 0.1
    simpo = algorithm_of("simpo").preference
    assert (simpo.beta, simpo.gamma, simpo.length_normalized, simpo.reference_free) == (2.0, 1.0, True, True)


def test_the_drivers_half_imports_no_torch():
    modules = "advantages, reductions, kl_reward, preference_targets"
    code = f"import sys; from rlflow.algorithms import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
