"""What a run leaves in ``final/``, kind by kind: files, where generation stops, a card whose code runs."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rlflow
from rlflow.checkpoint import FINAL_MANIFEST
from rlflow.cli.main import main
from rlflow.data.tokenizer import load_tokenizer, stop_token_ids
from rlflow.recipe import ModelBlock
from tests.local_actors import use_local_actors

RECIPE = """
algorithm: {{name: {algorithm}}}
run: {{output_dir: {out}, steps: 1}}
model: {{path: {model}}}
data: {{train: {{path: {rows}}}, prompts_per_step: 2, max_tokens: 64, max_prompt_tokens: 32}}
rollout: {{engine: torch, max_new_tokens: 6}}
trainer: {{learning_rate: 1.0e-2}}
tracking: [jsonl]
"""
REWARD = '\nrewards: [{{plugin: "{plugin}:length"}}]\n'
END_OF_TURN = "!"

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose turns end with another token than eos, and whose generation config contradicts itself."""
    directory = tmp_path_factory.mktemp("start") / "model"
    shutil.copytree(tiny_model_dir, directory)
    tokenizer = load_tokenizer(ModelBlock(path=str(directory)))
    tokenizer.add_special_tokens({"additional_special_tokens": [END_OF_TURN]})
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<eos>", END_OF_TURN)
    tokenizer.save_pretrained(directory)
    settings = {"eos_token_id": [1, 7], "temperature": 0.6, "do_sample": False, "max_new_tokens": 99}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n# start\n")
    return directory


def rows_of(algorithm: str) -> list[dict[str, Any]]:
    def say(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": answer}]

    if algorithm == "grpo":
        return [{"prompt": "Say one."}, {"prompt": "Say two."}]
    if algorithm == "sft":
        return [{"messages": say("one")}, {"messages": say("two")}]
    return [{"chosen": say("one"), "rejected": say("no")}, {"chosen": say("two"), "rejected": say("nono")}]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, model_dir: Path, tmp_path: Path) -> Run:
    use_local_actors(monkeypatch)

    def make(algorithm: str, **overrides: Any) -> Path:
        rows, plugin, out = tmp_path / "rows.jsonl", tmp_path / "reward.py", tmp_path / "run"
        rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(algorithm)))
        plugin.write_text(
            "def length(completions, **columns):\n    return [float(len(text)) for text in completions]\n"
        )
        text = RECIPE + (REWARD if algorithm == "grpo" else "")
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(text.format(algorithm=algorithm, out=out, model=model_dir, rows=rows, plugin=plugin))
        rlflow.run(recipe, overrides=overrides)
        return out

    return make


def generation_config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "generation_config.json").read_text())


MODEL_FILES = {
    "README.md",
    "args.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def said_by_the_card(directory: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Output of the card's first block of code, run in the card's directory."""
    monkeypatch.chdir(directory)
    block = re.search(r"```python\n(.*?)```", (directory / "README.md").read_text(), flags=re.DOTALL)
    assert block
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(block[1], {})
    return output.getvalue()


@pytest.mark.slow
def test_a_policy_is_whole_and_stops_where_its_rollouts_stopped(run: Run, model_dir: Path, monkeypatch):
    final = run("grpo") / "final"
    assert {path.name for path in final.iterdir()} == MODEL_FILES | {FINAL_MANIFEST}
    model = ModelBlock(path=str(model_dir))
    tokenizer = load_tokenizer(model)
    stops = generation_config_of(final)["eos_token_id"]
    assert stops == list(stop_token_ids(tokenizer, model))
    assert set(stops) == {1, 7, tokenizer.convert_tokens_to_ids(END_OF_TURN)}
    assert generation_config_of(final)["temperature"] == 0.6
    assert generation_config_of(final)["max_new_tokens"] == 99
    assert (final / "chat_template.jinja").read_text() == (model_dir / "chat_template.jinja").read_text()
    written = json.loads((final / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == [END_OF_TURN]
    config = json.loads((final / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert "license: apache-2.0" in (final / "README.md").read_text()
    assert said_by_the_card(final, monkeypatch).endswith("\n")


def test_the_chat_template_of_the_recipe_is_the_one_that_is_left(run: Run):
    template = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
    final = run("sft", **{"model.chat_template": template}) / "final"
    assert (final / "chat_template.jinja").read_text() == template
    assert generation_config_of(final)["eos_token_id"] == [1, 7]


def test_an_adapter_and_what_it_is_merged_into_stop_there_too(run: Run, tmp_path: Path, monkeypatch):
    directory = run("sft", **{"model.adapter": {}})
    final, merged = directory / "final", tmp_path / "merged"
    assert {path.name for path in final.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "args.json",
        "chat_template.jinja",
        "generation_config.json",
        FINAL_MANIFEST,
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert main(["export", str(directory), str(merged), "--merge"]) == 0
    assert {path.name for path in merged.iterdir()} == MODEL_FILES
    assert generation_config_of(merged) == generation_config_of(final)
    assert len(generation_config_of(merged)["eos_token_id"]) == 3
    card = (merged / "README.md").read_text()
    assert "library_name: transformers" in card and "with its adapter merged into it" in card
    assert said_by_the_card(final, monkeypatch) == said_by_the_card(merged, monkeypatch)


def test_an_adapter_of_a_checkpoint_is_merged_as_that_of_the_end_is(run: Run, tmp_path: Path):
    directory, outputs = run("sft", **{"model.adapter": {}}), [tmp_path / "of_final", tmp_path / "of_checkpoint"]
    assert main(["export", str(directory), str(outputs[0]), "--merge"]) == 0
    assert main(["export", str(directory / "checkpoints" / "latest"), str(outputs[1]), "--merge"]) == 0
    of_final, of_checkpoint = ({path.name: path.read_bytes() for path in one.iterdir()} for one in outputs)
    assert of_checkpoint == of_final
    said = json.loads(of_final["args.json"])
    assert (said["tuner_type"], said["adapters"], said["lora_rank"]) == ("full", [], 16)


def test_args_json_says_in_ms_swifts_words_what_was_trained(run: Run, model_dir: Path):
    directory = run("sft", **{"model.adapter": {"rank": 4}, "data.system": "Be brief.", "run.seed": 7})
    beside_checkpoint = json.loads((directory / "checkpoints" / "latest" / "args.json").read_text())
    said = json.loads((directory / "final" / "args.json").read_text())
    assert beside_checkpoint == said
    expected = {"model": str(model_dir), "tuner_type": "lora", "task_type": "causal_lm", "torch_dtype": "float32"}
    expected |= {"system": "Be brief.", "max_length": 64, "seed": 7, "lora_rank": 4, "template": None}
    assert {key: said[key] for key in expected} == expected


def test_a_reward_model_scores_as_its_card_says(run: Run, monkeypatch):
    from rlflow.rewards.reward_model import RewardModel

    final = run("reward_model") / "final"
    assert {path.name for path in final.iterdir()} == {
        "README.md",
        "args.json",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        FINAL_MANIFEST,
        "tokenizer.json",
        "tokenizer_config.json",
    }
    (score,) = RewardModel(path=str(final))([[{"role": "user", "content": "Hello"}]], ["Hello you"], [[]])
    assert score != 0
    assert float(said_by_the_card(final, monkeypatch)) == pytest.approx(score, rel=1e-5)


def test_a_run_that_keeps_no_metrics_ends_well_with_a_card(run: Run):
    directory = run("sft", tracking=["console"])
    assert "## Recipe" in (directory / "final" / "README.md").read_text()
    assert not (directory / "report.html").exists()
