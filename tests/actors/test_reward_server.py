"""The reward server with real child processes: every way in which a reward function can misbehave."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlflow.actors.reward_server import RewardServer
from rlflow.data.video_archive import Video, pack
from rlflow.recipe import RewardBlock
from rlflow.rewards import RewardError
from tests.actors.reward_servers import batch


def test_scores_come_back_in_row_order_from_several_children(serve: Any) -> None:
    server = serve("length", "numpy_scores", "later", children=2)
    scores = server.score(*batch([["a", "bb"], ["ccc", "dddd"], ["eeeee", "ffffff"]]))
    for label in ("length", "numpy_scores", "later"):
        assert scores.rewards[label].tolist() == [1, 2, 3, 4, 5, 6]
        assert scores.rewards[label].dtype == np.float32
        assert not scores.failed[label].any()
    assert scores.errors == ()


def test_a_function_receives_messages_token_ids_and_columns_of_its_rows(serve: Any) -> None:
    scores = serve("arguments").score(*batch([["a", "b"], ["c", "d"]], level=[1, 2]))
    assert scores.rewards["arguments"].tolist() == [110.0, 113.0, 216.0, 219.0]


def test_a_function_sees_the_pictures_and_videos_of_its_rows_decoded(serve: Any, tmp_path: Path) -> None:
    code = tmp_path / "colors.py"
    code.write_text(
        "def is_red(completions, images):\n"
        "    return [float(row[0].mode == 'RGB' and row[0].getpixel((0, 0)) == (255, 0, 0)) for row in images]\n"
        "def counted(completions, **columns):\n"
        "    return [float('images' in columns)] * len(completions)\n"
    )
    blocks = [RewardBlock(plugin=f"{code}:{name}", prompts_per_call=2) for name in ("is_red", "counted")]
    (groups,) = batch([["a", "b"], ["c", "d"]])
    colors = [encoded_picture(color) for color in ("red", "blue")]
    seen = [replace(g, prompt=replace(g.prompt, images=(c,))) for g, c in zip(groups, colors, strict=True)]
    scores = serve(*blocks).score(seen)
    assert scores.rewards["is_red"].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert scores.rewards["counted"].tolist() == [1.0] * 4
    assert serve(blocks[1]).score(groups).rewards["counted"].tolist() == [0.0] * 4
    clip = pack(Video((colors[0], colors[1], colors[0]), (0, 1, 2), 2.0, 3))
    code.write_text(
        "def is_red(completions, images, videos):\n"
        "    return [10.0 * len(row) + sum(frame.getpixel((0, 0)) == (255, 0, 0) for clip in clips for frame in clip)"
        " for row, clips in zip(images, videos)]\n"
    )
    both = ((colors[1], clip), (colors[0],))
    seen = [replace(g, prompt=replace(g.prompt, images=own)) for g, own in zip(groups, both, strict=True)]
    assert serve(blocks[0]).score(seen).rewards["is_red"].tolist() == [12.0, 12.0, 10.0, 10.0]
    assert serve(blocks[0]).score(groups).rewards["is_red"].tolist() == [0.0] * 4


def encoded_picture(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "PNG")
    return buffer.getvalue()


def test_what_is_judged_begins_with_the_tag_that_the_prompt_opened(serve: Any) -> None:
    ((first, second),) = batch([["a</think> <answer>1</answer>"], ["<think>b</think> <answer>1</answer>"]])
    first = replace(first, prompt=replace(first.prompt, opened="<think>\n"))
    assert serve(RewardBlock(name="format")).score([first, second]).rewards["format"].tolist() == [1.0, 1.0]


def test_a_call_holds_as_many_prompts_as_the_recipe_says(serve: Any, plugin: Path) -> None:
    block = RewardBlock(plugin=f"{plugin}:rows_of_call", prompts_per_call=2)
    groups, notes = [["a", "b"], ["c", "d"], ["e", "f"]], ["x", "y", "z"]
    scores = serve(block, children=2).score(*batch(groups, note=notes))
    assert scores.rewards["rows_of_call"].tolist() == pytest.approx([4.2, 4.2, 4.2, 4.2, 2.1, 2.1])
    block = RewardBlock(plugin=f"{plugin}:length", prompts_per_call=2)
    scores = serve(block).score(*batch([["a", "bb"], ["raise", "dddd"], ["eeeee", "ffffff"]]))
    assert scores.failed["length"].tolist() == [False, False, True, False, False, False]
    assert scores.rewards["length"][[0, 1, 3, 4, 5]].tolist() == [1, 2, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("raise", "raised RuntimeError: boom (misbehaviour.py:5)"),
        ("nan", "returned nan"),
        ("inf", "returned inf"),
        ("str", "returned a str"),
        ("huge", "returned a int that is no float"),
        ("too large for float32", "returned 1e+300"),
        ("hang busily", "gave no answer within 0.5 s"),
        ("exit", "ended its process (exit code 3)"),
        ("sys.exit", "raised SystemExit: bye"),
        ("last words", "last words: the disk is on fire"),
        ("segfault", "SIGSEGV"),
        ("allocate", "raised MemoryError"),
        ("fork and hang", "gave no answer within 0.5 s"),
        ("close everything", "ended its process"),
        ("garbage", "ended its process"),
    ],
)
def test_one_bad_row_is_masked_and_named_and_its_group_keeps_its_scores(serve: Any, text: str, cause: str) -> None:
    server = serve("length", timeout_s=0.5 if "hang" in text else 60)
    scores = server.score(*batch([["a", text, "ccc"], ["a", "bb", "ccc"]]))
    np.testing.assert_array_equal(scores.rewards["length"], np.array([1, math.nan, 3, 1, 2, 3], np.float32))
    assert scores.failed["length"].tolist() == [False, True, False, False, False, False]
    assert len(scores.errors) == 1
    assert str(scores.errors[0]).startswith("reward 'length', prompt 'set:0', row 1: it ")
    assert cause in str(scores.errors[0])
    assert server.score(*batch([["a"]])).rewards["length"].tolist() == [1.0]


@pytest.mark.parametrize("text", ["bool", "print", "fork and return"])
def test_odd_but_harmless_rows_are_scored(serve: Any, text: str) -> None:
    server = serve("length", timeout_s=60)
    scores = server.score(*batch([["a", text]]))
    assert scores.rewards["length"].tolist() == [1.0, 1.0 if text == "bool" else len(text)]
    assert server.score(*batch([["a", "bb"]])).rewards["length"].tolist() == [1.0, 2.0]
    assert scores.errors == ()


def test_an_abstention_is_no_failure(serve: Any) -> None:
    scores = serve("length").score(*batch([["none", "a"]]))
    assert np.isnan(scores.rewards["length"]).tolist() == [True, False]
    assert not scores.failed["length"].any()


@pytest.mark.parametrize(
    ("returned", "cause"),
    [
        ("[1.0]", "returned 1 score for 4 completions"),
        ("[1.0] * 5", "returned 5 scores for 4 completions"),
        ("[]", "returned 0 scores for 4 completions"),
        ("1.0", "returned a float, not a list"),
        ("None", "returned None, not a list"),
        ("'1111'", "returned a str, not a list"),
        ("{1.0, 2.0, 3.0, 4.0}", "returned a set, not a list"),
        ("{0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}", "returned a dict, not a list"),
        ("(1.0 for _ in completions)", "returned a generator, not a list"),
        ("completions.clear() or []", "changed the list of completions it was given (work on a copy)"),
        ("completions.reverse() or [1.0, 2.0, 3.0, 4.0]", "changed the list of completions it was given"),
        ("completions.append('e') or [1.0] * 4", "changed the list of completions it was given"),
        ("Short([1.0])", "returned a Short that has no 4 entries"),
    ],
)
def test_what_is_no_list_of_one_score_a_row_fails_every_row_in_one_sentence(
    serve: Any, plugin: Path, returned: str, cause: str
) -> None:
    """A group's rows must not be tried one by one: alone, each would get the score that was meant for another."""
    plugin.write_text(
        "class Short(list):\n    def __len__(self):\n        return 4\n"
        f"def broken(completions, **columns):\n    return {returned}\n"
    )
    scores = serve("broken").score(*batch([["a", "b", "c", "d"]]))
    assert scores.failed["broken"].all() and np.isnan(scores.rewards["broken"]).all()
    assert len(scores.errors) == 1
    assert str(scores.errors[0]).startswith(f"reward 'broken', prompt 'set:0', row 0 and 3 more: it {cause}")
    assert "return a list" in str(scores.errors[0])
    assert scores.causes[3].startswith(f"broken: it {cause}")


