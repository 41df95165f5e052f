import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from toy_policy import algorithm

from rlflow.algorithms.advantages import BASELINES, SCALES
from rlflow.algorithms.corrections import CORRECTIONS, LEVELS
from rlflow.algorithms.kl import KL_ESTIMATORS
from rlflow.algorithms.objectives import OBJECTIVES, POLICY_LOSSES, PREFERENCE_LOSSES, objective_of
from rlflow.algorithms.policy_losses import RATIOS
from rlflow.algorithms.reductions import REDUCTIONS
from rlflow.recipe import ALGORITHMS, AdvantageBlock, CorrectionBlock, KLBlock, PolicyLossBlock, PreferenceBlock

DOCS = Path(__file__).parents[3] / "docs" / "algorithms.md"


@pytest.mark.parametrize(
    ("block", "name", "bound", "without"),
    [
        (AdvantageBlock, "estimator", BASELINES, {"gae"}),
        (AdvantageBlock, "scale", SCALES, {"none"}),
        (PolicyLossBlock, "kind", POLICY_LOSSES, set()),
        (PolicyLossBlock, "ratio", RATIOS, set()),
        (PolicyLossBlock, "reduction", REDUCTIONS, set()),
        (KLBlock, "estimator", KL_ESTIMATORS, set()),
        (CorrectionBlock, "mode", CORRECTIONS, {"none"}),
        (CorrectionBlock, "level", LEVELS, set()),
        (PreferenceBlock, "loss", PREFERENCE_LOSSES, set()),
    ],
)
def test_every_word_of_the_schema_is_bound_to_a_function_and_no_function_is_without_a_word(block, name, bound, without):
    assert set(get_args(block.model_fields[name].annotation)) - without == set(bound)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_is_a_valid_block_with_an_objective(name):
    block = algorithm(name)
    assert objective_of(block) is OBJECTIVES[ALGORITHMS[name].objective]
    assert f"`{name}`" in DOCS.read_text(), "docs/algorithms.md explains every row"


@pytest.mark.parametrize("word", [*PREFERENCE_LOSSES, *RATIOS, *REDUCTIONS, *BASELINES, *LEVELS])
def test_every_option_is_documented(word):
    assert f"`{word}`" in DOCS.read_text()


def test_the_defaults_are_the_papers():
    assert algorithm("grpo").kl.coef == 0.04
    assert (algorithm("dapo").loss.clip_low, algorithm("dapo").loss.clip_high) == (0.2, 0.28)
    assert algorithm("dapo").groups.overlong_buffer * 20480 == 4096
    assert (algorithm("gspo").loss.clip_low, algorithm("gspo").loss.clip_high) == (3e-4, 4e-4)
    assert algorithm("dr_grpo").advantage.scale == "none"
    assert algorithm("ppo").advantage.gae_lambda == 0.95
    assert algorithm("sapo").loss.sapo_tau_negative == 1.05
    assert algorithm("dpo").preference.beta == 0.1
    simpo = algorithm("simpo").preference
    assert (simpo.beta, simpo.gamma, simpo.length_normalized, simpo.reference_free) == (2.0, 1.0, True, True)


def test_the_drivers_half_imports_no_torch():
    modules = "advantages, reductions, kl_reward, preference_targets"
    code = f"import sys; from rlflow.algorithms import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
