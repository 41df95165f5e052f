"""Before the first step: a model's numbers of two packed sequences must be those of plain transformers, one at a time.

Plain transformers is the same model with its own attention, called with token ids and nothing else. Of the ways in
which a decoder can be run (decoder_passes), the first that agrees is taken; a model with which none does is refused.
What a number must not depend on (later tokens, other sequences) has no share in its gradient, exactly: that shows in
16 bits and in new models too, whose weights are too small for the numbers to tell.
Windows and chunks of attention are made shorter than the probe for as long as it lasts, so that they show.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from textwrap import shorten
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from rlflow.actors.train_engines import packed_attention
from rlflow.actors.train_engines.decoder_passes import DecoderPasses
from rlflow.actors.train_engines.packed_attention import NotPackable
from rlflow.actors.vision import part_finder, set_text_attention, text_attention

logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_LENGTHS = (11, 14)
"""Near enough to stand side by side."""
_WINDOW = 5
"""Tokens that layers with a window or chunks see during the probe."""
_WINDOWS = (
    "sliding_window",
    "attention_window_size",
    "attention_chunk_size",
    "window_size",
    "local_attention",
    "keep_window_size",
)
"""What configs and layers call it."""


class ProbedModule(Protocol):
    """A TokenModel or ScalarModel."""

    model: PreTrainedModel
    passes: DecoderPasses

    @property
    def decoder(self) -> nn.Module: ...

    def probe(self, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A number for each token of sequences packed together, [L] each."""
        ...

    def probe_plain(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The same of one sequence, by transformers' own forward pass of the whole model."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """What a module says of a sequence, and what of it comes from each token."""

    numbers: torch.Tensor
    """[L], float32."""
    gradient: torch.Tensor
    """Of their sum by the embeddings of the tokens in the same pass, [N, H] float32."""


@torch.enable_grad()
def choose_passes(module: ProbedModule, device: torch.device) -> None:
    """Settles how the module's decoder is run. The model is as transformers loaded it, in evaluation mode.

    Raises:
        ValueError: The model is no left-to-right one, cannot be run on token ids alone, or gives other numbers here
            than in transformers.
    """
    model = module.model
    use_own_attention(model)
    sequences = _texts(model, _LENGTHS, 0, device)
    with narrow_windows(model):
        plain = [_plain_answer(module, tokens) for tokens in sequences]
        problem = _why_not_packed(module, sequences, plain)
        if problem is not None:
            module.passes.way, module.passes.reason, module.passes.names_boundaries = "padded", problem, False
            if _why_not_together(module, sequences, plain) is not None:
                module.passes.way = "alone"
                _check_one_at_a_time(module, sequences, plain)
    if problem is not None:
        how = {"padded": "sequences side by side, padded", "alone": "one sequence at a time"}[module.passes.way]
        logger.warning("%s is run %s: %s", type(model).__name__, how, problem)


def _plain_answer(module: ProbedModule, tokens: torch.Tensor) -> Answer:
    """Of transformers alone.

    Raises:
        ValueError: It fails, gives what is no number, has no gradient, or lets a number depend on tokens after its own.
    """
    with torch.no_grad():
        reason = "its own forward pass fails on the token ids of a short text"
        found = _run(module, lambda: module.probe_plain(tokens), reason)
    if not bool(torch.isfinite(found).all()):
        raise ValueError(
            f"{type(module.model).__name__}: its numbers for a short text are not finite: some of its weights, or "
            "of its adapter's, are no numbers, or too large for model.dtype. Choose another model or checkpoint"
        )
    run = partial(_run, module, problem="in evaluation mode it gives no gradients")
    numbers, embeddings = run(lambda: _traced(module, lambda: module.probe_plain(tokens)))
    half = len(tokens) // 2
    first, whole = (run(lambda end=end: _gradient(numbers[:end], embeddings)) for end in (half, None))
    if not (seen := float(first[half:].norm() / first.norm())) < leak(module.model):
        raise ValueError(
            f"{type(module.model).__name__}: its numbers of a text's first half depend on the second, by {seen:.2g} of "
            "their gradient: it is no left-to-right model as it is configured. Choose another model"
        )
    return Answer(numbers.detach(), whole)


def _why_not_packed(module: ProbedModule, sequences: Sequence[torch.Tensor], plain: Sequence[Answer]) -> str | None:
    """None where packed attention is right, and is now in place; otherwise the model has its own again."""
    model = module.model
    if any(name.endswith("indexer") for name, _ in model.named_modules()):
        return "its layers choose the tokens that they attend to, among all that are packed"
    stateful = "its layers carry a state from token to token, which packed sequences would share"
    if not model._can_set_attn_implementation() or not _takes_options(module.decoder):
        return stateful if model._is_stateful else "its attention is not behind transformers' attention interface"
    own = text_attention(model)
    set_text_attention(model, packed_attention.NAME)
    problem = _why_not_together(module, sequences, plain)
    if problem is not None:
        # Kernels of such layers may take the boundaries; what transformers has in their place leaves them aside.
        module.passes.names_boundaries = True
        if _why_not_together(module, sequences, plain) is None:
            return None
    # A state that does not show in short texts is there all the same.
    problem = stateful if model._is_stateful else problem
    if problem is not None:
        set_text_attention(model, own)
    return problem


def _why_not_together(module: ProbedModule, sequences: Sequence[torch.Tensor], plain: Sequence[Answer]) -> str | None:
    """None where two sequences have each its own answer in the module's present way."""
    try:
        return _problem_together(module, sequences, plain)
    except NotPackable as error:
        return str(error)
    except torch.OutOfMemoryError:
        raise
    # What a model's code makes of sequences together is not ours; one at a time it may be right.
    except Exception as error:
        return shorten(f"{module.passes.way}, it fails ({type(error).__name__}: {error})", 200)


def _problem_together(module: ProbedModule, sequences: Sequence[torch.Tensor], plain: Sequence[Answer]) -> str | None:
    lengths, start, way = [len(tokens) for tokens in sequences], 0, module.passes.way
    for index, (length, alone) in enumerate(zip(lengths, plain, strict=True)):
        # Anew for each: a gradient takes the place of the logits that it is made from.
        numbers, embeddings = _traced(module, lambda: torch.cat(module.probe(sequences)))
        own, places = numbers.split(lengths)[index], module.passes.places
        inside = slice(start, start + length) if places is None else places[start : start + length]
        gradient = _gradient(own, embeddings)
        others = gradient.clone()
        others[inside] = 0
        if not (seen := float(others.norm() / gradient.norm())) < leak(module.model):
            return f"{way}, its numbers of a sequence depend on the others, by {seen:.2g} of their gradient"
        if problem := difference(module.model, Answer(own.detach(), gradient[inside]), alone):
            return f"{way}, {problem}"
        start += length
    return None


def _check_one_at_a_time(module: ProbedModule, sequences: Sequence[torch.Tensor], plain: Sequence[Answer]) -> None:
    """
    Raises:
        ValueError: Even so, numbers or gradients are not those of transformers.
    """
    run = partial(_run, module, problem="its decoder and its head, called one after the other, fail")
    for tokens, alone in zip(sequences, plain, strict=True):
        numbers, embeddings = run(lambda tokens=tokens: _traced(module, lambda: module.probe([tokens])[0]))
        answer = Answer(numbers.detach(), _gradient(numbers, embeddings))
        if problem := difference(module.model, answer, alone):
            raise ValueError(
                f"{type(module.model).__name__}: {problem}: it makes them of its decoder's hidden states in a way that "
                "is not known here. Choose another model"
            )


def difference(model: PreTrainedModel, ours: Answer, theirs: Answer) -> str | None:
    """What is wrong with ours. In 16 bits, where a mixture of experts may route single tokens otherwise, most numbers
    must agree; in float32 all."""
    exact = model.dtype == torch.float32
    differences = (ours.numbers - theirs.numbers).abs()
    apart = float(differences.max() if exact else differences.median())
    if not apart < (3e-4 if exact else 0.1):
        return f"its numbers differ from those of transformers' own forward pass by {apart:.2g}"
    apart = float((ours.gradient - theirs.gradient).norm() / theirs.gradient.norm())
    if not apart < (1e-4 if exact else 0.3):
        return f"its gradients differ from those of transformers' own forward pass by {apart:.2g} of their length"
    return None


@torch.enable_grad()
def _traced(module: ProbedModule, numbers: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers [N], 0 where they mean nothing, and the embeddings [1, N, H] from which their gradients start."""
    seen: list[torch.Tensor] = []

    def start_here(_module: nn.Module, _arguments: Any, embeddings: torch.Tensor) -> torch.Tensor:
        # A module may call its model more than once.
        if not seen:
            seen.append(embeddings.detach().requires_grad_())
        return seen[0]

    handle = module.model.get_input_embeddings().register_forward_hook(start_here)
    try:
        return numbers().float(), seen[0]
    finally:
        handle.remove()


def _gradient(numbers: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """[N, H] float32. No parameter gets any."""
    return torch.autograd.grad(numbers.sum(), embeddings, retain_graph=True)[0].float().flatten(0, -2)


def leak(model: PreTrainedModel) -> float:
    """The share of a gradient that is rounding: what a mask shuts out has exactly none."""
    return 1e-6 if model.dtype == torch.float32 else 1e-3


def _run(module: ProbedModule, call: Callable[[], _Result], problem: str) -> _Result:
    """
    Raises:
        ValueError: The model's code fails.
    """
    try:
        return call()
    except torch.OutOfMemoryError:
        raise
    # That code is not ours; whatever it wants beside token ids, we have not.
    except Exception as error:
        said = shorten(f"{type(error).__name__}: {error}", 200)
        raise ValueError(f"{type(module.model).__name__}: {problem} ({said}). Choose another model") from error


def _takes_options(decoder: nn.Module) -> bool:
    parameters = inspect.signature(decoder.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return takes_any and "position_ids" in parameters


def use_own_attention(model: PreTrainedModel) -> None:
    """What transformers chose for a model as it loaded it, but of those that cap attention's logits (Gemma 2): their
    default, torch's scaled-dot-product attention, leaves the cap out without a word."""
    if model.config.get_text_config().to_dict().get("attn_logit_softcapping") is not None:
        set_text_attention(model, "eager")


def _texts(model: PreTrainedModel, lengths: Sequence[int], seed: int, device: torch.device) -> list[torch.Tensor]:
    """Tokens other than the one for padding, by which transformers' classifiers find a text's end."""
    config = model.config.get_text_config().to_dict()
    generator = torch.Generator().manual_seed(seed)
    vocabulary = range(min(config["vocab_size"], 4096))
    usable = torch.tensor([token for token in vocabulary if token != config.get("pad_token_id")])
    chosen = usable[torch.randint(len(usable), (sum(lengths),), generator=generator)]
    return list(chosen.to(device).split(list(lengths)))


@contextmanager
def narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Within, no layer of the language model with a window or chunks sees farther than ``_WINDOW`` tokens."""
    part_of = part_finder(model)
    modules = [module for name, module in model.named_modules() if part_of(name) == "language"]
    configs = {id(part.config): part.config for part in modules if isinstance(part, PreTrainedModel)}
    changed = []
    for holder in [*configs.values(), *modules]:
        for name in _WINDOWS:
            size = vars(holder).get(name)
            if isinstance(size, int) and not isinstance(size, bool) and size > _WINDOW:
                changed.append((holder, name, size))
                setattr(holder, name, _WINDOW)
    try:
        yield
    finally:
        for holder, name, size in changed:
            setattr(holder, name, size)
