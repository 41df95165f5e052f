"""The commands on a vision-language model: what they write, transformers reads with equal numbers."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from rlflow.actors import adapters
from rlflow.cli.main import main
from rlflow.data.processor_files import copy_processor_files
from rlflow.data.tokenizer import load_tokenizer, save_tokenizer
from rlflow.recipe import AdapterBlock, ModelBlock
from rlflow.recipe.model_blocks import Part
from rlflow.tracking.card_snippets import usage
from tests.seeing_models import FAMILIES, write_seeing_model
from tests.vision_models import picture

PICTURE = picture(40, 24, 1)


@pytest.fixture(scope="module", params=FAMILIES)
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeing_model(tmp_path_factory.mktemp(request.param), request.param)


def write_adapter(directory: Path, base: Path, parts: Sequence[Part] = ("language",)) -> Path:
    """As a run leaves it: an adapter of these parts that has learned something, and what reads for it."""
    block = ModelBlock(path=str(base), adapter=AdapterBlock(rank=4, alpha=6), train=tuple(parts))
    model = adapters.load_adapted(block, seed=0, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.adapter_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    directory.mkdir(parents=True)
    adapters.write(directory, model, adapters.adapter_parameters(model).items())
    save_tokenizer(load_tokenizer(block), directory)
    copy_processor_files(block, directory)
    return directory


def logits_of(model: Any, reader: Path) -> torch.Tensor:
    """Of a question with a picture, as the processor beside the model reads it."""
    processor: Any = AutoProcessor.from_pretrained(reader)
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    image = Image.open(io.BytesIO(PICTURE))
    inputs = processor(text=[text], images=[image], add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits[0]


@pytest.mark.parametrize("parts", [("language",), ("vision", "projector", "language")], ids=len)
@pytest.mark.slow
def test_a_merged_vision_language_model_has_the_logits_of_base_plus_adapter(
    seeing: Path, tmp_path: Path, parts: Sequence[Part]
):
    adapter, output = write_adapter(tmp_path / "run" / "final", seeing, parts), tmp_path / "merged"
    adapted = {
        name for name in load_file(adapter / "adapter_model.safetensors") if "visual" in name or "vision" in name
    }
    assert bool(adapted) == ("vision" in parts)
    base = AutoModelForImageTextToText.from_pretrained(seeing)
    plain = logits_of(base, seeing)
    expected = logits_of(PeftModel.from_pretrained(base, str(adapter)), adapter)
    assert main(["export", str(tmp_path / "run"), str(output), "--merge"]) == 0
    merged = logits_of(AutoModelForImageTextToText.from_pretrained(output), output)
    torch.testing.assert_close(merged, expected, rtol=0, atol=2e-4)
    assert (merged - plain).abs().max() > 0.1
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"):
        assert (output / name).exists() == (seeing / name).exists()


def test_an_adapter_without_processor_files_is_merged_with_its_bases(seeing: Path, tmp_path: Path):
    adapter, output = write_adapter(tmp_path / "adapter", seeing), tmp_path / "merged"
    for file in adapter.glob("*processor_config.json"):
        file.unlink()
    assert main(["export", str(adapter), str(output), "--merge"]) == 0
    assert logits_of(AutoModelForImageTextToText.from_pretrained(output), output).isfinite().all()


def test_the_code_of_a_model_card_shows_a_picture_to_the_model(
    seeing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    recipe = {"algorithm": {"name": "sft"}, "rollout": {"max_new_tokens": 3}}
    (tmp_path / "picture.png").write_bytes(PICTURE)
    for directory in (seeing, write_adapter(tmp_path / "adapter", seeing)):
        blocks = re.findall(r"```python\n(.*?)```", usage(directory, recipe), flags=re.DOTALL)
        assert len(blocks) == 2 and "image_pil" in blocks[1]
        compile(blocks[1], "card", "exec")
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        exec(blocks[0].replace('path = "."', f'path = "{directory}"'), {})
        assert capsys.readouterr().out


def test_infer_and_eval_answer_to_pictures_alike(seeing: Path, tmp_path: Path):
    (tmp_path / "good.png").write_bytes(PICTURE)
    rows = [{"prompt": "<image>How many?", "images": ["good.png"], "solution": "3"}, {"prompt": "2?", "solution": "2"}]
    data, output = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = ["--engine", "torch", "--max-new-tokens", "3", "--max-model-len", "128"]
    assert main(["infer", str(seeing), "--data", str(data), "--output", str(output), *options]) == 0
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert answers[0]["images"][0].startswith("data:image/png;base64,") and "images" not in answers[1]
    arguments = ["eval", str(seeing), "--sets", str(data), "--output", str(tmp_path / "measured"), *options]
    assert main(arguments) == 0
    samples = [json.loads(line) for line in (tmp_path / "measured" / "rows.jsonl").read_text().splitlines()]
    assert [sample["response"] for sample in samples] == [answer["response"] for answer in answers]


def test_each_bad_picture_is_named_with_its_row_and_field(
    seeing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """By every command alike, before any weights are loaded."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "good.png").write_bytes(PICTURE)
    (tmp_path / "cut.png").write_bytes(PICTURE[: len(PICTURE) // 2])
    (tmp_path / "huge.png").write_bytes(picture(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    bad = {
        "gone.png": "`images[0]`: there is no file",
        "cut.png": "`images[0]`: it is damaged",
        "huge.png": "`images[0]`: it has more than 2,000 pixels",
        "moves.gif": "`images[0]`: it is animated, or has pages: 2 frames",
    }
    rows: list[dict[str, Any]] = [{"prompt": "<image>What?", "images": [name], "solution": "3"} for name in bad]
    rows.append({"prompt": "<image>What?", "images": ["good.png", "good.png"], "solution": "3"})
    data, recipe = tmp_path / "rows.jsonl", tmp_path / "recipe.yaml"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    recipe.write_text(
        f"run: {{output_dir: {tmp_path}/run, steps: 1}}\nmodel: {{path: {seeing}}}\nalgorithm: {{name: grpo}}\n"
        f"data: {{train: {{path: {data}}}, prompts_per_step: 1, max_prompt_tokens: 64}}\n"
        "rewards: [{name: exact_match}]\nrollout: {max_new_tokens: 8}\n"
    )
    for arguments in (
        ["infer", str(seeing), "--data", str(data), "--output", str(tmp_path / "none.jsonl")],
        ["eval", str(seeing), "--sets", str(data), "--output", str(tmp_path / "none")],
        ["plan", str(recipe)],
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        said = capsys.readouterr().err
        for number, reason in enumerate([*bad.values(), "its text has 1 <image>, and its column 2 pictures"], 1):
            assert f"row {number}: {reason}" in said or number > 3
        assert "5 bad rows" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["export", "{model}", "{new}", "--quantize", "fp8"],
            "has a tower beside its language model, and schemes are of",
        ),
        (["eval", "{model}", "--sets", "{choices}"], "row 1: `images` is not empty, and it is text alone"),
    ],
    ids=["quantize", "choices"],
)
def test_what_takes_text_alone_says_so(
    seeing: Path, tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture
):
    row = {"question": "<image>Which?", "images": ["a.png"], "choices": ["a", "b"], "answer": 0}
    (tmp_path / "choices.jsonl").write_text(f"{json.dumps(row)}\n")
    names = {"model": seeing, "new": tmp_path / "new", "choices": tmp_path / "choices.jsonl"}
    if arguments[0] == "eval":
        arguments = [*arguments, "--output", "{new}"]
    assert main([word.format(**names) for word in arguments]) == 2
    assert says in capsys.readouterr().err
