"""What a model is measured on: sets by name, files of one's own, what a recipe evaluates on; all as problems.

kind     a problem is                                    a verdict is
answer   a prompt, a reference                           the reward of a completion
code     a prompt, tests                                 whether the program passes them, in the sandbox
choice   a text, several that may follow it              which of them the model finds likeliest
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlflow.data.errors import BadRow, DataError, RowError, Rows
from rlflow.data.prompts import load_prompts
from rlflow.data.records import refuse_bad_rows
from rlflow.data.sampler import permutation
from rlflow.data.sequence_texts import refuse_media
from rlflow.data.sources import Table, read_table
from rlflow.recipe import DataBlock, EvaluationBlock, Recipe, RewardBlock, SourceBlock
from rlflow.types import Prompt

if TYPE_CHECKING:
    from rlflow.serving.models import ServedModel

Kind = Literal["answer", "code", "choice"]
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
WRITE_CODE = "Complete this function. Answer with the whole function in one block of code."
STOPS_OF_CODE = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")
"""Where a model without a chat template has left the function that it goes on with (arXiv 2107.03374, section 2.1)."""
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Choice:
    """A problem of several possible ends."""

    id: str
    text: str
    """What all of them follow."""
    ends: tuple[str, ...]
    """As they follow it, the space before them included."""
    right: int
    """Which of them is."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Characters of each end, without the space before it: what acc_norm divides by."""
        return tuple(len(end.strip()) for end in self.ends)


@dataclass(frozen=True, slots=True)
class ProblemSet:
    """A set that is read."""

    name: str
    kind: Kind
    prompts: Sequence[Prompt] = ()
    """Of answer and code."""
    choices: Sequence[Choice] = ()
    reward: RewardBlock | None = None
    threshold: float = 1.0
    """Least reward that passes."""
    stop: tuple[str, ...] = ()
    samples: int | None = None
    """Completions a prompt, where a recipe says."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ends: tuple[str, ...] | None = None
    """Stop strings that are kept, as in rollouts."""
    max_new_tokens: int | None = None

    def __len__(self) -> int:
        return len(self.choices) if self.kind == "choice" else len(self.prompts)


@dataclass(frozen=True, slots=True)
class NamedSet:
    """A row of the table."""

    kind: Kind
    hub: str
    split: str
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    """A row of the data as it is published -> what `_prompt_row` or `_choice` takes."""
    summary: str
    subset: str | None = None


def _gsm8k(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"question": _take(row, "question"), "solution": _take(row, "answer")}


def _math500(row: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: row[name] for name in ("subject", "level") if name in row}
    return {"question": _take(row, "problem"), "solution": _take(row, "answer"), **kept}


def _humaneval(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _take(row, name) for name in ("test", "entry_point")} | {"code": _take(row, "prompt")}


def _mmlu(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"question": _take(row, "question"), "choices": _take(row, "choices"), "answer": _take(row, "answer")}


def _arc(row: Mapping[str, Any]) -> dict[str, Any]:
    choices = _take(row, "choices")
    if not isinstance(choices, Mapping) or not {"text", "label"} <= choices.keys():
        raise RowError("`choices` has no text and label")
    labels = [str(label) for label in choices["label"]]
    answer = str(_take(row, "answerKey"))
    if answer not in labels:
        raise RowError(f"`answerKey` is {answer}, which is none of {', '.join(labels)}")
    return {"question": _take(row, "question"), "ends": list(choices["text"]), "answer": labels.index(answer)}


NAMED: dict[str, NamedSet] = {
    "gsm8k": NamedSet("answer", "openai/gsm8k", "test", _gsm8k, "grade-school word problems", "main"),
    "math500": NamedSet("answer", "HuggingFaceH4/MATH-500", "test", _math500, "competition problems"),
    "humaneval": NamedSet("code", "openai/openai_humaneval", "test", _humaneval, "Python functions with tests"),
    "mmlu": NamedSet("choice", "cais/mmlu", "test", _mmlu, "57 subjects, the likeliest letter of four", "all"),
    "arc_easy": NamedSet("choice", "allenai/ai2_arc", "test", _arc, "school science, the likeliest text", "ARC-Easy"),
    "arc_challenge": NamedSet("choice", "allenai/ai2_arc", "test", _arc, "the harder of them", "ARC-Challenge"),
}


@dataclass(frozen=True, slots=True)
class Reading:
    """How sets become problems of a model."""

    model: ServedModel
    system: str | None = None
    instruction: str | None = None
    """In the place of a named set's own, behind the question; empty for none."""
    limit: int | None = None
    """Use this many problems, drawn with the seed."""
    seed: int = 0
    reward: RewardBlock | None = None
    """Of files, in the place of what their columns ask for."""

    def data(self, source: SourceBlock) -> DataBlock:
        recipe = self.model.source.recipe
        return DataBlock(
            train=source,
            system=self.system,
            max_prompt_tokens=max(1, self.model.context - 1),
            template_date=None if recipe is None else recipe.data.template_date,
        )


