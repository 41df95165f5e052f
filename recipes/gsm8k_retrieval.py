"""GSM8K as queries, each with a document that answers it and others that do not: a generator for recipes, beside it.

The query is how a problem begins, the documents are how its own solution and those of other problems begin. Fetch it
(MIT licence):

    curl -LO https://github.com/openai/grade-school-math/raw/master/grade_school_math/data/train.jsonl
    curl -LO https://github.com/openai/grade-school-math/raw/master/grade_school_math/data/test.jsonl
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlflow.data.errors import DataError
from rlflow.data.files import missing_file, read_file


def candidates(
    path: str, negatives: int = 1, query_words: int = 14, document_words: int = 10
) -> Iterator[dict[str, Any]]:
    """Each problem as {query, positive, negative}. Who the negatives of a problem are is always the same.

    Args:
        path: GSM8K's train.jsonl or test.jsonl.
        negatives: Solutions of other problems.
        query_words, document_words: So many words of a problem, and of a solution.

    Raises:
        DataError: There is no such file, a line is no problem, or there are too few other solutions.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"{missing_file(file)} recipes/gsm8k_retrieval.py says where to fetch it.")
    problems = []
    for number, problem in read_file(file):
        if not isinstance(problem, dict) or not {"question", "answer"} <= problem.keys():
            raise DataError(f"{file}, row {number}: is no problem with question and answer.")
        problems.append((_cut(problem["question"], query_words), _cut(problem["answer"], document_words)))
    documents = list(dict.fromkeys(document for _, document in problems))
    if len(documents) <= negatives:
        raise DataError(f"{file}: has {len(documents)} different solutions, too few for {negatives} negatives.")
    for number, (query, document) in enumerate(problems):
        drawn = random.Random(number).sample(documents, negatives + 1)
        yield {"query": query, "positive": document, "negative": [one for one in drawn if one != document][:negatives]}


def _cut(text: str, words: int) -> str:
    return " ".join(text.split()[:words])
