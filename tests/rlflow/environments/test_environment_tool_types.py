"""What the policy is told of a tool's arguments whose types are made of others."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import pytest

from rlflow.environments.protocol import EnvironmentFault
from rlflow.environments.tools import described


class Address(TypedDict, total=False):
    street: str
    number: int | None


class Person(TypedDict):
    name: str
    homes: list[Address]


@dataclass
class Point:
    x: int


class Color(enum.Enum):
    RED = "red"


def visit(person: Person, others: dict[str, Person] | None = None) -> str:
    """Visits.

    Args:
        person: Who.
        others: More.
    """
    return person["name"]


def plain(
    query: str | None, mode: Literal["a", "b"], deep: list[dict[str, list[int]]], pair: tuple[int, str], any_: Any
) -> str:
    """Finds.

    Args:
        query: What.
        mode: How.
        deep: Numbers.
        pair: Two.
        any_: More.
    """
    return mode


def go(place: list[Point]) -> str:
    """Goes.

    Args:
        place: Where.
    """
    return str(place)


def paint(color: Color) -> str:
    """Paints.

    Args:
        color: Which.
    """
    return str(color)


def test_the_keys_of_a_typed_dict_are_described_wherever_it_stands():
    (tool,) = described([visit])
    address = {
        "type": "object",
        "properties": {"street": {"type": "string"}, "number": {"type": "integer", "nullable": True}},
        "required": [],
    }
    person = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "homes": {"type": "array", "items": address}},
        "required": ["name", "homes"],
    }
    others = {"type": "object", "additionalProperties": person, "nullable": True, "description": "More."}
    assert tool["function"]["parameters"] == {
        "type": "object",
        "properties": {"person": {**person, "description": "Who."}, "others": others},
        "required": ["person"],
    }


def test_other_types_are_described_as_transformers_does():
    (tool,) = described([plain])
    properties = tool["function"]["parameters"]["properties"]
    types = {"query": "string", "mode": "string", "deep": "array", "pair": "array", "any_": None}
    assert {name: schema.get("type") for name, schema in properties.items()} == types


@pytest.mark.parametrize(("tool", "says"), [(go, "place is a Point"), (paint, "color is a Color")])
def test_an_argument_of_a_class_that_no_call_can_make_is_refused_by_name(tool, says):
    with pytest.raises(EnvironmentFault, match=f"{says}, of which a call can make none: take str"):
        described([tool])
