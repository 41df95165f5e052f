"""What a recipe names must exist; nothing is loaded or executed to find out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from rlflow.cli import preflight, run
from rlflow.cli.preflight import load_checked, load_runnable
from rlflow.machine import Machine
from rlflow.recipe import RecipeError

RECIPE = """\
algorithm: {name: grpo}
model: {path: model}
data: {train: {path: data.jsonl}}
rewards: [{plugin: "rewards.py:brevity"}]
run: {steps: 1}
"""


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    save_file({}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "data.jsonl").write_text("")
    (tmp_path / "rewards.py").write_text("raise SystemExit\ndef brevity(): ...\nif True:\n    length = other = 1\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def problem_of(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as raised:
        load_checked(path, overrides)
    (problem,) = raised.value.problems
    return str(problem)


def test_a_recipe_whose_files_exist_passes_and_its_plugin_is_not_run(recipe_file: Path):
    assert load_checked(recipe_file)
    assert load_checked(recipe_file, ["rewards.0.plugin=rewards.py:length"])


def test_hub_ids_are_not_looked_up(recipe_file: Path):
    assert load_checked(recipe_file, ["model.path=org/model", "data.train.path=org/data", "reference.path=gpt2"])


def test_a_missing_file_is_named_with_its_line_and_the_one_that_was_meant(recipe_file: Path):
    here = recipe_file.parent
    recipe_file.write_text(RECIPE.replace("data.jsonl", "dta.jsonl"))
    expected = f"{recipe_file}:3: data.train.path: there is no file {here}/dta.jsonl (did you mean {here}/data.jsonl?)"
    assert problem_of(recipe_file) == expected


@pytest.mark.parametrize(
    ("override", "key", "says"),
    [
        ("model.path=./modle", "model.path", "there is no directory"),
        ("model.path=data.jsonl", "model.path", "is a file: name the directory"),
        ("reference.path=./modle", "reference.path", "there is no directory"),
        ("model.chat_template=chat.jinja", "model.chat_template", "there is no file"),
        ("data.train=[{path: data.jsonl}, {path: b.jsonl}]", "data.train.1.path", "there is no file"),
        ("data.train={generator: arithmetik, path: null}", "data.train.generator", "did you mean arithmetic?"),
        ("evaluation={data: {path: c.jsonl}}", "evaluation.data.path", "there is no file"),
        ("rewards=[{name: exact_mach}]", "rewards.0.name", "did you mean exact_match?"),
        ("rewards=[{plugin: 'reward.py:f'}]", "rewards.0.plugin", "did you mean"),
        ("rewards=[{name: reward_model}]", "rewards.0.args", "reward_model needs path"),
        ("rewards=[{name: reward_model, args: {path: ./modle}}]", "rewards.0.args.path", "did you mean"),
        ("rewards=[{name: reward_model, args: {path: model}}]", "rewards.0.args.path", "has no score head"),
        (
            "rewards=[{plugin: 'rewards.py:brevty'}]",
            "rewards.0.plugin",
            "has no function brevty (did you mean brevity?",
        ),
        ("rewards=[{plugin: 'rewards.py:zzz'}]", "rewards.0.plugin", "it defines brevity, length, other"),
        ("run.output_dir=data.jsonl", "run.output_dir", "is a file: name a directory"),
        ("model.router.z_coef=0.1", "model.router", "the model has no experts: remove it"),
    ],
)
def test_what_is_missing_is_named_with_its_key_and_a_remedy(recipe_file: Path, override: str, key: str, says: str):
    problem = problem_of(recipe_file, override)
    assert problem.startswith(f"command line: {key}: ")
    assert says in problem


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("gemma3n_text", "vLLM leaves out the embeddings of its layers"),
        ("deepseek_v3", "it has latent attention"),
        ("falcon_h1", "its layers carry a state"),
        ("qwen3", None),
    ],
)
def test_a_model_that_vllm_would_sample_wrongly_is_refused_before_anything_starts(
    recipe_file: Path, kind: str, says: str | None
):
    path = recipe_file.parent / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": kind}))
    if says is None:
        load_checked(recipe_file, ["rollout.engine=vllm"])
    else:
        problem = problem_of(recipe_file, "rollout.engine=vllm")
        assert problem.startswith(f"command line: rollout.engine: vllm cannot sample this model: {says}")
        assert problem.endswith("set torch")


def test_a_plugin_that_is_no_python_is_named_with_its_line(recipe_file: Path):
    (recipe_file.parent / "rewards.py").write_text("x = 1\ndef brevity(:\n")
    assert f"{recipe_file.parent}/rewards.py:2 is not Python" in problem_of(recipe_file)


def test_a_model_directory_needs_a_config_and_weights(recipe_file: Path):
    model = recipe_file.parent / "model"
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "has no *.safetensors" in problem_of(recipe_file)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({}, model / "model-1.safetensors")
    assert "lacks model-2.safetensors, which its index names" in problem_of(recipe_file)
    (model / "config.json").unlink()
    assert "it has no config.json" in problem_of(recipe_file)
    (model / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in problem_of(recipe_file)


def test_the_model_that_an_earlier_stage_will_write_may_be_missing(recipe_file: Path):
    recipe_file.write_text(RECIPE + "stages: [{name: sft, algorithm: {name: sft}, rewards: []}, {name: grpo}]\n")
    assert len(load_checked(recipe_file)) == 2


def test_a_policy_needs_the_head_of_a_language_model(recipe_file: Path):
    config = recipe_file.parent / "model" / "config.json"
    for name in ("Qwen3ForCausalLM", "GPT2LMHeadModel", "Gemma3ForConditionalGeneration"):
        config.write_text(json.dumps({"architectures": [name]}))
        load_checked(recipe_file)
    for name in ("Qwen3ForSequenceClassification", "LlamaModel"):
        config.write_text(json.dumps({"architectures": [name]}))
        assert f"holds a {name}, not a language model: name the policy" in problem_of(recipe_file)


def test_a_reward_model_is_judged_by_its_config(recipe_file: Path):
    override = "rewards=[{name: reward_model, args: {path: judge}}]"
    shutil.copytree(recipe_file.parent / "model", recipe_file.parent / "judge")
    config = recipe_file.parent / "judge" / "config.json"
    written = {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    config.write_text(json.dumps(written))
    assert load_checked(recipe_file, [override])
    assert load_checked(recipe_file, [override.replace("judge}", "org/judge}")])
    config.write_text(json.dumps({**written, "id2label": {"0": "bad", "1": "good"}}))
    assert "has a score head of 2 labels" in problem_of(recipe_file, override)
    config.write_text("{")
    assert "config.json is no JSON" in problem_of(recipe_file, override)


def test_a_reward_model_that_an_earlier_stage_will_write_may_be_missing_and_a_policy_is_none(recipe_file: Path):
    stages = "stages: [{name: FIRST, algorithm: {name: FIRST}, rewards: []}, {name: grpo, model: {path: model}}]\n"
    text = RECIPE.replace('plugin: "rewards.py:brevity"', "name: reward_model, args: {path: out/FIRST/final}")
    text = text.replace("steps: 1", "steps: 1, output_dir: out") + stages
    recipe_file.write_text(text.replace("FIRST", "reward_model"))
    assert len(load_checked(recipe_file)) == 2
    recipe_file.write_text(text.replace("FIRST", "sft"))
    assert "out/sft/final will be no reward model (sft): name the final/ of a reward_model stage" in problem_of(
        recipe_file
    )


SHARED = ["trainer.workers=4", "trainer.sequence_parallel=4"]


def test_heads_that_do_not_divide_over_the_ranks_that_share_tokens_are_refused(recipe_file: Path):
    config = recipe_file.parent / "model" / "config.json"
    config.write_text(json.dumps({"num_attention_heads": 14, "num_key_value_heads": 2}))
    problem = problem_of(recipe_file, *SHARED)
    assert problem == (
        f"command line: trainer.sequence_parallel: {config.parent}: 14 attention heads and 2 key-value heads do not "
        "divide over 4 ranks: set trainer.sequence_parallel to one of 1, 2, 14"
    )
    assert load_checked(recipe_file, ["trainer.workers=4", "trainer.sequence_parallel=2"])
    config.write_text(json.dumps({"num_attention_heads": 16, "num_key_value_heads": 2}))
    assert load_checked(recipe_file, SHARED)


def test_a_new_models_and_a_critics_heads_are_looked_at_too(recipe_file: Path):
    new = "model={path: null, architecture: {model_type: llama, num_attention_heads: 6}, characters: abc}"
    assert "the new model: 6 attention heads" in problem_of(recipe_file, new, *SHARED)
    critic = recipe_file.parent / "critic"
    critic.mkdir()
    (critic / "config.json").write_text(json.dumps({"n_head": 6}))
    save_file({}, critic / "model.safetensors")
    ppo = ["algorithm={name: ppo, critic: {workers: 4, path: critic}}", *SHARED]
    assert f"{critic}: 6 attention heads" in problem_of(recipe_file, *ppo)


def test_a_stage_that_goes_on_from_another_has_its_heads(recipe_file: Path):
    (recipe_file.parent / "model" / "config.json").write_text(json.dumps({"num_attention_heads": 6}))
    stages = (
        "stages: [{name: sft, algorithm: {name: sft}, rewards: [], trainer: {sequence_parallel: 1}}, {name: grpo}]\n"
    )
    recipe_file.write_text(RECIPE + "trainer: {workers: 4, sequence_parallel: 4}\n" + stages)
    problem = problem_of(recipe_file)
    assert problem.startswith(f"{recipe_file}:") and "sft/final: 6 attention heads" in problem


def test_losses_on_routers_go_with_experts_and_with_models_of_which_nothing_is_known_here(recipe_file: Path):
    (recipe_file.parent / "model" / "config.json").write_text('{"num_local_experts": 8}')
    assert load_checked(recipe_file, ["model.router.balance_coef=0.1"])
    assert load_checked(recipe_file, ["model.router.balance_coef=0.1", "model.path=org/model"])


FOUR_BITS = ["model.adapter={quantize: nf4}", "rollout={engine: torch, gpus_per_worker: 0.5}"]


@pytest.mark.parametrize(
    ("overrides", "keys", "says"),
    [
        ([], ["trainer.gpus_per_worker"], "asks for GPUs, and there are none here: set 0, or set RAY_ADDRESS"),
        (FOUR_BITS, ["model.adapter.quantize"], "nf4 needs a GPU, and there is none here: set quantize: none"),
        (
            ["reward_server.gpus_per_worker=1", "reference.gpus_per_worker=1"],
            ["trainer.gpus_per_worker", "reward_server.gpus_per_worker", "reference.gpus_per_worker"],
            "asks for GPUs",
        ),
        (
            ["trainer.gpus_per_worker=0", "algorithm={name: ppo, critic: {gpus_per_worker: 1}}"],
            ["algorithm.critic.gpus_per_worker"],
            "asks for GPUs",
        ),
    ],
)
def test_gpus_that_a_run_on_this_machine_would_wait_for_are_missed_at_once(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], keys: list[str], says: str
):
    monkeypatch.setattr(preflight, "this_machine", lambda: Machine(cpus=1, memory=1, gpus=0))
    given = ["trainer.gpus_per_worker=1", *overrides]
    with pytest.raises(RecipeError) as raised:
        load_checked(recipe_file, given, alone=True)
    assert [problem.key for problem in raised.value.problems] == keys
    assert all(says in str(problem) for problem in raised.value.problems)
    # A cluster may have them, as may another machine, of which `rlflow plan` says what it needs.
    assert load_checked(recipe_file, given)
    monkeypatch.setattr(preflight, "this_machine", lambda: Machine(cpus=1, memory=1, gpus=4))
    assert load_checked(recipe_file, given, alone=True)


def test_more_gpus_than_this_machine_has_are_missed_too(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preflight, "this_machine", lambda: Machine(cpus=1, memory=1, gpus=1))
    asked = ["trainer.gpus_per_worker=0.5", "rollout.gpus_per_worker=0.5"]
    assert load_checked(recipe_file, asked, alone=True)
    with pytest.raises(RecipeError) as raised:
        load_checked(recipe_file, [*asked, "trainer.gpus_per_worker=1"], alone=True)
    (problem,) = raised.value.problems
    assert problem.key == "trainer.gpus_per_worker"
    assert "(trainer 1 x 1, rollout 1 x 0.5) than the 1 that there are" in problem.message


@pytest.mark.parametrize("address", ["", "local", "10.0.0.1:6379"])
def test_a_run_that_joins_a_cluster_may_ask_for_gpus(monkeypatch: pytest.MonkeyPatch, address: str):
    asked = []
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(run, "load_runnable", lambda path, overrides, alone: [asked.append(alone)])
    monkeypatch.setattr(run, "run", lambda recipes, **options: None)
    monkeypatch.setattr(run, "next_lines", lambda recipe: [])
    run.execute(run.make_parser().parse_args(["recipe.yaml"]))
    assert asked == [address in ("", "local")]


def test_a_margin_is_accepted_before_a_run_where_a_reward_model_learns_from_it(tmp_path: Path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{characters: abc, architecture: {{model_type: llama}}}}\nalgorithm: {{name: reward_model}}\n"
        f"data: {{train: {{path: {tmp_path}/rows.jsonl}}}}\nrun: {{steps: 1, output_dir: {tmp_path}/run}}\n"
    )
    assert load_runnable(recipe, {})
    with pytest.raises(RecipeError, match="a column `margin`, which only the loss of a reward_model looks at"):
        load_runnable(recipe, {"algorithm.name": "dpo"})
