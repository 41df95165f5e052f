"""Whole runs in an environment: what is trained is what the policy sampled, and nothing else, counted by rollouts."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import rlflow
from rlflow.cli.main import main
from rlflow.data.tokenizer import build_character_tokenizer
from rlflow.tracking.rollouts import read_rollouts
from tests.local_actors import use_local_actors

pytestmark = pytest.mark.slow

ENVIRONMENT = """
from rlflow.environments import Reply

class Echo:
    def reset(self, row):
        self.row, self.heard = row, []
    def step(self, message):
        self.heard.append(message["content"])
        return Reply(f"{self.row['word']}?", reward=0.25, done=len(self.heard) == 2)
    def finish(self):
        if self.row["word"] == "bad" and self.heard:
            raise ValueError("no score")
        return sum(text.count("a") for text in self.heard) + 0.1 * len("".join(self.heard))
    @property
    def state(self):
        return {"heard": self.heard}

def seen(completions, turns, num_turns, tool_calls, environment_reward, environment_state, word, **columns):
    for said, messages, number, calls, state in zip(completions, turns, num_turns, tool_calls, environment_state):
        assert said == messages[-1]["content"] and calls == []
        assert len(messages) == 2 * number - 1
    return [float(len(messages)) for messages in turns]
"""
RECIPE = """
run: {{output_dir: {out}, seed: 3, steps: 1}}
model: {{path: {model}, chat_template: "{template}"}}
environment: {{plugin: "{plugin}:Echo", max_turns: 3}}
algorithm: {{name: grpo, group_size: 8, kl: {{coef: 0.0}}}}
data: {{train: {{path: {rows}}}, prompts_per_step: 4, max_prompt_tokens: 8, shuffle: false}}
rewards: [{{name: environment}}, {{plugin: "{plugin}:seen", weight: 0.5}}]
rollout: {{engine: torch, max_new_tokens: 4, temperature: 1.0}}
trainer: {{learning_rate: 1.0e-2, optimizer: {{eps: 1.0e-3}}, max_grad_norm: 1.0, tokens_per_micro_batch: 48}}
tracking: [jsonl]
"""
PLAIN = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<eos>{% else %}|{% endif %}{% endfor %}"
REWRITING = PLAIN.replace("m.content }}", "m.content[-1:] if m.role == 'assistant' else m.content }}")
"""Keeps the last character of what the policy said before."""
SHAPE = {
    **{"vocab_size": 11, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "eos_token_id": 1, "pad_token_id": 0},
}
LEARNING_RATE, EPS = 1e-2, 1e-3


@pytest.fixture
def run(monkeypatch, tmp_path):
    use_local_actors(monkeypatch)

    def run(template: str, words: str = "c d e f", **overrides: Any) -> Path:
        rows, plugin, recipe = tmp_path / "rows.jsonl", tmp_path / "echo.py", tmp_path / "recipe.yaml"
        rows.write_text("".join(json.dumps({"prompt": w, "word": w}) + "\n" for w in words.split()))
        plugin.write_text(ENVIRONMENT)
        model = tmp_path / "model"
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(**SHAPE)).save_pretrained(model)
        build_character_tokenizer("abcdefg?|").save_pretrained(model)
        text = RECIPE.format(out=tmp_path / "run", model=model, rows=rows, plugin=plugin, template=template)
        recipe.write_text(text)
        rlflow.run(recipe, overrides=overrides)
        return tmp_path / "run"

    return run


def metrics_of(directory: Path) -> dict[str, float]:
    return json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("template", [PLAIN, REWRITING], ids=["plain", "rewriting"])
def test_the_gradient_of_episodes_is_that_of_a_plain_loop_over_the_sampled_tokens_alone(run, template):
    directory = run(template)
    rows = pq.read_table(directory / "rollouts" / "step_000001.parquet").to_pylist()
    assert {row["num_turns"] for row in rows} == {1, 2}
    policy = AutoModelForCausalLM.from_pretrained(directory.parent / "model")
    total, sampled_logprobs = torch.zeros(()), []
    for row in rows:
        group = [r["reward"] for r in rows if r["prompt_id"] == row["prompt_id"]]
        rewards = torch.tensor(group)
        advantage = (row["reward"] - rewards.mean()) / (rewards.std() + 1e-4)
        stream = row["prompt_token_ids"] + row["token_ids"]
        sampled = [False] * len(row["prompt_token_ids"]) + row["is_sampled"]
        engine = [0.0] * len(row["prompt_token_ids"]) + row["logprobs"]
        borders = [*row["sequence_starts"], len(stream)]
        # A rollout of two sequences is one: the mean is over all that the policy wrote in it.
        share = 1 / (len(rows) * sum(sampled))
        for start, end in pairwise(borders):
            table = torch.log_softmax(policy(torch.tensor([stream[start:end]])).logits[0], dim=1)
            for t in range(start + 1, end):
                if sampled[t]:
                    logprob = table[t - start - 1, stream[t]]
                    sampled_logprobs.append((logprob.item(), engine[t]))
                    total = total - share * advantage * logprob
    assert all(abs(ours - theirs) < 1e-4 for ours, theirs in sampled_logprobs)
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    metrics = metrics_of(directory)
    assert norm.item() == pytest.approx(metrics["trainer/grad_norm"], rel=1e-3)
    start = {name: p.detach().clone() for name, p in policy.named_parameters()}
    # The first step is a warm-up-free one of the recipe's rate.
    optimizer = torch.optim.AdamW(policy.parameters(), LEARNING_RATE, eps=EPS, weight_decay=0.0)
    optimizer.step()
    final = load_file(directory / "final" / "model.safetensors")
    moved = torch.stack([(p.detach() - start[name]).norm() for name, p in policy.named_parameters()]).norm()
    apart = torch.stack([(final[name] - p.detach()).norm() for name, p in policy.named_parameters() if name in final])
    assert moved > 1e-2
    assert apart.norm() < 1e-3 * moved


def test_a_rollout_file_holds_every_turn_and_the_environments_own_account(run):
    directory = run(PLAIN)
    records = read_rollouts(directory / "rollouts" / "step_000001.parquet")
    assert len(records) == 32
    for record in records:
        episode = record.episode
        assert episode is not None
        said = [message["content"] for message in episode.messages if message["role"] == "assistant"]
        heard = [message["content"] for message in episode.messages if message["role"] == "user"]
        assert len(said) == episode.num_turns
        assert heard == [f"{record.prompt}?"] * (episode.num_turns - 1)
        # A turn that was cut is the last, and the environment did not hear it.
        in_full = said if record.finish_reason == "stop" else said[:-1]
        assert episode.state == {"heard": in_full}
        given = sum(text.count("a") for text in in_full) + 0.1 * len("".join(in_full)) + 0.25 * len(in_full)
        assert episode.reward == pytest.approx(given)
        assert record.rewards == pytest.approx({"environment": given, "seen": len(episode.messages)})
        assert record.reward == pytest.approx(given + 0.5 * len(episode.messages))
    metrics = metrics_of(directory)
    turns = [record.episode.num_turns for record in records if record.episode is not None]
    assert metrics["environment/turns"] == pytest.approx(sum(turns) / 32)
    assert metrics["group/trained"] == 4
    assert metrics["environment/sequences"] == 1


def test_rollouts_whose_environment_failed_are_masked_counted_and_named(run, capsys):
    # A group of one word fails wherever the environment was spoken to.
    directory = run(PLAIN, "c d bad e", **{"data.max_prompt_tokens": 8})
    records = read_rollouts(directory / "rollouts" / "step_000001.parquet")
    failed = [record for record in records if record.episode is not None and record.episode.error]
    assert failed
    for record in failed:
        assert record.prompt == "bad"
        assert record.state == "masked"
        assert "finish raised ValueError: no score (echo.py:" in record.error
        assert record.finish_reason == "error"
    metrics = metrics_of(directory)
    assert metrics["environment/failed_fraction"] == pytest.approx(len(failed) / 32)
    assert metrics["reward/error_fraction"] == pytest.approx(len(failed) / 32)
    assert "finish raised ValueError: no score" in capsys.readouterr().err


def test_logged_episodes_are_replayed_to_the_same_rewards_and_exported_as_chat(run, tmp_path, capsys):
    directory = run(PLAIN)
    records = read_rollouts(directory / "rollouts" / "step_000001.parquet")
    export = tmp_path / "best.jsonl"
    assert main(["inspect", str(directory), "--step", "1", "--replay"]) == 0
    said = capsys.readouterr().out
    for name in ("environment", "seen"):
        (line,) = [line.split() for line in said.splitlines() if line.split()[:1] == [name]]
        assert line[1:3] == ["32", "0"], said  # all the same, none changed
    assert main(["inspect", str(directory), "--step", "1", "--where", "reward > 0", "--export", str(export)]) == 0
    rows = [json.loads(line) for line in export.read_text().splitlines()]
    turns = [record.messages + list(record.episode.messages) for record in records if record.episode is not None]
    assert rows
    # What was cut is marked as not to be trained; nothing else is added.
    said_in = [
        [{key: value for key, value in turn.items() if key != "loss"} for turn in row["messages"]] for row in rows
    ]
    assert all(messages in turns for messages in said_in)
    assert any(len(row["messages"]) == 4 for row in rows)
