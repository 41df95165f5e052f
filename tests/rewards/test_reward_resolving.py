"""From a recipe's reward to something that can be called."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlflow.recipe import RewardBlock
from rlflow.rewards import REWARDS, RewardError, resolve

PLUGIN = """
from helper_beside_the_plugin import OFFSET

def plain(prompts, completions, completion_ids, level, bonus=0):
    return [len(completions[0]) + level[0] + bonus + OFFSET]

def everything(completions, **columns):
    return [sorted(columns)]

async def coroutine(completions, **columns):
    return [2.0]

class Swift:
    def __init__(self, args=None, scale=1, **kwargs):
        self.scale = scale
    def __call__(self, completions, **kwargs):
        return [self.scale * len(ids) for ids in kwargs["response_token_ids"]]

class AsyncSwift(Swift):
    async def __call__(self, completions, **kwargs):
        return [self.scale * 1.0 for _ in completions]

class Broken:
    def __init__(self):
        raise RuntimeError("no model")

constant = 3
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "helper_beside_the_plugin.py").write_text("OFFSET = 100\n")
    path = folder / "my_rewards.py"
    path.write_text(PLUGIN)
    return path


def call(block: RewardBlock, **columns: Any) -> Any:
    return resolve(block)([[]], ["text"], [[1, 2]], **columns)


@pytest.mark.parametrize("name", REWARDS)
def test_every_name_leads_to_a_documented_function(name: str) -> None:
    module, _, function = REWARDS[name].partition(":")
    assert vars(importlib.import_module(module))[function].__doc__


def test_every_name_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    assert [name for name in REWARDS if f"`{name}`" not in page] == []


def test_a_builtin_is_called_with_its_arguments() -> None:
    assert call(RewardBlock(name="format", args={"pattern": "t..t"})) == [1.0]
    assert call(RewardBlock(name="exact_match"), solution=["text"], level=[1]) == [1.0]


def test_a_plugin_gets_what_it_names_and_may_import_its_neighbour(plugin: Path) -> None:
    block = RewardBlock(plugin=f"{plugin}:plain", args={"bonus": 1000})
    assert call(block, level=[10], unused=[0]) == [1114]


def test_a_plugin_with_keywords_gets_every_column(plugin: Path) -> None:
    assert call(RewardBlock(plugin=f"{plugin}:everything"), level=[1]) == [["completion_ids", "level", "prompts"]]


@pytest.mark.parametrize(
    ("block", "columns", "reward"),
    [
        ({"name": "format", "args": {"pattern": "t..t"}}, {"pattern": ["none"]}, 1.0),
        ({"name": "math_accuracy"}, {"solution": ["5"], "explicit": ["no"], "timeout_s": ["x"]}, 1.0),
        ({"name": "repetition"}, {"unit": ["kg"], "ngram_size": [0]}, 0.0),
        ({"name": "soft_overlong", "args": {"max_tokens": 2, "cache_tokens": 1}}, {"cache_tokens": [9]}, -1.0),
        ({"name": "exact_match"}, {"solution": ["so it is 5"], "prompts": ["p"], "completions": ["c"]}, 1.0),
    ],
)
def test_columns_of_the_data_never_set_a_builtins_options(block: Any, columns: Any, reward: float) -> None:
    text = "text" if block["name"] == "format" else "so it is 5"
    assert resolve(RewardBlock(**block))([[]], [text], [[1, 2]], **columns) == [reward]


def test_columns_that_bear_the_names_of_what_every_function_gets_are_left_out(plugin: Path) -> None:
    columns = {"prompts": [1], "completions": [2], "completion_ids": [3], "level": [10]}
    assert call(RewardBlock(plugin=f"{plugin}:plain"), **columns) == [114]


def test_a_coroutine_function_is_called_like_any_other(plugin: Path) -> None:
    assert call(RewardBlock(plugin=f"{plugin}:coroutine")) == [2.0]


