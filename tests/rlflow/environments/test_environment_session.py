"""What an environment returns is what is asked for, or its episode ends with a reason."""

from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlflow.environments.loading import load_environment
from rlflow.environments.methods import MethodsEnvironment
from rlflow.environments.protocol import EnvironmentFault, Reply
from rlflow.environments.session import Session
from rlflow.environments.tools import call_tool, described


class Saying:
    """Says what it is given, and is over then; its state is given too."""

    def __init__(self, said: Any = None, state: Any = None) -> None:
        self.said, self.state = said, state

    def reset(self, row):
        return None

    def step(self, message):
        return self.said


def stepped(said: Any) -> dict[str, Any]:
    session = Session(lambda: Saying(said))
    session.answer("reset", {"messages": []}, 0)
    return session.answer("step", {"role": "assistant", "content": "a"})


def finished(state: Any) -> dict[str, Any]:
    session = Session(lambda: Saying(state=state))
    session.answer("reset", {"messages": []}, 0)
    return session.answer("finish")


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (("seen", 1.0, True, {}), "step returned a tuple: return text, a list of messages, a Reply"),
        ("  ", "step returned an empty text: return what the policy is to hear"),
        (Reply("a", done="no"), "its done is 'no': give True or False"),  # pyright: ignore[reportArgumentType]
        (Reply("a", done=np.array([True, False])), "its done is array"),  # pyright: ignore[reportArgumentType]
        (Reply("a", reward=1e300), "its reward is 1e\\+300: give a finite number"),
        (Reply("a", counts=["won"]), "its counts are a list: give a mapping"),  # pyright: ignore[reportArgumentType]
        (Reply("a", counts={"won": float("nan")}), "its count 'won' is nan: give a finite number"),
        (Reply("a", counts={"turns": 1}), "it counts 'turns': take a name .* that is not .*turns"),
        (Reply("a", counts={"": 1}), "it counts '': take a name"),
    ],
)
def test_what_is_no_reply_ends_the_episode_with_what_to_return(said, error):
    with pytest.raises(AssertionError, match=error):
        raise AssertionError(stepped(said)["error"])


def test_counts_and_the_end_are_taken_as_they_are_meant():
    said = stepped(Reply(done=np.bool_(True), counts={"steps": np.int64(2), "way": 0.7}, reward=np.float32(0.5)))  # pyright: ignore[reportArgumentType]
    assert said == {"messages": [], "reward": 0.5, "done": True, "counts": {"steps": 2, "way": 0.7}}
    assert isinstance(said["counts"]["steps"], int)


def test_a_state_is_kept_with_its_numbers_and_one_that_json_does_not_hold_is_named():
    assert finished({"at": np.float32(1.5), "grid": np.arange(3), "odds": float("nan")})["state"] == {
        "at": 1.5,
        "grid": [0, 1, 2],
        "odds": None,
    }
    assert "its state cannot be kept as JSON (keys must be str" in finished({(1, 2): 3})["error"]


def test_an_attribute_error_of_a_property_is_told_and_not_taken_for_a_missing_state():
    class Broken(Saying):
        state = property(lambda self: self.nothing)  # pyright: ignore[reportAttributeAccessIssue]

        def __init__(self) -> None:
            pass

    session = Session(Broken)
    session.answer("reset", {"messages": []}, 0)
    assert "has no attribute 'nothing'" in session.answer("finish")["error"]


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def ends(x: int = 0) -> None:
    """Ends.

    Args:
        x: Nothing.
    """
    sys.exit("over")


def fails(x: int = 0) -> None:
    """Fails."""
    raise Unprintable


def test_a_tool_that_runs_what_ends_a_program_tells_it_to_the_policy():
    functions = {"ends": ends, "fails": fails}
    calls = [{"name": name, "arguments": {}} for name in functions]
    told = [asyncio.run(call_tool(functions, call)) for call in calls]
    assert told == [
        ("Error: SystemExit: over", False),
        ("Error: Unprintable: (its text raised RuntimeError)", False),
    ]


def placed(a: int, /) -> int:
    """Does.

    Args:
        a: What.
    """
    return a


def many(*numbers: int) -> int:
    """Does.

    Args:
        numbers: Which.
    """
    return sum(numbers)


@pytest.mark.parametrize(
    ("tools", "error"),
    [
        ("search", "its tools are a str: give a list of functions"),
        ([3], "a tool is 3: give functions with type hints"),
        ([{"foo": 1}], "a tool has no name"),
        ([{"name": "f", "parameters": {1, 2}}], "the schema of its tool f is no JSON"),
        ([placed], "calls give arguments by name, which a cannot be"),
        ([many], "calls give arguments by name, which numbers cannot be"),
    ],
)
def test_tools_that_nobody_could_call_are_refused(tools, error):
    with pytest.raises(EnvironmentFault, match=error):
        described(tools)


@pytest.mark.parametrize(
    ("methods", "error"),
    [
        (
            {"reset": lambda: None, "step": lambda message: None},
            r"as reset\(row\), and reset has too many",
        ),
        ({"reset": lambda row: None, "step": lambda: None}, r"as step\(message\), and step has too many"),
    ],
)
def test_a_method_that_does_not_take_what_it_is_given_is_named_before_a_run(methods, error):
    said = Session(lambda: SimpleNamespace(**methods)).answer("describe")
    with pytest.raises(AssertionError, match=error):
        raise AssertionError(said["error"])


class Level:
    """TRL's convention."""

    def reset(self, level, prompt, *, seed=0, **row):
        return None

    def go(self) -> str:
        """Goes."""
        return "gone"


def test_the_columns_that_trls_reset_needs_are_known_and_a_class_without_tools_is_refused():
    assert Session(lambda: MethodsEnvironment(Level())).answer("describe")["columns"] == ["level"]
    with pytest.raises(EnvironmentFault, match=r"neither step\(message\) nor public methods"):
        MethodsEnvironment(SimpleNamespace(reset=lambda **row: None))


def test_of_a_class_of_trls_what_json_can_hold_is_its_state_with_numpys_numbers_as_pythons():
    made = Level()
    vars(made).update(found=np.int64(3), board=np.eye(2), client=object(), _secret=7, word="x")
    session = Session(lambda: MethodsEnvironment(made))
    session.answer("reset", {"level": 1, "messages": [{"role": "user", "content": "Go."}]}, 0)
    assert session.answer("finish")["state"] == {"found": 3, "board": [[1.0, 0.0], [0.0, 1.0]], "word": "x"}


def test_arguments_that_the_class_does_not_take_are_named(tmp_path):
    (tmp_path / "game.py").write_text("class Game:\n    def __init__(self, size): ...\n")
    with pytest.raises(EnvironmentFault, match=r"missing a required argument: 'size': give it in environment\.args"):
        load_environment(None, f"{tmp_path / 'game.py'}:Game", (), {})
