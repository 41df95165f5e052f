"""From files and overrides to resolved recipes."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from rlflow.recipe import (
    ALGORITHMS,
    AdapterBlock,
    ModelBlock,
    Recipe,
    RecipeError,
    RewardBlock,
    dump_recipe,
    load_recipe,
)

SHARED = """\
algorithm: {name: grpo}
model: {path: org/model, revision: main, dtype: bfloat16}
data: {train: {path: org/data}}
rewards: [{name: exact_match}, {name: math_accuracy, weight: 0.5}]
trainer: {learning_rate: 1e-6, workers: 2}
run: {steps: 10}
"""
STAGES = """\
stages:
  - name: sft
    algorithm: {name: sft}
    rewards: []
    trainer: {learning_rate: 1e-4}
    run: {steps: 5}
  - name: grpo
    algorithm: {group_size: 16}
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "arithmetic.yaml", SHARED)


def load_one(path: Path, *overrides: str) -> Recipe:
    (recipe,) = load_recipe(path, overrides)
    return recipe


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        load_recipe(path, overrides)
    return [str(problem) for problem in raised.value.problems]


def test_numbers_may_be_written_without_a_dot(recipe_file: Path):
    assert load_one(recipe_file).trainer.learning_rate == 1e-6


def test_the_algorithms_defaults_lie_under_what_the_recipe_gives(recipe_file: Path):
    algorithm = load_one(recipe_file, "algorithm.advantage.eps=0.01").algorithm
    assert algorithm.group_size == ALGORITHMS["grpo"].defaults["group_size"]
    assert (algorithm.advantage.scale, algorithm.advantage.eps) == ("group_std", 0.01)


def test_overrides_set_nested_keys_list_items_and_blocks_that_were_not_there(recipe_file: Path):
    recipe = load_one(
        recipe_file,
        "trainer.learning_rate=2e-6",
        "rewards.1.weight=2",
        "rollout.max_new_tokens=7",
        "tracking=[console]",
        "data.system=a=b",
    )
    assert (recipe.trainer.learning_rate, recipe.trainer.workers) == (2e-6, 2)
    assert [reward.weight for reward in recipe.rewards] == [1.0, 2.0]
    assert recipe.rollout.max_new_tokens == 7
    assert recipe.tracking == ["console"]
    assert recipe.data.system == "a=b"


def test_overrides_may_be_a_mapping_of_python_values(recipe_file: Path):
    (recipe,) = load_recipe(recipe_file, {"trainer.learning_rate": 2e-6, "trainer": {"workers": 4}})
    assert (recipe.trainer.learning_rate, recipe.trainer.workers) == (2e-6, 4)


def test_an_override_may_empty_a_value(recipe_file: Path):
    assert load_one(recipe_file, "run.steps=null", "run.epochs=2").run.epochs == 2.0


def test_a_bad_override_names_the_command_line(recipe_file: Path):
    wrong = ["run.stesp=1", "trainer.workers=two", "x", "rewards.2.weight=1", "run.steps.a=1"]
    assert problems_of(recipe_file, *wrong) == [
        "command line: x: is no override: write key=value, e.g. run.steps=10",
        "command line: rewards.2.weight: rewards is a list of 2: give a place from 0 to 1, not 2",
        "command line: run.steps.a: run.steps is a value, not a block: a cannot be set in it",
        "command line: trainer.workers: must be a whole number, is two",
        "command line: run.stesp: unknown key here (did you mean steps?)",
    ]
    assert problems_of(recipe_file, "run.steps={") == [
        "command line: run.steps: { is not YAML: put quotes around the whole key=value"
    ]
    assert problems_of(recipe_file, "stages.sft.run.steps=1") == [
        "command line: stages.sft.run.steps: the recipe has no stages: leave out stages.<name>"
    ]


def test_extends_merges_blocks_and_replaces_lists(recipe_file: Path):
    child = write(
        recipe_file.parent / "more" / "child.yaml",
        "extends: ../arithmetic.yaml\nalgorithm: {group_size: 2}\nrewards: [{name: cosine}]\nrun: {seed: 3}\n",
    )
    recipe = load_one(child)
    assert (recipe.algorithm.name, recipe.algorithm.group_size) == ("grpo", 2)
    assert recipe.rewards == [RewardBlock(name="cosine")]
    assert (recipe.run.steps, recipe.run.seed) == (10, 3)
    assert recipe.run.output_dir == str(recipe_file.parent / "runs" / "child")


