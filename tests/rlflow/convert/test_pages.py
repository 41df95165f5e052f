"""The pages for those who come from elsewhere: their commands convert, their code works, their names exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from rlflow.cli.main import main
from rlflow.convert import convert
from rlflow.convert.shell import read_commands

DOCS = Path(__file__).resolve().parents[3] / "docs"
PAGES = ["from_ms_swift.md", "from_trl.md", "from_verl.md"]


def blocks(page: str) -> list[str]:
    """Every indented block of a page, without its indentation."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE)
    return ["\n".join(line[4:] for line in block.splitlines()).strip("\n") for block in found]


FILES = {
    "train.sh": "swift sft --model m --dataset d.jsonl\n",
    "run_qwen3-8b.sh": "python -m verl.trainer.main_ppo algorithm.adv_estimator=grpo data.train_files=t.parquet "
    "actor_rollout_ref.model.path=m actor_rollout_ref.rollout.n=5\n",
    "grpo.yaml": "model_name_or_path: m\ndataset_name: o/d\nreward_funcs: [accuracy_reward]\n",
}


@pytest.mark.parametrize("page", PAGES)
def test_every_convert_command_of_a_page_runs(page: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    commands = [command.words for block in blocks(page) for command in read_commands(block)]
    conversions = [list(words[1:]) for words in commands if words[:2] == ("rlflow", "convert")]
    assert len(conversions) >= 2
    for words in conversions:
        (tmp_path / "recipe.yaml").unlink(missing_ok=True)
        assert main(words) == 0, shlex.join(words)


def test_the_functions_on_the_pages_work_as_they_stand():
    names: dict[str, Any] = {"compute_score": lambda source, text, truth, extra: float(text == truth)}
    for page in PAGES:
        for block in blocks(page):
            if block.startswith(("class ", "def ")):
                exec(block, names)
    assert names["Brevity"]()(["x" * 300, "short"], solution=["1", "2"]) == [0.0, 1.0]
    models = [{"ground_truth": "4"}, {"ground_truth": "5"}]
    assert names["reward"](["4", "4"], data_source=["s", "s"], reward_model=models, other=[1, 2]) == [1.0, 0.0]


COMMANDS = [
    f"swift {verb} --model m --dataset AI-ModelScope/alpaca-gpt4-data-en#500 swift/self-cognition#500 "
    f"--tuner_type {tuner} "
    "--torch_dtype bfloat16 --num_train_epochs 1 --per_device_train_batch_size 1 --learning_rate 1e-5 "
    "--max_length 2048 "
    "--gradient_accumulation_steps 16 --save_steps 50 --save_total_limit 2 --warmup_ratio 0.05 --model_name bot"
    for verb in ("sft", "pt")
    for tuner in ("full", "lora")
] + [
    f"swift rlhf --rlhf_type {kind} --model m --dataset d.jsonl --tuner_type full --deepspeed zero2 {flags}"
    for kind, flags in {
        "dpo": "--rpo_alpha 0.1 --ref_model o/ref",
        "kto": "--undesirable_weight 1.2",
        "cpo": "",
        "simpo": "",
        "orpo": "",
        "rm": "",
        "ppo": "--reward_model o/rm --response_length 64",
        "grpo": "--reward_funcs accuracy format cosine repetition soft_overlong --soft_cache_length 50 "
        "--num_generations 2 "
        "--per_device_train_batch_size 4",
    }.items()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_kind_of_training_that_ms_swift_documents_is_a_recipe_without_a_conflict(command: str, converted):
    recipe, conversion = converted(command)
    assert recipe.model.path is not None
    [found] = convert(command)
    assert found.recipe == conversion.recipe