def test_a_column_that_a_function_lacks_is_one_sentence(serve: Any) -> None:
    scores = serve(RewardBlock(name="exact_match")).score(*batch([["a", "b"], ["c", "d"]], answer=["a", "b"]))
    (sentence,) = map(str, scores.errors)
    assert "prompt 'set:0', row 0 and 3 more: it cannot be called" in sentence
    assert "needs the column 'solution'; the data has answer" in sentence


def test_a_failing_function_leaves_the_others_alone(serve: Any) -> None:
    scores = serve("length", "not_a_list").score(*batch([["a", "bb"]]))
    assert scores.rewards["length"].tolist() == [1.0, 2.0]
    assert not scores.failed["length"].any()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (RewardBlock(name="math_acuracy"), "did you mean 'math_accuracy'"),
        (RewardBlock(plugin="nowhere.py:f"), "no such file"),
        (RewardBlock(name="format", args={"patern": "x"}), "did you mean 'pattern'"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_an_error_before_training(block: RewardBlock, message: str) -> None:
    server = RewardServer([block], 1)
    try:
        with pytest.raises(RewardError, match=message):
            server.ready()
    finally:
        server.close()


def test_two_rewards_of_one_function_are_told_apart_by_their_labels(serve: Any) -> None:
    with pytest.raises(RewardError, match="two rewards are called format"):
        RewardServer([RewardBlock(name="format"), RewardBlock(name="format", args={"pattern": "x"})], 1)
    server = serve(
        RewardBlock(name="format", label="letter", args={"pattern": "[a-z]"}),
        RewardBlock(name="format", label="digit", args={"pattern": "[0-9]"}),
    )
    scores = server.score(*batch([["a", "1"]]))
    assert {label: values.tolist() for label, values in scores.rewards.items()} == {
        "letter": [1.0, 0.0],
        "digit": [0.0, 1.0],
    }


def test_the_self_check_passes_on_this_machine(serve: Any) -> None:
    serve(RewardBlock(name="math_accuracy"), "not_a_list").self_check()


def test_the_self_check_stops_a_run_whose_verifier_is_broken(serve: Any) -> None:
    server = serve(RewardBlock(name="math_accuracy", args={"timeout_s": "two"}))
    with pytest.raises(RewardError, match=r"math_accuracy gave a right and a wrong answer.*TypeError"):
        server.self_check()
