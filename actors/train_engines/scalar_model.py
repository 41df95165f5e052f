"""A decoder with a head that says a number, or several, of chosen tokens: PPO's critic, and what scores, classifies or
embeds whole sequences. The critic and reward models are transformers classifiers on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from rlflow.actors.pretrained import load_whole
from rlflow.actors.train_engines.decoder_passes import packed, passes_of
from rlflow.actors.train_engines.heads import SCORE, Head, ScoreHead, one_number
from rlflow.actors.train_engines.packed_attention import PackedLayout
from rlflow.actors.train_engines.picture_probe import prepare_tower
from rlflow.actors.train_engines.probe import choose_passes
from rlflow.actors.train_engines.sequence_parallel import SequenceRanks, layout_of
from rlflow.actors.train_engines.token_model import recompute_layers
from rlflow.actors.train_engines.tower import Pictures, Tower, read_batch, read_pictures, tower_of
from rlflow.actors.vision import classifier_class, train_parts
from rlflow.recipe import ModelBlock
from rlflow.types import MicroBatch

Problem = Literal["regression", "single_label_classification", "multi_label_classification"]


@dataclass(frozen=True, slots=True)
class Outputs:
    """What the head of a classifier puts out."""

    count: int = 1
    names: tuple[str, ...] = ()
    """Of the classes, in the order of their ids."""
    problem: Problem | None = None
    """Transformers' ``problem_type``."""


class ScalarModel(nn.Module):
    def __init__(self, model: PreTrainedModel, head: Head = ScoreHead()) -> None:  # noqa: B008 (it has no state)
        super().__init__()
        self.model, self.head = model, head
        self.ranks: SequenceRanks | None = None
        """Those that share a micro-batch's tokens."""
        self.tower: Tower | None = None
        """None of a model that reads text alone."""
        self.passes = passes_of(model.config.get_text_config().to_dict())

    def forward(self, batch: MicroBatch, device: torch.device, wanted: Literal["values", "scores"]) -> torch.Tensor:
        """What the head says of the hidden states of chosen tokens, float32.

        Args:
            wanted: ``values``: [N], at each loss token the number of the token before it, which is what the critic
                expects before that token is known; 0 elsewhere. ``scores``: [S], or [S, D] of several numbers, of
                each sequence's last token: the reward, the logits or the embedding of the whole.
        """
        read = read_batch(batch, self.tower)
        layout = layout_of(read.cu_seqlens, device, self.ranks)
        token_ids, position_ids = (torch.from_numpy(x).to(device) for x in (read.token_ids, read.position_ids))
        pictures = read_pictures(self.tower, read.token_ids, read.cu_seqlens, read.images, device)
        hidden = self.hidden_states(token_ids, position_ids, layout, pictures)
        scores = wanted == "scores"
        at = torch.from_numpy(batch.cu_seqlens[1:] if scores else np.flatnonzero(batch.loss_mask)).to(device) - 1
        rows, size = (torch.arange(len(at), device=device), len(at)) if scores else (at + 1, len(batch.token_ids))
        held = layout.held(at)
        # Batches without a loss token must still reach every parameter, or ranks fall out of step.
        said = self.head(self.model, hidden[at[held] - layout.first])
        zeros = torch.zeros((size, *said.shape[1:]), dtype=torch.float32, device=device)
        zeros = zeros + 0.0 * hidden.sum(dtype=torch.float32)
        return layout.summed(zeros.index_put((rows[held],), said))

    def hidden_states(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
        layout: PackedLayout,
        pictures: Pictures | None = None,
    ) -> torch.Tensor:
        """token_ids, position_ids int [N] -> [n, H] of the tokens that this rank holds."""
        return self.passes.hidden_states(self.decoder, token_ids, position_ids, layout, pictures)

    @property
    def decoder(self) -> nn.Module:
        return self.model.base_model

    def probe(self, sequences: Sequence[torch.Tensor], pictures: Pictures | None = None) -> list[torch.Tensor]:
        """A number for each token of sequences packed together."""
        tokens, positions, layout = packed(sequences)
        numbers = one_number(self.head(self.model, self.hidden_states(tokens, positions, layout, pictures)))
        return list(numbers.split([len(sequence) for sequence in sequences]))

    def probe_plain(self, token_ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """A number for each token of one sequence by transformers' forward pass, the last by the whole model's.

        Args:
            inputs: What of its pictures goes with the tokens.
        """
        said = self.head(self.model, self.decoder(input_ids=token_ids[None], **inputs).last_hidden_state[0])
        return one_number(torch.cat([said[:-1], self.head.of_last(self.model, token_ids, **inputs)]))


def load_scalar_model(
    block: ModelBlock, *, seed: int, device: torch.device, checkpointing: bool = False
) -> ScalarModel:
    """Loads a sequence classifier with one label, or puts a head that answers 0 on a language model.

    Raises:
        ValueError: See read_classifier.
    """
    model = read_classifier(block, seed=seed)
    train_parts(model, block.train)
    model.to(device).eval()  # pyright: ignore[reportArgumentType]
    scalar_model = ScalarModel(model)
    scalar_model.tower = tower_of(model, block)
    with random_head(model):
        choose_passes(scalar_model, device)
        prepare_tower(scalar_model, block, device)
    if checkpointing:
        recompute_layers(model)
    return scalar_model


def read_classifier(block: ModelBlock, *, seed: int, outputs: Outputs = Outputs()) -> PreTrainedModel:
    """The classifier that load_scalar_model trains, as transformers has it.

    Raises:
        ValueError: The checkpoint lacks weights or has a head of another number of labels, or transformers has no
            classifier of its architecture.
    """
    assert block.path is not None
    options: dict[str, Any] = {
        "trust_remote_code": block.trust_remote_code,
        "dtype": getattr(torch, block.dtype),
    }
    config = AutoConfig.from_pretrained(block.path, revision=block.revision, trust_remote_code=block.trust_remote_code)
    is_classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    if is_classifier and config.num_labels != outputs.count:
        wanted = "a critic, a reward model or a reranker has one"
        if outputs.problem:
            wanted = f"algorithm.classification asks for {outputs.count}"
        raise ValueError(
            f"{block.path}: its head has {config.num_labels} labels; {wanted}: start from a model without a head"
        )
    config.num_labels = outputs.count
    if outputs.names:
        config.id2label = dict(enumerate(outputs.names))
        config.label2id = {name: id_ for id_, name in enumerate(outputs.names)}
    if outputs.problem is not None:
        config.problem_type = outputs.problem
    auto_class = classifier_class(config)
    if block.architecture is not None:
        torch.manual_seed(seed)
        model = auto_class.from_config(config, **options)
    else:
        new = None if is_classifier else SCORE
        options |= {"config": config, "revision": block.revision}
        model = load_whole(auto_class, block.path, new=new, **options)
    head = _head_of(model)
    if not is_classifier:
        nn.init.zeros_(head.weight)
    return model


def _head_of(model: PreTrainedModel) -> nn.Linear:
    """
    Raises:
        ValueError: It is none that a critic or a reward model can have.
    """
    head = model.get_submodule(SCORE)
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{type(model).__name__}: its head is no linear layer called {SCORE}; not supported")
    return head


@contextmanager
def random_head(model: PreTrainedModel) -> Iterator[None]:
    """Within, the head's numbers of two hidden states are as far apart as these are: one of zeros hides all."""
    head = _head_of(model)
    weight = head.weight.detach().clone()
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) / weight.shape[1] ** 0.5
    head.weight.data.copy_(drawn)
    try:
        yield
    finally:
        head.weight.data.copy_(weight)
