"""What an offline step draws: an example, a pair of answers, or a judged answer, as samples.

    sft, pretrain      example  (example,)
    dpo and kin        pair     (chosen, rejected)
    reward_model       pair     (chosen, rejected), with their margin
    kto                judged   (answer, another's answer to its prompt)
    apo_zero_unpaired  judged   (answer,)
    classification, embedding, reranker   the sequences of a row

rlflow.algorithms.batch_targets has what becomes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rlflow.algorithms.batch_targets import Unit
from rlflow.data.answers import loader_of
from rlflow.data.errors import Rows
from rlflow.data.examples import Example
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.preferences import Labelled, Pair
from rlflow.data.sequences import SequenceRow
from rlflow.driver.learner import Learner
from rlflow.recipe import DataBlock, Recipe
from rlflow.types import Sample


def load_units(recipe: Recipe, data: DataBlock, tokenizer: Any, vision: ImageProcessor | None = None) -> Rows[Unit]:
    """The rows of ``data.train`` as the recipe's algorithm wants them; ``skipped`` names those that were left out.

    Raises:
        DataError: The rows cannot be used; which, and why.
    """
    learning = recipe.algorithm.learning
    rows = loader_of(recipe.algorithm)(data, tokenizer, recipe.run.seed, vision)
    return Rows(_UNITS[learning.data_row](rows, data.max_tokens), rows.skipped, rows.notes)


def score_units(learner: Learner, units: Sequence[Unit]) -> list[Unit]:
    """The units with what the algorithm's scorers say of their samples; nothing to do when they have it."""
    scored = iter(learner.score([sample for unit in units for sample in unit]))
    return [tuple(next(scored) for _ in unit) for unit in units]


def example_units(rows: Sequence[Example], max_tokens: int) -> list[Unit]:
    """Each example alone."""
    return [(_sample(example),) for example in rows]


def pair_units(rows: Sequence[Pair], max_tokens: int) -> list[Unit]:
    """The chosen answer, then the rejected one."""
    return [(_sample(pair.chosen, label=1.0), _sample(pair.rejected, label=-1.0)) for pair in rows]


def margin_units(rows: Sequence[Pair], max_tokens: int) -> list[Unit]:
    """As `pair_units`, with the pair's margin."""
    units = pair_units(rows, max_tokens)
    return [
        tuple(replace(sample, reward_margin=pair.margin) for sample in unit)
        for pair, unit in zip(rows, units, strict=True)
    ]


def judged_units(rows: Sequence[Labelled], max_tokens: int) -> list[Unit]:
    """Each answer with a mismatched one: its prompt, and the answer of a row to another prompt.

    KTO's KL is estimated on these (arXiv 2402.01306, section 4.1). Which row it is depends on the data alone, half the
    rows away or the next behind with another prompt, so that its reference logprobs can be computed once.
    """
    units = []
    prompts = [_prompt(row.example).tobytes() for row in rows]
    all_the_same = len(set(prompts)) == 1
    for index, row in enumerate(rows):
        prompt = _prompt(row.example)
        ahead = ((index + len(rows) // 2 + k) % len(rows) for k in range(len(rows)))
        other = rows[index - 1 if all_the_same else next(i for i in ahead if prompts[i] != prompts[index])]
        answer = other.example.token_ids[len(_prompt(other.example)) :]
        trained = other.example.loss_mask[len(_prompt(other.example)) :]
        mismatched = Example(
            f"{row.id} with {other.id}",
            np.concatenate([prompt, answer])[:max_tokens],
            np.concatenate([np.zeros(len(prompt), dtype=bool), trained])[:max_tokens],
            row.example.images,
        )
        units.append((_sample(row.example, label=1.0 if row.label else -1.0), _sample(mismatched)))
    return units


def answer_units(rows: Sequence[Labelled], max_tokens: int) -> list[Unit]:
    """Each answer alone, with its label."""
    return [(_sample(row.example, label=1.0 if row.label else -1.0),) for row in rows]


def sequence_units(rows: Sequence[SequenceRow], max_tokens: int) -> list[Unit]:
    """The sequences of each row, of which one number or several are said at their last token."""
    return [
        tuple(
            Sample(
                token_ids=token_ids,
                loss_mask=np.arange(len(token_ids)) == len(token_ids) - 1,
                loss_weights=np.zeros(len(token_ids), dtype=np.float32),
                label=label,
                targets=row.targets,
                images=row.images,
            )
            for token_ids, label in zip(row.token_ids, row.labels, strict=True)
        )
        for row in rows
    ]


_UNITS: dict[str, Callable[[Sequence[Any], int], list[Unit]]] = {
    "example": example_units,
    "pair": pair_units,
    "margin_pair": margin_units,
    "labelled": judged_units,
    "judged": answer_units,
    "classified": sequence_units,
    "related": sequence_units,
    "ranked": sequence_units,
}
"""An algorithm's ``data_row`` -> function of the rows and the longest sequence."""


def _prompt(example: Example) -> np.ndarray:
    """int32: the tokens before the first that is trained."""
    return example.token_ids[: int(example.loss_mask.argmax())]


def _sample(example: Example, *, label: float = 0.0) -> Sample:
    return Sample(
        token_ids=example.token_ids,
        loss_mask=example.loss_mask,
        loss_weights=np.zeros(len(example.token_ids), dtype=np.float32),
        label=label,
        images=example.images,
    )
