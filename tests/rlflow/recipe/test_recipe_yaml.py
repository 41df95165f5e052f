"""Scalars as YAML 1.2 reads them, and text that survives the way out and back."""

from __future__ import annotations

import pytest

from rlflow.recipe.yaml_source import dump, parse_value


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
