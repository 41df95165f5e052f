"""The reference page is generated, complete and current; suggestions point at keys that exist."""

from __future__ import annotations

from pathlib import Path

from rlflow.recipe import AlgorithmBlock
from rlflow.recipe.explain import ELSEWHERE, block_classes
from rlflow.recipe.reference import doc_of, markdown, options

PAGE = Path(__file__).resolve().parents[3] / "docs" / "recipe.md"


def test_the_reference_page_is_current():
    assert PAGE.read_text() == markdown(), "run: python -m rlflow.recipe.reference > docs/recipe.md"


def test_every_key_says_what_it_means():
    silent = [
        f"{path}.{name}"
        for path, block in block_classes().items()
        for name, info in block.model_fields.items()
        if not doc_of(info)
    ]
    assert silent == []


def test_a_block_has_at_most_fifteen_keys():
    sizes = {path: len(block.model_fields) for path, block in block_classes().items()}
    assert max(sizes.values()) <= 15, sizes


def test_other_frameworks_names_lead_to_keys_that_exist():
    for name, key in ELSEWHERE.items():
        owner, _, field = key.rpartition(".")
        assert field in block_classes()[owner].model_fields, name


def test_options_lists_the_keys_of_inner_blocks_by_their_dotted_names():
    found = {option.key: option.value for option in options(AlgorithmBlock(name="sft"))}
    assert found["group_size"] == 1
    assert found["kl.coef"] == 0.0
    assert found["name"] == "sft"
