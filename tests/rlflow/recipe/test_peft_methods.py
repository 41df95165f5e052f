"""The table of PEFT's methods is PEFT's, and what a recipe says of one is checked against it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import PeftType

from rlflow.recipe import RecipeError, load_recipe
from rlflow.recipe import peft_methods as methods
from tests.peft_fields import peft_fields

RECIPE = """\
algorithm: {{name: {name}}}
model: {{path: a/b, dtype: {dtype}, adapter: {adapter}}}
data: {{train: {{path: rows.jsonl}}, prompts_per_step: 2}}
run: {{steps: 1}}
"""


def load(directory: Path, adapter: str, *overrides: str, name: str = "sft", dtype: str = "float32"):
    path = directory / "recipe.yaml"
    path.write_text(RECIPE.format(name=name, dtype=dtype, adapter=adapter))
    (recipe,) = load_recipe(path, list(overrides))
    return recipe


def test_the_fields_are_those_of_the_installed_peft():
    written = json.loads(Path(methods.__file__).with_name("peft_fields.json").read_text())
    assert written == peft_fields(), "python -m tests.peft_fields > rlflow/recipe/peft_fields.json"


def test_every_method_of_peft_is_trained_or_refused_by_name():
    assert methods.METHODS.keys() | methods.REFUSED.keys() == {kind.value for kind in PeftType}
    assert not methods.METHODS.keys() & methods.REFUSED.keys()


def test_a_method_starts_as_its_base_and_on_all_linear_layers_where_nothing_else_is_said():
    assert methods.completed({"peft_type": "fourierft", "n_frequency": 8}) == {
        "peft_type": "FOURIERFT",
        "n_frequency": 8,
        "init_weights": True,
        "target_modules": "all-linear",
    }
    experts = {"peft_type": "LORA", "target_parameters": ["mlp.experts.down_proj"]}
    assert "target_modules" not in methods.completed(experts)
    assert "target_modules" not in methods.completed({"peft_type": "LN_TUNING"})


@pytest.mark.parametrize(
    ("adapter", "key", "says"),
    [
        ("{peft: {}}", "peft.peft_type", "is missing: name PEFT's method, one of ADALORA, BOFT"),
        ("{peft: {peft_type: lokrr}}", "peft.peft_type", "is lokrr: did you mean LOKR?"),
        ("{peft: {peft_type: ADALORA, r: 8}}", "peft.r", "is not read: set init_r, which a layer begins with"),
        ("{peft: {peft_type: ADALORA, use_dora: true}}", "peft.use_dora", "is of LORA alone and not read: remove it"),
        ("{peft: {peft_type: ADALORA, total_step: 9}}", "peft.total_step", "is how many updates the run has"),
        ("{peft: {peft_type: ADALORA, target_r: 12}}", "peft.target_r", "must be less than init_r, 12"),
        ("{peft: {peft_type: ADALORA, init_lora_weights: eva}}", "peft.init_lora_weights", "eva is of LORA: remove it"),
        ("{peft: {peft_type: PREFIX_TUNING}}", "peft.peft_type", "adds tokens to prompts and adapts no layer"),
        ("{peft: {peft_type: UNILORA}}", "peft.peft_type", "does not start as its base: train VERA"),
        ("{peft: {peft_type: LOKR, alpa: 3}}", "peft.alpa", "LOKR has no such field, did you mean alpha?"),
        ("{peft: {peft_type: LOKR, r: many}}", "peft.r", 'must be int; is "many"'),
        ("{peft: {peft_type: LOKR, r: true}}", "peft.r", "must be int; is true"),
        ("{peft: {peft_type: LORA, r: 0}}", "peft.r", "must be more than 0; is 0"),
        ("{peft: {peft_type: PSOFT, psoft_alpha: -8}}", "peft.psoft_alpha", "must be more than 0; is -8"),
        ("{peft: {peft_type: LORA, rank_pattern: {q_proj: 0}}}", "peft.rank_pattern", "q_proj must be more than 0"),
        ("{peft: {peft_type: LOHA, alpha_pattern: {q_proj: x}}}", "peft.alpha_pattern", 'more than 0; is "x"'),
        ("{peft: {peft_type: LORA, rank_pattern: {'(q': 4}}}", "peft.rank_pattern", "(q is no regular expression"),
        ("{peft: {peft_type: IA3, target_modules: '.*(q'}}", "peft.target_modules", ".*(q is no regular expression"),
        (
            "{peft: {peft_type: TRAINABLE_TOKENS, token_indices: [3, 3]}}",
            "peft.token_indices",
            "ids of tokens, each once",
        ),
        ("{peft: {peft_type: TRAINABLE_TOKENS, token_indices: []}}", "peft.token_indices", "ids of tokens, each once"),
        (
            "{peft: {peft_type: TRAINABLE_TOKENS, token_indices: [-1]}}",
            "peft.token_indices",
            "ids of tokens, each once",
        ),
        ("{peft: {peft_type: MISS, init_weights: bta}}", "peft.init_weights", "must be 'bat' or 'mini' or bool"),
        ("{peft: {peft_type: LORA, modules_to_save: [lm_head]}}", "peft.modules_to_save", "is not supported"),
        ("{peft: {peft_type: LORA, task_type: CAUSAL_LM}}", "peft.task_type", "follows from the algorithm: remove it"),
        ("{peft: {peft_type: LORA, init_lora_weights: loftq}}", "peft.init_lora_weights", "changes the base: set true"),
        ("{peft: {peft_type: LORA, init_lora_weights: pissa_niter}}", "peft.init_lora_weights", "must be 'corda' or"),
        ("{peft: {peft_type: LORA, init_lora_weights: pissa, use_dora: true}}", "peft.use_dora", "does not go with"),
        ("{peft: {peft_type: LORA, init_lora_weights: olora, lora_dropout: 0.1}}", "peft.lora_dropout", "set 0"),
        (
            "{peft: {peft_type: LORA, init_lora_weights: eva, rank_pattern: {q_proj: 4}}}",
            "peft.rank_pattern",
            "is found by",
        ),
        ("{peft: {peft_type: LORA, eva_config: {rho: 1.0}}}", "peft.eva_config", "with init_lora_weights: eva alone"),
        (
            "{peft: {peft_type: LORA, init_lora_weights: lora_ga, lora_ga_config: {dirction: ArBr}}}",
            "peft.lora_ga_config",
            "has no dirction, did you mean direction?",
        ),
        (
            "{peft: {peft_type: LORA, init_lora_weights: lora_ga, lora_ga_config: {scale: big}}}",
            "peft.lora_ga_config",
            "scale must be stable or weight_svd or gd_scale or unit; is big",
        ),
        ("{rank: 4, peft: {peft_type: LOKR}}", "rank", "give peft PEFT's own field"),
        ("{lora_plus_ratio: 4, peft: {peft_type: LOKR}}", "lora_plus_ratio", "is of LoRA's A and B"),
        ("{path: a, peft: {peft_type: LOKR}}", "peft", "is settled by the adapter at path"),
    ],
)
def test_what_is_wrong_with_a_method_is_said_with_its_line_and_field(adapter: str, key: str, says: str, tmp_path: Path):
    with pytest.raises(RecipeError) as raised:
        load(tmp_path, adapter)
    (problem,) = raised.value.problems
    assert (problem.line, problem.key) == (2, f"model.adapter.{key}")
    assert says in problem.message


def test_sizes_and_expressions_that_peft_takes_are_taken(tmp_path: Path):
    assert load(tmp_path, "{peft: {peft_type: OFT, r: 0, oft_block_size: 8}}")
    assert load(tmp_path, "{peft: {peft_type: LORA, rank_pattern: {'^a.b': 4}, target_modules: '.*[qv]_proj'}}")


@pytest.mark.parametrize(
    ("adapter", "overrides", "key", "says"),
    [
        ("{peft: {peft_type: VERA}}", ["model.dtype=bfloat16"], "peft", "float32: set model.dtype: float32"),
        ("{peft: {peft_type: C3A, init_weights: false}}", [], "peft.init_weights", "another policy than its base"),
        ("{peft: {peft_type: LOHA, module_dropout: 0.1}}", [], "peft.module_dropout", "dpo compares logprobs"),
        ("{peft: {peft_type: LOKR}}", ["trainer.engine=deepspeed"], "peft", "set trainer.engine: fsdp"),
        ("{peft: {peft_type: ADALORA, tinit: 2}}", ["run.steps=2"], "peft", "tinit and tfinal are 2 updates of 2"),
    ],
)
def test_what_a_method_rules_out_elsewhere_is_said(
    adapter: str, overrides: list[str], key: str, says: str, tmp_path: Path
):
    with pytest.raises(RecipeError) as raised:
        load(tmp_path, adapter, *overrides, name="dpo")
    (problem,) = raised.value.problems
    assert problem.key == f"model.adapter.{key}"
    assert says in problem.message


def test_a_method_whose_ranks_are_given_out_over_all_layers_has_one_trainer(tmp_path: Path):
    assert load(tmp_path, "{peft: {peft_type: RANDLORA}}", "trainer.workers=2").trainer.workers == 2
    with pytest.raises(RecipeError, match=r"trainer\.workers: ADALORA compares values over all layers.*set 1"):
        load(tmp_path, "{peft: {peft_type: ADALORA, init_r: 12, target_r: 8}}", "trainer.workers=2")


def test_fine_tuning_may_start_elsewhere_and_drop_out(tmp_path: Path):
    adapter = load(tmp_path, "{peft: {peft_type: FOURIERFT, init_weights: false}}").model.adapter
    assert adapter is not None and methods.starts_elsewhere(adapter.config)
    adapter = load(tmp_path, "{peft: {peft_type: LOHA, module_dropout: 0.1}}").model.adapter
    assert adapter is not None and adapter.drops_out


@pytest.mark.parametrize(
    ("config", "plain", "modules"),
    [
        ({"peft_type": "LORA", "r": 8, "rank_pattern": {"q_proj": 4}, "use_dora": False}, True, True),
        ({"peft_type": "LORA", "use_dora": True}, False, True),
        ({"peft_type": "LORA", "target_parameters": ["mlp.experts.down_proj"]}, False, False),
        ({"peft_type": "LOKR", "r": 8}, False, False),
    ],
)
def test_engines_take_lora_as_it_is(config: dict, plain: bool, modules: bool):
    assert methods.is_plain_lora(config) == plain
    assert methods.has_lora_modules(config) == modules
