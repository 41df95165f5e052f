from __future__ import annotations

import datetime
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rlflow.tracking import rollouts
from rlflow.tracking.rollouts import (
    RolloutFileError,
    RolloutRecord,
    last_user_text,
    read_errors,
    read_rollouts,
    write_rollouts,
)
from rlflow.tracking.row_columns import keep_columns
from rlflow.types import Group, Message, Prompt, Rollout
from tests.flat_rollouts import flat


def make_prompt(index: int, messages: list[Message] | None = None) -> Prompt:
    default = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {index} + ½?"}]
    return Prompt(f"set:{index}", np.arange(index + 1, dtype=np.int32), messages or default, {})


def make_rollout(prompt: Prompt, length: int, rewards: dict[str, float], text: str = "four") -> Rollout:
    return flat(
        prompt.token_ids,
        np.arange(100, 100 + length),
        sum(rewards.values()),
        logprobs=np.linspace(-2, 0, length),
        version=7,
        text=text,
        rewards=rewards,
    )


def make_groups() -> tuple[list[Group], list[np.ndarray], list[str]]:
    """Two of two rollouts each."""
    one, two = make_prompt(0), make_prompt(1)
    first = (
        make_rollout(one, 3, {"exact": 1.0, "brevity": 0.5}),
        make_rollout(one, 1, {"exact": math.nan, "brevity": 0.5}),
    )
    second = (
        make_rollout(two, 2, {"exact": 0.0, "brevity": 0.25}, "\ud83d <b>"),
        make_rollout(two, 1, {"exact": 1.0, "brevity": 0.0}),
    )
    groups = [Group(one, 0, first), Group(two, 2, second)]
    return groups, [np.array([0.5, np.nan]), np.array([-1.0, 1.0])], ["trained", "masked", "trained", "filtered"]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "step_000001.parquet"
    groups, advantages, states = make_groups()
    write_rollouts(path, groups, advantages, states)
    records = read_rollouts(path)
    assert [(r.prompt_id, r.epoch, r.sample_index, r.state) for r in records] == [
        ("set:0", 0, 0, "trained"),
        ("set:0", 0, 1, "masked"),
        ("set:1", 2, 0, "trained"),
        ("set:1", 2, 1, "filtered"),
    ]
    sources = [(group, rollout) for group in groups for rollout in group.rollouts]
    for record, (group, rollout) in zip(records, sources, strict=True):
        assert record.messages == list(group.prompt.messages)
        assert record.prompt == group.prompt.messages[-1]["content"]
        np.testing.assert_array_equal(record.prompt_token_ids, group.prompt.token_ids)
        size = len(group.prompt.token_ids)
        np.testing.assert_array_equal(record.token_ids, rollout.completion_ids)
        np.testing.assert_array_equal(record.logprobs, rollout.logprobs[size:])
        assert record.is_sampled.all() and set(record.versions) == {7}
        np.testing.assert_equal(record.rewards, rollout.rewards)
        np.testing.assert_equal(record.reward, rollout.reward)
        assert (record.policy_version, record.finish_reason) == (7, "stop")
    np.testing.assert_array_equal([r.advantage for r in records], [0.5, np.nan, -1.0, 1.0])
    assert records[2].completion == "? <b>"


def test_a_rollout_alone_has_its_rewards(tmp_path: Path) -> None:
    prompt = make_prompt(0)
    group = Group(prompt, 0, (make_rollout(prompt, 3, {"exact": 1.0}),))
    write_rollouts(tmp_path / "one.parquet", [group], [np.zeros(1)], ["trained"])
    (record,) = read_rollouts(tmp_path / "one.parquet")
    assert record.rewards == {"exact": 1.0}


def test_only_texts_that_repeat_are_looked_up_in_a_dictionary(tmp_path: Path) -> None:
    path = tmp_path / "step_000001.parquet"
    write_rollouts(path, *make_groups())
    row_group = pq.ParquetFile(path).metadata.row_group(0)
    columns = [row_group.column(index) for index in range(row_group.num_columns)]
    looked_up = {column.path_in_schema for column in columns if column.has_dictionary_page}
    assert looked_up == {"prompt_id", "prompt", "messages", "opened", "columns", "error", "finish_reason", "state"}


def test_columns_have_fixed_types_and_an_unscored_reward_is_null(tmp_path: Path) -> None:
    path = tmp_path / "step_000001.parquet"
    write_rollouts(path, *make_groups())
    table = pq.read_table(path)
    assert " ".join(table.schema.names) == (
        "prompt_id epoch sample_index prompt messages opened columns inexact_columns completion reward reward/exact "
        "reward/brevity error advantage policy_version finish_reason state prompt_token_ids token_ids is_sampled "
        "logprobs versions"
    )
    assert str(table.schema.field("token_ids").type) == "list<element: int32>"
    assert str(table.schema.field("logprobs").type) == "list<element: float>"
    assert table["reward/exact"].to_pylist() == [1.0, None, 0.0, 1.0]
    assert table["error"].to_pylist() == [None] * 4
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"


def test_reading_without_tokens_leaves_them_empty(tmp_path: Path) -> None:
    path = tmp_path / "step_000001.parquet"
    write_rollouts(path, *make_groups())
    record = read_rollouts(path, tokens=False)[0]
    assert (record.completion, len(record.token_ids), len(record.logprobs)) == ("four", 0, 0)


