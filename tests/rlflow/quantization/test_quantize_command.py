"""`rlflow export --quantize`: a whole directory, its loss as transformers has it, and what is refused."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from rlflow.checkpoint import verify_model
from rlflow.cli.main import main
from rlflow.quantization import rounding
from tests.conftest import _write_model

ROWS = [{"messages": [{"role": "user", "content": f"{n}+{n}="}, {"role": "assistant", "content": str(2 * n)}]} for n in
        range(3, 15)]  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tiny_model_dir, of widths that groups of 32 divide."""
    directory = tmp_path_factory.mktemp("wide") / "wide"
    _write_model(directory, Qwen3Config, 0.25, hidden_size=64, tie_word_embeddings=True, num_hidden_layers=2)
    return directory


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def nats_a_token(directory: Path) -> float:
    """By transformers' own loss, of the conversations as the tokenizer's template has them."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    total = tokens = 0
    for row in ROWS:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return total / tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8", "int8", "w4a16"])
def test_the_loss_in_the_card_is_that_of_transformers(
    name: str, model_dir: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    output = tmp_path / "deep" / name
    command = ["export", str(model_dir), str(output), "--quantize", name, "--held-out", str(rows), "--dtype", "float32"]
    assert main(command) == 0
    before, after = nats_a_token(model_dir), nats_a_token(output)
    card = (output / "README.md").read_text()
    said = dict(re.findall(r"\| (before|after) \| ([\d.]+) \|", card))
    assert float(said["before"]) == pytest.approx(before, abs=2e-4)
    assert float(said["after"]) == pytest.approx(after, abs=2e-4)
    assert abs(after - before) > 1e-3
    printed = capsys.readouterr()
    assert f"{said['before']} -> {said['after']} nats a token" in printed.err
    assert printed.out == f"{output}\n"
    assert AutoTokenizer.from_pretrained(output).chat_template
    verify_model(output)
    assert not [path for path in output.parent.iterdir() if path != output]


def test_an_adapter_is_merged_first(model_dir: Path, tmp_path: Path):
    base: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    adapted: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    names = (tmp_path / name for name in ("adapter", "once", "merged", "twice"))
    adapter, once, merged, twice = map(str, names)
    assert main(["export", adapter, once, "--quantize", "fp8", "--dtype", "float32"]) == 0
    assert main(["export", adapter, merged, "--merge"]) == 0
    assert main(["export", merged, twice, "--quantize", "fp8", "--dtype", "float32"]) == 0
    stored = [load_file(Path(path, "model.safetensors")) for path in (once, twice)]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(tensor.float(), stored[1][name].float()) for name, tensor in stored[0].items())
    assert "was not measured" in Path(once, "README.md").read_text()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--calibration", "rows.jsonl"], "--calibration and --held-out are of --quantize: add it"),
        (["--quantize", "fp8", "--held-out", "gone.jsonl"], "gone.jsonl"),
        (["--quantize", "gptq"], "--quantize awq and gptq need auto-round: pip install 'rlflow[quantize]'"),
    ],
    ids=str,
)
def test_what_is_asked_for_wrongly_is_one_sentence(
    words: list[str],
    says: str,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.setattr(rounding, "find_spec", lambda name: None)
    assert main(["export", str(model_dir), str(tmp_path / "out"), *words]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_quantised_is_refused_and_one_that_exists_is_kept(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    once = str(tmp_path / "once")
    assert main(["export", str(model_dir), once, "--quantize", "fp8"]) == 0
    assert main(["export", str(model_dir), once, "--quantize", "int8"]) == 2
    assert "exists already: name a new directory" in capsys.readouterr().err
    assert main(["export", once, str(tmp_path / "twice"), "--quantize", "int8"]) == 2
    assert "is quantised already (compressed-tensors)" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_leaves_nothing(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", refuse)
    assert main(["export", str(model_dir), str(tmp_path / "out"), "--quantize", "fp8"]) == 1
    assert "No space left on device; name a directory with room" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_quantised_model_answers_with_the_torch_engine(model_dir: Path, tmp_path: Path):
    small, answers = tmp_path / "small", tmp_path / "answers.jsonl"
    assert main(["export", str(model_dir), str(small), "--quantize", "w4a16", "--dtype", "float32"]) == 0
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "1+2="}\n')
    command = ["infer", str(small), "--engine", "torch", "--data", str(asked), "--output", str(answers)]
    assert main([*command, "--temperature", "0", "--max-new-tokens", "8"]) == 0
    tokenizer, model = AutoTokenizer.from_pretrained(small), AutoModelForCausalLM.from_pretrained(small)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+2="}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert json.loads(answers.read_text())["response"] == tokenizer.decode(written, skip_special_tokens=True)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_format_that_the_torch_engine_does_not_read_names_vllm(
    method: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    small = tmp_path / "small"
    shutil.copytree(model_dir, small)
    config = json.loads((small / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
    (small / "config.json").write_text(json.dumps(config))
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "1+2="}\n')
    command = ["infer", str(small), "--engine", "torch", "--data", str(asked), "--output", str(tmp_path / "a.jsonl")]
    assert main(command) == 2
    assert f"has its weights in {method}'s format" in (said := capsys.readouterr().err)
    assert "--engine vllm reads it" in said
