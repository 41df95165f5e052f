"""Rows of the table on a vision-language model, whole runs on questions with pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import rlflow
from rlflow.data.video_archive import is_video
from rlflow.tracking.rollouts import read_rollouts
from tests.local_actors import use_local_actors
from tests.seeing_models import NEEDS_TORCHVISION, write_seeing_model
from tests.vision_models import picture

RECIPE = """
run: {{output_dir: {out}, seed: 3, steps: 2}}
model: {{path: {model}, train: [language, projector, vision], learning_rates: {{vision: 1.0e-4}}}}
data: {{train: {{path: {rows}}}, prompts_per_step: 4, max_prompt_tokens: 128}}
trainer: {{learning_rate: 1.0e-3, tokens_per_micro_batch: 256}}
tracking: [jsonl]
"""
ONLINE = """
rewards: [{{plugin: "{plugin}:shortness"}}]
rollout: {{engine: torch, max_new_tokens: 5}}
"""
ROWS: dict[str, str] = {
    "sft": "{name: sft}",
    "dpo": "{name: dpo}",
    "kto": "{name: kto}",
    "reward_model": "{name: reward_model}",
    "grpo": "{name: grpo, group_size: 2, kl: {coef: 0.1}, groups: {epochs_per_step: 2}}",
    "ppo": "{name: ppo, group_size: 2, critic: {learning_rate: 1.0e-3}}",
}


CASES = [
    *(pytest.param("qwen3_vl", name, marks=NEEDS_TORCHVISION, id=f"qwen3_vl, {name}") for name in ROWS),
    *(pytest.param("idefics3", name, id=f"idefics3, {name}") for name in ("sft", "grpo")),
]

PLUGINS = """
from rlflow.environments import Reply

def shortness(completions, **columns):
    return [-float(len(text)) for text in completions]

class Echo:
    def reset(self, row):
        self.heard = 0

    def step(self, message):
        self.heard += 1
        return Reply(f"again, {self.heard}", reward=float(len(message["content"])), done=self.heard == 3)

class Introduced(Echo):
    def reset(self, row):
        super().reset(row)
        return [{"role": "system", "content": "Look."}, *row["messages"]]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda family: write_seeing_model(tmp_path_factory.mktemp(family), family))


