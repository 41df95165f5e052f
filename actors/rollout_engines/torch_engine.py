"""Generation with transformers alone: any machine, batched, KV-cached, with the logprobs tokens were drawn with.

Requests come and go between two steps, and so do weights. A prompt is read once for all of its samples.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig
from transformers.initialization import no_init_weights

from rlflow.actors.checkpoint_names import kept_buffers, to_model
from rlflow.actors.rollout_engines.engine import CacheAtUpdate, Written
from rlflow.actors.rollout_engines.prompt_logprobs import PromptLogprobs, prompt_logprobs
from rlflow.actors.rollout_engines.sent_weights import Chunks
from rlflow.actors.rollout_engines.torch_generation import Generation
from rlflow.actors.rollout_engines.torch_reading import Images, Reader, UnpaddedReading
from rlflow.actors.rollout_engines.torch_slots import GROUPED, SlotReading
from rlflow.actors.train_engines.probe import narrow_windows, use_own_attention
from rlflow.actors.train_engines.tower import Tower, require_tower
from rlflow.actors.vision import language_model_class, require_writer, sees, set_text_attention, text_attention
from rlflow.data.errors import DataError, RowError
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.messages import Kind
from rlflow.data.vocabulary import placeholder_ids
from rlflow.recipe import ModelBlock
from rlflow.types import Completion, SampleRequest, SamplingParams

logger = logging.getLogger(__name__)
_HEATS = (1.0, 10.0)
"""Temperatures at which ways of reading are compared: where one token has nearly all of the probability, its logprob is
0 whatever the others' are."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a model generates."""

    name: str
    reader: Reader
    attention: str | None = None
    """As transformers calls it; None is the model's own."""


GROUPED_SLOTS = Way("slots, queries grouped", partial(SlotReading, in_blocks=True), GROUPED)
SLOTS = Way("slots", SlotReading)
OWN_CACHE = Way("texts of one length at a time", partial(UnpaddedReading, is_cached=True))
NO_CACHE = Way("texts of one length at a time, without a cache", partial(UnpaddedReading, is_cached=False))


