"""A run's rollouts train as they are: the tokens that the policy had, those that it wrote."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlflow.cli.main import main
from rlflow.data.errors import DataError
from rlflow.data.examples import load_examples
from rlflow.data.preferences import load_labelled, load_pairs
from rlflow.inspection.exporting import export_chat
from rlflow.recipe import DataBlock, Recipe, SourceBlock
from rlflow.tracking.rollouts import read_rollouts, rollouts_path, write_rollouts
from rlflow.types import Episode, Group, Prompt, Rollout
from tests.flat_rollouts import flat
from tests.rlflow.data.conversations import FAMILIES, TOOL, Conversation, sequences_of, tokenizer_of

THOUGHT = "<think>\nhm\n</think>\n\n"


def played(family: str) -> Conversation:
    """Two questions, the second after a call and its result, thoughts in every turn."""
    conversation = Conversation(family)
    conversation.turn({"role": "assistant", "content": f"{THOUGHT}It is 1."}, {"role": "user", "content": "Sure?"})
    call = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 1}}}
    said = {"role": "assistant", "content": THOUGHT, "tool_calls": [call]}
    conversation.turn(said, {"role": "tool", "name": "add", "tool_call_id": "c1", "content": "3"})
    conversation.turn({"role": "assistant", "content": f"{THOUGHT}It is 3."}, {"role": "user", "content": "Fine."})
    return conversation


def rollout_of(conversation: Conversation, reward: float) -> Rollout:
    token_ids, is_sampled, logprobs, versions, starts = conversation.transcript.stream()
    episode = Episode(tuple(conversation.messages[1:-1]), starts=starts, num_turns=3, reward=reward)
    return Rollout(token_ids, is_sampled, logprobs, versions, "stop", "", {"environment": reward}, reward, "", episode)


def write(directory: Path, step: int, prompt: Prompt, *rollouts: Rollout) -> Path:
    path = rollouts_path(directory, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    size = len(rollouts)
    write_rollouts(path, [Group(prompt, 0, rollouts)], [np.zeros(size)], ["trained"] * size)
    return path.parent


def prompt_of(conversation: Conversation) -> Prompt:
    question = conversation.messages[:1]
    return Prompt("p:1", conversation.prompts[0], question, {"solution": "3"}, tools=(TOOL,))


def data_of(path: Path, **source) -> DataBlock:
    return DataBlock(train=SourceBlock(path=str(path), **source), max_tokens=4096)


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3", "llama3.1", "glm-4.5"])
def test_an_episode_that_was_logged_is_trained_as_its_own_tokens(family, tmp_path):
    conversation = played(family)
    rollouts = write(tmp_path / "run", 1, prompt_of(conversation), rollout_of(conversation, 1.0))
    examples = load_examples(data_of(rollouts), conversation.tokenizer, 0)
    sampled = [(tokens, mask) for tokens, mask in sequences_of(conversation.transcript) if any(mask)]
    assert len(examples) == len(sampled)
    for example, (tokens, mask) in zip(examples, sampled, strict=True):
        size = len(example.token_ids)
        assert example.token_ids.tolist() == tokens[:size] and not any(mask[size:])
        assert example.loss_mask.tolist() == mask[:size]


@pytest.mark.parametrize("name", [".", "rollouts", "rollouts/step_000002.parquet"])
def test_rollouts_are_named_by_their_run_their_directory_or_their_file_and_chosen_by_a_condition(name, tmp_path):
    conversation = played("qwen2.5")
    prompt = prompt_of(conversation)
    write(tmp_path, 1, prompt, rollout_of(conversation, 0.0), rollout_of(conversation, math.nan))
    write(tmp_path, 2, prompt, rollout_of(conversation, 1.0))
    data = data_of(tmp_path / name, where="reward > 0.5 and step == 2")
    (example,) = load_examples(data, conversation.tokenizer, 0)
    assert example.id.endswith(":1" if name.endswith("parquet") else ":3")
    whole = load_examples(data_of(tmp_path / name), conversation.tokenizer, 0)
    assert len(whole) == (1 if name.endswith("parquet") else 2)


def test_for_another_template_the_conversation_is_rendered_again(tmp_path):
    conversation = played("qwen2.5")
    rollouts = write(tmp_path, 1, prompt_of(conversation), rollout_of(conversation, 1.0))
    # Qwen2.5's writes a system message of its own.
    other = tokenizer_of(*FAMILIES["qwen3-2507"])
    (example,) = load_examples(data_of(rollouts), other, 0)
    assert "You are Qwen" not in other.decode(example.token_ids)
    assert other.decode(example.token_ids[example.loss_mask]).split("<|im_end|>")[::2] == [
        f"{THOUGHT}It is 1.",
        f"{THOUGHT}It is 3.",
    ]
    last = data_of(rollouts).model_copy(update={"loss_on": "last_assistant"})
    (example,) = load_examples(last, conversation.tokenizer, 0)
    assert conversation.tokenizer.decode(example.token_ids[example.loss_mask]) == f"{THOUGHT}It is 3.<|im_end|>"


def test_a_completion_that_was_cut_gets_no_stop_that_the_policy_did_not_write(tmp_path):
    tokenizer = tokenizer_of(*FAMILIES["qwen2.5"])
    question = [{"role": "user", "content": "1 + 2?"}]
    rendered = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    token_ids, cut = (np.array(tokenizer(text)["input_ids"], np.int32) for text in (rendered, "It is"))
    rollout = replace(flat(token_ids, cut, 1.0, finish_reason="length"), text="It is")
    rollouts = write(tmp_path, 1, Prompt("p:1", token_ids, question, {}), rollout)
    (example,) = load_examples(data_of(rollouts), tokenizer, 0)
    assert tokenizer.decode(example.token_ids[example.loss_mask]) == "It is"
    exported = tmp_path / "best.jsonl"
    export_chat(read_rollouts(rollouts / "step_000001.parquet"), exported)
    assert json.loads(exported.read_text())["messages"][-1] == {"role": "assistant", "content": "It is", "loss": False}


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("rewrd > 0", r"where: .*there is no 'rewrd' \(did you mean 'reward'\?\)"),
        ("reward > 5", r"none of its 2 rows fulfils `reward > 5`"),
        ("reward > 'a'", "where: .*compares the text 'a' with 0.5"),
        ("__import__('os')", "where: .*"),
    ],
)
def test_a_condition_that_chooses_no_row_is_refused_and_says_why(where, says, write_jsonl, tokenizer):
    rows = [{"text": "a", "reward": 0.5}, {"text": "b", "reward": 1.0}]
    source = SourceBlock(path=str(write_jsonl(rows)), where=where)
    with pytest.raises(DataError, match=says):
        load_examples(DataBlock(train=source), tokenizer, 0)


def test_rows_that_are_not_chosen_keep_the_numbers_of_the_others_and_may_be_no_examples(write_jsonl, tokenizer):
    rows = [{"prompt": "1+1?", "reward": None}, {"prompt": "1+2?", "response": "3", "reward": 1.0}]
    source = SourceBlock(path=str(write_jsonl(rows)), where="reward >= 1")
    (example,) = load_examples(DataBlock(train=source), tokenizer, 0)
    assert example.id.endswith(":2")


def test_the_best_and_the_worst_episode_of_a_group_are_a_pair_for_dpo(tmp_path, capsys):
    best, other = played("qwen2.5"), Conversation("qwen2.5")
    other.turn({"role": "assistant", "content": "It is 9."}, {"role": "user", "content": "Bye."})
    worst = replace(rollout_of(best, 0.25), episode=Episode(tuple(other.messages[1:-1])))
    cut = replace(worst, reward=0.0, finish_reason="length")
    write(tmp_path / "run", 1, prompt_of(best), worst, rollout_of(best, 1.0), rollout_of(best, 0.5), cut)
    pairs = tmp_path / "pairs.jsonl"
    assert main(["inspect", str(tmp_path / "run"), "--pairs", str(pairs)]) == 0
    assert capsys.readouterr().out.endswith("pairs.jsonl: 1 pairs\n")
    (pair,) = load_pairs(data_of(pairs), best.tokenizer, 0)
    chosen, rejected = (
        best.tokenizer.decode(side.token_ids[side.loss_mask]).split("<|im_end|>")[:-1]
        for side in (pair.chosen, pair.rejected)
    )
    assert rejected == ["It is 9."] and len(chosen) == 3 and chosen[2] == f"{THOUGHT}It is 3."


def test_episodes_are_answers_for_kto_desirable_by_a_condition_on_their_reward(tmp_path):
    conversation = played("qwen2.5")
    # A column of the data that another format would take for the answer is for rewards alone.
    prompt = replace(prompt_of(conversation), columns={"response": "3"})
    rewards = (0.2, 0.9, math.nan)
    rollouts = write(tmp_path, 1, prompt, *(rollout_of(conversation, reward) for reward in rewards))
    worse, better = load_labelled(data_of(rollouts, label="reward > 0.5"), conversation.tokenizer, 0)
    assert (worse.label, better.label) == (False, True)
    ((tokens, mask),) = sequences_of(conversation.transcript)
    for item in (worse, better):
        size = len(item.example.token_ids)
        assert item.example.token_ids.tolist() == tokens[:size] and not any(mask[size:])
        assert item.example.loss_mask.tolist() == mask[:size]
    # For another template all turns behind the prompt are judged as well.
    other = tokenizer_of(*FAMILIES["qwen3-2507"])
    again, _ = load_labelled(data_of(rollouts, label="reward > 0.5"), other, 0)
    assert other.decode(again.example.token_ids[again.example.loss_mask]).count("<|im_end|>") == 3


@pytest.mark.parametrize(
    ("family", "label", "says"),
    [
        ("qwen3", "reward > 0.5", "row 1: a rollout of 2 sequences, as its template rewrites turns"),
        ("qwen2.5", None, "row 1: it has no `label`: say which rows are desirable, e.g. label: reward > 0.5"),
        ("qwen2.5", "reward > 2", "all 2 rows have the label false"),
        ("qwen2.5", "column/level > 2", "there is no 'column/level'"),
    ],
)
def test_rollouts_that_kto_cannot_judge_are_refused_and_say_why(family, label, says, tmp_path):
    conversation = played(family)
    rewards = (0.2, 0.9)
    rollouts = write(tmp_path, 1, prompt_of(conversation), *(rollout_of(conversation, reward) for reward in rewards))
    with pytest.raises(DataError, match=says):
        load_labelled(data_of(rollouts, label=label), conversation.tokenizer, 0)


def test_rows_of_a_file_are_desirable_by_a_condition_and_a_missing_value_is_a_bad_row(write_jsonl, tokenizer):
    rows = [{"prompt": "1+1?", "response": "2", "score": score} for score in (1, 3, None)]
    source = SourceBlock(path=str(write_jsonl(rows)), label="score >= 2", max_bad_rows=1)
    labelled = load_labelled(DataBlock(train=source), tokenizer, 0)
    assert [item.label for item in labelled] == [False, True]
    assert [(bad.row, bad.reason) for bad in labelled.skipped] == [
        (3, "`label` is missing, or a value that the source's condition for it names")
    ]


@pytest.mark.parametrize(
    ("source", "algorithm", "says"),
    [
        ({"label": "reward > 0"}, {"name": "sft"}, "says which answers are desirable, and sft does not ask: remove it"),
        ({"label": "score > 0", "columns": {"label": "good"}}, {"name": "kto"}, "has a condition and a column"),
    ],
)
def test_a_condition_for_labels_where_none_are_asked_for_or_there_are_some_is_refused(source, algorithm, says):
    data = {"train": {"path": "rows.jsonl", **source}}
    recipe = {"run": {"steps": 1, "output_dir": "out"}, "model": {"path": "m"}, "algorithm": algorithm, "data": data}
    with pytest.raises(ValueError, match=says):
        Recipe.model_validate(recipe)
