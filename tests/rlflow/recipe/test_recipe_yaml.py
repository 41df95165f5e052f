"""Scalars as YAML 1.2 reads them, text that survives the way out and back, and files made to hang who reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlflow.recipe.yaml_source import dump, parse_value
from tests.rlflow.recipe.test_bad_recipes import Bad, refuse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1.5E3", 1500.0),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("1_000", 1000),
        ("true", True),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("off", "off"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("0x10", "0x10"),
        ("1e", "1e"),
        ("[1, 2e-3]", [1, 0.002]),
    ],
)
def test_a_scalar_means_what_yaml_1_2_says(text: str, value: object):
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


VALUES = ["1e-6", "true", "null", "", "12", " a ", "a: b", "# x", "é\n\u2028", "<<", 1e-06, 3.0]


@pytest.mark.parametrize("value", VALUES)
def test_what_is_written_reads_back_the_same(value: object):
    assert parse_value(dump({"key": [value]})) == {"key": [value]}


def bomb(layer: str, depth: int = 30) -> str:
    """A value of ``depth`` layers, each with the one before it several times in it: its first naming and aliases."""
    text = "&a0 {x: 1}"
    for number in range(depth):
        inner = layer.format(f"*a{number}").replace(f"*a{number}", text, 1).replace("KEY", f"k{number}")
        text = f"&a{number + 1} {inner}"
    return text


HOSTILE = {
    "aliases of aliases": Bad(
        9, f"trainer: {bomb('[{0}, {0}, {0}, {0}, {0}, {0}, {0}, {0}, {0}]')}", "", "aliases of aliases"
    ),
    "merges of merges": Bad(9, f"trainer: {bomb('{{<<: [{0}, {0}], KEY: 1}}')}", "", "through `<<`"),
    "brackets without end": Bad(9, f"trainer: {'[' * 2000}{']' * 2000}", "", "blocks nest deeper than 50"),
    "blocks within blocks": Bad(9, f"trainer: {'[' * 60}{']' * 60}", "", "blocks nest deeper than 50"),
    "a number of too many digits": Bad(10, f"run: {{steps: {'9' * 5000}}}", "", "cannot be read as int"),
    "a count beyond all counts": Bad(10, f"run: {{steps: {'9' * 20}}}", "run.steps", "must be at most 9.0072e+15"),
    "a tag on something else": Bad(10, "run: {steps: !!int many}", "", "'many' cannot be read as int"),
    "a tag of no recipe": Bad(10, "run: {steps: !!timestamp 2026-01-01}", "", "the tag tag:yaml.org,2002:timestamp"),
    "a NUL in a path": Bad(10, 'run: {steps: 1, output_dir: "a\\0b"}', "", "an escape for NUL"),
    "half a character": Bad(3, 'data:\n  system: "\\ud800"', "", "half of a surrogate pair", at=4),
}


@pytest.mark.slow
@pytest.mark.parametrize("bad", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_would_hang_or_break_a_reader_is_a_message_with_its_line(bad: Bad, tmp_path: Path):
    refuse(bad, tmp_path)
