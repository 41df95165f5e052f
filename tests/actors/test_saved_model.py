"""A checkpoint becomes the model that its trainers would have exported, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from free_ports import free_address
from saving_ranks import ENGINES, save_and_export, train

from rlflow.actors.policy_trainer import PolicyTrainer
from rlflow.actors.saved_model import export_saved
from rlflow.actors.sequence_trainer import SequenceTrainer
from rlflow.recipe import AdapterBlock, ModelBlock, TrainerBlock, algorithm_of

SETTINGS = {"do_sample": True, "temperature": 0.6, "eos_token_id": [1, 7]}


def contents_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def exported(checkpoint: Path, directory: Path, block: ModelBlock, *, is_classifier: bool = False) -> dict[str, bytes]:
    directory.mkdir()
    told: list[tuple[int, int]] = []
    export_saved(
        checkpoint,
        directory,
        block,
        algorithm=algorithm_of("reward_model" if is_classifier else "sft"),
        seed=0,
        progress=lambda *numbers: told.append(numbers),
    )
    assert told[-1][0] == told[-1][1] > 0
    return contents_of(directory)


@pytest.fixture
def start(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """The tiny model, with a generation config of its own."""
    directory = tmp_path / "start"
    directory.mkdir()
    for path in tiny_model_dir.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    (directory / "generation_config.json").write_text(json.dumps(SETTINGS))
    return directory


def saved_by_one_rank(directory: Path, trainer_class: Any, block: ModelBlock) -> tuple[Path, dict[str, bytes]]:
    """A checkpoint of a model that is not the one it started from, and what its trainer exports."""
    of_head = {"algorithm": algorithm_of("reward_model")} if trainer_class is SequenceTrainer else {}
    trainer = trainer_class(block, TrainerBlock(), rank=0, world_size=1, num_threads=1, seed=0, **of_head)
    trainer.setup(None)
    train(trainer, is_classifier=trainer_class is SequenceTrainer)
    save_and_export(trainer, directory)
    return directory / "saved", contents_of(directory / "final")


@pytest.mark.parametrize(
    "adapter",
    [None, {"rank": 4}, {"rank": 4, "kind": "dora", "target_modules": ["q_proj", "o_proj"]}],
    ids=["whole", "lora", "dora"],
)
def test_a_policy_and_an_adapter_are_those_that_the_trainer_exports(start: Path, tmp_path: Path, adapter: Any):
    block = ModelBlock(path=str(start), adapter=None if adapter is None else AdapterBlock(**adapter))
    saved, expected = saved_by_one_rank(tmp_path, PolicyTrainer, block)
    found = exported(saved, tmp_path / "export", block)
    assert found == expected
    assert json.loads(found["generation_config.json"])["temperature"] == 0.6
    weights = "model.safetensors" if adapter is None else "adapter_model.safetensors"
    assert found[weights] != (start / "model.safetensors").read_bytes() and len(found[weights]) > 5000


def test_an_adapter_that_went_on_from_another_is_the_one_that_was_trained(start: Path, tmp_path: Path):
    block = ModelBlock(path=str(start), adapter=AdapterBlock(rank=4))
    _, before = saved_by_one_rank(tmp_path / "first", PolicyTrainer, block)
    goes_on = ModelBlock(path=str(start), adapter=AdapterBlock(path=str(tmp_path / "first" / "final")))
    saved, expected = saved_by_one_rank(tmp_path, PolicyTrainer, goes_on)
    assert exported(saved, tmp_path / "export", goes_on) == expected != before


def test_a_mixture_of_experts_has_the_names_of_its_architectures_checkpoints(tiny_moe_dir: Path, tmp_path: Path):
    block = ModelBlock(path=str(tiny_moe_dir))
    saved, expected = saved_by_one_rank(tmp_path, PolicyTrainer, block)
    assert exported(saved, tmp_path / "export", block) == expected


def test_a_reward_model_has_its_head_and_its_own_padding_token(start: Path, tmp_path: Path):
    settings = json.loads((start / "tokenizer_config.json").read_text())
    (start / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<eos>"}))
    block = ModelBlock(path=str(start))
    saved, expected = saved_by_one_rank(tmp_path, SequenceTrainer, block)
    found = exported(saved, tmp_path / "export", block, is_classifier=True)
    assert found == expected
    assert "ForSequenceClassification" in found["config.json"].decode()
    assert json.loads(found["config.json"])["pad_token_id"] != 1


def test_an_adapter_of_a_reward_model_has_its_head_beside_it(start: Path, tmp_path: Path):
    block = ModelBlock(path=str(start), adapter=AdapterBlock(rank=4))
    saved, expected = saved_by_one_rank(tmp_path, SequenceTrainer, block)
    found = exported(saved, tmp_path / "export", block, is_classifier=True)
    assert found == expected
    assert json.loads(found["adapter_config.json"])["modules_to_save"] == ["score"]


def test_a_checkpoint_of_another_model_is_refused(start: Path, tmp_path: Path, tiny_moe_dir: Path):
    saved, _ = saved_by_one_rank(tmp_path, PolicyTrainer, ModelBlock(path=str(start)))
    with pytest.raises(ValueError, match="has shape"):
        exported(saved, tmp_path / "export", ModelBlock(path=str(tiny_moe_dir)))


@pytest.mark.slow
def test_what_two_ranks_of_any_engine_saved_is_what_they_export(start: Path, tmp_path: Path):
    address = free_address()
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("saving_ranks.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), address, str(start), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    for name, (dtype, _) in ENGINES.items():
        assert len(list((tmp_path / name / "saved").glob("state-*-of-00002.safetensors"))) == 2
        block = ModelBlock(path=str(start), dtype=dtype)
        found = exported(tmp_path / name / "saved", tmp_path / name / "export", block)
        assert found == contents_of(tmp_path / name / "final"), name
        assert json.loads(found["config.json"])["dtype"] == dtype
