"""The model card: front matter that hubs read, lineage, results, and a recipe that gives nothing away."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from rlflow.recipe import Recipe, dump_recipe
from rlflow.tracking.history import HistoryError
from rlflow.tracking.model_card import read_front_matter, write_card

Write = Callable[..., Path]

POLICY = {"config.json": {"architectures": ["Qwen3ForCausalLM"]}, "chat_template.jinja": ""}
SCORER = {"config.json": {"architectures": ["Qwen3ForSequenceClassification"]}, "chat_template.jinja": ""}
HUB_DATA = {"train": {"path": "openai/gsm8k", "subset": "main"}, "prompts_per_step": 16}
EVALUATION = {"data": {"path": "openai/gsm8k", "split": "test"}, "name": "gsm8k"}
METRICS = [
    {"step": 0, "time": 0.0, "eval/gsm8k/pass@1": 0.189, "eval/gsm8k/unscored_fraction": 0.0},
    {"step": 1, "time": 1.0, "reward/mean": 0.2},
    {"step": 100, "time": 2.0, "reward/mean": 0.75, "eval/gsm8k/pass@1": 0.736, "eval/gsm8k/unscored_fraction": 0.0},
]


@pytest.fixture
def write(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> Write:
    """Writes a run with the files of a final/ and its card. Returns the run's directory."""

    def make(name: str, files: dict[str, Any], metrics: list[dict[str, float]] = METRICS, **blocks: Any) -> Path:
        run = tmp_path / name
        (run / "final").mkdir(parents=True)
        for file, content in files.items():
            (run / "final" / file).write_text(content if isinstance(content, str) else json.dumps(content))
        (run / "recipe.yaml").write_text(dump_recipe(make_recipe(**blocks)))
        if metrics:
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
        write_card(run / "final", run)
        return run

    return make


def card_of(run: Path) -> ModelCard:
    return ModelCard.load(run / "final" / "README.md")


def test_the_front_matter_is_what_hubs_read(write: Write):
    card = card_of(write("gsm8k", POLICY, data=HUB_DATA, evaluation=EVALUATION, model={"path": "Qwen/Qwen3-0.6B"}))
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["base_model"] == "Qwen/Qwen3-0.6B"
    assert data["datasets"] == ["openai/gsm8k"]
    assert data["tags"] == ["rlflow", "grpo", "reinforcement-learning"]
    (result,) = card.data.eval_results or []
    assert (result.metric_type, result.metric_value) == ("pass@1", 0.736)
    assert (result.dataset_type, result.dataset_name, result.dataset_split) == ("openai/gsm8k", "gsm8k", "test")


def test_each_of_several_sets_has_its_own_results(write: Write):
    other = {"data": {"path": "rows.jsonl"}, "name": "own"}
    metrics = [*METRICS[:2], {**METRICS[2], "eval/own/pass@1": 0.5}]
    run = write("both", POLICY, metrics, data=HUB_DATA, evaluation=[EVALUATION, other])
    found = [(r.dataset_name, r.dataset_type, r.metric_value) for r in card_of(run).data.eval_results or []]
    assert found == [("gsm8k", "openai/gsm8k", 0.736), ("own", "held-out", 0.5)]


def test_the_results_are_those_before_the_first_and_after_the_last_step(write: Write):
    text = card_of(write("gsm8k", POLICY, data=HUB_DATA, evaluation=EVALUATION)).text
    assert "| `gsm8k/pass@1` | 0 | 0.189 | 100 | 0.736 | +0.547 |" in text
    assert "unscored_fraction` |" not in text
    assert "trained with rlflow. Base: [some/model](https://huggingface.co/some/model)." in text
    assert "; 100 steps of 16 prompts x 8 completions, learning rate" in text
    assert "[arXiv 2402.03300](https://arxiv.org/abs/2402.03300)" in text


def test_without_an_evaluation_the_metrics_of_training_stand_in_and_say_so(write: Write):
    metrics = [{"step": step, "time": step, "reward/mean": step / 100} for step in range(1, 101)]
    card = card_of(write("plain", POLICY, metrics))
    assert "model-index" not in card.data.to_dict()
    assert "has no held-out evaluation" in card.text
    assert "| `reward/mean` | 1 | 0.010 | 100 | 1 | +0.990 |" in card.text


def test_a_run_without_metrics_has_a_card_without_results(write: Write):
    text = card_of(write("silent", POLICY, [], tracking=["console"])).text
    assert "## Results" not in text and "## Recipe" in text


