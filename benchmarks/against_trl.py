"""Whole GRPO steps on a CPU: `rlflow run` and TRL's GRPOTrainer, in pairs of runs one after the other.

    python benchmarks/against_trl.py --case equal                  # 1.3M parameters, 64 completions of some 110 tokens
    python benchmarks/against_trl.py --case varied                 # 0.8M parameters, of up to 512 tokens, most shorter
    python benchmarks/against_trl.py --case smollm2 --model models/SmolLM2-135M-Instruct    # 16 of up to 64
    python benchmarks/against_trl.py --case varied --staleness 1   # rlflow generates the next step meanwhile

Both train the same model on the same prompts with the same reward (the share of digits in a completion), learning rate,
loss and threads; a step is timed from its beginning to the next one's, the first two are left out. Where a policy stops
is up to it: the probability of the end is that of any token of its vocabulary at first. Where lengths vary the learning
rate is so small that it stays so: at 1e-3 both policies learn to write three times as much within five steps, each at
its own pace, and steps of unlike work are compared. Completions' lengths and rewards stand beside the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import yaml

WARM_UP = 2
TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Case:
    vocabulary: int | None
    """Of a model that is made here; None where one is given."""
    prompts: int
    group: int
    new_tokens: int
    learning_rate: float


CASES = {
    "equal": Case(4096, 8, 8, 110, 1e-3),
    "varied": Case(128, 8, 8, 512, 1e-5),
    "smollm2": Case(None, 4, 4, 64, 1e-6),
}


def digit_share(completions: Sequence[Any], **_: Any) -> list[float]:
    """The reward of both: rlflow gives messages or texts, TRL texts."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [sum(character.isdigit() for character in text) / max(1, len(text)) for text in texts]


def sums(rows: int) -> Iterator[dict[str, str]]:
    """{prompt, answer} of sums of numbers of two digits."""
    for row in range(rows):
        a, b = 10 + row * 7 % 90, 10 + row * 13 % 90
        yield {"prompt": f"{a}+{b}=", "answer": str(a + b)}


def make_model(directory: Path, vocabulary: int) -> str:
    from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed

    from rlflow.data.tokenizer import build_character_tokenizer

    known = string.digits + string.ascii_letters + string.punctuation + " "
    extra = "".join(chr(0x4E00 + i) for i in range(vocabulary - 2 - len(known)))
    tokenizer = build_character_tokenizer(known + extra)
    set_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def run_rlflow(case: Case, model: str, steps: int, threads: int, staleness: int, directory: Path) -> list[dict]:
    here = Path(__file__).resolve()
    recipe = {
        "algorithm": {"name": "grpo", "group_size": case.group, "kl": {"coef": 0.0}},
        "model": {"path": model, "dtype": "float32"},
        "data": {
            "train": {"generator": f"{here}:sums", "args": {"rows": steps * case.prompts}},
            "prompts_per_step": case.prompts,
            "max_prompt_tokens": 64,
            "shuffle": False,
        },
        "rewards": [{"plugin": f"{here}:digit_share"}],
        "rollout": {
            "engine": "torch",
            "max_new_tokens": case.new_tokens,
            "max_num_seqs": case.prompts * case.group,
            "cpus_per_worker": threads,
        },
        "trainer": {
            "learning_rate": case.learning_rate,
            "tokens_per_micro_batch": case.prompts * case.group * (64 + case.new_tokens),
            "cpus_per_worker": threads,
        },
        "run": {"steps": steps, "seed": 0, "output_dir": str(directory / "run"), "max_staleness": staleness},
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "rlflow", "run", str(directory / "recipe.yaml")]
    subprocess.run(command, stdout=sys.stderr, check=True, timeout=TIMEOUT_S)
    lines = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    return [
        {"seconds": line["time/step_s"], "tokens": line["completion/mean_tokens"], "reward": line["reward/mean"]}
        for line in lines
        if line["step"] > 0
    ]


