"""GSM8K's model solutions as preference pairs and as labelled answers: generators for recipes, beside them.

OpenAI published, for each of the 1,319 problems of GSM8K's test set, the solutions of four models and whether each is
right (MIT licence): 731 problems have both a right and a wrong one, 2,001 of the 5,276 solutions are right. Fetch it:

    curl -LO https://github.com/openai/grade-school-math/raw/master/grade_school_math/data/example_model_solutions.jsonl

What learns from them has seen GSM8K's test problems: do not measure it on that test set afterwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from rlflow.data.errors import DataError
from rlflow.data.files import missing_file, read_file

Split = Literal["train", "heldout", "all"]

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def pairs(path: str, split: Split = "train", heldout_fraction: float = 0.1) -> Iterator[dict[str, Any]]:
    """A right and a wrong solution of each problem that has both, as {prompt, chosen, rejected, solution}.

    A problem with several of a kind gives the one that a hash of its question points at.

    Args:
        path: example_model_solutions.jsonl.
        split: which problems; the hash of a question alone decides, so train and heldout never share one as long as
            both are asked for with the same ``heldout_fraction``.
        heldout_fraction: share of the problems that is held out.

    Raises:
        DataError: there is no such file, a line is not such a problem, or an argument is out of its range.
    """
    for problem, draw in _problems(path, split, heldout_fraction):
        right, wrong = ([text for text, label in _solutions(problem) if label is kind] for kind in (True, False))
        if right and wrong:
            yield {
                "prompt": problem["question"],
                "chosen": right[draw % len(right)],
                "rejected": wrong[draw % len(wrong)],
                "solution": problem["ground_truth"],
            }


def labelled(path: str, split: Split = "train", heldout_fraction: float = 0.1) -> Iterator[dict[str, Any]]:
    """Every solution with its label, as {prompt, completion, label, solution}; arguments and errors as of ``pairs``."""
    for problem, _ in _problems(path, split, heldout_fraction):
        for text, label in _solutions(problem):
            yield {
                "prompt": problem["question"],
                "completion": text,
                "label": label,
                "solution": problem["ground_truth"],
            }


def _problems(path: str, split: str, heldout_fraction: float) -> Iterator[tuple[dict[str, Any], int]]:
    """The split's problems in the order of the file, each with a number drawn from its question."""
    if split not in ("train", "heldout", "all"):
        raise DataError(f"gsm8k_solutions: split is {split!r}; it is train, heldout or all.")
    if not 0.0 < heldout_fraction < 1.0:
        raise DataError(f"gsm8k_solutions: heldout_fraction is {heldout_fraction}; it lies between 0 and 1.")
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"{missing_file(file)} recipes/gsm8k_solutions.py says where to fetch it.")
    for number, problem in read_file(file):
        if not isinstance(problem, dict) or not {"question", "ground_truth", *MODELS} <= problem.keys():
            raise DataError(f"{file}, row {number}: is no problem with the solutions of {', '.join(MODELS)}.")
        digest = hashlib.sha256(problem["question"].encode()).digest()
        held_out = int.from_bytes(digest[:8], "big") < heldout_fraction * 2**64
        if split in ("all", "heldout" if held_out else "train"):
            yield problem, int.from_bytes(digest[8:16], "big")


def _solutions(problem: dict[str, Any]) -> list[tuple[str, bool]]:
    return [(problem[model]["solution"], problem[model]["is_correct"]) for model in MODELS]