def test_a_problem_names_the_file_that_it_stands_in(recipe_file: Path):
    write(recipe_file, SHARED.replace("workers: 2", "workers: two"))
    child = write(recipe_file.parent / "child.yaml", "extends: arithmetic.yaml\nrun: {sede: 3}\n")
    assert problems_of(child) == [
        f"{recipe_file}:5: trainer.workers: must be a whole number, is two",
        f"{child}:2: run.sede: unknown key here (did you mean seed?)",
    ]


def test_files_that_extend_each_other_are_refused(recipe_file: Path):
    write(recipe_file, "extends: child.yaml\n")
    child = write(recipe_file.parent / "child.yaml", "extends: arithmetic.yaml\n")
    (problem,) = problems_of(child)
    assert problem.startswith(f"{recipe_file}:1: extends: goes in a circle: {child} -> {recipe_file} -> {child}")


def test_anchors_and_merge_keys_work_and_do_not_count_as_repeated(recipe_file: Path):
    shared = "rollout: &shared {workers: 3, cpus_per_worker: 2}\nreference: {<<: *shared, workers: 4}\n"
    recipe = load_one(write(recipe_file, SHARED + shared))
    assert (recipe.reference.workers, recipe.reference.cpus_per_worker) == (4, 2.0)


def test_an_extended_file_may_repeat_a_key_and_is_still_reported(recipe_file: Path):
    write(recipe_file, SHARED + "trainer: {learning_rate: 1e-3}\n")
    child = write(recipe_file.parent / "child.yaml", "extends: arithmetic.yaml\n")
    assert problems_of(child) == [f"{recipe_file}:7: trainer: is given twice, first on line 5: keep one"]


def test_a_stage_is_merged_over_the_shared_blocks(recipe_file: Path):
    sft, grpo = load_recipe(write(recipe_file, SHARED + STAGES))
    assert (sft.stage, grpo.stage) == ("sft", "grpo")
    assert (sft.trainer.learning_rate, sft.trainer.workers) == (1e-4, 2)
    assert (grpo.trainer.learning_rate, grpo.trainer.workers) == (1e-6, 2)
    assert (sft.run.steps, grpo.run.steps) == (5, 10)
    assert (sft.rewards, len(grpo.rewards)) == ([], 2)


def test_a_stage_with_another_algorithm_replaces_the_block_and_one_with_the_same_extends_it(recipe_file: Path):
    text = SHARED.replace("{name: grpo}", "{name: grpo, group_size: 4, kl: {coef: 0.5}}") + STAGES
    sft, grpo = load_recipe(write(recipe_file, text))
    assert sft.algorithm.model_dump() == {"name": "sft", "loss": {"reduction": "token"}}
    assert (grpo.online.group_size, grpo.online.kl.coef) == (16, 0.5)


def test_a_stage_starts_from_the_model_of_the_one_before(recipe_file: Path):
    sft, grpo = load_recipe(write(recipe_file, SHARED + STAGES))
    assert sft.model == ModelBlock(path="org/model", revision="main", dtype="bfloat16")
    assert grpo.model == ModelBlock(path=f"{recipe_file.parent}/runs/arithmetic/sft/final", dtype="bfloat16")


def test_a_stage_goes_on_from_an_adapter_on_the_same_revision_of_its_base(recipe_file: Path):
    with_adapter = SHARED.replace("dtype: bfloat16", "dtype: bfloat16, adapter: {rank: 4, lora_plus_ratio: 4.0}")
    sft, grpo = load_recipe(write(recipe_file, with_adapter + STAGES))
    adapter = AdapterBlock(path=f"{sft.run.output_dir}/final", lora_plus_ratio=4.0)
    assert grpo.model == ModelBlock(path="org/model", revision="main", dtype="bfloat16", adapter=adapter)


def test_a_new_model_is_made_by_the_first_stage_only(recipe_file: Path):
    new = SHARED.replace("path: org/model, revision: main", "architecture: {model_type: llama}, characters: ab")
    sft, grpo = load_recipe(write(recipe_file, new + STAGES))
    assert sft.model.characters == "ab"
    assert grpo.model.architecture is None
    assert grpo.model.characters is None
    assert grpo.model.path == f"{sft.run.output_dir}/final"


