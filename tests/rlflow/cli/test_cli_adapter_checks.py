"""Adapters in the preflight: layers that are not there, adapters of other models, adapters in the place of models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from rlflow.cli.preflight import load_checked
from rlflow.plan_text import render
from rlflow.planning import make_plans
from rlflow.recipe import RecipeError
from rlflow.roles import roles

RECIPE = """\
algorithm: {{name: dpo}}
model: {{path: {model}, adapter: {{rank: 4}}}}
data: {{train: {{path: data.jsonl}}, max_tokens: 64}}
run: {{steps: 1}}
"""
STAGES = """\
model: {{path: {model}, adapter: {{rank: 4, kind: dora, lora_plus_ratio: 4.0}}}}
data: {{train: {{path: data.jsonl}}, max_tokens: 64}}
run: {{steps: 1}}
stages:
  - name: sft
    algorithm: {{name: sft}}
  - name: dpo
    algorithm: {{name: dpo}}
"""


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_model_dir))
    return path


@pytest.fixture
def adapter_dir(tmp_path: Path, tiny_model_dir: Path) -> Path:
    directory = tmp_path / "adapter"
    directory.mkdir()
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], "base_model_name_or_path": str(tiny_model_dir)}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file({}, directory / "adapter_model.safetensors")
    return directory


def problem_of(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as raised:
        load_checked(path, overrides)
    (problem,) = raised.value.problems
    return f"{problem.key}: {problem.message}"


def change(directory: Path, **changes: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_layer_that_is_not_there_names_the_nearest(recipe_file: Path):
    assert load_checked(recipe_file, ["model.adapter.target_modules=[q_proj, mlp.up_proj]"])
    said = problem_of(recipe_file, "model.adapter.target_modules=[q_proj, up_prj]")
    assert said.startswith(
        "model.adapter.target_modules: no linear layer beside the head is called up_prj (did you mean up_proj?"
    )
    assert "called embed_tokens" in problem_of(recipe_file, "model.adapter.target_modules=[embed_tokens]")


def test_an_adapter_to_go_on_from_is_looked_at(recipe_file: Path, adapter_dir: Path):
    path = f"model.adapter={{path: {adapter_dir}, rank: 16}}"
    assert load_checked(recipe_file, [path])
    change(adapter_dir, target_modules=["q_proj", "embed_tokens"])
    said = problem_of(recipe_file, path)
    assert (
        said.startswith(f"model.adapter.path: {adapter_dir} is on more than linear layers") and "embed_tokens" in said
    )
    change(adapter_dir, target_modules=["q_proj"])
    change(adapter_dir, base_model_name_or_path="org/else")
    assert "is an adapter of org/else, and model.path is" in problem_of(recipe_file, path)
    change(adapter_dir, base_model_name_or_path="/elsewhere/tiny_model0", modules_to_save=["lm_head"])
    assert "was made with modules_to_save" in problem_of(recipe_file, path)
    change(adapter_dir, peft_type="ADALORA")
    assert "of type ADALORA" in problem_of(recipe_file, path)
    (adapter_dir / "adapter_config.json").write_text("{")
    assert "is no JSON" in problem_of(recipe_file, path)
    assert "there is no directory" in problem_of(recipe_file, "model.adapter={path: ./nowhere/at/all, rank: 16}")


def test_the_references_adapter_is_looked_at(recipe_file: Path, adapter_dir: Path, tiny_model_dir: Path):
    named = f"reference.adapter={adapter_dir}"
    (recipe,) = load_checked(recipe_file, [named])
    assert [role.name for role in roles(recipe)] == ["trainer"]
    assert f"; the reference is {adapter_dir}, beside it" in render(make_plans([recipe])[0])
    assert "reference" in [role.name for role in roles(load_checked(recipe_file, [named, "model.adapter=null"])[0])]
    other = "model.adapter={rank: 16, peft: {peft_type: LOKR, r: 4}}"
    said = problem_of(recipe_file, named, other)
    assert said.startswith("reference.adapter: ") and "of type LORA, and the trained one of type LOKR" in said
    change(adapter_dir, base_model_name_or_path="org/else")
    assert "reference.adapter: " in (said := problem_of(recipe_file, named)) and "is an adapter of org/else" in said
    assert "there is no directory" in problem_of(recipe_file, "reference.adapter=./nowhere/at/all")


def test_a_directory_of_several_adapters_names_them(recipe_file: Path, adapter_dir: Path):
    for name in ("first", "second"):
        shutil.copytree(adapter_dir, adapter_dir.parent / "several" / name)
    several = adapter_dir.parent / "several"
    said = problem_of(recipe_file, f"model.adapter={{path: {several}, rank: 16}}")
    assert f"it has no adapter_config.json, and first, second below it do: name {several}/first" in said
    assert load_checked(recipe_file, [f"model.adapter={{path: {several}/second, rank: 16}}"])


def test_an_adapter_in_the_place_of_a_model_says_how_to_use_it(
    recipe_file: Path, adapter_dir: Path, tiny_model_dir: Path
):
    said = problem_of(recipe_file, f"model={{path: {adapter_dir}, adapter: null}}")
    assert f"holds an adapter of {tiny_model_dir}, not a model" in said
    assert f"set model.path: {tiny_model_dir} and model.adapter.path: {adapter_dir}" in said
    assert f"rlflow export {adapter_dir} OUTPUT --merge" in said
    said = problem_of(recipe_file, f"reference.path={adapter_dir}")
    assert said.startswith("reference.path: ")
    assert "model.adapter.path" not in said


def test_a_stage_goes_on_from_the_adapter_of_the_one_before(recipe_file: Path, tiny_model_dir: Path):
    recipe_file.write_text(STAGES.format(model=tiny_model_dir))
    first, second = load_checked(recipe_file)
    assert second.model.path == str(tiny_model_dir)
    assert second.model.adapter is not None
    assert second.model.adapter.path == f"{first.run.output_dir}/final"
    assert second.model.adapter.lora_plus_ratio == 4.0
    shapes = [plan.shape for plan in make_plans([first, second])]
    assert not isinstance(shapes[0], str)
    assert not isinstance(shapes[1], str)
    assert shapes[0].adapter == shapes[1].adapter


def test_a_stage_that_trains_all_weights_after_an_adapter_is_refused(recipe_file: Path, tiny_model_dir: Path):
    recipe_file.write_text(STAGES.format(model=tiny_model_dir) + "    model: {adapter: null}\n")
    said = problem_of(recipe_file)
    assert said.startswith(
        f"model.path: {recipe_file.parent}/runs/recipe/sft/final will be an adapter of {tiny_model_dir}"
    )


def test_a_base_in_few_bits_is_trained_with_the_torch_engine_or_refused(recipe_file: Path, tiny_model_dir: Path):
    small = recipe_file.parent / "small"
    shutil.copytree(tiny_model_dir, small)
    fields = json.loads((small / "config.json").read_text())

    def in_format(method: str) -> None:
        (small / "config.json").write_text(json.dumps(fields | {"quantization_config": {"quant_method": method}}))

    named = f"model.path={small}"
    in_format("hqq")
    assert problem_of(recipe_file, named).startswith(f"model.path: {small} has its weights in hqq's format")
    assert "from which nothing is trained" in problem_of(recipe_file, f"reference.path={small}")
    in_format("compressed-tensors")
    (plan,) = make_plans(load_checked(recipe_file, [named]))
    (plain,) = make_plans(load_checked(recipe_file))
    assert not isinstance(plan.shape, str) and not isinstance(plain.shape, str)
    assert plan.shape.parameters == plain.shape.parameters
    rounded = problem_of(recipe_file, named, "model.adapter={rank: 4, quantize: torchao_int8}")
    assert "quantize rounds what is in full precision" in rounded
    online = [named, "algorithm={name: grpo}", "rewards=[{name: exact_match}]", "data.max_tokens=1024"]
    assert load_checked(recipe_file, online)
    said = problem_of(recipe_file, *online, "rollout.engine=vllm")
    assert said.startswith(f"rollout.engine: vllm would hold {small} in compressed-tensors's format")


def test_no_reference_is_placed_and_little_is_planned(recipe_file: Path):
    recipe, placed = load_checked(recipe_file)[0], load_checked(recipe_file, ["reference.path=gpt2"])[0]
    assert [role.name for role in roles(recipe)] == ["trainer"]
    assert [role.name for role in roles(placed)] == ["trainer", "reference"]
    (whole,) = make_plans(load_checked(recipe_file, ["model.adapter=null"]))
    (plan,) = make_plans([recipe])
    trainer, of_all = plan.roles[0].parts, whole.roles[0].parts
    assert trainer is not None
    assert of_all is not None
    assert 0 < trainer["activations"] < of_all["activations"], "frozen layers keep less"
    assert 0 < trainer["optimizer"] < 0.5 * of_all["optimizer"]
    assert "lora, rank 4" in render(plan)


@pytest.mark.parametrize(
    "adapter", ["{rank: 4}", "{rank: 3, kind: dora}", "{rank: 5, target_modules: [q_proj, down_proj]}"]
)
def test_the_plan_counts_what_is_trained(recipe_file: Path, adapter: str):
    import torch

    from rlflow.actors import adapters

    (recipe,) = load_checked(recipe_file, [f"model.adapter={adapter}"])
    model = adapters.load_adapted(recipe.model, seed=0, device=torch.device("cpu"))
    shape = make_plans([recipe])[0].shape
    assert not isinstance(shape, str)
    assert shape.adapter == sum(p.numel() for p in adapters.adapter_parameters(model).values())


def test_the_plan_counts_what_is_trained_on_from_an_adapter(recipe_file: Path, adapter_dir: Path):
    (recipe,) = load_checked(recipe_file, [f"model.adapter={{path: {adapter_dir}, rank: 16}}"])
    shape = make_plans([recipe])[0].shape
    assert not isinstance(shape, str)
    assert shape.adapter == 2 * 8 * (48 + 64)