def rows_of(kind: str, directory: Path, family: str = "idefics3") -> Path:
    """Four questions, three of them with a picture; the last with a video in its stead, where the model takes some."""
    made: list[dict[str, Any]] = []
    for number in range(4):
        (directory / f"{number}.png").write_bytes(picture(20 + 10 * number, 24, number))
        tag, images = ("<image>", [f"{number}.png"]) if number else ("", [])
        right, wrong = ({"role": "assistant", "content": text} for text in ("a picture", "nothing"))
        row: dict[str, Any] = {"images": images}
        if number == 3 and family != "idefics3":
            tag, row = "<video>", {"videos": [{"frames": ["1.png", "1.png", "1.png"], "fps": 1}]}
        question = {"role": "user", "content": f"{tag}What is {number}?"}
        if kind in ("dpo", "reward_model"):
            row |= {"chosen": [question, right], "rejected": [question, wrong]}
        elif kind == "kto":
            row |= {"messages": [question, right], "label": number % 2 == 0}
        else:
            row |= {"messages": [question, right] if kind == "sft" else [question]}
        made.append(row)
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_row_trains_a_vision_language_model_on_pictures(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, name: str
):
    """Every part moves by its own learning rate, and engine and trainer agree on what pictures and videos say."""
    use_local_actors(monkeypatch)
    plugin = tmp_path / "rewards.py"
    plugin.write_text(PLUGINS)
    is_online = name in ("grpo", "ppo")
    text = RECIPE.replace("max_prompt_tokens", "max_prompt_tokens" if is_online else "max_tokens")
    recipe = tmp_path / "recipe.yaml"
    rows = rows_of(name, tmp_path, family)
    values = {"out": tmp_path / "run", "model": models(family), "rows": rows, "plugin": plugin}
    recipe.write_text((text + ONLINE * is_online).format(**values) + f"algorithm: {ROWS[name]}\n")
    rlflow.run(recipe)
    final = tmp_path / "run" / "final"
    assert (final / "processor_config.json").is_file()
    assert (final / "modeling_classifier.py").is_file() == (name == "reward_model")
    before, after = load_file(models(family) / "model.safetensors"), load_file(final / "model.safetensors")
    moved = {key: float((after[key].float() - before[key].float()).abs().max()) for key in before if key in after}
    of_tower = [value for key, value in moved.items() if "visual.blocks" in key or "vision_model.encoder" in key]
    assert 0 < max(of_tower) < 5e-4 < max(moved.values())
    if is_online:
        metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
        assert metrics["mismatch/logprob_abs_diff_max"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "environment"),
    [
        ("idefics3", "Echo"),
        ("idefics3", "Introduced"),
        pytest.param("qwen3_vl", "Introduced", marks=NEEDS_TORCHVISION, id="a video"),
    ],
)
def test_an_episode_of_several_turns_shows_its_first_messages_picture_in_each(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, environment: str
):
    """The trainer scores all turns as the engine sampled them, under an adapter of the language model alone; of an
    environment that begins with messages of its own, too, and of a video."""
    use_local_actors(monkeypatch)
    plugin = tmp_path / "plugins.py"
    plugin.write_text(PLUGINS)
    recipe = tmp_path / "recipe.yaml"
    model = _that_stops(models(family), tmp_path / "model")
    recipe.write_text(
        f"""
run: {{output_dir: {tmp_path / "run"}, seed: 3, steps: 2}}
model: {{path: {model}, adapter: {{rank: 2, target_modules: [q_proj, v_proj]}}}}
algorithm: {{name: grpo, group_size: 2, kl: {{coef: 0.1}}}}
data: {{train: {{path: {rows_of("grpo", tmp_path, family)}}}, prompts_per_step: 4, max_prompt_tokens: 128}}
environment: {{plugin: "{plugin}:{environment}", max_turns: 3, max_tokens: 96}}
rewards: [{{name: environment}}]
rollout: {{engine: torch, max_new_tokens: 8}}
trainer: {{learning_rate: 1.0e-2}}
tracking: [jsonl]
"""
    )
    rlflow.run(recipe)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    metrics = [line for line in lines if "environment/turns" in line]
    assert max(line["environment/turns"] for line in metrics) > 1
    assert all(line["environment/failed_fraction"] == 0 for line in metrics)
    assert all(line["mismatch/logprob_abs_diff_max"] < 1e-4 for line in metrics)
    rollouts = read_rollouts(tmp_path / "run" / "rollouts" / "step_000001.parquet", images=True)
    shown = [r.episode.prompt for r in rollouts if r.episode is not None and r.images]
    assert shown and all((prompt is None) == (environment == "Echo") for prompt in shown)
    assert all(sum(m.get("images", 0) for m in prompt) == 1 for prompt in shown if prompt is not None)
    config = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    if family == "idefics3":
        assert len(config["target_modules"]) == 4
        assert all(".text_model." in name for name in config["target_modules"])
    else:
        # Its tower has no layers of these names.
        assert set(config["target_modules"]) == {"q_proj", "v_proj"}
        assert any(is_video(image) and r.num_turns > 1 for r in rollouts for image in r.images)


def _that_stops(model: Path, directory: Path) -> Path:
    """The model, with an end of turn that it often writes."""
    shutil.copytree(model, directory)
    weights = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    end = vocabulary.get("<end_of_utterance>", vocabulary.get("<|im_end|>"))
    tied = next(tensor for name, tensor in weights.items() if "embed_tokens" in name)
    head = 0.1 * weights.get("lm_head.weight", tied)
    head[end] *= 30
    save_file(weights | {"lm_head.weight": head}, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
