"""The documentation's commands are run, page by page in their order, as a reader would who has small models and runs.

Only what needs a hub, serves until it is stopped or trains for minutes is left out: `reason_to_leave_out` says which.
"""

from __future__ import annotations

import io
import json
import shutil
import string
import sys
from pathlib import Path

import pytest
import yaml

from rlflow.cli.main import main
from tests.documentation import ROOT, DocumentedCommand, Page, pages
from tests.local_actors import use_local_actors

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<eos>{% else %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
LEFT_BY_OTHERS = {
    "train.sh": "swift sft --model m --dataset d.jsonl\n",
    "run_qwen3-8b.sh": "python -m verl.trainer.main_ppo algorithm.adv_estimator=grpo data.train_files=t.parquet "
    "actor_rollout_ref.model.path=m actor_rollout_ref.rollout.n=5\n",
    "grpo.yaml": "model_name_or_path: m\ndataset_name: o/d\nreward_funcs: [accuracy_reward]\n",
    "zero3.yaml": "num_processes: 8\n",
    "my_rewards.py": "def strict(completions, solution, **columns):\n"
    "    return [float(a == b) for a, b in zip(completions, solution)]\n"
    "def sums(completion_ids, **columns):\n"
    "    return [sum(ids) for ids in completion_ids]\n",
}
"""What a reader has who comes from elsewhere, and a reward of his own."""
GSM8K = {
    "algorithm": {"name": "grpo", "group_size": 2, "kl": {"coef": 0.0}},
    "model": {"path": "models/SmolLM2-135M-Instruct", "dtype": "float32", "adapter": {"kind": "lora", "rank": 2}},
    "data": {"train": {"path": "test.jsonl"}, "prompts_per_step": 2, "max_prompt_tokens": 64},
    "rewards": [{"name": "math_accuracy"}, {"plugin": "my_rewards.py:sums", "weight": 0.01}],
    "rollout": {"engine": "torch", "max_new_tokens": 8},
    "evaluation": {"data": {"path": "test.jsonl"}, "reward": {"name": "math_accuracy"}, "every": 1},
    "run": {"steps": 2, "output_dir": "runs/gsm8k", "save_every": 1},
    "tracking": ["jsonl"],
}


def make_model(directory: Path) -> None:
    """Some thousand random weights, and a tokenizer that has a token for whatever a page writes."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    from rlflow.data.tokenizer import build_character_tokenizer

    tokenizer = build_character_tokenizer(string.printable.strip() + " \n", TEMPLATE)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=4096,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the models, data and finished runs that pages speak of, by their names."""
    directory = tmp_path_factory.mktemp("reader")
    make_model(directory / "models/SmolLM2-135M-Instruct")
    rows = [{"prompt": f"What is {n} + 1?", "solution": str(n + 1)} for n in range(4)]
    for name in ("test.jsonl", "mine.jsonl", "held_out.jsonl"):
        (directory / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name, text in LEFT_BY_OTHERS.items():
        (directory / name).write_text(text)
    (directory / "changed.yaml").write_text(yaml.safe_dump(GSM8K))
    (directory / "recipes").symlink_to(ROOT / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        use_local_actors(patch)
        patch.chdir(directory)
        assert main(["run", "changed.yaml"]) == 0
        quick = ["stages.sft.run.steps=1", "stages.grpo.run.steps=1", "data.prompts_per_step=4", "tracking=[jsonl]"]
        varied = "stages.grpo.rewards=[{plugin: my_rewards.py:sums, weight: 0.01}]"
        assert main(["run", "recipes/quickstart.yaml", *quick, varied, "evaluation.data.rows=4"]) == 0
    shutil.copytree(directory / "runs/quickstart/grpo/final", directory / "models/other")
    for name in ("gsm8k.1", "gsm8k.2", "NAME"):
        shutil.copytree(directory / "runs/gsm8k", directory / "runs" / name)
    for name in ("gsm8k", "quickstart/grpo"):
        rollouts = directory / "runs" / name / "rollouts"
        for step in (100, 200):
            shutil.copy(rollouts / "step_000001.parquet", rollouts / f"step_{step:06d}.parquet")
    logs = [directory / f"runs/{run}/logs/{log}.log" for run in ("gsm8k", "quickstart/sft", "quickstart/grpo")
            for log in ("rollout-0", "trainer-0")]  # fmt: skip
    for path in logs:
        path.write_text("an actor's line\n")
    return directory


def reason_to_leave_out(command: DocumentedCommand, page: Page) -> str | None:
    """Why a command is not run here; None of one that is."""
    name, *words = command.words
    if command.program == "make" or name in ("serve", "ui", "submit"):
        return "goes on until it is stopped, or builds"
    if {"--push", "--follow"} & set(words):
        return "needs a hub, or goes on until it is stopped"
    if "runs/signs" in words:
        return "needs a run of a model that sees"
    if {"gptq", "awq"} & set(words):
        return "needs auto-round"
    if name in ("run", "plan") and words[0] not in {*page.files, "recipes/quickstart.yaml"}:
        return "needs a model of a hub"
    if name == "run" and words[0] not in page.files:
        return "trains for minutes"
    if name == "eval" and (
        "--backend" in words or any("gsm8k" in w or "humaneval" in w or "mmlu" in w for w in words[1:])
    ):
        return "needs a hub's set"
    return None


RUN = [(page, [c for c in page.commands if reason_to_leave_out(c, page) is None]) for page in pages()]
RUN = [(page, commands) for page, commands in RUN if commands]


def test_most_commands_are_run():
    assert sum(len(commands) for _, commands in RUN) >= 50
    assert {command.words[0] for _, commands in RUN for command in commands} >= {
        "run", "plan", "convert", "infer", "eval", "export", "report", "logs", "inspect", "doctor", "algorithms"
    }  # fmt: skip


@pytest.mark.parametrize(("page", "commands"), RUN, ids=[page.name for page, _ in RUN])
def test_the_commands_of_a_page_work_in_their_order(page, commands, reader, tmp_path, monkeypatch, capsys):
    place = tmp_path / "reader"
    shutil.copytree(reader, place, symlinks=True)
    for name, text in page.files.items():
        (place / name).write_text(text)
    monkeypatch.chdir(place)
    use_local_actors(monkeypatch)
    for command in commands:
        monkeypatch.setattr(sys, "stdin", io.StringIO("" if command.piped is None else f"{command.piped}\n"))
        code = main(command.words)
        said = capsys.readouterr()
        # The doctor is right about a machine that lacks something.
        assert code == 0 or command.words == ("doctor",), f"{command}: exit code {code}: {said.err}"
        assert said.out or said.err or command.piped, f"{command} said nothing"
