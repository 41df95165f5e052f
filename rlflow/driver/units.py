"""What an offline step draws and trains on: an example, a pair of answers, or a judged answer, as samples.

                 rows ------> units ------> with reference logprobs ------> samples with margins and weights
sft, pretrain    example      (example)                                     weights by the reduction
dpo and kin      pair         (chosen, rejected)                            aot, aot_unpaired: margins from a
                                                                            forward pass
reward_model     pair         (chosen, rejected)                            margins from the data
kto              judged       (answer, another's answer to its prompt)      margin = the batch's KL, the second
                                                                            sample is not trained
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rlflow.algorithms.preference_targets import aot_margins, aot_partners, kto_kl
from rlflow.algorithms.reductions import preference_weights
from rlflow.data.answers import LOADERS
from rlflow.data.errors import Rows
from rlflow.data.examples import Example
from rlflow.data.preferences import Labelled, Pair
from rlflow.driver import learner
from rlflow.driver.assemble import weigh
from rlflow.driver.stage import Stage
from rlflow.recipe import DataBlock, Recipe
from rlflow.types import Denominators, Sample

Unit = tuple[Sample, ...]


def load_units(recipe: Recipe, data: DataBlock, tokenizer: Any) -> Rows[Unit]:
    """The rows of ``data.train`` as the recipe's algorithm wants them; ``skipped`` names those that were left out.

    Raises:
        DataError: The rows cannot be used; which, and why.
    """
    data_row = recipe.algorithm.learning.data_row
    rows = LOADERS[data_row](data, tokenizer, recipe.run.seed)
    return Rows(_UNITS[data_row](rows, data.max_tokens), rows.skipped, rows.notes)


def example_units(rows: Sequence[Example], max_tokens: int) -> list[Unit]:
    """Each example alone."""
    return [(_sample(example),) for example in rows]


def pair_units(rows: Sequence[Pair], max_tokens: int) -> list[Unit]:
    """The chosen answer, then the rejected one."""
    return [
        (_sample(pair.chosen, label=1.0, margin=pair.margin), _sample(pair.rejected, label=-1.0, margin=pair.margin))
        for pair in rows
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
        )
        units.append((_sample(row.example, label=1.0 if row.label else -1.0), _sample(mismatched)))
    return units


_UNITS: dict[str, Callable[[Sequence[Any], int], list[Unit]]] = {
    "example": example_units,
    "pair": pair_units,
    "margin_pair": pair_units,
    "labelled": judged_units,
}
"""An algorithm's ``data_row`` -> function of the rows and the longest sequence."""


def with_reference(stage: Stage, units: Sequence[Unit]) -> list[Unit]:
    """The units with their reference logprobs; nothing to do when they have them."""
    if not stage.recipe.needs_reference or all(unit[0].ref_logprobs is not None for unit in units):
        return list(units)
    scored = iter(learner.with_reference(stage, [sample for unit in units for sample in unit]))
    return [tuple(next(scored) for _ in unit) for unit in units]


def make_batch(stage: Stage, units: Sequence[Unit]) -> tuple[list[Sample], Denominators]:
    """The samples of one optimizer update: what needs the whole batch is put into margins and weights here."""
    algorithm, max_tokens = stage.algorithm, stage.recipe.data.max_tokens
    if algorithm.learning.batch_targets == "mismatched_kl":
        kl = _mismatched_kl(stage, [mismatched for _, mismatched in units])
        return weigh([replace(answer, margin=kl) for answer, _ in units], 1, algorithm, max_tokens)
    samples = [sample for unit in units for sample in unit]
    if not stage.recipe.is_paired:
        return weigh(samples, 1, algorithm, max_tokens)
    if algorithm.preference.loss in ("aot", "aot_unpaired"):
        samples = _with_aot_margins(stage, samples)
    counts = np.array([int(sample.loss_mask.sum()) for sample in samples])
    labels = np.array([sample.label for sample in samples])
    weights, denominators = preference_weights(algorithm.loss.reduction, counts, labels, max_tokens)
    weighed = [
        replace(sample, loss_weights=np.where(sample.loss_mask, weight, 0.0).astype(np.float32))
        for sample, weight in zip(samples, weights, strict=True)
    ]
    return weighed, denominators


def _mismatched_kl(stage: Stage, samples: Sequence[Sample]) -> float:
    if stage.algorithm.preference.reference_free:
        return 0.0
    kept = [sample for sample in samples if sample.loss_mask.any()]
    if not kept:
        return 0.0
    logprobs = learner.trainer_logprobs(stage, kept)
    return kto_kl(_sums(kept, logprobs), _sums(kept, [_reference(sample) for sample in kept]))


def _with_aot_margins(stage: Stage, samples: Sequence[Sample]) -> list[Sample]:
    """Margins by rank, from the policy's and the reference's logprobs of the whole batch."""
    scores = _sums(samples, learner.trainer_logprobs(stage, samples))
    references = _sums(samples, [_reference(sample) for sample in samples])
    if stage.algorithm.preference.length_normalized:
        lengths = np.array([max(1, sample.loss_mask.sum()) for sample in samples])
        scores, references = scores / lengths, references / lengths
    if stage.algorithm.preference.loss == "aot":
        margins = np.repeat(aot_margins(scores[::2] - scores[1::2], references[::2] - references[1::2]), 2)
    else:
        ratios = scores - references
        margins = np.stack(aot_partners(ratios[::2], ratios[1::2]), axis=1).ravel()
    return [replace(sample, margin=float(margin)) for sample, margin in zip(samples, margins, strict=True)]


def _sums(samples: Sequence[Sample], logprobs: Sequence[np.ndarray]) -> np.ndarray:
    """float64 [S]: over each sample's loss tokens."""
    return np.array([values[s.loss_mask].sum(dtype=np.float64) for s, values in zip(samples, logprobs, strict=True)])


def _reference(sample: Sample) -> np.ndarray:
    return np.zeros(len(sample.token_ids)) if sample.ref_logprobs is None else sample.ref_logprobs


def _prompt(example: Example) -> np.ndarray:
    """int32: the tokens before the first that is trained."""
    return example.token_ids[: int(example.loss_mask.argmax())]


def _sample(example: Example, *, label: float = 0.0, margin: float = 0.0) -> Sample:
    return Sample(
        token_ids=example.token_ids,
        loss_mask=example.loss_mask,
        loss_weights=np.zeros(len(example.token_ids), dtype=np.float32),
        label=label,
        margin=margin,
    )
