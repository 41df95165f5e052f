"""What does not train becomes a command line that rlflow's own commands take."""

from __future__ import annotations

import shlex

import pytest

from rlflow.cli.main import COMMANDS, load_command
from rlflow.convert import convert, other_commands


@pytest.mark.parametrize("verb", [verb for verb, (name, _) in other_commands.COMMANDS.items() if name])
def test_every_option_of_the_table_is_one_of_the_commands(verb: str):
    name, flags = other_commands.COMMANDS[verb]
    assert name in COMMANDS
    options = {option for action in load_command(name).make_parser()._actions for option in action.option_strings}
    assert set(flags.values()) - {""} <= options


@pytest.mark.parametrize(
    "command",
    [
        "swift infer --adapters out/checkpoint-9 --infer_backend vllm --val_dataset v.jsonl --max_new_tokens 64 "
        "--stream true",
        "swift app --model m --temperature 0.7",
        "swift deploy --adapters a=x b=y --host 127.0.0.1 --port 8001 --infer_backend vllm --served_model_name q",
        "swift export --adapters out/checkpoint-9 --merge_lora true --output_dir merged",
        "swift export --model m --push_to_hub true --hub_model_id o/m --use_hf true --hub_token hf_x",
        "swift export --model m --quant_method gptq --quant_bits 4 --dataset d --output_dir o",
        "swift eval --model m --eval_dataset gsm8k --eval_limit 100",
        "swift web-ui --server_port 7860",
    ],
)
def test_the_command_line_is_taken_by_the_parser(command: str):
    [conversion] = convert(command)
    assert conversion.command is not None
    program, name, *words = shlex.split(conversion.command)
    assert program == "rlflow"
    load_command(name).make_parser().parse_intermixed_args(words)
    assert not any("hf_x" in note.text for note in conversion.notes)


def test_a_rollout_server_is_not_needed():
    [conversion] = convert("swift rollout --model m")
    assert conversion.command is None
    assert "starts its engines itself" in conversion.notes[0].text


@pytest.mark.parametrize(
    ("command", "line", "lost"),
    [
        (
            "swift export --model m --quant_bits 4 --dataset a#9 b --output_dir o",
            "rlflow export m --quantize w4a16 --calibration a o",
            "--dataset b: --calibration is one file, join them",
        ),
        ("swift export --model m --dataset a --output_dir o", "rlflow export m o", "--dataset a: nothing is quantised"),
    ],
)
def test_texts_that_nothing_is_calibrated_on_are_named(command: str, line: str, lost: str):
    [conversion] = convert(command)
    assert conversion.command == line
    assert [note.text for note in conversion.notes] == [lost]


def test_how_a_model_is_held_is_carried_over_and_what_is_so_anyway_is_said():
    command = "swift infer --adapters a --stream true --infer_backend vllm --vllm_max_model_len 64 --max_batch_size 8"
    [conversion] = convert(f"{command} --torch_dtype bfloat16 --vllm_gpu_memory_utilization 0.5 --load_args true")
    assert conversion.command == (
        "rlflow infer a --engine vllm --max-model-len 64 --max-num-seqs 8 --dtype bfloat16 --gpu-memory-fraction 0.5"
    )
    assert [(note.kind, note.text.split(":")[0]) for note in conversion.notes] == [
        ("unneeded", "--stream true"),
        ("unneeded", "--load_args true"),
    ]
