"""Before the first step: a model's numbers of packed sequences with pictures must be those of plain transformers.

Plain transformers is the same model called with one sequence at a time, with what its processor makes of the pictures,
and with positions that it computes itself. Of two sequences with a picture each and one without between them, the
numbers must agree, and so must their gradients by the pictures' pixels: those show in new models too, whose weights are
too small for the numbers to tell, and another sequence's picture has exactly none.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from textwrap import shorten
from typing import Any, Protocol

import numpy as np
import torch

from rlflow.actors.train_engines import packed_attention
from rlflow.actors.train_engines.probe import Answer, ProbedModule, difference, leak, use_own_attention
from rlflow.actors.train_engines.tower import SOUND, Images, Pictures, Tower
from rlflow.actors.vision import set_text_attention
from rlflow.data.errors import DataError, RowError
from rlflow.data.messages import Kind
from rlflow.recipe import ModelBlock

logger = logging.getLogger(__name__)
_WIDTHS = (32, 64)
"""Of the two pictures."""
_PIXELS = ("pixel_values", "pixel_values_videos", SOUND)
"""Of pictures, of videos and of recordings."""


class SeeingModule(ProbedModule, Protocol):
    """A TokenModel or ScalarModel."""

    tower: Tower | None

    def parameters(self) -> Any: ...

    def probe(self, sequences: Sequence[torch.Tensor], pictures: Pictures | None = None) -> list[torch.Tensor]: ...

    def probe_plain(self, token_ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor: ...


def prepare_tower(module: SeeingModule, block: ModelBlock, device: torch.device) -> None:
    """Settles whether a model can be trained on pictures, once it is known how its decoder is run.

    Raises:
        ValueError: It cannot, and the recipe trains its tower or its projector.
    """
    tower = module.tower
    if tower is None:
        return
    tower.problem = _problem(module, tower, device, tower.processor.kinds[0])
    if not tower.problem and tower.processor.takes_videos:
        tower.video_problem = _problem(module, tower, device, "video")
    trains_tower = bool({"projector", "vision", "audio"} & set(block.train))
    if trains_tower:
        tower.require()
    elif tower.problem:
        kind = type(module.model).__name__
        logger.warning("%s: %ss are refused, text is not: %s", kind, tower.name, tower.problem)
    elif tower.video_problem:
        logger.warning("%s: videos are refused, pictures are not: %s", type(module.model).__name__, tower.video_problem)
    tower.is_always_run = trains_tower


@torch.enable_grad()
def _problem(module: SeeingModule, tower: Tower, device: torch.device, kind: Kind) -> str:
    """Why pictures, videos or recordings cannot be trained on; empty where they can."""
    if not module.passes.packs:
        return f"its sequences are not packed ({module.passes.reason})"
    if module.passes.longest is not None:
        return "its rotary embedding depends on the longest sequence"
    try:
        sequences, images = _sequences(tower, kind)
    except (DataError, RowError) as error:
        return str(error)
    try:
        if kind == "video" and (problem := tower.order_problem()):
            return problem
        return _disagreement(module, tower, sequences, images, device)
    except torch.OutOfMemoryError:
        raise
    # What a model's code makes of pictures is not ours, and it may be right without.
    except Exception as error:
        return shorten(f"packed, it fails on them ({type(error).__name__}: {error})", 200)
    finally:
        set_text_attention(module.model, packed_attention.NAME)


def _sequences(tower: Tower, kind: Kind) -> tuple[list[np.ndarray], list[Images]]:
    """Token ids int32 [L] of three sequences, and the pictures, videos or recordings of each.

    Raises:
        DataError, RowError: As ``Tower.example``.
    """
    processor, configs = tower.processor, (tower.model.config, tower.model.config.get_text_config())
    fields = [(name, value) for config in configs for name, value in config.to_dict().items()]
    special = {processor.image_token_id}
    for name, value in fields:
        if name.endswith(("_token_id", "_token_index")):
            special.update(value if isinstance(value, list) else [value])
    vocabulary = range(min(configs[1].vocab_size, 4096))
    usable = np.array([token for token in vocabulary if token not in special], dtype=np.int32)
    texts = np.random.default_rng(0).choice(usable, (3, 11))
    small, large = _WIDTHS
    first, of_first = tower.example(texts[0], kind, width=small)
    try:
        second, of_second = tower.example(texts[1], kind, width=large + (processor.window if kind == "audio" else 0))
    except RowError:
        # Some hear one window alone.
        second, of_second = tower.example(texts[1], kind, width=large)
    return [first, texts[2], second], [of_first, (), of_second]


def _disagreement(
    module: SeeingModule,
    tower: Tower,
    sequences: list[np.ndarray],
    images: list[Images],
    device: torch.device,
) -> str:
    tokens = [torch.from_numpy(ids).long().to(device) for ids in sequences]
    bounds = np.cumsum([0, *map(len, sequences)])
    together = tower.read(np.concatenate(sequences), bounds, images, device)
    start = 0
    for index, own in enumerate(images):
        set_text_attention(module.model, packed_attention.NAME)
        packed = _answer(lambda: module.probe(tokens, together), index, together.inputs)
        set_text_attention(module.model, tower.own_attention)
        use_own_attention(module.model)
        if not own:
            alone = module.probe_plain(tokens[index]).detach().float()
            if not float(packed.gradient.norm()) <= leak(module.model):
                return "packed, a sequence without a picture depends on the others'"
            same = torch.ones(1)
            packed, plain = Answer(packed.numbers, same), Answer(alone, same)
        else:
            inputs = tower.read(sequences[index], np.array([0, len(sequences[index])]), [own], device).inputs
            plain = _answer(lambda inputs=inputs, index=index: [module.probe_plain(tokens[index], **inputs)], 0, inputs)
            # Beside a longer recording a short one is filled up.
            inside = (slice(start, start + len(plain.gradient)), ..., slice(plain.gradient.shape[-1]))
            others = packed.gradient.clone()
            others[inside] = 0
            if not float(others.norm() / packed.gradient.norm()) < leak(module.model):
                return "packed, a sequence depends on another one's picture"
            packed = Answer(packed.numbers, packed.gradient[inside])
            start += len(plain.gradient)
        if problem := difference(module.model, packed, plain):
            return f"packed with pictures, {problem}"
    return ""


def _answer(numbers: Any, index: int, inputs: dict[str, torch.Tensor]) -> Answer:
    """A sequence's numbers, and the gradient of their sum by the pixels of all pictures, [patches, ...]."""
    name = next(name for name in _PIXELS if name in inputs)
    inputs[name] = inputs[name].detach().requires_grad_()
    own = numbers()[index].float()
    if not own.requires_grad:
        return Answer(own.detach(), torch.zeros(1))
    (gradient,) = torch.autograd.grad(own.sum(), inputs[name], allow_unused=True)
    if gradient is None:
        gradient = torch.zeros_like(inputs[name])
    inputs[name].requires_grad_(False)
    gradient = gradient.float()
    return Answer(own.detach(), gradient.flatten(0, 1) if gradient.ndim == 5 else gradient)
