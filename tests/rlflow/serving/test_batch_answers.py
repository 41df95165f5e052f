"""Answers to a data set: their order, their seeds, their rewards, and going on with a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlflow.actors.reward_server import RewardServer
from rlflow.actors.rollout_engines.engine import Written
from rlflow.data.errors import DataError
from rlflow.data.examples import load_examples
from rlflow.data.prompts import load_prompts
from rlflow.recipe import DataBlock, RewardBlock, SourceBlock
from rlflow.serving import batch
from rlflow.serving.batch import Job, answer_prompts, read_answers
from rlflow.serving.models import ServedModel
from rlflow.serving.sampling import Sampling
from rlflow.serving.streams import Ask, Piece, Streams
from rlflow.types import Prompt
from tests.rlflow.serving.conftest import Oracle

QUESTIONS = [f"{i}+{i * i}=" for i in range(30)]


@pytest.fixture
def prompts(served: ServedModel, tmp_path: Path) -> list[Prompt]:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": question, "solution": str(i)} for i, question in enumerate(QUESTIONS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceBlock(path=str(path))
    return load_prompts(source, DataBlock(train=source), served.tokenizer, 0)


def job_of(served: ServedModel, sampling: Sampling, samples: int = 1, *rewards: RewardBlock) -> Job:
    return Job(served, "tiny", sampling, samples, rewards, 8)


def answers(prompts: list[Prompt], job: Job, streams: Streams, server: RewardServer | None = None) -> list[Any]:
    found = answer_prompts(prompts, job, streams, server, lambda done, total: None)
    return [row for rows, errors in found for row in rows if not errors]


@pytest.mark.slow
def test_answers_come_in_the_order_of_the_data_and_are_those_of_transformers(
    served: ServedModel, streams: Streams, oracle: Oracle, prompts: list[Prompt]
) -> None:
    rows = answers(prompts, job_of(served, Sampling(0.0, max_new_tokens=8)), streams)
    expected = [oracle.answer([{"role": "user", "content": question}], 8) for question in QUESTIONS]
    assert [row["response"] for row in rows] == expected
    assert [row["id"] for row in rows] == [prompt.id for prompt in prompts]
    assert rows[3]["messages"] == [
        {"role": "user", "content": "3+9="},
        {"role": "assistant", "content": expected[3]},
    ]
    assert rows[3]["columns"] == {"solution": "3"} and rows[3]["num_tokens"] == 8


class AnswersAtOnce(Streams):
    """Has written every answer before anybody waits for it."""

    def __init__(self) -> None:
        super().__init__({})

    def submit(self, asks: Sequence[Ask]) -> list[int]:
        for ask in asks:
            ask.tell(Piece(Written((5,), (-1.0,)), "length"))
        return list(range(len(asks)))


def test_more_answers_than_are_scored_at_once_may_be_done_together(
    served: ServedModel, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "SCORED_AT_ONCE", 8)
    monkeypatch.setattr(batch, "SILENCE_S", 0.01)
    streams = AnswersAtOnce()
    rows = answers(prompts, job_of(served, Sampling(0.0, max_new_tokens=1)), streams)
    streams.close()
    assert [row["id"] for row in rows] == [prompt.id for prompt in prompts]


def test_seeds_come_from_names_so_that_rows_do_not_depend_on_each_other(
    served: ServedModel, streams: Streams, prompts: list[Prompt]
) -> None:
    job = job_of(served, Sampling(1.0, max_new_tokens=8, seed=4), 3)
    rows = answers(prompts, job, streams)
    assert answers(prompts[5:7], job, streams) == rows[15:21]
    assert [row["sample"] for row in rows] == [0, 1, 2] * 30
    assert len({row["seed"] for row in rows}) == 90
    other = answers(prompts[5:7], replace(job, sampling=replace(job.sampling, seed=5)), streams)
    assert [row["response"] for row in other] != [row["response"] for row in rows[15:21]]


def test_rewards_stand_beside_the_answers_with_their_weights(
    served: ServedModel, streams: Streams, prompts: list[Prompt], tmp_path: Path
) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "def length(prompts, completions, completion_ids, solution, **columns):\n"
        "    return [None if int(s) % 3 == 0 else len(c) + 100 * int(s) for c, s in zip(completions, solution)]\n"
        "def ids(prompts, completions, completion_ids, **columns):\n"
        "    return [float(len(i)) for i in completion_ids]\n"
    )
    blocks = [
        RewardBlock.model_validate({"plugin": f"{plugin}:length", "weight": 2.0}),
        RewardBlock.model_validate({"plugin": f"{plugin}:ids", "weight": 10.0}),
    ]
    server = RewardServer(blocks, 1)
    try:
        server.ready()
        rows = answers(prompts[:6], job_of(served, Sampling(0.0, max_new_tokens=8), 1, *blocks), streams, server)
    finally:
        server.close()
    for index, row in enumerate(rows):
        length = None if index % 3 == 0 else len(row["response"]) + 100.0 * index
        assert row["rewards"] == {"length": length, "ids": float(row["num_tokens"])}
        assert row["reward"] == 10.0 * row["num_tokens"] + 2.0 * (length or 0.0)


def test_a_stop_string_ends_answers(
    served: ServedModel, streams: Streams, oracle: Oracle, prompts: list[Prompt]
) -> None:
    whole = oracle.answer([{"role": "user", "content": QUESTIONS[2]}], 16)
    job = job_of(served, Sampling(0.0, max_new_tokens=16, stop=(whole[5:7],)))
    (row,) = answers(prompts[2:3], job, streams)
    assert row["response"] == whole[: whole.index(whole[5:7])] and row["finish_reason"] == "stop"


@pytest.fixture
def written(served: ServedModel, streams: Streams, prompts: list[Prompt], tmp_path: Path) -> tuple[Path, Job]:
    job, path = job_of(served, Sampling(0.0, max_new_tokens=4), 2), tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in answers(prompts[:10], job, streams)))
    return path, job


def test_a_file_is_gone_on_with_behind_its_last_whole_prompt(
    written: tuple[Path, Job], streams: Streams, prompts: list[Prompt]
) -> None:
    path, job = written
    whole = path.read_bytes()
    assert read_answers(path, prompts, job) == 10
    path.write_bytes(whole[:-20])
    assert read_answers(path, prompts, job) == 9
    lines = whole.splitlines(keepends=True)
    assert path.read_bytes() == b"".join(lines[:18])
    path.write_bytes(b"".join(lines[:3]))
    assert read_answers(path, prompts, job) == 1
    assert path.read_bytes() == b"".join(lines[:2])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda rows, job: ([{**rows[0], "id": "other:1"}], job), "line 1: is the answer to other:1, sample 0"),
        (lambda rows, job: ([rows[1]], job), "line 1: .*sample 1, which is not this data's"),
        (lambda rows, job: ([*rows, {"a": 1}], job), "line 21: is no answer"),
        (lambda rows, job: (rows, replace(job, sampling=replace(job.sampling, seed=9))), "line 1: .*another --seed"),
        (lambda rows, job: (rows, replace(job, samples=1)), "line 2: .*sample 1, which is not this data's"),
    ],
)
def test_a_file_of_something_else_is_refused(
    written: tuple[Path, Job], prompts: list[Prompt], spoil: Callable[..., Any], said: str
) -> None:
    path, job = written
    rows, job = spoil([json.loads(line) for line in path.read_text().splitlines()], job)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = path.read_bytes()
    with pytest.raises(DataError, match=said):
        read_answers(path, prompts, job)
    assert path.read_bytes() == before


@pytest.mark.slow
def test_the_answers_that_a_reward_likes_are_data_to_learn_from(
    served: ServedModel, streams: Streams, prompts: list[Prompt], tmp_path: Path
) -> None:
    (tmp_path / "rewards.py").write_text(
        "def short(completions):\n    return [float(len(c) % 2) for c in completions]\n"
    )
    job = job_of(served, Sampling(1.0, max_new_tokens=6, seed=3), 3, RewardBlock(plugin=f"{tmp_path}/rewards.py:short"))
    server = RewardServer(job.rewards, 1)
    try:
        rows = answers(prompts, job, streams, server)
    finally:
        server.close()
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = [row for row in rows if row["reward"] == 1.0 and row["num_tokens"] > 1]
    assert 0 < len(kept) < len(rows)
    source = SourceBlock(path=str(path), where="reward/short >= 1 and num_tokens > 1 and column/solution != ''")
    examples = load_examples(DataBlock(train=source), served.tokenizer, 0)
    assert len(examples) == len(kept)
    for example, row in zip(examples, kept, strict=True):
        trained = served.tokenizer.decode(example.token_ids[example.loss_mask])
        assert trained.removesuffix(served.tokenizer.eos_token) == row["response"]
