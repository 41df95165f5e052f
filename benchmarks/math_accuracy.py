"""The reward math_accuracy beside math-verify: wrong answers that each accepts, right ones that each refuses, speed.

    python benchmarks/math_accuracy.py GSM8K_SOLUTIONS MATH > benchmarks/math_accuracy.md

GSM8K_SOLUTIONS is openai/grade-school-math's example_model_solutions.jsonl: a ``ground_truth`` a row, and solutions of
several models with ``is_correct``. MATH has ``problem`` and ``answer`` a row (MATH-500), as JSONL or one JSON list.
Both verifiers see the same completions; math-verify runs as its documentation shows, ``verify(parse(reference),
parse(completion))`` with its defaults.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from math_verify import parse, verify

from rlflow.rewards.math_accuracy import math_accuracy


class Pair(NamedTuple):
    completion: str
    reference: str
    is_right: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gsm8k", type=Path, help="GSM8K's labelled model solutions")
    parser.add_argument("math", type=Path, help="MATH-500, or another file with problem and answer")
    paths = parser.parse_args()
    logging.disable(logging.CRITICAL)
    print("# math_accuracy beside math-verify\n")
    print("    python benchmarks/math_accuracy.py GSM8K_SOLUTIONS MATH > benchmarks/math_accuracy.md\n")
    print(
        "GSM8K's model solutions with published labels, MATH-500's references, and whole numbers. One core, every\n"
        "pair judged once; math-verify with its defaults.\n"
    )
    columns = ("false accepts", "of math-verify", "false rejects", "of math-verify", "verdicts/s", "of math-verify")
    print(f"| completions | right | wrong | {' | '.join(columns)} |")
    print("|---" * 9 + "|")
    sets = {**gsm8k_sets(read_rows(paths.gsm8k)), **math_sets(read_rows(paths.math)), **integer_sets()}
    for name, pairs in sets.items():
        print(f"| {name} | {' | '.join(row(pairs))} |", flush=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    return (
        json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    )


def gsm8k_sets(rows: Sequence[dict[str, Any]]) -> dict[str, list[Pair]]:
    """The labels compare final answers, so that a solution keeps its label in any form that keeps its last number."""
    solutions = [
        (model["solution"], row["ground_truth"].rpartition("A:")[2].strip(), model["is_correct"])
        for row in rows
        for model in row.values()
        if isinstance(model, dict)
    ]

    def rewritten(change: Callable[[str], str]) -> list[Pair]:
        return [Pair(change(solution), reference, label) for solution, reference, label in solutions]

    return {
        "GSM8K solutions as they are": rewritten(lambda text: text),
        "GSM8K, one paragraph": rewritten(lambda text: text.replace("\n", " ")),
        "GSM8K, one paragraph, no marker, no calculator notes": rewritten(unmarked),
    }


def unmarked(solution: str) -> str:
    return re.sub(r"<<[^<>]*>>", "", re.sub(r"\s*\n\s*A:\s*", ", so it is ", solution)).replace("\n", " ") + "."


def math_sets(rows: Sequence[dict[str, Any]]) -> dict[str, list[Pair]]:
    answers = [row["answer"] for row in rows]
    reformatted = [Pair(boxed(other), answer, True) for answer in answers for other in reformattings(answer)]
    return {
        "MATH, right, boxed": [Pair(boxed(answer), answer, True) for answer in answers],
        "MATH, right, in a sentence": [Pair(f"Hence the answer is ${answer}$.", answer, True) for answer in answers],
        "MATH, right, display of three lines": [
            Pair(f"We find\n\\[\n{answer}\n\\]", answer, True) for answer in answers
        ],
        "MATH, right, worked solution": [
            Pair(row["solution"], row["answer"], True) for row in rows if "solution" in row
        ],
        "MATH, wrong by one": [
            Pair(boxed(by_one(answer)), answer, False) for answer in answers if by_one(answer) != answer
        ],
        "MATH, right, reformatted": reformatted,
    }


def boxed(answer: str) -> str:
    return rf"So we get $\boxed{{{answer}}}$."


def by_one(answer: str) -> str:
    """The answer with its first whole number one larger, that of a base or an exponent left out."""
    return re.sub(r"(?<![\d^_{.,])\d+(?![\d,])", lambda match: str(int(match[0]) + 1), answer, count=1)


def reformattings(answer: str) -> Iterator[str]:
    """Other ways to write an answer, each where it differs from what there is."""
    ways = [
        re.sub(r"\\frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", answer)
        if re.fullmatch(r"-?\\frac\{-?\d+\}\{\d+\}", answer)
        else answer,
        answer.replace(r"\frac", r"\dfrac"),
        answer.replace(" ", ""),
        answer.replace(r"\left", "").replace(r"\right", ""),
        f"{int(answer):,}" if re.fullmatch(r"\d{4,}", answer) else answer,
        f"{int(answer):,}".replace(",", r"\,") if re.fullmatch(r"\d{4,}", answer) else answer,
        f"{answer}.0" if re.fullmatch(r"-?\d+", answer) else answer,
        f"n = {answer}" if re.fullmatch(r"-?\d+", answer) else answer,
        rf"{answer} \text{{ units}}" if re.fullmatch(r"-?\d+", answer) else answer,
        answer.replace("-", "\N{MINUS SIGN}"),
        re.sub(r"\\sqrt\{(\d+)\}", r"sqrt(\1)", answer) if re.fullmatch(r"\d*\\sqrt\{\d+\}", answer) else answer,
        answer.replace(r"\pi", "\N{GREEK SMALL LETTER PI}"),
        re.sub(r"\\text\{([^{}]*)\}", r"\1", answer),
    ]
    yield from dict.fromkeys(way for way in ways if way != answer)


def integer_sets() -> dict[str, list[Pair]]:
    """Whole numbers in four forms, half of them wrong by one, for the speed."""
    forms = {
        "integers, boxed": r"We add and get $\boxed{{{}}}$.",
        "integers, ####": "We add.\n#### {}",
        "integers, in a sentence": "We add the parts. The answer is {}.",
        "integers, last of a paragraph": "He had 3 parts, and he adds 12 to each, which makes {} in all.",
    }
    return {
        name: [Pair(form.format(number * 37 + number % 2), str(number * 37), number % 2 == 0) for number in range(1000)]
        for name, form in forms.items()
    }


def row(pairs: Sequence[Pair]) -> list[str]:
    ours, our_rate = judged(
        pairs, lambda pair: math_accuracy([None], [pair.completion], [[]], [pair.reference])[0] == 1.0
    )
    theirs, their_rate = judged(pairs, lambda pair: verify(parse(f"${pair.reference}$"), parse(pair.completion)))
    right = [index for index, pair in enumerate(pairs) if pair.is_right]
    wrong = [index for index, pair in enumerate(pairs) if not pair.is_right]
    counts = [len(right), len(wrong)]
    counts += [sum(verdicts[index] for index in wrong) for verdicts in (ours, theirs)]
    counts += [sum(not verdicts[index] for index in right) for verdicts in (ours, theirs)]
    return [f"{count:,}" for count in (*counts, round(our_rate), round(their_rate))]


def judged(pairs: Sequence[Pair], verdict: Callable[[Pair], bool]) -> tuple[list[bool], float]:
    """Verdicts, and how many a second of processor time."""
    verdict(pairs[0])
    begun = time.process_time()
    verdicts = [verdict(pair) for pair in pairs]
    return verdicts, len(pairs) / (time.process_time() - begun)


if __name__ == "__main__":
    main()
