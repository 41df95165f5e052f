"""What reads the rows of an algorithm that generates nothing: examples, pairs, labelled answers, sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from rlflow.data.errors import Rows
from rlflow.data.examples import load_examples
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.preferences import load_labelled, load_pairs
from rlflow.data.sequences import load_sequences
from rlflow.recipe import AlgorithmBlock, DataBlock

Loader = Callable[[DataBlock, Any, int, ImageProcessor | None], Rows[Any]]
"""Of the data block, the tokenizer, the run's seed, and the image processor of a model that takes pictures."""
LOADERS: dict[str, Loader] = {
    "example": load_examples,
    "pair": load_pairs,
    "margin_pair": partial(load_pairs, for_reward_model=True),
    "labelled": load_labelled,
    "judged": load_labelled,
}
"""An algorithm's ``data_row`` -> what reads it, where the rest of the algorithm does not matter."""


def loader_of(algorithm: AlgorithmBlock) -> Loader:
    """What reads the rows of an algorithm."""
    learning = algorithm.learning
    return partial(load_sequences, algorithm=algorithm) if learning.held_out else LOADERS[learning.data_row]