def test_a_class_in_the_form_of_ms_swift_is_constructed_with_the_arguments(plugin: Path) -> None:
    assert call(RewardBlock(plugin=f"{plugin}:Swift", args={"scale": 10})) == [20]
    assert call(RewardBlock(plugin=f"{plugin}:AsyncSwift", args={"scale": 10})) == [10.0]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"name": "cosin"}, "did you mean 'cosine'"),
        ({"name": "soft_overlong", "args": {"max_token": 3, "cache_tokens": 1}}, "did you mean 'max_tokens'"),
        ({"name": "soft_overlong", "args": {"max_tokens": 3}}, "needs args: cache_tokens"),
        ({"name": "exact_match", "args": {"solution": ["5"]}}, "takes no argument 'solution'"),
        ({"plugin": "{plugin}:plan"}, "did you mean 'plain'"),
        ({"plugin": "{plugin}:plain", "args": {"bonsu": 1}}, "did you mean 'bonus'"),
        ({"plugin": "{plugin}:constant"}, "is a int, not a function"),
        ({"plugin": "{plugin}:Broken"}, "constructing it raised RuntimeError: no model"),
        ({"plugin": "elsewhere/{plugin}:plain"}, "no such file"),
    ],
)
def test_a_wrong_block_is_an_error_that_says_what_to_do(plugin: Path, block: dict[str, Any], message: str) -> None:
    if "plugin" in block:
        block = block | {"plugin": block["plugin"].replace("{plugin}", str(plugin))}
    with pytest.raises(RewardError, match=message):
        resolve(RewardBlock(**block))


def test_a_plugin_that_does_not_import_is_an_error_that_says_why(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("from swift.rewards import ORM\n")
    with pytest.raises(RewardError, match="importing it raised ModuleNotFoundError: No module named 'swift'"):
        resolve(RewardBlock(plugin=f"{path}:f"))


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def said_by(*plugins: str, after: str = "") -> str:
    """What the plugins' scores of one completion are, or the error, in a process that imports nothing else first."""
    program = (
        "import sys\n"
        f"{after}\n"
        "from rlflow.rewards import RewardError, load\n"
        "try:\n"
        "    print([load(None, plugin, {})([[]], ['a'], [[1]]) for plugin in sys.argv[1:]])\n"
        "except RewardError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-P", "-c", program, *plugins]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


USES = "def score(completions, **columns):\n    import {0}\n    return [{0}.BONUS]\n"


@pytest.mark.parametrize("name", ["rewards", "actors", "my_helper"])
def test_a_plugin_finds_the_file_beside_it_that_is_named_like_one_of_ours(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "mine", plugin=USES.format(name), **{name: "BONUS = 0.5\n"})
    assert said_by(f"{folder}/plugin.py:score") == "[[0.5]]"


def test_plugins_of_one_file_name_in_two_folders_are_two(tmp_path: Path) -> None:
    one = write(tmp_path / "one", plugin="X = 1.0\ndef score(completions): return [X]\n")
    two = write(tmp_path / "two", plugin="X = 2.0\ndef score(completions): return [X]\n")
    assert said_by(f"{one}/plugin.py:score", f"{two}/plugin.py:score") == "[[1.0], [2.0]]"


def test_two_rewards_of_one_file_share_what_it_holds(tmp_path: Path) -> None:
    text = "seen = []\ndef first(completions): return [seen.append(1)]\ndef second(completions): return seen\n"
    folder = write(tmp_path / "one", plugin=text)
    assert said_by(f"{folder}/plugin.py:first", f"{folder}/plugin.py:second") == "[[None], [1]]"


@pytest.mark.parametrize(
    ("neighbour", "instead"), [("random", "Python's own module random"), ("numpy", "numpy/__init__.py")]
)
def test_a_file_that_another_module_hides_is_an_error_that_names_both(
    tmp_path: Path, neighbour: str, instead: str
) -> None:
    folder = write(tmp_path / "mine", plugin=USES.format(neighbour), **{neighbour: "BONUS = 0.5\n"})
    said = said_by(f"{folder}/plugin.py:score")
    assert f"plugin.py imports {neighbour}, and Python would take" in said and instead in said
    assert f"{folder}/{neighbour}.py beside it: rename {neighbour}.py" in said
    unused = write(tmp_path / "other", plugin="def score(completions): return [1.0]\n", **{neighbour: "BONUS = 0.5\n"})
    assert said_by(f"{unused}/plugin.py:score") == "[[1.0]]"


def test_helpers_of_one_name_beside_two_plugins_are_an_error_and_not_the_first_ones(tmp_path: Path) -> None:
    one = write(tmp_path / "one", plugin="from helper import score\n", helper="def score(completions): return [1.0]\n")
    through = "from between import score\n"
    two = write(tmp_path / "two", plugin=through, between=USES.format("helper"), helper="BONUS = 0.5\n")
    said = said_by(f"{one}/plugin.py:score", f"{two}/plugin.py:score")
    assert f"between.py imports helper, and Python would take {one}/helper.py for it" in said


def test_a_missing_column_is_named() -> None:
    with pytest.raises(RewardError, match="needs the column 'solution'; the data has answer"):
        call(RewardBlock(name="exact_match"), answer=["5"])


def test_importing_the_package_imports_no_reward_function() -> None:
    program = "import sys, rewards; print({'sympy', 'torch', 'ray', 'pydantic', 'numpy'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.strip() == "set()"
