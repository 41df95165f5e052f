"""Pictures of prompts in rollout files, in what is made of them, and in pages."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rlflow.data.images import data_uri
from rlflow.data.logged import read_logged
from rlflow.data.video_archive import unpack
from rlflow.inspection.exporting import export_chat
from rlflow.inspection.replay import groups_of
from rlflow.inspection.show import show_rollout
from rlflow.tracking.embedding import step_page
from rlflow.tracking.page_data import episodes
from rlflow.tracking.rollouts import read_rollouts, rollouts_path, write_rollouts
from rlflow.tracking.shown_pictures import ShownPictures
from rlflow.types import Group, Prompt, Rollout
from tests.vision_models import picture, video

FIRST, SECOND = picture(300, 200, 1), picture(8, 8, 2)


def group(name: str, images: tuple[bytes, ...], rewards: tuple[float, ...]) -> Group:
    message = {"role": "user", "content": "<image>" * len(images) + "Which?"}
    prompt = Prompt(name, np.arange(4, dtype=np.int32), [{**message, "images": len(images)}], {}, images=images)
    rollouts = tuple(
        Rollout(
            token_ids=np.arange(6, dtype=np.int32),
            is_sampled=np.array([False] * 4 + [True] * 2),
            logprobs=np.zeros(6, dtype=np.float32),
            versions=np.array([-1] * 4 + [0] * 2, dtype=np.int32),
            finish_reason="stop",
            text="7",
            rewards={"right": reward},
            reward=reward,
        )
        for reward in rewards
    )
    return Group(prompt, 0, rollouts)


def written(stage: Path, groups: list[Group]) -> Path:
    (stage / "rollouts").mkdir(parents=True, exist_ok=True)
    path = rollouts_path(stage, 1)
    advantages = [np.zeros(len(one.rollouts), dtype=np.float32) for one in groups]
    write_rollouts(path, groups, advantages, ["trained"] * sum(len(one.rollouts) for one in groups))
    return path


def test_a_file_has_each_picture_once_however_many_rollouts_are_of_it(tmp_path: Path):
    (tmp_path / "many").mkdir()
    one = written(tmp_path, [group("a", (FIRST, SECOND), (1.0,))])
    size = one.stat().st_size
    many = written(tmp_path / "many", [group("a", (FIRST, SECOND), (1.0,) * 16), group("b", (), (0.0,))])
    assert many.stat().st_size < size + len(FIRST) // 2
    records = read_rollouts(many, images=True)
    assert [record.images for record in records] == [(FIRST, SECOND)] * 16 + [()]
    assert records[0].images[0] is records[15].images[0]
    assert [record.images for record in read_rollouts(many)] == [()] * 17


def test_what_reads_rollouts_again_has_their_pictures(tmp_path: Path):
    path = written(tmp_path, [group("a", (FIRST, SECOND), (1.0, 0.0))])
    records = read_rollouts(path, images=True)
    assert [prompt.images for prompt, _ in groups_of(records)] == [(FIRST, SECOND)]
    assert [row["images"] for _, row in read_logged([path], None)] == [[FIRST, SECOND]] * 2
    export_chat(records, tmp_path / "rows.jsonl")
    row = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    assert row["images"] == [data_uri(FIRST), data_uri(SECOND)]
    assert row["messages"][0]["content"] == "<image><image>Which?"
    stream = io.StringIO()
    show_rollout(Console(file=stream, width=100), records[0], is_whole=False, tokens=None)
    assert f"300 x 200 pixels, {len(FIRST):,} bytes of image/png" in stream.getvalue()


def test_a_video_is_shown_by_its_frames_and_written_so_that_it_is_read_again(tmp_path: Path):
    clip = video(8, 8, 3)
    frames = [data_uri(frame) for frame in unpack(clip).frames]
    path = written(tmp_path, [group("a", (clip, SECOND), (1.0,))])
    (record,) = read_rollouts(path, images=True)
    page: dict[str, Any] = step_page(tmp_path, 1, tokens=False)
    assert page["prompts"][0]["images"] == [*frames, data_uri(SECOND)]
    assert [message["images"] for message in page["prompts"][0]["messages"]] == [4]
    export_chat([record], tmp_path / "rows.jsonl")
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row["images"] == [data_uri(SECOND)] and row["videos"][0]["frames"] == frames
    ((_, logged),) = read_logged([path], None)
    assert (logged["images"], logged["videos"]) == ([SECOND], [clip])
    stream = io.StringIO()
    show_rollout(Console(file=stream, width=100), record, is_whole=False, tokens=None)
    assert "3 frames of 8 x 8 pixels" in stream.getvalue()


def test_pages_show_the_pictures_of_each_prompt_within_a_budget(tmp_path: Path):
    written(tmp_path, [group("a", (FIRST, SECOND), (1.0, 0.0)), group("b", (), (1.0,))])
    page: dict[str, Any] = step_page(tmp_path, 1, tokens=False)
    assert [prompt.get("images") for prompt in page["prompts"]] == [[data_uri(FIRST), data_uri(SECOND)], None]
    assert episodes(tmp_path, 1)["prompts"][0]["images"] == [data_uri(FIRST), data_uri(SECOND)]
    record = read_rollouts(rollouts_path(tmp_path, 1), images=True)[0]
    shown = ShownPictures(len(data_uri(FIRST)) + 10)
    assert (one := shown.of(record))["images"] == [data_uri(FIRST)] and one["images_left_out"] == 1
    assert (none := shown.of(record))["images"] == [] and none["images_left_out"] == 2
    large = ShownPictures().of(replace(record, images=(picture(800, 600),)))["images"][0]
    assert len(large) < 700_000 and large.startswith("data:image/png;base64,")