def test_the_recipe_is_whole_and_without_secrets_or_the_home_directory(write: Write, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = {"train": {"path": f"{tmp_path}/mine/train.jsonl"}}
    rewards = [{"plugin": f"{tmp_path}/mine/reward.py:score", "args": {"api_key": "hunter2-secret"}}]
    run = write("secret", POLICY, data=data, rewards=rewards)
    text = card_of(run).text
    assert "hunter2" not in text and str(tmp_path) not in text
    assert "path: ~/mine/train.jsonl" in text and "api_key: '***'" in text
    recipe = (run / "recipe.yaml").read_text()
    assert all(line in text for line in recipe.splitlines() if str(tmp_path) not in line and "hunter2" not in line)


def test_a_stage_names_the_stages_before_it_and_the_model_under_them(write: Write):
    first = write("both/sft", POLICY, algorithm={"name": "sft"}, rewards=[], stage="sft", data=HUB_DATA)
    second = write("both/grpo", POLICY, model={"path": str(first / "final")}, stage="grpo")
    card = card_of(second)
    assert card.data.to_dict()["base_model"] == "some/model"
    assert card.data.to_dict()["datasets"] == ["openai/gsm8k"]
    assert card.text.index("- `sft`") < card.text.index("- `grpo`")
    assert "# both-grpo" in card.text and "<summary>both-sft</summary>" in card.text


def test_a_model_from_random_weights_or_a_directory_names_no_base(write: Write, tmp_path: Path):
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\ntags: [x]\n---\nhello\n")
    local = card_of(write("of_local", POLICY, model={"path": str(tmp_path / "local")}))
    assert "base_model" not in local.data.to_dict()
    assert (local.data.license, local.data.language) == ("apache-2.0", "en")
    assert "Base: `local`." in local.text
    new = {"architecture": {"model_type": "qwen3"}, "characters": "ab"}
    assert "Base: random weights of a new qwen3 model." in card_of(write("new", POLICY, model=new)).text


@pytest.mark.parametrize(("kind", "rank"), [("lora", 12), ("lora", 16), ("dora", 12)])
def test_an_adapter_is_loaded_onto_its_base(write: Write, kind: str, rank: int):
    config = {"peft_type": "LORA", "base_model_name_or_path": "some/model", "r": rank, "use_dora": kind == "dora"}
    model = {"path": "some/model", "adapter": {"rank": rank, "kind": kind}}
    card = card_of(write("adapter", {"adapter_config.json": config, "chat_template.jinja": ""}, model=model))
    assert card.data.library_name == "peft"
    assert card.data.to_dict()["base_model"] == "some/model"
    assert kind in (card.data.tags or [])
    assert 'base = "some/model"' in card.text
    assert ("max_lora_rank=16" in card.text) == (kind == "lora")
    assert ("vLLM has no DoRA" in card.text) == (kind == "dora")


def test_pictures_that_training_has_scaled_down_are_spoken_of(write: Write):
    """Whoever uses the model scales them down too."""
    said = "Pictures of more than 200,704 pixels were scaled down to that: the processor does not do it."
    model = {"path": "org/model"}
    cards = [card_of(write(name, {}, model=model | more)) for name, more in (("a", {}), ("b", {"max_pixels": 200_704}))]
    assert [said in card.text for card in cards] == [False, True]


def test_a_reward_model_is_a_classifier(write: Write):
    data = {"train": {"path": "Anthropic/hh-rlhf"}}
    card = card_of(write("rm", SCORER, algorithm={"name": "reward_model"}, rewards=[], data=data))
    assert card.data.pipeline_tag == "text-classification"
    assert card.text.lstrip().splitlines()[2].startswith("Reward model trained with rlflow.")
    # The recipe at the end has the keys of what the run did not use too.
    shown = card.text.split("<details>")[0].lower()
    assert "AutoModelForSequenceClassification" in card.text and "vllm" not in shown.split("## versions")[0]


def test_a_recipe_of_another_version_ends_the_account_and_is_no_card_of_its_own(write: Write, tmp_path: Path):
    first = write("first", POLICY, model={"path": "some/model"})
    (first / "recipe.yaml").write_text("algorithm: {name: grpo}\n")
    text = card_of(write("second", POLICY, model={"path": str(first / "final")})).text
    assert "Base: `final`." in text and text.count("<details>") == 1
    with pytest.raises(HistoryError, match=r"recipe\.yaml cannot be read: 3 of its keys"):
        write_card(first / "final", first)
    with pytest.raises(HistoryError, match=r"recipe\.yaml cannot be read"):
        write_card(tmp_path, tmp_path)


@pytest.mark.parametrize("text", ["", "no front", "---\n: [\n---\n", "---\n- 1\n---\n"])
def test_a_card_without_front_matter_says_nothing(text: str, tmp_path: Path):
    (tmp_path / "README.md").write_text(text)
    assert read_front_matter(tmp_path / "README.md") == {}
    assert read_front_matter(tmp_path / "missing.md") == {}


def test_the_card_says_which_versions_of_transformers_read_the_files(write: Write):
    assert "both read them, where they have the architecture." in card_of(write("policy", POLICY)).text
    layers = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    only_new = {"architectures": ["NewForCausalLM"], "rope_parameters": layers}
    assert "Read by transformers 5 and newer: the bases" in card_of(write("new", {"config.json": only_new})).text
    gemma = {**only_new, "rope_local_base_freq": 1e4}
    assert "both read them" in card_of(write("gemma", {"config.json": gemma})).text
    capped = {"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0}
    assert 'Version 4 needs `attn_implementation="eager"`' in card_of(write("capped", {"config.json": capped})).text