def read_named(name: str, path: str | None, reading: Reading) -> ProblemSet:
    """A set of the table.

    Args:
        path: Of its data in a file, in the columns in which it is published; the hub's when left out.

    Raises:
        DataError: It cannot be read.
    """
    named = NAMED[name]
    source = SourceBlock(path=path or named.hub, split=named.split, subset=None if path else named.subset)
    try:
        table = read_table(source)
    except DataError as error:
        remedy = f"--data {name}=FILE names a copy of {named.hub}, in JSON, JSONL, CSV or Parquet"
        raise DataError(f"{error} {remedy}" if path is None else str(error)) from error
    return _problems(name, named.kind, table, named.read, reading)


def read_own(name: str, path: str, reading: Reading) -> ProblemSet:
    """A file of the user's: with ``choices`` and ``answer`` of choices, with ``test`` of code, or with a reference.

    Raises:
        DataError: It cannot be read, or nobody can tell what is right.
    """
    source = SourceBlock(path=path)
    table = read_table(source)
    columns = {column for row in table.rows for column in row.columns}
    if "choices" in columns:
        return _problems(name, "choice", table, _own_choice, reading)
    reward = reading.reward
    if reward is None and "test" in columns:
        reward = RewardBlock.model_validate({"name": "python_tests"})
    elif reward is None:
        reference = next(
            (column for column in ("solution", "answer", "reference", "target") if column in columns), None
        )
        if reference is None:
            raise DataError(
                f"{path}: has none of the columns solution, answer, test, choices: name what judges, --reward NAME or "
                "file.py:function"
            )
        reward = RewardBlock.model_validate({"name": "math_accuracy"})
        if reference != "solution":
            source = SourceBlock(path=path, columns={"solution": reference})
    if "question" in columns and not {"prompt", "messages", "query"} & columns:
        source = source.model_copy(update={"columns": {**source.columns, "prompt": "question"}})
    source = source.model_copy(update={"rows": _limit(reading.limit, len(table.rows))})
    prompts = load_prompts(
        source, reading.data(source), reading.model.tokenizer, reading.seed, vision=reading.model.vision
    )
    return ProblemSet(name, "code" if reward.name == "python_tests" else "answer", prompts=prompts, reward=reward)


def read_evaluations(recipe: Recipe, reading: Reading) -> list[ProblemSet]:
    """What a recipe measures on its held-out rows, as it does: each of its evaluations that generates.

    Raises:
        DataError: It has none, or their rows cannot be read.
    """
    rewards = [(block, recipe.reward_of(block)) for block in recipe.evaluations.values()]
    sets = [_read_evaluation(recipe, block, reward, reading) for block, reward in rewards if reward is not None]
    if not sets:
        what = "measures a loss, and no answers" if rewards else "has no evaluation"
        raise DataError(f"the recipe {what}: name sets, --sets {','.join(NAMED)} or a file of yours")
    return sets


def _read_evaluation(recipe: Recipe, block: EvaluationBlock, reward: RewardBlock, reading: Reading) -> ProblemSet:
    source = block.data
    if reading.limit is not None:
        source = source.model_copy(update={"rows": _limit(reading.limit, len(read_table(source).rows))})
    data = recipe.data.model_copy(update={"system": reading.system})
    prompts = load_prompts(source, data, reading.model.tokenizer, recipe.run.seed, vision=reading.model.vision)
    return ProblemSet(
        block.name,
        "answer",
        prompts=prompts,
        reward=reward,
        threshold=block.threshold,
        samples=block.samples,
        temperature=block.temperature,
        top_p=recipe.rollout.top_p if block.top_p is None else block.top_p,
        top_k=recipe.rollout.top_k if block.top_k is None else block.top_k,
        min_p=recipe.sampling.min_p if block.min_p is None else block.min_p,
        repetition_penalty=recipe.sampling.repetition_penalty,
        ends=tuple(recipe.sampling.stop),
        max_new_tokens=block.max_new_tokens or recipe.rollout.max_new_tokens,
    )


def _limit(limit: int | None, num_rows: int) -> int | None:
    return None if limit is None else min(limit, num_rows)