def test_why_a_reward_failed_is_beside_the_rollout(tmp_path: Path) -> None:
    path = tmp_path / "step_000001.parquet"
    groups, advantages, states = make_groups()
    failed = replace(groups[1].rollouts[0], error="exact: it raised KeyError: 'x'")
    groups[1] = replace(groups[1], rollouts=(failed, groups[1].rollouts[1]))
    write_rollouts(path, groups, advantages, states)
    assert [record.error for record in read_rollouts(path)] == ["", "", "exact: it raised KeyError: 'x'", ""]
    assert read_errors(path) == ["exact: it raised KeyError: 'x'"]


def with_columns(columns: dict[str, Any], opened: str = "") -> Prompt:
    return replace(make_prompt(0), columns=columns, opened=opened)


def write_one(path: Path, prompt: Prompt) -> RolloutRecord:
    write_rollouts(path, [Group(prompt, 0, (make_rollout(prompt, 2, {"exact": 1.0}),))], [np.zeros(1)], ["trained"])
    (record,) = read_rollouts(path)
    return record


def test_what_rewards_saw_beside_the_completion_is_in_the_file(tmp_path: Path) -> None:
    columns = {"solution": "1/2 ½", "tests": [{"in": [1, 2.5], "out": None}], "difficulty": 3}
    record = write_one(tmp_path / "step_000012.parquet", with_columns(columns, "<think>\n"))
    assert (record.columns, record.inexact_columns, record.opened) == (columns, (), "<think>\n")
    assert (record.step, record.num_tokens) == (12, 2)


def test_columns_that_are_cut_or_that_json_does_not_hold_are_named(tmp_path: Path) -> None:
    given = {"when": datetime.date(2026, 1, 2), "share": math.nan, "keys": {1: 2}, "half": "\ud83d", "solution": "4"}
    record = write_one(tmp_path / "step_000001.parquet", with_columns(given))
    assert record.columns == {"when": "2026-01-02", "share": "nan", "keys": "{1: 2}", "half": "?", "solution": "4"}
    assert record.inexact_columns == ("when", "share", "keys", "half")


def test_long_columns_are_cut_and_the_short_ones_beside_them_stay_whole(tmp_path: Path) -> None:
    given = {"cases": ["x" * 99_000], "story": "y" * 60_000, "solution": "4"}
    kept = keep_columns(given)
    assert json.loads(kept.text) == {"cases": '["' + "x" * 998, "story": given["story"], "solution": "4"}
    assert kept.inexact == ("cases",)
    assert len(kept.text) < 65_536 + 1_100


def test_half_a_surrogate_pair_in_an_error_or_a_prompt_does_not_lose_the_file(tmp_path: Path) -> None:
    prompt = replace(make_prompt(0, [{"role": "user", "content": "a\ud83d"}]), opened="\ud83d")
    rollout = replace(make_rollout(prompt, 1, {"exact": 1.0}), error="exact: it raised \ud83d")
    write_rollouts(tmp_path / "one.parquet", [Group(prompt, 0, (rollout,))], [np.zeros(1)], ["trained"])
    (record,) = read_rollouts(tmp_path / "one.parquet")
    assert (record.error, record.prompt, record.opened, record.step) == ("exact: it raised ?", "a?", "?", 0)


def test_files_of_earlier_versions_are_read_and_those_of_others_are_named(tmp_path: Path) -> None:
    path = tmp_path / "step_000001.parquet"
    write_rollouts(path, *make_groups())
    table = pq.read_table(path)
    pq.write_table(table.drop(["opened", "columns", "inexact_columns", "is_sampled", "versions", "error"]), path)
    record = read_rollouts(path)[0]
    assert (record.columns, record.opened, record.error, record.num_tokens) == ({}, "", "", 3)
    assert record.is_sampled.tolist() == [True] * 3 and record.versions.tolist() == [7] * 3
    pq.write_table(table.drop(["advantage"]), path)
    with pytest.raises(RolloutFileError, match=r"step_000001\.parquet has no column 'advantage'"):
        read_rollouts(path)


@pytest.mark.parametrize("cut", [0, 10, -30])
def test_a_file_that_is_cut_short_is_named(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "step_000001.parquet"
    write_rollouts(path, *make_groups())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(RolloutFileError, match=r"step_000001\.parquet cannot be read, it is damaged or cut short"):
        read_rollouts(path)


def test_some_rows_of_a_file_can_be_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "step_000001.parquet"
    write_rollouts(path, *make_groups())
    middle = read_rollouts(path, rows=slice(1, 3))
    assert [(record.prompt_id, record.num_tokens, len(record.token_ids)) for record in middle] == [
        ("set:0", 1, 1),
        ("set:1", 2, 2),
    ]
    assert read_rollouts(path, rows=slice(4, 9)) == []


def test_a_step_without_groups_is_an_empty_file(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "empty.parquet", [], [], [])
    assert read_rollouts(tmp_path / "empty.parquet") == []


def test_lengths_that_disagree_are_an_error(tmp_path: Path) -> None:
    groups, advantages, states = make_groups()
    with pytest.raises(ValueError, match=r"step\.parquet: 4 rollouts, 4 advantages, 3 states"):
        write_rollouts(tmp_path / "step.parquet", groups, advantages, states[:3])


def test_a_write_that_fails_leaves_the_older_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "step_000001.parquet"
    write_rollouts(path, *make_groups())

    def fail(table: object, target: Path, **options: object) -> None:
        target.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rollouts.pq, "write_table", fail)
    with pytest.raises(OSError, match="No space left"):
        write_rollouts(path, *make_groups())
    assert os.listdir(tmp_path) == [path.name]
    assert len(read_rollouts(path)) == 4


def test_the_prompt_column_is_the_last_user_message_and_names_parts_that_are_not_text() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "<think>"}]
    assert last_user_text(make_prompt(0, messages)) == "[image]What is this?"
    assert last_user_text(make_prompt(0, [{"role": "system", "content": "x"}])) == ""
