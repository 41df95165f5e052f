"""Classifiers that see: transformers alone, with the processor that is written, measures what the run measured."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import RunRecipe, metrics_of
from PIL import Image
from transformers import AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from rlflow.cli.main import main
from tests.seeing_models import FAMILIES, write_seeing_model
from tests.vision_models import picture


def rows_in(directory: Path) -> list[dict[str, Any]]:
    """Rows in the forms that people have, the pictures beside them, and one without."""
    for index in range(3):
        (directory / f"{index}.png").write_bytes(picture(24 + 8 * index, 24, index))
    messages = [{"role": "user", "content": "<image>What is it?"}]
    parts = [{"type": "image", "image": "1.png"}, {"type": "text", "text": "And this?"}]
    return [
        {"messages": messages, "images": ["0.png"], "label": "dark"},
        {"messages": [{"role": "user", "content": parts}], "label": "light"},
        {"text": "Here: <image>", "image": "2.png", "label": "light"},
        {"text": "What is it?", "images": [], "label": "dark"},
    ]


def logits_of(final: Path, rows: list[dict[str, Any]], directory: Path) -> torch.Tensor:
    """[rows, classes], by transformers alone."""
    named = json.loads((final / "config.json").read_text())["auto_map"]["AutoModelForSequenceClassification"]
    # As AutoModelForSequenceClassification finds it, where no rlflow has registered its own.
    model: Any = get_class_from_dynamic_module(named, str(final)).from_pretrained(final, dtype=torch.float32).eval()
    processor: Any = AutoProcessor.from_pretrained(final)

    def shown(name: str) -> dict[str, Any]:
        return {"type": "image", "image": Image.open(io.BytesIO((directory / name).read_bytes()))}

    contents = [
        [shown("0.png"), {"type": "text", "text": "What is it?"}],
        [shown("1.png"), {"type": "text", "text": "And this?"}],
        [{"type": "text", "text": "Here: "}, shown("2.png")],
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = [processor.apply_chat_template([{"role": "user", "content": one}], **options) for one in contents]
    inputs.append(processor(text=[rows[3]["text"]], return_tensors="pt"))
    with torch.no_grad():
        return torch.cat([model(**one).logits for one in inputs])


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_finds_the_loss_that_a_classifier_of_pictures_was_measured_at(
    family: str, tmp_path: Path, run_recipe: RunRecipe
):
    base, data = write_seeing_model(tmp_path / "base", family), tmp_path / "rows.jsonl"
    rows = rows_in(tmp_path)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "algorithm": {"name": "classification"},
        "model": {"path": str(base)},
        "data": {"train": {"path": str(data)}, "prompts_per_step": 4, "max_tokens": 400},
        "evaluation": {"data": {"path": str(data)}},
        "trainer": {"learning_rate": 1.0e-2, "tokens_per_micro_batch": 400},
        "run": {"steps": 2},
    }
    directory = run_recipe(recipe)
    logits = logits_of(directory / "final", rows, tmp_path)
    labels = torch.tensor([("dark", "light").index(row["label"]) for row in rows])
    measured = metrics_of(directory)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert measured[-1]["eval/heldout/loss/classification"] == pytest.approx(loss, abs=1e-5)
    assert loss < measured[0]["eval/heldout/loss/classification"] - 0.01
    said = tmp_path / "said.jsonl"
    assert main(["infer", str(directory), "--data", str(data), "--output", str(said)]) == 0
    chances = [json.loads(line)["probabilities"]["light"] for line in said.read_text().splitlines()]
    assert chances == pytest.approx(logits.softmax(dim=1)[:, 1].tolist(), abs=1e-5)
    card = (directory / "final" / "README.md").read_text()
    assert "trust_remote_code=True" in card and "id2label" in card
