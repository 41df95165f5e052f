from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from rlflow.data.tokenizer import build_character_tokenizer
from rlflow.tracking.history import HistoryError, read_stage
from rlflow.tracking.page_data import episodes, failures, metrics_since, plain, run_summary
from rlflow.tracking.panels import panels_of, tiles_of
from rlflow.tracking.rollouts import RolloutFileError, write_rollouts
from rlflow.types import Group, Prompt
from tests.flat_rollouts import flat

SECONDS = {"time/step_s": 4.0, "time/train_s": 3.0}
LINES = [
    {"step": 0, "time": 10.0, "eval/heldout/pass@1": 0.25},
    {"step": 1, "time": 11.0, "reward/mean": 0.5, "reward/error_fraction": 0.5, **SECONDS},
    {"step": 2, "time": 12.0, "reward/mean": None, "eval/heldout/pass@1": 0.75, **SECONDS},
]


def make_run(directory: Path) -> Path:
    """A run of one stage with rollouts of step 1: two prompts, two rollouts each."""
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    recipe = {"algorithm": {"name": "grpo"}, "model": {"path": "some/model"}, "run": {"steps": 2}}
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    groups = []
    for number in range(2):
        messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": f"1+{number}="}]
        prompt = Prompt(f"set:{number}", np.arange(2), messages, {"solution": str(1 + number)}, "<think>\n")
        rollouts = (
            flat([2, 3], [4, 5, 1], 1.0, text="ab", rewards={"exact": 1.0}, version=3),
            flat([2, 3], [5], math.nan, text="\ud83d", rewards={"exact": math.nan}, error="exact: it raised \ud83d"),
        )
        groups.append(Group(prompt, 0, rollouts))
    (directory / "rollouts").mkdir()
    path = directory / "rollouts" / "step_000001.parquet"
    write_rollouts(path, groups, [np.array([0.5, math.nan])] * 2, ["trained", "masked"] * 2)
    return directory


def test_a_summary_has_a_runs_numbers_charts_and_recipe(tmp_path: Path) -> None:
    (stage,) = run_summary(make_run(tmp_path / "run"))["stages"]
    assert (stage["name"], stage["algorithm"], stage["last_step"], stage["num_steps"]) == ("run", "grpo", 2, 2)
    assert stage["facts"] == ["grpo", "some/model", "2 steps", "8 s"]
    assert stage["evaluations"] == [["heldout/pass@1", 0, 0.25, 2, 0.75]]
    assert stage["tiles"] == [
        ["heldout/pass@1", "0.750", "+0.500 since step 0"],
        ["reward/mean", "null", "0.500 at step 1"],
    ]
    assert stage["panels"][:2] == [["Held-out", ["eval/heldout/pass@1"]], ["Reward", ["reward/mean"]]]
    assert stage["phases"] == [
        {"name": "train", "key": "time/train_s", "share": 0.75},
        {"name": "other", "key": None, "share": 0.25},
    ]
    assert stage["rollout_steps"] == [1]
    assert (stage["is_finished"], stage["began"], stage["last_seen"]) == (False, 10.0, 12.0)


def test_metrics_are_those_of_the_steps_after_the_one_that_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    everything = metrics_since(run)
    assert everything["steps"] == [0, 1, 2] and everything["times"] == [10.0, 11.0, 12.0]
    assert everything["metrics"]["reward/mean"] == [None, 0.5, None]
    assert everything["metrics"]["eval/heldout/pass@1"] == [0.25, None, 0.75]
    newest = metrics_since(run, 1)
    assert newest["steps"] == [2] and "reward/error_fraction" not in newest["metrics"]
    assert metrics_since(run, 2) == {"steps": [], "times": [], "metrics": {}}


def test_episodes_have_their_prompt_once_and_every_token_with_its_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    tokenizer = build_character_tokenizer("+=ab")
    tokenizer.save_pretrained(run / "final")
    page = episodes(run, 1, offset=1, limit=2)
    assert (page["step"], page["total"], page["offset"], page["has_texts"]) == (1, 4, 1, True)
    assert [prompt["id"] for prompt in page["prompts"]] == ["set:0", "set:1"]
    assert page["prompts"][1]["columns"] == {"solution": "2"} and page["prompts"][1]["opened"] == "<think>\n"
    failed, right = page["episodes"]
    assert (failed["row"], failed["prompt"], right["row"], right["prompt"]) == (1, 0, 2, 1)
    assert (failed["reward"], failed["advantage"], failed["completion"]) == (None, None, "?")
    assert failed["error"] == "exact: it raised ?"
    assert right["tokens"] == ["a", "b", "<eos>"] and right["logprobs"] == [-1.0, -2.0, -3.0]
    assert (right["versions"], right["num_tokens"], right["version"]) == ([[3, 3]], 3, 3)
    json.dumps(page, allow_nan=False).encode()


