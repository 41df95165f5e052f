"""recipes/gsm8k_retrieval.py: queries with the document that answers each and others that do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlflow.data.errors import DataError
from rlflow.data.sources import read_table
from rlflow.recipe.data_blocks import SourceBlock

FILE = Path(__file__).resolve().parent.parent / "recipes" / "gsm8k_retrieval.py"


@pytest.fixture
def read(tmp_path):
    """read(problems, **args) -> the rows, by the same way a recipe takes."""

    def read(problems: list, **args) -> list[dict]:
        path = tmp_path / "problems.jsonl"
        path.write_text("".join(json.dumps(item) + "\n" for item in problems))
        source = SourceBlock(generator=f"{FILE}:candidates", args={"path": str(path), **args})
        return [row.columns for row in read_table(source).rows]

    return read


def test_negatives_are_other_solutions_and_always_the_same(read):
    # Of twenty problems two each have one solution.
    problems = [{"question": f"how many  are\n{n} of them", "answer": f"there are {n // 2} in all"} for n in range(20)]
    rows = read(problems, negatives=4, query_words=4, document_words=3)
    assert [row["query"] for row in rows] == [f"how many are {n}" for n in range(20)]
    for n, row in enumerate(rows):
        assert row["positive"] == f"there are {n // 2}"
        assert len(set(row["negative"])) == 4 and row["positive"] not in row["negative"]
    assert len({tuple(row["negative"]) for row in rows}) > 10
    assert rows == read(problems, negatives=4, query_words=4, document_words=3)


def test_what_cannot_be_such_a_set_is_refused(read):
    with pytest.raises(DataError, match="row 1: is no problem"):
        read([{"question": "how many?"}])
    with pytest.raises(DataError, match="has 1 different solutions, too few for 1 negatives"):
        read([{"question": f"{n}?", "answer": "one"} for n in range(9)])
    with pytest.raises(DataError, match=r"recipes/gsm8k_retrieval\.py says where to fetch it"):
        read_table(SourceBlock(generator=f"{FILE}:candidates", args={"path": "nowhere.jsonl"}))
