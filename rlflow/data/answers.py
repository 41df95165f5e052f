"""What reads the rows of an algorithm that generates nothing: examples, pairs of answers, labelled answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from rlflow.data.errors import Rows
from rlflow.data.examples import load_examples
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.preferences import load_labelled, load_pairs
from rlflow.recipe import DataBlock

LOADERS: dict[str, Callable[[DataBlock, Any, int, ImageProcessor | None], Rows[Any]]] = {
    "example": load_examples,
    "pair": load_pairs,
    "margin_pair": partial(load_pairs, for_reward_model=True),
    "labelled": load_labelled,
    "judged": load_labelled,
}
"""An algorithm's ``data_row`` -> function of the data block, the tokenizer, the run's seed, and the image
processor of a model that takes pictures."""