def test_without_a_tokenizer_a_tokens_text_is_its_id_and_without_tokens_there_are_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = episodes(run, 1, limit=1)
    assert page["episodes"][0]["tokens"] == ["[4]", "[5]", "[1]"] and not page["has_texts"]
    without = episodes(run, 1, most_tokens=0)
    assert "tokens" not in without["episodes"][0]
    assert [one["num_tokens"] for one in without["episodes"]] == [3, 1, 3, 1]


def test_characters_of_several_tokens_are_with_the_token_that_completes_them(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from rlflow.tracking.token_texts import token_texts

    alphabet = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ids = tokenizer.encode("a½ b").ids
    assert token_texts(tokenizer, ids) == ["a", "", "½", " ", "b"]


def test_a_step_without_rollouts_is_named_with_those_that_have_some(tmp_path: Path) -> None:
    with pytest.raises(RolloutFileError, match=r"no rollouts of step 2; it has those of steps 1\. Runs keep those"):
        episodes(make_run(tmp_path / "run"), 2)


def test_a_damaged_file_is_named_by_episodes_and_left_out_by_the_account_of_failures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert failures(read_stage(run)) == [["exact: it raised ?", 2]]
    path = run / "rollouts" / "step_000001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RolloutFileError, match=r"step_000001\.parquet cannot be read, it is damaged or cut short"):
        episodes(run, 1)
    assert failures(read_stage(run)) == []


def test_a_recipe_of_another_version_and_lines_of_others_do_not_hide_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "recipe.yaml").write_text("algo: grpo\nmodel: some/model\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "note": "by hand", "reward/mean": 1.0}\n{"step": "four"}\n[5]\n{"step": 6, "rew')
    (stage,) = run_summary(run)["stages"]
    assert (stage["algorithm"], stage["model"], stage["last_step"]) == (None, None, 3)
    assert metrics_since(run, 2)["metrics"] == {"reward/mean": [1.0]}


@pytest.mark.parametrize("text", ["a: [1", "- a list\n", "\xff".encode("latin1")])
def test_a_recipe_that_is_none_is_named(tmp_path: Path, text: str | bytes) -> None:
    run = make_run(tmp_path / "run")
    (run / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(HistoryError, match="a run's directory"):
        run_summary(run)


def test_plain_data_is_json_whatever_it_was() -> None:
    given = {1: (math.nan, -math.inf, 2, True, None), "\ud83d": np.array([1.5, np.nan]), "path": Path("a/b")}
    assert plain(given) == {"1": [None, None, 2, True, None], "?": [1.5, None], "path": "a/b"}


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_bytes_that_are_no_text_lose_no_token_and_no_letter(kind: str) -> None:
    """Policies write such things; the library's own decoder of streams gives up on some."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from rlflow.tracking.token_texts import token_texts

    if kind == "bytes":
        vocabulary = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        tokenizer.decoder = decoders.ByteLevel()
    else:
        vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁a": 256, "b": 257, "é": 258, "q": 259}
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    random = np.random.default_rng(0)
    for _ in range(200):
        ids = random.integers(0, len(vocabulary) + 1, 40).tolist()
        texts = token_texts(tokenizer, ids)
        assert len(texts) == 40
        joined = "".join(texts)
        for text, token in (("q", vocabulary["q"]), ("b", vocabulary["b"]), ("[", len(vocabulary))):
            assert joined.count(text) >= ids.count(token)


def test_a_score_that_stays_at_0_is_shown_and_a_share_of_what_went_wrong_is_not(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "time": 1.0, "eval/mine/pass@1": 0, "eval/mine/unscored_fraction": 0}\n'
        '{"step": 4, "time": 2.0, "eval/mine/pass@1": 0, "eval/mine/unscored_fraction": 0}\n'
    )
    stage = read_stage(tmp_path)
    assert stage.evaluations() == [("mine/pass@1", 0, 0, 4, 0)]
    panels = panels_of(stage)
    assert panels.main == [("Held-out", ["eval/mine/pass@1"])]
    assert panels.unchanging == [("0", ["eval/mine/unscored_fraction"])]
    assert tiles_of(stage)[0][:2] == ("mine/pass@1", "0")
