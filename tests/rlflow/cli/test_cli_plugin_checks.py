"""A recipe's functions are imported in processes of their own: whatever that does, it is one message with its line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlflow.cli import plugin_checks
from rlflow.cli.main import main
from rlflow.cli.plugin_checks import in_functions, in_generators, in_rewards
from rlflow.cli.preflight import check_in_use
from rlflow.data.sources import read_table
from rlflow.recipe import Recipe, SourceBlock, load_recipe
from rlflow.recipe.loading import load_located

RECIPE = """\
algorithm: {name: grpo}
model: {path: org/model}
data: {train: {path: org/data}}
rewards: [{name: exact_match}]
run: {steps: 1}
"""


@pytest.fixture
def recipe_with(tmp_path: Path):
    def recipe_with(*overrides: str) -> Recipe:
        (tmp_path / "recipe.yaml").write_text(RECIPE)
        (recipe,) = load_recipe(tmp_path / "recipe.yaml", overrides)
        return recipe

    return recipe_with


def problem_of(tmp_path: Path, recipe_with, source: str, args: str = "{}", row: dict | None = None) -> str | None:
    """What is said of a reward plugin ``f`` with this source."""
    (tmp_path / "mine.py").write_text(source)
    recipe = recipe_with(f"rewards=[{{plugin: '{tmp_path}/mine.py:f', args: {args}}}]")
    found = list(in_rewards(recipe, row))
    assert len(found) <= 1
    for key, message in found:
        assert key == "rewards.0.plugin"
        return message
    return None


GOOD = "def f(completions, answer, scale=1.0):\n    return [0.0] * len(completions)\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "args", "says"),
    [
        ("\nraise RuntimeError('no GPU')\n", "{}", "mine.py:2: importing it raised RuntimeError: no GPU"),
        ("import sys\nsys.exit(3)\n", "{}", "mine.py:2: importing it raised SystemExit: 3"),
        ("import no_such_module\n", "{}", "mine.py:1: importing it raised ModuleNotFoundError"),
        ("import os\nos._exit(7)\n", "{}", "importing it ended the process (exit code 7)"),
        (
            "import os, time\nos.closerange(3, 64)\ntime.sleep(600)\n",
            "{}",
            "importing it closed files that are not its own, and went on",
        ),
        (GOOD, "{scael: 2}", "takes no argument 'scael'; did you mean 'scale'?"),
        (GOOD, "{}", "needs the column answer, and the data has question"),
        ("f = 3\n", "{}", "is a int, not a function"),
        ("class f:\n    def __init__(self, path): pass\n", "{pth: x}", "missing a required argument: 'path'"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_named_with_the_reason(tmp_path, recipe_with, source, args, says):
    assert says in str(problem_of(tmp_path, recipe_with, source, args, {"question": "1"}))


def test_a_plugin_that_can_be_used_is_let_pass_whatever_it_prints_and_starts(tmp_path, recipe_with):
    noisy = "import threading, time, neighbour\nprint('x' * 100_000)\n"
    noisy += "threading.Thread(target=time.sleep, args=(600,)).start()\n" + GOOD
    (tmp_path / "neighbour.py").write_text("")
    assert problem_of(tmp_path, recipe_with, noisy, "{scale: 2}", {"answer": "1"}) is None
    judge = "class f:\n    def __init__(self, path): raise RuntimeError('loaded')\n"
    assert problem_of(tmp_path, recipe_with, judge, "{path: x}") is None


def test_a_plugin_in_a_package_and_a_generator_find_what_lies_beside_them(tmp_path, recipe_with):
    package = tmp_path / "rewards"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "own_helper.py").write_text("ONE = 1.0\n")
    source = "from rewards.own_helper import ONE\nimport own_helper\n"
    (package / "mine.py").write_text(f"{source}def f(completions): return [ONE] * len(completions)\n")
    assert list(in_rewards(recipe_with(f"rewards=[{{plugin: '{package}/mine.py:f'}}]"), None)) == []
    (tmp_path / "own_rows.py").write_text("ROWS = [{'prompt': '1+1='}]\n")
    (tmp_path / "made.py").write_text("import own_rows\ndef make(): return own_rows.ROWS\n")
    assert len(read_table(SourceBlock(generator=f"{tmp_path}/made.py:make")).rows) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "line"),
    [("import time\nwhile True:\n    time.sleep(9)\n", "3"), ("n = 0\nwhile True:\n    n += 1\n    n -= 1\n", "[2-4]")],
)
def test_an_import_that_does_not_end_is_given_up_with_its_line(tmp_path, recipe_with, monkeypatch, source, line):
    assert plugin_checks.SILENCE_S <= 3.0  # of the five seconds in which a plan says so
    monkeypatch.setattr(plugin_checks, "SILENCE_S", 1.0)
    said = problem_of(tmp_path, recipe_with, source)
    assert re.search(f"importing it does not end: for 1 of .* is at line {line}; move what takes long", str(said))


@pytest.mark.slow
def test_an_import_that_goes_on_is_waited_for(tmp_path, recipe_with, monkeypatch):
    monkeypatch.setattr(plugin_checks, "SILENCE_S", 1.2)
    slow = "import time\n" + "time.sleep(0.5)\n" * 3 + GOOD
    assert problem_of(tmp_path, recipe_with, slow) is None


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        ("{name: soft_overlong}", "soft_overlong needs max_tokens"),
        ("{name: repetition, args: {ngram: 3}}", "repetition takes no argument ngram (did you mean ngram_size?)"),
        ("{name: format, args: {pattern: '('}}", "cannot be called with these args: "),
        ("{name: exact_match}", "exact_match needs the column solution, and the data has answer: map it in data.train"),
    ],
)
def test_a_built_in_rewards_arguments_and_columns_are_checked(recipe_with, reward, says):
    ((key, message),) = in_rewards(recipe_with(f"rewards=[{reward}]"), {"answer": "1"})
    assert key == "rewards.0.args" and says in message
    assert not list(in_rewards(recipe_with("rewards=[{name: exact_match}]"), {"solution": "1"}))


@pytest.mark.parametrize(
    ("spec", "args", "says"),
    [
        ("rows.py:make", "{n: 3}", "missing a required argument: 'm'; its args are n, m"),
        ("rows.py:broken", "{}", "rows.py:3: importing it raised ZeroDivisionError"),
    ],
)
def test_a_generators_arguments_and_import_are_checked(tmp_path, recipe_with, monkeypatch, spec, args, says):
    monkeypatch.chdir(tmp_path)
    text = "def make(n, m): return []\ndef broken(): return []\n" + ("1 / 0\n" if "broken" in spec else "")
    (tmp_path / "rows.py").write_text(text)
    recipe = recipe_with(f"data.train={{path: null, generator: '{spec}', args: {args}}}")
    ((key, message),) = in_generators(recipe, is_called=False)
    assert key == "data.train.generator" and says in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "limit", "says"),
    [
        (
            "import time\n    time.sleep(600)\n    yield {}",
            "CALL_SILENCE_S",
            "rows.py:3: calling it does not end: it has given 0 rows",
        ),
        ("while True:\n        yield {'prompt': '1'}", "MOST_ROWS", "calling it does not end: it has given"),
        ("yield {}\n    while True:\n        n += 1\n        n -= 1", "CALL_SILENCE_S", "it has given 1 rows"),
        ("yield {}\n    yield n['x']", "CALL_LONGEST_S", "rows.py:3: calling it raised TypeError"),
    ],
)
def test_a_generator_that_does_not_end_or_fails_is_given_up_with_its_line(
    tmp_path, recipe_with, monkeypatch, body, limit, says
):
    monkeypatch.setattr(plugin_checks, limit, 1)
    (tmp_path / "rows.py").write_text(f"def make(n):\n    {body}\n")
    recipe = recipe_with(f"data.train={{path: null, generator: '{tmp_path}/rows.py:make', args: {{n: 3}}}}")
    ((key, message),) = in_generators(recipe, is_called=True)
    assert key == "data.train.generator" and message.startswith(f"{tmp_path}/rows.py:") and says in message
    assert not list(in_generators(recipe, is_called=False))


@pytest.mark.slow
def test_a_generator_that_ends_is_let_pass_and_plan_asks_it_before_it_reads(tmp_path, monkeypatch, recipe_with, capsys):
    (tmp_path / "rows.py").write_text("def make(n):\n    return [{'prompt': '1'}] * n\n")
    override = f"data.train={{path: null, generator: '{tmp_path}/rows.py:make', args: {{n: 3}}}}"
    assert not list(in_generators(recipe_with(override), is_called=True))
    monkeypatch.setattr(plugin_checks, "MOST_ROWS", 2)
    (tmp_path / "rows.py").write_text("import itertools\ndef make():\n    return itertools.repeat({'prompt': '1'})\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("path: org/data", f"generator: '{tmp_path}/rows.py:make'"))
    assert main(["plan", str(recipe), f"run.output_dir={tmp_path}/out"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{recipe}:3: data.train.generator: {tmp_path}/rows.py") and "does not end" in said
    check_in_use(load_located(recipe), read=lambda _: False)


def test_run_and_plan_say_so_with_the_recipes_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("raise SystemExit\nf = print\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("name: exact_match", f"plugin: '{tmp_path}/mine.py:f'"))
    for command in ("run", "plan"):
        assert main([command, str(recipe), f"run.output_dir={tmp_path}/out"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"{recipe}:4: rewards.0.plugin: {tmp_path}/mine.py:1: importing it raised SystemExit")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "source", "says"),
    [
        ("metrics", "def f(groups, word):\n    return 1.0\n", "missing a required argument: 'word', and args of"),
        ("metrics", "def f():\n    return 1.0\n", "too many positional arguments, and args of the recipe"),
        ("metrics", "\nraise RuntimeError('no GPU')\n", "mine.py:2: importing it raised RuntimeError: no GPU"),
        ("metrics", "f = 3\n", "mine.py:f is a int, not a function or a class"),
        (
            "callbacks",
            "class f:\n    def __init__(self, patience):\n        pass\n",
            "missing a required argument: 'patience'",
        ),
        ("callbacks", "def f(step):\n    pass\n", "too many positional arguments"),
        (
            "algorithm.loss.kind",
            "def f(ratios):\n    pass\n",
            "'ratios'; it may take ratio, log_ratio, logprobs, old_logp",
        ),
        (
            "algorithm.advantage.estimator",
            "def f(reward):\n    pass\n",
            "'reward'; it may take rewards, group_of, lengths",
        ),
        (
            "trainer.optimizer.kind",
            "def f(params):\n    pass\n",
            "'params'; it may take parameters, named_parameters, and",
        ),
        ("metrics", "def f(groups):\n    return 1.0\n", None),
        ("callbacks", "class f:\n    pass\n", None),
        ("algorithm.loss.kind", "def f(ratio, advantages, low=0.2):\n    pass\n", None),
        ("algorithm.advantage.estimator", "def f(rewards, **others):\n    pass\n", None),
        ("trainer.optimizer.kind", "def f(named_parameters):\n    pass\n", None),
    ],
)
def test_what_a_function_of_ones_own_takes_is_compared_with_what_it_will_be_given(
    recipe_with, tmp_path, key, source, says
):
    (tmp_path / "mine.py").write_text(source)
    plugin = f"{tmp_path}/mine.py:f"
    recipe = recipe_with(f"{key}=[{plugin}]" if key in ("metrics", "callbacks") else f"{key}={plugin}")
    found = list(in_functions(recipe))
    assert [said for _, said in found if says is None or says not in said] == [] and len(found) == (says is not None)
    block = f"{key}.0" if key in ("metrics", "callbacks") else key.rpartition(".")[0]
    assert all(where == f"{block}.plugin" for where, _ in found)


def test_a_file_or_function_of_ones_own_that_is_not_there_is_named_at_its_line(tmp_path: Path, capsys):
    (tmp_path / "mine.py").write_text("def loss(ratio):\n    pass\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        RECIPE.replace("{name: grpo}", "{name: grpo, loss: {kind: 'mine.py:los'}}") + "callbacks: ['mien.py:f']\n"
    )
    assert main(["plan", str(path)]) == 2
    said = capsys.readouterr().err
    assert f"{path}:1: algorithm.loss.plugin: {tmp_path}/mine.py has no function los (did you mean loss?)" in said
    assert (
        "callbacks.0.plugin: there is no file " in said and f"did you mean {tmp_path}/mine.py?" in said
    ) or "mien.py" in said


def test_deepspeed_refuses_an_optimizer_of_ones_own_by_name(tmp_path: Path, capsys):
    (tmp_path / "mine.py").write_text("def make(parameters):\n    pass\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE + "trainer: {engine: deepspeed, optimizer: {kind: 'mine.py:make'}}\n")
    assert main(["plan", str(path)]) == 2
    assert f"ZeRO cuts weights into flat pieces, which {tmp_path}/mine.py:make cannot step" in capsys.readouterr().err
