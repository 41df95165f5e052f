"""What ms-swift's documentation tells people to type converts, and `rlflow plan` finds nothing to object to."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlflow.cli.main import main

SFT = (
    "CUDA_VISIBLE_DEVICES=0 swift sft --model MODEL --tuner_type lora --dataset conversations.jsonl#4 "
    "conversations.jsonl --torch_dtype bfloat16 --num_train_epochs 1 --per_device_train_batch_size 1 "
    "--per_device_eval_batch_size 1 "
    "--learning_rate 1e-4 --lora_rank 8 --lora_alpha 32 --target_modules all-linear --gradient_accumulation_steps 16 "
    "--eval_steps 50 --save_steps 50 --save_total_limit 2 --logging_steps 5 --max_length 2048 --output_dir output "
    "--system 'You are a helpful assistant.' --warmup_ratio 0.05 --dataloader_num_workers 4 --dataset_num_proc 4 "
    "--model_author swift --model_name swift-robot"
)
GRPO = (
    "CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 NPROC_PER_NODE=8 swift rlhf --rlhf_type grpo --model MODEL --train_type full "
    "--dataset problems.jsonl#5000 --torch_dtype bfloat16 --num_train_epochs 1 --per_device_train_batch_size 2 "
    "--learning_rate 1e-6 --save_total_limit 2 --logging_steps 5 --output_dir output --gradient_accumulation_steps 1 "
    "--warmup_ratio 0.05 --dataloader_num_workers 4 --max_completion_length 1024 --vllm_max_model_len 2048 "
    "--reward_funcs accuracy --num_generations 16 --use_vllm true --vllm_gpu_memory_utilization 0.4 --sleep_level 1 "
    "--offload_model true --offload_optimizer true --gc_collect_after_offload true --deepspeed zero3 "
    "--num_infer_workers 8 --tensor_parallel_size 1 --temperature 1.0 --top_p 0.85 --log_completions true "
    "--overlong_filter true"
)
PREFERENCES = (
    "CUDA_VISIBLE_DEVICES=0 swift rlhf --rlhf_type {kind} --model MODEL --train_type lora --dataset {data}.jsonl "
    "--torch_dtype bfloat16 --num_train_epochs 1 --per_device_train_batch_size 1 --learning_rate 1e-4 --lora_rank 8 "
    "--lora_alpha 32 --target_modules all-linear --gradient_accumulation_steps 16 --eval_steps 50 --save_steps 50 "
    "--save_total_limit 2 --logging_steps 5 --max_length 2048 --output_dir output --warmup_ratio 0.05 {more}"
)
COMMANDS = {
    "sft": SFT,
    "sft, full, packed": "NPROC_PER_NODE=8 swift sft --model MODEL --train_type full --dataset conversations.jsonl "
    "--packing true --max_length 4096 --attn_impl flash_attn --use_liger_kernel true --deepspeed zero2 "
    "--save_only_model true --loss_scale ignore_empty_think",
    "pt": "NPROC_PER_NODE=8 swift pt --model MODEL --dataset texts.jsonl --streaming true --train_type full "
    "--deepspeed zero2 --output_dir output --max_steps 10000",
    "grpo": GRPO,
    "grpo, lora": GRPO.replace("--train_type full", "--tuner_type lora --lora_rank 8 --target_modules all-linear"),
    "ppo": PREFERENCES.format(kind="ppo", data="problems", more="--reward_model SCORER --response_length 64"),
    **{
        kind: PREFERENCES.format(kind=kind, data="pairs", more=more)
        for kind, more in {
            "dpo": "--rpo_alpha 0.1",
            "cpo": "",
            "simpo": "",
            "orpo": "",
            "rm": "--center_rewards_coefficient 0.01",
        }.items()
    },
    "kto": PREFERENCES.format(kind="kto", data="labelled", more=""),
}


@pytest.fixture(scope="module")
def files(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data of each kind, a model and a scorer by the names that the commands have."""
    directory = tmp_path_factory.mktemp("documented")
    question = {"role": "user", "content": "What is 1 + 2?"}
    conversation = [question, {"role": "assistant", "content": "It is 3."}]
    rows = {
        "conversations": {"messages": conversation},
        "texts": {"messages": [{"role": "assistant", "content": "One and two are three."}]},
        "problems": {"messages": [question], "solution": "3"},
        "pairs": {"messages": conversation, "rejected_response": "It is 4."},
        "labelled": {"messages": conversation},
    }
    for name, row in rows.items():
        labels = [{"label": number % 2 == 0} if name == "labelled" else {} for number in range(16)]
        (directory / f"{name}.jsonl").write_text("".join(f"{json.dumps({**row, **label})}\n" for label in labels))
    (directory / "MODEL").symlink_to(tiny_model_dir)
    scorer = directory / "SCORER"
    scorer.mkdir()
    for file in tiny_model_dir.iterdir():
        (scorer / file.name).write_bytes(file.read_bytes())
    config = json.loads((scorer / "config.json").read_text())
    config |= {"architectures": ["Qwen3ForSequenceClassification"], "num_labels": 1, "id2label": {"0": "LABEL_0"}}
    (scorer / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_documented_command_converts_and_passes_the_plan(name, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(files)
    recipe = tmp_path / "recipe.yaml"
    assert main(["convert", COMMANDS[name], "-o", str(recipe)]) == 0
    assert main(["plan", str(recipe), f"run.output_dir={tmp_path / 'run'}"]) == 0, capsys.readouterr().err
    kind = name.partition(",")[0]
    row = {"pt": "pretrain", "rm": "reward_model"}.get(kind, kind)
    assert re.search(rf"^algorithm  {row}: ", capsys.readouterr().out, re.MULTILINE)
