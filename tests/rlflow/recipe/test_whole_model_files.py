"""What a copy or a download that was cut off leaves of a model's directory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rlflow.data.errors import DataError
from rlflow.model_source import find_model
from rlflow.recipe.model_files import files_problem, read_header

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.5, "top_k": null}')
    save_file({"a": np.zeros((3, 5), np.float32), "b": np.zeros(2, np.int8)}, directory / "model.safetensors")
    return directory


def test_a_whole_directory_has_no_problem_and_its_header_says_how_long_each_file_is(model: Path):
    assert files_problem(model) is None
    tensors, size = read_header(model / "model.safetensors")
    assert {name: tensor["shape"] for name, tensor in tensors.items()} == {"a": [3, 5], "b": [2]}
    assert size == (model / "model.safetensors").stat().st_size


def test_weights_that_are_cut_off_by_one_byte_are_named_with_both_sizes(model: Path):
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert files_problem(model) == f"{weights} is cut off: {len(whole) - 1} of {len(whole)} bytes: fetch it again"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("model.safetensors", "", "is no safetensors file, it may be cut off"),
        ("model.safetensors", "<html>not found</html>", "is no safetensors file"),
        ("model.safetensors", "\x02" + "\0" * 7 + "[]", "is no safetensors file"),
        ("model.safetensors", POINTER, "is a pointer of Git LFS to the weights, run `git lfs pull` there"),
        ("config.json", "", "is no JSON, it may be cut off"),
        ("config.json", "[]", "holds no fields"),
        ("generation_config.json", '{"eos_token_id": "</s>"}', 'eos_token_id is "</s>", not a token\'s id'),
        ("generation_config.json", '{"temperature": "hot"}', 'temperature is "hot", not a number'),
        ("tokenizer_config.json", "{", "is no JSON, it may be cut off"),
        ("model.safetensors.index.json", "{}", "has no weight_map"),
    ],
)
def test_each_damaged_file_is_named_with_its_remedy_before_anything_is_loaded(
    model: Path, name: str, text: str, says: str
):
    (model / name).write_text(text)
    with pytest.raises(DataError) as refused:
        find_model(str(model))
    assert str(refused.value).startswith(str(model / name))
    assert says in str(refused.value)


def test_an_adapter_is_refused_for_what_is_wrong_with_its_base(model: Path, tmp_path: Path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    save_file({}, adapter / "adapter_model.safetensors")
    assert find_model(str(adapter)).base == str(model)
    (model / "model.safetensors").write_text(POINTER)
    with pytest.raises(DataError, match="pointer of Git LFS"):
        find_model(str(adapter))