class TorchEngine:
    def __init__(
        self,
        model_dir: str,
        *,
        dtype: str,
        max_num_seqs: int,
        trust_remote_code: bool = False,
        adapted: ModelBlock | None = None,
        model: Any | None = None,
    ) -> None:
        """Builds the model without weights: they arrive through load_weights.

        Args:
            adapted: Of a policy with an adapter, its block: the base is loaded here, once, and what arrives is the
                adapter alone.
            model: A model that has its weights, where none are waited for. Engines that are never stepped at the same
                time may share it, as adapters of one base do.
        """
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.max_num_seqs = max_num_seqs
        self.model: Any
        self.left_out: torch.Tensor | None = None
        self.is_settled = False
        """The way is known to be right for this model."""
        self.is_adapted = adapted is not None
        if model is not None:
            self.model, self.synced = model.to(self.device).eval(), _synced(model)
        elif adapted is not None:
            from rlflow.actors import adapters

            options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
            self.model = adapters.load_adapted(adapted, seed=0, device=self.device, **options).eval()
            self.synced = adapters.adapter_parameters(self.model)
        else:
            config = AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
            with no_init_weights():
                self.model = language_model_class(config).from_config(
                    config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
                )
            self.model.tie_weights()
            self.model.to(self.device).eval()
            self.synced = _synced(self.model)
        require_writer(self.model.config)
        use_own_attention(self.model)
        self.own_attention = text_attention(self.model)
        self.tower: Tower | None = None
        if sees(self.model.config):
            self.tower = Tower(self.model, ImageProcessor(model_dir, trust_remote_code=trust_remote_code))
        self.way = SLOTS
        self.generation = Generation(self.model, self._reader(self.way), max_num_seqs, version=-1)
        if model is not None:
            with torch.inference_mode():
                self._choose_way()
            # Another engine may be made of the same model: `step` sets the attention that its own way needs.
            self._attend_by(None)
            self.generation = Generation(self.model, self._reader(self.way), max_num_seqs, version=0)

    @torch.inference_mode()
    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], version: int, cache: CacheAtUpdate = "recompute"
    ) -> int:
        """Copies every weight in. The first time, it also settles how the model generates; a cache of the model's own
        is looked at every time, as what it gets wrong may be too small to see in weights that are new.

        Returns:
            How many tokens of completions under way are read again.

        Raises:
            ValueError: For a name or shape that the model does not have, or one left out.
            WeightsLost: They stopped coming.
        """
        self._copy_in(weights)
        self.generation.change_version(version)
        before = self.way
        if not self.is_settled or self.way is OWN_CACHE:
            self._choose_way()
        if cache == "recompute" or self.way is not before:
            return self.generation.read_again(self._reader(self.way))
        return 0

    def _copy_in(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        missing = set(self.synced)
        are_kept = not isinstance(weights, Chunks)
        for name, tensor in weights if self.is_adapted else to_model(self.model, weights, are_kept=are_kept):
            if name not in self.synced:
                raise ValueError(f"weight sync: the engine's model has no parameter {name}")
            if self.synced[name].shape != tensor.shape:
                shapes = f"{tuple(tensor.shape)} sent, {tuple(self.synced[name].shape)} here"
                raise ValueError(f"weight sync: {name} has another shape: {shapes}")
            place = self.synced[name]
            if not isinstance(place, nn.Parameter):
                # In the trainer's dtype: by rounding, a router would choose other experts.
                place.data = torch.empty_like(place, dtype=tensor.dtype)
            place.copy_(tensor)
            missing.discard(name)
        if missing:
            raise ValueError(f"weight sync: {len(missing)} parameters were not sent, among them {sorted(missing)[0]}")

    def leave_out(self, ids: np.ndarray) -> None:
        """Gives ``ids`` of the vocabulary no probability from now on, and those of an earlier call theirs back."""
        self.left_out = torch.from_numpy(ids).to(self.device) if len(ids) else None

    def add(self, requests: Sequence[SampleRequest]) -> None:
        """Takes requests, which begin as there is room.

        Raises:
            ValueError: One has nothing to go on from or nothing to write, or an id that is here; none was taken.
        """
        taken = self.generation.ids
        for request in requests:
            if not len(request.token_ids) or request.params.max_new_tokens < 1:
                sizes = f"{len(request.token_ids)} prompt tokens, at most {request.params.max_new_tokens} new ones"
                raise ValueError(f"request {request.id} cannot be generated: {sizes}")
            if request.id in taken:
                raise ValueError(f"request {request.id} is there already")
            if request.images:
                require_tower(self.tower, request.images)
            taken.add(request.id)
        self.generation.waiting.extend(requests)

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Makes the next token of everything under way. Returns what has finished, in the order it was added."""
        self._attend_by(self.way.attention)
        return self.generation.step(self.left_out)

    def written(self, seen: Mapping[int, int]) -> dict[int, Written]:
        """Shows what is under way: of each request the tokens behind so many, and their logprobs."""
        return self.generation.written(seen)

    @torch.inference_mode()
    def abort(self, ids: Sequence[int]) -> list[Completion]:
        """Ends requests that are under way or waiting. Returns what was written of them."""
        return self.generation.abort(ids)

    @torch.inference_mode()
    def prompt_logprobs(self, token_ids: np.ndarray, k: int) -> PromptLogprobs:
        """What the model gives the tokens int [L] of a text, by transformers' forward pass of it alone. Nothing that is
        under way changes."""
        self._attend_by(None)
        return prompt_logprobs(self._logits(token_ids), token_ids, k)

    @property
    def num_running(self) -> int:
        return len(self.generation.rows)

    @property
    def num_waiting(self) -> int:
        return len(self.generation.waiting)

    def sleep(self) -> None:
        """Gives GPU memory back between generations."""
        assert not self.num_running, "an engine sleeps when nothing is under way"
        self.model.to("cpu")

    def wake(self) -> None:
        self.model.to(self.device)

    def close(self) -> None:
        """Nothing outlives the process."""

    def _choose_way(self) -> None:
        """The first whose logprobs of a few tokens are those of transformers' forward pass of each sequence alone;
        windows are made shorter than these texts meanwhile, so that they show."""
        ways = self._ways()
        before = self.way
        with narrow_windows(self.model):
            if not self._logits(_texts(self.model)[1]).isfinite().all():
                return
            for way in ways:
                if way is ways[-1] or all(self._is_right(way, _probe(_texts(self.model), heat)) for heat in _HEATS):
                    self.way = way
                    break
            if self.tower is not None and not self.is_settled:
                self.tower.problem = self._picture_problem(self.tower, "image")
                if not self.tower.problem and self.tower.processor.takes_videos:
                    self.tower.video_problem = self._picture_problem(self.tower, "video")
        self._attend_by(self.way.attention)
        self.is_settled = True
        if self.way is not before and self.way not in (GROUPED_SLOTS, SLOTS):
            logger.warning("%s generates from %s", type(self.model).__name__, self.way.name)

    def _ways(self) -> list[Way]:
        # Padding would enter a state that is carried from token to token; with small weights that does not show yet.
        if self.model._is_stateful:
            return [OWN_CACHE, NO_CACHE]
        can_group = self.model._supports_attention_backend and self.model._can_set_attn_implementation()
        grouped = [GROUPED_SLOTS] if can_group and self.own_attention == "sdpa" else []
        return [*grouped, SLOTS, OWN_CACHE, NO_CACHE]

    def _reader(self, way: Way) -> Reader:
        return partial(way.reader, tower=self.tower) if way in (GROUPED_SLOTS, SLOTS) else way.reader

    def _picture_problem(self, tower: Tower, kind: Kind) -> str:
        """Why the model cannot generate from pictures, or videos; empty where it can."""
        if self.way not in (GROUPED_SLOTS, SLOTS):
            return f"it generates from {self.way.name}: set rollout.engine: vllm"
        try:
            text, images = tower.example(_texts(self.model)[1], kind)
        except (DataError, RowError) as error:
            return str(error)
        if kind == "video" and (problem := tower.order_problem()):
            return problem
        before, self.left_out = self.left_out, torch.tensor(placeholder_ids(self.model.config), device=self.device)
        try:
            for heat in _HEATS:
                requests = [replace(request, images=images) for request in _probe([text, text[:-1]], heat)]
                if not self._is_right(self.way, requests):
                    return "logprobs of what it generates are not those of transformers: set rollout.engine: vllm"
        finally:
            self.left_out = before
        return ""

    def _is_right(self, way: Way, requests: Sequence[SampleRequest]) -> bool:
        generation = Generation(self.model, self._reader(way), max_num_seqs=3, version=0)
        generation.waiting.extend(requests)
        completions: dict[int, Completion] = {}
        self._attend_by(way.attention)
        try:
            while len(completions) < len(requests):
                completions |= {completion.id: completion for completion in generation.step(self.left_out)}
        except torch.OutOfMemoryError:
            raise
        # What a model's code makes of padding and caches is not ours; the next way may be right.
        except Exception as error:
            logger.info("%s: %s: %s", type(self.model).__name__, type(error).__name__, error)
            return False
        finally:
            self._attend_by(None)
        apart = torch.cat([self._differences(request, completions[request.id]) for request in requests])
        # In 16 bits a mixture of experts may route single tokens otherwise.
        exact = self.model.dtype == torch.float32
        return bool(apart.max() < 3e-4) if exact else bool(apart.median() < 0.1)

    def _differences(self, request: SampleRequest, completion: Completion) -> torch.Tensor:
        """Of its logprobs to those of transformers' forward pass, [C]."""
        text = np.concatenate([request.token_ids, completion.token_ids])
        logits = self._logits(text, request.images)[len(request.token_ids) - 1 : -1].float()
        logits = logits / request.params.temperature
        if self.left_out is not None:
            logits = logits.index_fill(-1, self.left_out, -torch.inf)
        written = torch.from_numpy(completion.token_ids).long().to(self.device)
        plain = torch.log_softmax(logits, dim=-1).gather(1, written[:, None]).squeeze(1)
        return (plain.cpu() - torch.from_numpy(completion.logprobs)).abs()

    def _logits(self, tokens: np.ndarray, images: Images = ()) -> torch.Tensor:
        """Of a text alone, [L, V], of all ids."""
        ids = torch.from_numpy(tokens).long().to(self.device)
        pictures: dict[str, torch.Tensor] = {}
        if images:
            pictures = (
                require_tower(self.tower, images).read(tokens, np.array([0, len(tokens)]), [images], self.device).inputs
            )
        return self.model(input_ids=ids[None], **pictures).logits[0]

    def _attend_by(self, attention: str | None) -> None:
        name = attention or self.own_attention
        if text_attention(self.model) != name:
            set_text_attention(self.model, name)


def _synced(model: Any) -> dict[str, torch.Tensor]:
    """Where weights are copied to, by their names in the model."""
    buffers = {name: model.get_buffer(name) for name, _ in kept_buffers(model)}
    return {**dict(model.named_parameters()), **buffers}


def _texts(model: Any) -> list[np.ndarray]:
    """Two of unlike lengths."""
    generator = np.random.default_rng(0)
    vocabulary = model.config.get_text_config().vocab_size
    return [generator.integers(0, vocabulary, size=size).astype(np.int32) for size in (3, 9)]


def _probe(texts: Sequence[np.ndarray], temperature: float) -> list[SampleRequest]:
    """For three rows: two of one text, a shorter completion of another, in whose place a third sample of the first text
    is begun while the others are written, and goes on alone when they have ended."""
    which = ((0, 6), (0, 6), (1, 3), (0, 6))
    return [
        SampleRequest(i, texts[text], i, SamplingParams(max_new_tokens=limit, temperature=temperature))
        for i, (text, limit) in enumerate(which)
    ]