def test_a_stage_may_name_its_own_model(recipe_file: Path):
    write(recipe_file, SHARED + STAGES)
    _, grpo = load_recipe(recipe_file, ["stages.grpo.model.path=org/other"])
    assert grpo.model.path == "org/other"


def test_a_policy_goes_on_from_the_last_policy_not_from_a_reward_model(recipe_file: Path):
    reward_model = "  - name: rm\n    algorithm: {name: reward_model}\n    rewards: []\n"
    text = STAGES.replace("  - name: grpo", reward_model + "  - name: grpo")
    sft, rm, grpo = load_recipe(write(recipe_file, SHARED + text))
    assert rm.model.path == grpo.model.path == f"{sft.run.output_dir}/final"
    first = SHARED + "stages:\n" + reward_model + "  - name: grpo\n    algorithm: {group_size: 16}\n"
    rm, grpo = load_recipe(write(recipe_file, first))
    assert rm.model.path == grpo.model.path == "org/model"


def test_an_override_without_stage_applies_to_all_and_with_one_to_that(recipe_file: Path):
    write(recipe_file, SHARED + STAGES)
    sft, grpo = load_recipe(recipe_file, ["trainer.learning_rate=3e-5", "stages.grpo.run.steps=7"])
    assert (sft.trainer.learning_rate, grpo.trainer.learning_rate) == (3e-5, 3e-5)
    assert (sft.run.steps, grpo.run.steps) == (5, 7)
    assert problems_of(recipe_file, "stages.gpro.run.steps=7", "stages.sft=7") == [
        "command line: stages.gpro.run.steps: there is no such stage (did you mean grpo?)",
        "command line: stages.sft: does not say what to set: write stages.<name>.<key>=value",
    ]


def test_each_stage_has_a_directory_in_the_runs(recipe_file: Path):
    sft, grpo = load_recipe(write(recipe_file, SHARED + STAGES), ["run.output_dir=out"])
    assert sft.run.output_dir == str(recipe_file.parent / "out" / "sft")
    assert grpo.run.output_dir == str(recipe_file.parent / "out" / "grpo")


def test_a_problem_of_the_shared_blocks_is_reported_once(recipe_file: Path):
    write(recipe_file, SHARED.replace("workers: 2", "workers: two") + STAGES)
    assert problems_of(recipe_file) == [f"{recipe_file}:5: trainer.workers: must be a whole number, is two"]


def test_a_problem_of_a_stage_has_the_stages_line(recipe_file: Path):
    write(recipe_file, SHARED + STAGES.replace("group_size: 16", "group_size: 1"))
    (problem,) = problems_of(recipe_file)
    assert problem.startswith(f"{recipe_file}:14: algorithm.group_size: with 1 completion a prompt")


def test_a_resolved_recipe_reads_back_the_same(recipe_file: Path):
    overrides = ["data.system='1e-6'", "trainer.optimizer.betas=[0.8, 0.9]"]
    for recipe in load_recipe(write(recipe_file, SHARED + STAGES), overrides):
        text = dump_recipe(recipe)
        resolved = write(recipe_file.parent / "elsewhere" / "recipe.yaml", text)
        assert load_recipe(resolved) == [recipe]
        assert dump_recipe(load_one(resolved)) == text
        assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_two_rewards_of_one_function_have_labels_of_their_own(recipe_file: Path):
    rewards = "rewards: [{name: format}, {name: format, label: react, args: {pattern: x}}]\n"
    text = (
        f"algorithm: {{name: grpo}}\nmodel: {{path: a/b}}\ndata: {{train: {{path: a/b}}}}\n{rewards}run: {{steps: 1}}\n"
    )
    recipe = load_one(write(recipe_file, text))
    assert [reward.label for reward in recipe.rewards] == ["format", "react"]


