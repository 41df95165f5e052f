"""What a stage that samples leaves to those behind it, and how they name it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rlflow.recipe.block import Block, Conflict, PositiveInt
from rlflow.recipe.problems import Problem, nearest
from rlflow.recipe.yaml_source import Document

if TYPE_CHECKING:
    from rlflow.recipe.schema import Recipe

ROWS_FILE = "final/rows.jsonl"
"""Where, in the directory of a stage that samples, the kept rows are."""
_SOURCES = (("data", "train"), ("demonstrations", "train"))
"""The keys under which a stage may name an earlier one."""


class KeepBlock(Block):
    form: Literal["answers", "pairs"] = "answers"
    """answers: conversations that SFT reads. pairs: a better and a worse answer to a prompt, which DPO reads."""
    where: str | None = None
    """Which answers are good, e.g. `reward > 0.9`: a condition as `rlflow inspect --where` has it. Of a pair the better
    one must be. Answers that were cut at their longest, that no reward could score or that say nothing never are."""
    at_most: PositiveInt | None = None
    """Good answers of a prompt that are kept, those of the highest reward; best of n with 1. All when absent; of pairs
    one, and with more the second best and the second worst, and so on."""
    at_least: PositiveInt = 1
    """A prompt with fewer good answers is left out."""


def sampling_conflicts(recipe: Recipe, keep: KeepBlock) -> Iterator[Conflict]:
    """What a stage that samples cannot do."""
    if recipe.model.path is None:
        yield Conflict(("model.path", "algorithm.name"), "names the model that answers, and a new one says nothing")
    if not recipe.rewards:
        if keep.form == "pairs":
            yield Conflict(("algorithm.keep.form", "rewards"), "are of rewards, and there are none: give at least one")
        if keep.where is not None and "reward" in keep.where:
            yield Conflict(("algorithm.keep.where", "rewards"), "is of rewards, and there are none: give at least one")
    for key, block in recipe.evaluations.items():
        if recipe.reward_of(block) is None:
            reason = "measures a loss, and nothing is trained in this stage: give evaluation.reward, or set it to null"
            yield Conflict((key, "algorithm.name"), reason)


def without_shared_sources(own: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """What all stages share, without the sources in the place of which a stage names an earlier one."""
    kept = dict(shared)
    for block, key in _SOURCES:
        mine, theirs = own.get(block), kept.get(block)
        source = mine.get(key) if isinstance(mine, dict) else None
        if isinstance(source, dict) and "stage" in source and isinstance(theirs, dict):
            kept[block] = {name: value for name, value in theirs.items() if name != key}
    return kept


def name_rows(
    document: Document, data: dict[str, Any], made: Mapping[str, str | None], problems: list[Problem]
) -> None:
    """Gives the sources that name an earlier stage the path of its rows.

    Args:
        document: What the stage was given.
        data: Its resolved blocks, which are changed.
        made: Each earlier stage, and where its rows will be; None of one that leaves none.
    """
    for block, key in _SOURCES:
        given = data[block][key] if isinstance(data.get(block), dict) and key in data[block] else None
        several = isinstance(given, list)
        for index, source in enumerate(given if isinstance(given, list) else [given]):
            if not isinstance(source, dict) or not isinstance(stage := source.get("stage"), str):
                continue
            if made.get(stage) is not None:
                source["path"] = made[stage]
            elif not str(source.get("path")).endswith(ROWS_FILE):
                # A resolved recipe has the path.
                source["path"] = stage
                place = (block, key, *((index,) if several else ()), "stage")
                problems.append(Problem.at(document.place(place), ".".join(map(str, place)), _unknown(stage, made)))


def _unknown(stage: str, made: Mapping[str, str | None]) -> str:
    if stage in made:
        return f"{stage} trains a model and leaves no rows: name a stage of algorithm sample"
    sampling: Sequence[str] = [name for name, path in made.items() if path is not None]
    near = nearest(stage, sampling)
    there = f"there are {', '.join(sampling)}" if sampling else "there is none"
    return f"no stage before this one samples and is called {stage}: " + (f"did you mean {near}?" if near else there)
