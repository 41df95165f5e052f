"""How many processes a launcher starts, and how they share weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlflow.convert import convert
from rlflow.convert.commands import invocation_of
from rlflow.convert.folds import zero_of
from rlflow.convert.shell import read_commands


def gpus(command: str, told: int | None = None) -> int:
    [found] = [each for shell in read_commands(command) if (each := invocation_of(shell, told)) is not None]
    return found.machines.gpus


@pytest.mark.parametrize(
    ("command", "count"),
    [
        ("NPROC_PER_NODE=8 NNODES=2 swift sft --model m", 16),
        ("CUDA_VISIBLE_DEVICES=0,1,2,3 swift sft --model m", 1),  # one process, the model laid over four
        ("torchrun --nproc_per_node=4 --nnodes 2 --node_rank=0 swift/cli/sft.py --model m", 8),
        ("accelerate launch --num_processes 6 --num_machines 2 sft.py --model_name_or_path m", 6),
        ("CUDA_VISIBLE_DEVICES=0,1,2 trl sft --model_name_or_path m", 3),
        ("deepspeed --num_gpus 2 --num_nodes=2 dpo.py --model_name_or_path m", 4),
        ("trl sft --model_name_or_path m", 1),
    ],
)
def test_processes_are_those_that_the_launcher_starts(command: str, count: int):
    assert gpus(command) == count
    assert gpus(command, 5) == 5


def test_accelerates_file_says_how_many_and_which_stage(tmp_path: Path):
    file = tmp_path / "any_name.yaml"
    file.write_text("deepspeed_config: {zero_stage: 3, offload_optimizer_device: cpu}\nnum_processes: 7\n")
    assert gpus(f"accelerate launch --config_file {file} sft.py --model_name_or_path m") == 7
    assert zero_of(str(file)) == (3, "optimizer")


@pytest.mark.parametrize(
    ("name", "stage", "offload"),
    [
        ("zero0", 0, "none"),
        ("zero1", 1, "none"),
        ("zero2_offload", 2, "optimizer"),
        ("zero3_offload", 3, "all"),
        ("configs/ds_config_zero-3.json", 3, "none"),
        ("deepspeed_stage2.json", None, "none"),
        ("{'zero_optimization': {'stage': 2}}", 2, "none"),
        ("{broken", None, "none"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}', 3, "all"),
    ],
)
def test_zero_has_its_stage_in_its_name_or_its_file(name: str, stage: int | None, offload: str):
    assert zero_of(name) == (stage, offload)


def test_zero_0_is_fsdp_and_a_correction_that_is_off_is_none(converted):
    recipe, _ = converted("NPROC_PER_NODE=2 swift sft --model m --dataset d --deepspeed zero0")
    assert (recipe.trainer.engine, recipe.trainer.workers) == ("fsdp", 2)
    recipe, _ = converted("trl grpo --model_name_or_path m --dataset_name o/d --reward_funcs accuracy_reward "
                          "--use_vllm "
                          "--vllm_importance_sampling_correction false --num_processes 2")  # fmt: skip
    assert recipe.online.correction.mode == "none"


@pytest.mark.parametrize("command", ["swift sft --dataset d.jsonl", "swift infer"])
def test_a_line_that_no_backslash_joins_to_the_command_is_read_and_said(command: str):
    [conversion] = convert(f"{command}\n--model models/m")
    assert "models/m" in (conversion.recipe or conversion.command or "")
    assert "line 2 begins with an option, and no backslash" in next(
        n.text for n in conversion.notes if n.kind == "trap"
    )


def test_a_dollar_that_is_meant_as_one_is_no_variable_and_one_that_nothing_sets_is():
    [conversion] = convert('swift sft --model $MODEL --dataset $DATA/a.jsonl $DATA/b.jsonl --system "costs \\$5"')
    said = [note.text for note in conversion.notes if "is not set in what was converted" in note.text]
    assert [text.partition(" is not set")[0] for text in said] == ["model.path: $MODEL", "data.train: $DATA"]
    assert "costs $5" in (conversion.recipe or "")