def _problems(
    name: str, kind: Kind, table: Table, read: Callable[[Mapping[str, Any]], dict[str, Any]], reading: Reading
) -> ProblemSet:
    """The rows of a table as problems; rows that are none are named, and refused."""
    rows: Rows[Any] = Rows(skipped=table.bad)
    for row in table.rows:
        try:
            values = read(row.columns)
            rows.append(_choice(f"{name}:{row.number}", values) if kind == "choice" else values)
        except RowError as error:
            rows.skipped.append(BadRow(table.place, row.number, str(error)))
    refuse_bad_rows(table.place, rows.skipped, 0)
    kept = list(rows)
    if reading.limit is not None:
        drawn = sorted(permutation(len(kept), reading.seed, f"rows of {name}")[: reading.limit])
        kept = [kept[index] for index in drawn]
    if kind == "choice":
        return ProblemSet(name, kind, choices=kept)
    prompts = _rendered(name, kept, kind, reading)
    reward = RewardBlock.model_validate({"name": "python_tests" if kind == "code" else "math_accuracy"})
    stop = STOPS_OF_CODE if kind == "code" and not reading.model.has_template else ()
    return ProblemSet(name, kind, prompts=prompts, reward=reward, stop=stop)


def _rendered(name: str, rows: Sequence[dict[str, Any]], kind: Kind, reading: Reading) -> list[Prompt]:
    """Prompts in the model's chat template, or plain texts where it has none."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"{name}.jsonl"
        lines = (json.dumps(_prompt_row(values, kind, reading)) + "\n" for values in rows)
        path.write_text("".join(lines), encoding="utf-8")
        source = SourceBlock(path=str(path))
        return load_prompts(
            source, reading.data(source), reading.model.tokenizer, reading.seed, vision=reading.model.vision
        )


def _prompt_row(values: dict[str, Any], kind: Kind, reading: Reading) -> dict[str, Any]:
    """A row in the project's own columns."""
    asked = BOXED if kind == "answer" else WRITE_CODE
    asked = asked if reading.instruction is None else reading.instruction
    if kind == "code":
        head = values["code"]
        if not reading.model.has_template:
            return {"text": head, **values}
        return {"messages": [_user(f"{asked}\n```python\n{head.rstrip()}\n```".lstrip())], **values}
    question = values.pop("question")
    if not reading.model.has_template:
        return {"text": f"Question: {question}\nAnswer:", **values}
    return {"messages": [_user(f"{question}\n{asked}".rstrip())], **values}


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _own_choice(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the user's: ``choices`` a list of texts, ``answer`` the place of the right one, its letter or itself."""
    refuse_media(row)
    question = next((row[name] for name in ("question", "prompt", "text", "query") if name in row), None)
    choices, answer = _take(row, "choices"), _take(row, "answer")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise RowError("`choices` is no list of texts")
    if answer in choices:
        answer = choices.index(answer)
    elif isinstance(answer, str) and len(answer) == 1 and answer.upper() in _LETTERS:
        answer = _LETTERS.index(answer.upper())
    return {"question": question, "ends": choices, "answer": answer}


def _choice(id_: str, values: dict[str, Any]) -> Choice:
    """With ``ends`` the texts themselves follow the question, as in ARC; with ``choices`` their letters, as in MMLU.

    Raises:
        RowError: There is no question, there are too few ends, or the right one is none of them.
    """
    question, right = values["question"], values["answer"]
    given = values.get("ends", values.get("choices"))
    if not isinstance(question, str) or not question.strip():
        raise RowError("there is no question")
    if not isinstance(given, Sequence) or not 2 <= len(given) <= len(_LETTERS):
        raise RowError(f"`choices` are no list of 2 to {len(_LETTERS)}")
    if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(given):
        raise RowError(f"`answer` is {right!r}, and the choices are numbered 0 to {len(given) - 1}")
    if "ends" in values:
        return Choice(id_, f"Question: {question.strip()}\nAnswer:", tuple(f" {end}" for end in given), right)
    letters = _LETTERS[: len(given)]
    lines = "".join(f"{letter}. {choice}\n" for letter, choice in zip(letters, given, strict=True))
    return Choice(id_, f"{question.strip()}\n{lines}Answer:", tuple(f" {letter}" for letter in letters), right)


def _take(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise RowError(f"`{name}` is missing (it has {', '.join(row)})")
    return row[name]


def table_lines() -> Iterator[str]:
    """The named sets, for people."""
    for name, named in NAMED.items():
        yield f"{name:<14} {named.summary} ({named.hub})"