def test_relative_paths_are_seen_from_here_or_else_from_the_file(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    here = recipe_file.parent
    for name in ("near.jsonl", "both.jsonl", "rewards.py", "chat.jinja", "model/config.json"):
        write(here / "recipes" / name, "")
    write(here / "both.jsonl", "")
    path = write(
        here / "recipes" / "paths.yaml",
        "algorithm: {name: grpo}\n"
        "model: {path: model, chat_template: chat.jinja}\n"
        "data: {train: [{path: near.jsonl}, {path: both.jsonl}, {path: missing.jsonl}, {path: org/data}]}\n"
        "rewards:\n"
        "  - {plugin: 'rewards.py:brevity', args: {path: model}}\n"
        "  - {name: reward_model, args: {path: model}}\n"
        "run: {steps: 1, output_dir: out}\n",
    )
    recipe = load_one(path)
    assert recipe.model.path == str(here / "recipes" / "model")
    assert recipe.model.chat_template == str(here / "recipes" / "chat.jinja")
    assert isinstance(recipe.data.train, list)
    assert [source.path for source in recipe.data.train] == [
        str(here / "recipes" / "near.jsonl"),
        str(here / "both.jsonl"),
        str(here / "missing.jsonl"),
        "org/data",
    ]
    assert recipe.rewards[0].plugin == f"{here}/recipes/rewards.py:brevity"
    assert [reward.label for reward in recipe.rewards] == ["brevity", "reward_model"]
    assert recipe.rewards[0].args == {"path": "model"}
    assert recipe.rewards[1].args == {"path": recipe.model.path}
    assert load_one(path, "rewards.1.args.path=out/rm/final").rewards[1].args == {"path": str(here / "out/rm/final")}
    evaluation = "evaluation={data: {path: org/data}, reward: {name: reward_model, args: {path: recipes/model}}}"
    measured = load_one(path, "rewards=[{name: exact_match}]", evaluation).evaluation
    assert measured is not None and measured.reward is not None
    assert measured.reward.args == {"path": recipe.model.path}
    assert recipe.run.output_dir == str(here / "out")
    templates = {"missing.jinja": str(here / "missing.jinja"), "no template": "no template"}
    for given, read in templates.items():
        assert load_one(path, f"model.chat_template={given}").model.chat_template == read


def test_a_path_is_read_as_a_shell_reads_it_and_other_texts_are_not(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    recipe = load_one(
        recipe_file,
        "run.output_dir=${HOME}/runs",
        "model.path=~/models/a/b",
        "model.chat_template=${SCRATCH}/chat.jinja",
        "data.train.path=$SCRATCH/rows.jsonl",
        "rewards=[{plugin: '$SCRATCH/r.py:f', args: {path: '${HOME}'}}]",
        "data.system=pay $5 to ${HOME}",
    )
    assert recipe.run.output_dir == "/home/me/runs"
    assert recipe.model.path == "/home/me/models/a/b"
    assert recipe.model.chat_template == "/scratch/chat.jinja"
    assert recipe.data.train.path == "/scratch/rows.jsonl"  # pyright: ignore[reportAttributeAccessIssue]
    assert recipe.rewards[0].plugin == "/scratch/r.py:f"
    assert recipe.rewards[0].args == {"path": "${HOME}"}
    assert recipe.data.system == "pay $5 to ${HOME}"
    (recipe_file.parent / "$SCRATCH").mkdir()
    assert load_one(recipe_file, "model.path=$SCRATCH").model.path == f"{recipe_file.parent}/$SCRATCH"


@pytest.mark.slow
def test_an_override_is_no_bomb_either(recipe_file: Path):
    line = "&a [1, 2]"
    for number in range(30):
        line = f"&b{number} [{line}, *{'a' if number == 0 else f'b{number - 1}'}]"
    (problem,) = problems_of(recipe_file, f"tracking={line}")
    assert problem.startswith("command line: tracking: cannot be read: more than 20,000 values")


def test_a_data_file_is_not_read_as_a_recipe(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{}\n" * 400_000)
    with pytest.raises(RecipeError, match=r"is larger than 1 MiB, which no recipe is"):
        load_recipe(path)


def test_a_template_in_the_recipe_is_no_path(recipe_file: Path):
    template = "{{ messages }}.jinja"
    assert load_one(recipe_file, f"model.chat_template='{template}'").model.chat_template == template


def test_blocks_made_in_python_are_held_to_the_same_rules():
    with pytest.raises(ValueError, match="name: give name or plugin"):
        RewardBlock()
