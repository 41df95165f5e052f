"""`rlflow convert` at the command line: what is printed where, and what is refused in one line."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from rlflow.cli.main import main

COMMAND = "swift sft --model m --dataset d.jsonl --tuner_type full --packing true"


def test_the_recipe_is_printed_and_the_notes_that_matter_are_beside_it(capsys):
    assert main(["convert", COMMAND]) == 0
    out, err = capsys.readouterr()
    assert "name: sft  # swift sft" in out
    assert err.startswith("swift sft: ")
    assert "trap: --packing true" in err


def test_a_command_behind_dashes_keeps_its_own_flags(tmp_path: Path, capsys):
    output = tmp_path / "recipe.yaml"
    assert main(["convert", "-o", str(output), "--gpus", "4", "--", *COMMAND.split()]) == 0
    assert "workers: 4  # --gpus 4" in output.read_text()
    assert capsys.readouterr().out == f"{output}\n"
    assert main(["convert", COMMAND, "-o", str(output)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_each_training_command_of_a_script_gets_a_file(tmp_path: Path):
    script = tmp_path / "train.sh"
    script.write_text(f"{COMMAND} \\\n  --max_steps 5\n{COMMAND}\nswift infer --model m\n")
    assert main(["convert", str(script), "--output", str(tmp_path / "r.yaml")]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.yaml")) == ["r-1.yaml", "r-2.yaml"]


def test_the_standard_input_is_a_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(COMMAND))
    assert main(["convert", "-"]) == 0
    assert "algorithm:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing.sh"], "there is no file nothing.sh"),
        (["python train.py --x 1"], "no command here that is known"),
        (["swift sft --config missing.yaml --model m"], "names missing.yaml, which cannot be read"),
        (["swift rlhf --rlhf_type opsd --model m"], "no such algorithm yet"),
        (["swift sftt --model m"], "did you mean sft?"),
    ],
)
def test_what_cannot_be_converted_is_one_line(words: list[str], said: str, capsys):
    assert main(["convert", *words]) == 2
    err = capsys.readouterr().err.strip()
    assert said in err
    assert "\n" not in err


def test_a_configuration_alone_is_asked_whose_it_is(tmp_path: Path, capsys):
    (tmp_path / "grpo.yaml").write_text("beta: 0.04\n")
    assert main(["convert", str(tmp_path / "grpo.yaml")]) == 2
    assert "trl grpo --config" in capsys.readouterr().err


def test_flags_without_quotes_are_told_how(capsys):
    with pytest.raises(SystemExit):
        main(["convert", *COMMAND.split()])
    assert "put the whole command in quotes, or behind --" in capsys.readouterr().err


def test_a_converted_command_plans_on_local_data_and_model(tmp_path: Path, tiny_model_dir: Path, capsys):
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"1+{n}=", "solution": str(n + 1)}) + "\n" for n in range(8)))
    command = (
        f"swift rlhf --rlhf_type grpo --model {tiny_model_dir} --tuner_type full --dataset {data} "
        f"--reward_funcs accuracy "
        "--num_generations 2 --per_device_train_batch_size 4 --max_completion_length 8 --use_cpu true --max_length 32"
    )
    output = tmp_path / "recipe.yaml"
    assert main(["convert", command, "-o", str(output)]) == 0
    assert main(["plan", str(output), f"run.output_dir={tmp_path / 'run'}"]) == 0
    assert "2 prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["swift", "rlhf", "--rlhf_type", "grpo"], "rlflow convert -- swift rlhf --rlhf_type grpo"),
        (["r.yaml", "--learning_rate=1e-6"], "set without dashes: trainer.learning_rate=1e-6"),
        (["r.yaml", "--trainer.learning_rate=1e-6"], "set without dashes: trainer.learning_rate=1e-6"),
        (["r.yaml", "--steps=5"], "set without dashes: run.steps=5"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_run_and_plan_say_what_to_write_instead_of_another_frameworks_command(command, words, said, capsys):
    with pytest.raises(SystemExit):
        main([command, *words])
    assert said in capsys.readouterr().err


def test_a_shell_script_is_no_recipe_and_is_told_how_to_become_one(tmp_path: Path, capsys):
    script = tmp_path / "train.sh"
    script.write_text(COMMAND)
    assert main(["plan", str(script)]) == 2
    assert f"rlflow convert {script}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "python -m verl.trainer.main_ppo",
        "trl grpo",
        "swift rlhf --rlhf_type grpo --columns words --dataset d",
        'swift sft --dataset "unclosed',
        "swift sft --model",
        "swift sft --system missing.txt --deepspeed nowhere.json --quant_bits 3 --dataset :#5",
    ],
)
def test_a_command_that_says_little_or_nonsense_has_things_to_do(command: str, capsys):
    assert main(["convert", command]) == 0
    assert "to do" in capsys.readouterr().err


def test_a_configuration_of_nonsense_is_converted_as_far_as_it_goes(tmp_path: Path, capsys):
    (tmp_path / "c.yaml").write_text(
        "num_generations: {x: 1}\ndatasets: [x, {name: y}]\nreward_funcs: 3\ndataset_name: [a]\n"
    )
    assert main(["convert", "--", "trl", "grpo", "--config", str(tmp_path / "c.yaml")]) == 0
    assert "--num_generations" in capsys.readouterr().err