def run_trl(case: Case, model: str, steps: int, threads: int, directory: Path) -> list[dict]:
    command = [sys.executable, __file__, "--child", str(directory / "trl.json"), "--model", model]
    command += ["--steps", str(steps), "--threads", str(threads)]
    command += ["--case", next(name for name, other in CASES.items() if other is case)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, stdout=sys.stderr, check=True, env=environment, timeout=TIMEOUT_S)
    return json.loads((directory / "trl.json").read_text())


def train_trl(case: Case, model: str, steps: int, threads: int, output: Path) -> None:
    """The child: one run of TRL's."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.trainer.grpo_trainer import GRPOTrainer

    from rlflow.data.tokenizer import load_tokenizer
    from rlflow.recipe import ModelBlock

    torch.set_num_threads(threads)
    reported: list[dict] = []

    class Steps(TrainerCallback):
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            if "reward" in logs:
                tokens, reward = logs["completions/mean_length"], logs["reward"]
                reported.append({"seconds": time.perf_counter() - self.began, "tokens": tokens, "reward": reward})

    tokenizer = load_tokenizer(ModelBlock(path=model))
    tokenizer.padding_side = "left"
    rows = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in sums(steps * case.prompts)]
    )
    trainer = GRPOTrainer(
        model,
        reward_funcs=digit_share,
        args=trl_config(case, steps, output.parent / "trl"),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    trainer.train()
    output.write_text(json.dumps(reported))


def trl_config(case: Case, steps: int, directory: Path) -> Any:
    """The options of rlflow's recipe, in TRL's words."""
    from trl.trainer.grpo_config import GRPOConfig

    return GRPOConfig(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=case.prompts * case.group,
        num_generations=case.group,
        max_completion_length=case.new_tokens,
        learning_rate=case.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        loss_type="grpo",
        beta=0.0,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        model_init_kwargs={"dtype": "float32"},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="equal")
    parser.add_argument("--model", help="directory of SmolLM2-135M-Instruct, for its case")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help="of each run (default 12)")
    parser.add_argument("--threads", type=int, default=2, help="of a generating or training process (default 2)")
    parser.add_argument("--staleness", type=int, default=0, help="rlflow's run.max_staleness (default 0)")
    parser.add_argument("--child", type=Path, help="be TRL's process, and write the steps there")
    given = parser.parse_args()
    case = CASES[given.case]
    if given.child:
        train_trl(case, given.model, given.steps, given.threads, given.child)
        return
    if (given.model is None) != (case.vocabulary is not None):
        parser.error("name a --model for the case smollm2, and for no other")
    print("| pair | | steps a minute | tokens a completion | reward, first to last steps |\n|---|---|---|---|---|")
    ratios = []
    with tempfile.TemporaryDirectory(prefix="against_trl_") as directory:
        model = given.model or make_model(Path(directory) / "model", case.vocabulary or 0)
        for pair in range(given.pairs):
            place = Path(directory) / str(pair)
            place.mkdir()
            runs = {
                "TRL": partial(run_trl, case, model, given.steps, given.threads, place),
                "rlflow": partial(run_rlflow, case, model, given.steps, given.threads, given.staleness, place),
            }
            speeds = {}
            for name in runs if pair % 2 == 0 else reversed(runs):
                steps = runs[name]()
                timed = steps[WARM_UP:]
                speeds[name] = 60 / median(step["seconds"] for step in timed)
                tokens = mean(step["tokens"] for step in timed)
                first, last = (mean(step["reward"] for step in part) for part in (steps[:3], steps[-3:]))
                print(
                    f"| {pair + 1} | {name} | {speeds[name]:.1f} | {tokens:.0f} | {first:.3f} to {last:.3f} |",
                    flush=True,
                )
            ratios.append(speeds["rlflow"] / speeds["TRL"])
    print(f"\nrlflow to TRL, steps a minute: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")


if __name__ == "__main__":
    main()
