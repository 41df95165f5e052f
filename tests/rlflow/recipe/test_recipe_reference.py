"""The reference page is generated, complete and current; suggestions point at keys that exist."""

from __future__ import annotations

from pathlib import Path

from rlflow.recipe import algorithm_of
from rlflow.recipe.docstrings import meaning
from rlflow.recipe.explain import ELSEWHERE, blocks_at
from rlflow.recipe.reference import markdown, options

PAGE = Path(__file__).resolve().parents[3] / "docs" / "recipe.md"


def test_the_reference_page_is_current():
    assert PAGE.read_text() == markdown(), "run: python -m rlflow.recipe.reference > docs/recipe.md"


def test_every_key_says_what_it_means():
    silent = [
        f"{path}.{name}"
        for path, blocks in blocks_at().items()
        for block in blocks
        for name in block.model_fields
        if not meaning(block, name)
    ]
    assert silent == []


def test_a_block_has_at_most_fifteen_keys():
    # The recipe itself is the list of blocks.
    sizes = {block: len(block.model_fields) for path, blocks in blocks_at().items() if path for block in blocks}
    assert max(sizes.values()) <= 15, sizes


def test_other_frameworks_names_lead_to_keys_that_exist():
    for name, key in ELSEWHERE.items():
        owner, _, field = key.rpartition(".")
        assert any(field in block.model_fields for block in blocks_at()[owner]), name


def test_options_lists_the_keys_of_inner_blocks_by_their_dotted_names():
    found = {option.key: option.value for option in options(algorithm_of("grpo"))}
    assert found["group_size"] == 8
    assert found["kl.coef"] == 0.04
    assert found["name"] == "grpo"
