"""Reward functions that were written for TRL, ms-swift and verl are called as there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlflow.recipe import RewardBlock
from rlflow.rewards import resolve
from rlflow.rewards.conventions import OF_EPISODES
from rlflow.rewards.episodes import episode_columns
from rlflow.types import Episode

FUNCTIONS = '''
def trl(completions, **kwargs):
    """As in TRL's documentation, for conversational data."""
    contents = [completion[0]["content"] for completion in completions]
    return [float(len(content)) for content in contents]

def trl_get(prompts, completions, **kwargs):
    return [float(len(c[-1].get("content"))) + len(p) for p, c in zip(prompts, completions)]

def text(completions, **kwargs):
    return [float(len(completion)) for completion in completions]

class Swift:
    def __call__(self, completions, **kwargs):
        return [float(completion.count("a")) for completion in completions]

def turns(completions, num_turns, tool_calls, environment_state, **columns):
    return [len(messages) + 10 * n for messages, n in zip(completions, num_turns)]

def trl_environments(environments, **kwargs):
    return [environment.value for environment in environments]

def trl_private(environments, **kwargs):
    return [environment._solved for environment in environments]

def retool(data_source, solution_str, ground_truth, extra_info):
    return extra_info["num_turns"] + extra_info["index"] / 10

def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0):
    if data_source == "dict":
        return {"score": 0.5, "acc": 1}
    return float(solution_str == ground_truth) + (extra_info or {}).get("index", 0) + bonus

def broken(completions, **kwargs):
    return [completion["content"] for completion in completions]
'''
PROMPTS = [[{"role": "user", "content": "q"}]] * 2


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


EPISODES = [
    Episode((said("ab"), {"role": "user", "content": "?"}, said("a"))),
    Episode((said("abc"),), num_turns=2),
]


@pytest.fixture
def call(tmp_path):
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)

    def call(name: str, completions: str = "auto", texts=("abc", "a"), args=None, **columns):
        block = RewardBlock(plugin=f"{path}:{name}", completions=completions, args=args or {})
        function = resolve(block)
        # The second call follows the convention that the first has found.
        return [function(PROMPTS, list(texts), [[1], [2]], **columns) for _ in range(2)][1]

    return call


def test_a_function_of_trls_for_conversational_data_gets_messages(call):
    assert call("trl") == [3.0, 1.0]
    assert call("trl_get") == [4.0, 2.0]
    assert call("trl", "messages") == [3.0, 1.0]


def test_functions_of_text_get_text(call):
    assert call("text") == [3.0, 1.0]
    assert call("Swift") == [1.0, 1.0]


def test_messages_of_an_episode_are_all_of_its_turns(call):
    columns = episode_columns(EPISODES)
    assert call("turns", "messages", **columns) == [3 + 10, 1 + 20]
    assert call("trl", **columns) == [2.0, 3.0]


def test_a_function_of_trls_reads_the_environments_state_as_attributes(call):
    columns = episode_columns([replace(episode, state={"value": i}) for i, episode in enumerate(EPISODES, 2)])
    assert call("trl_environments", **columns) == [2, 3]
    with pytest.raises(AttributeError, match=r"'_solved' is not kept of an environment; .* here value: rename it"):
        call("trl_private", **columns)


def test_a_compute_score_of_verls_has_the_number_of_turns_in_extra_info_as_there(call):
    # The prompt, what the policy said, and what it heard, several results at once being one turn.
    tool = {"role": "tool", "content": "1"}
    episodes = [Episode((said("a"), tool, tool, said("b"))), Episode((said("a"), tool))]
    columns = {**episode_columns(episodes), "ground_truth": ["x", "y"], "extra_info": [{"index": 7}, {"index": 1}]}
    assert call("retool", **columns) == [4.7, 3.1]


def test_a_compute_score_of_verls_is_asked_for_each_row(call):
    columns = {"data_source": ["gsm8k", "dict"], "ground_truth": ["abc", "b"], "extra_info": [{"index": 7}, None]}
    assert call("compute_score", **columns) == [8.0, 0.5]
    assert call("compute_score", reward_model=[{"ground_truth": "b"}, {"ground_truth": "a"}]) == [0.0, 1.0]
    assert call("compute_score", solution=["abc", "b"], args={"bonus": 2}) == [3.0, 2.0]


def test_what_a_function_raises_of_its_own_is_raised(call):
    with pytest.raises(TypeError, match="string indices must be integers"):
        call("broken", "text")
    with pytest.raises(TypeError, match="list indices must be integers"):
        call("broken")


def test_the_names_that_mark_an_episode_are_those_that_functions_get():
    assert set(OF_EPISODES) == episode_columns(EPISODES).keys()
