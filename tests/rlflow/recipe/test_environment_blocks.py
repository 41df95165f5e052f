"""What an environment block must not say, and what preflight finds in what it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlflow.cli.preflight import load_runnable
from rlflow.recipe import RecipeError, load_recipe

RECIPE = """\
run: {steps: 1, output_dir: out}
model: {characters: "0123456789+=ad", architecture: {model_type: llama}, chat_template: tools.jinja}
algorithm: {name: grpo}
data: {train: {generator: arithmetic}, max_prompt_tokens: 64}
rollout: {max_new_tokens: 16}
rewards: [{name: %s}]
environment: %s
"""
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Says what the tools are called."""
TOOLS = '''
def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b

def bare(a):
    return a

class Game:
    def __init__(self, level):
        self.level = level
    def reset(self, row): ...
    def step(self, message): ...

class Empty: ...

three = 3
'''


def recipe_of(directory: Path, environment: str, reward: str = "exact_match") -> Path:
    (directory / "tools.py").write_text(TOOLS)
    (directory / "tools.jinja").write_text(TEMPLATE)
    path = directory / "recipe.yaml"
    path.write_text(RECIPE % (reward, environment))
    return path


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ("{}", "environment.plugin: give name, plugin or tools"),
        ('{name: verifiers, tools: ["tools.py:add"]}', "give name, plugin or tools, not several"),
        ("{plugin: tools.py}", "environment.plugin: "),
        ("{tools: [add]}", "add is not of the form file.py:function or module:function"),
        ('{tools: ["tools.py:add"], args: {a: 1}}', "tools have no arguments of a recipe"),
        ('{plugin: "tools.py:Game", max_tokens: 10}', "10 is less than one turn may have (16)"),
        ('{plugin: "tools.py:Game", timeout_s: 1800.0}', "a worker is taken for lost after 1800 s without a step"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_to_do(tmp_path, environment, said):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_of(tmp_path, environment))
    assert said in str(caught.value)


def test_an_environments_reward_without_an_environment_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="is an environment's, and there is none: add one"):
        load_recipe(recipe_of(tmp_path, "null", reward="environment"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ('{plugin: "toolz.py:Game"}', "there is no file"),
        ('{plugin: "tools.py:Gam"}', "has no function Gam (did you mean Game?)"),
        ('{plugin: "tools.py:Game"}', "missing a required argument: 'level': give it in environment.args"),
        ('{plugin: "tools.py:Empty"}', "has no reset"),
        ('{plugin: "tools.py:three"}', "is a int, not a class of environments"),
        ('{tools: ["tools.py:bare"]}', "the tool bare cannot be described to the policy"),
        ('{tools: ["tools.py:add", "tools.py:add"]}', "two tools are called add"),
        ('{tools: ["no_such_module:add"]}', "No module named 'no_such_module'"),
        ("{name: verifier}", "no environment is called verifier (did you mean verifiers?"),
        ('{plugin: "tools.py:Game", args: {level: 1}, variables: [NO_SUCH_VARIABLE]}', "NO_SUCH_VARIABLE is not set"),
    ],
)
def test_what_cannot_be_used_is_found_before_a_run(tmp_path, monkeypatch, environment, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load_runnable(recipe_of(tmp_path, environment), alone=True)
    assert said in str(caught.value)


@pytest.mark.slow
def test_what_can_be_used_is_let_pass(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (recipe,) = load_runnable(recipe_of(tmp_path, '{tools: ["tools.py:add"]}', reward="environment"), alone=True)
    assert recipe.environment is not None
    assert recipe.environment.tools == [f"{tmp_path / 'tools.py'}:add"]
