"""A causal language model that returns log-probabilities of chosen tokens instead of logits.

The [tokens, vocabulary] logits are computed only for the tokens asked for, in chunks, and all chunks but one again in
the backward pass, so they are never whole in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlflow.actors.expanded_model import train_new_layers
from rlflow.actors.pretrained import load_whole
from rlflow.actors.train_engines import liger
from rlflow.actors.train_engines.chosen_logprobs import Entropies, chosen_logprobs
from rlflow.actors.train_engines.decoder_passes import packed, passes_of
from rlflow.actors.train_engines.packed_attention import PackedLayout
from rlflow.actors.train_engines.picture_probe import prepare_tower
from rlflow.actors.train_engines.probe import choose_passes
from rlflow.actors.train_engines.sequence_parallel import SequenceRanks, layout_of
from rlflow.actors.train_engines.tower import Pictures, Tower, read_batch, read_pictures, tower_of
from rlflow.actors.vision import language_model_class, train_parts
from rlflow.data.tokenizer import load_tokenizer
from rlflow.data.vocabulary import ids_without_token, placeholder_ids
from rlflow.recipe import ModelBlock
from rlflow.types import MicroBatch

_CHUNK_BYTES = 1 << 28
"""Of the logits held at a time."""
_FLOAT32 = 4
"""Bytes of a number."""


class TokenOutputs(NamedTuple):
    logprobs: torch.Tensor
    """[N]: log-probability of the token at each asked-for position, 0 elsewhere."""
    entropies: torch.Tensor | None
    """[N]: entropy of the distribution it was drawn from, in nats, 0 elsewhere."""
    divergences: torch.Tensor | None = None
    """[N]: from a teacher's distribution, 0 elsewhere."""


Divergence = Callable[["TokenModel", torch.Tensor, torch.Tensor], torch.Tensor]
"""Function of the model, hidden states [M, H] and the tokens [M] that follow them, which returns [M]."""


class TokenModel(nn.Module):
    def __init__(self, model: PreTrainedModel, dropout_layers: Sequence[nn.Module] = ()) -> None:
        """
        Args:
            dropout_layers: Of ``model``, those that drop out where gradients are wanted, and nowhere else.
        """
        super().__init__()
        self.model = model
        self.uses_liger = False
        """Liger's kernel makes logprobs where entropies are not wanted."""
        self.dropout_layers = list(dropout_layers)
        self.ranks: SequenceRanks | None = None
        """Those that share a micro-batch's tokens."""
        self.tower: Tower | None = None
        """None of a model that reads text alone."""
        self.left_out: torch.Tensor | None = None
        """bool [V]: ids that get no probability; None where all of the vocabulary do."""
        config = model.config.get_text_config().to_dict()
        self.passes = passes_of(config)
        self.logit_scale = logit_scale(config)
        self.softcap: float | None = config.get("final_logit_softcapping", config.get("logits_soft_cap"))

    def forward(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
        layout: PackedLayout,
        wanted: torch.Tensor,
        temperature: float = 1.0,
        entropies: Entropies = "values",
        pictures: Pictures | None = None,
        divergence: Divergence | None = None,
    ) -> TokenOutputs:
        """token_ids, position_ids int [N], wanted bool [N] (never the first token of a sequence).

        ``logprobs[t] = log softmax(logits[t - 1] / temperature)[token_ids[t]]``.
        """
        for layer in self.dropout_layers:
            layer.train(torch.is_grad_enabled())
        hidden = self.hidden_states(token_ids, position_ids, layout, pictures)
        rows = wanted.nonzero().squeeze(1)
        rows = rows[layout.held(rows - 1)]
        # Filler and batches without a loss token must still reach every parameter, or ranks fall out of step.
        zeros = torch.zeros(token_ids.shape, dtype=torch.float32, device=hidden.device)
        zeros = zeros + 0.0 * hidden.sum(dtype=torch.float32)
        before = hidden[rows - 1 - layout.first]
        columns = self._score_all(before, token_ids[rows], temperature, entropies)

        def placed(column: torch.Tensor) -> torch.Tensor:
            return layout.summed(torch.zeros_like(zeros).index_put((rows,), column))

        return TokenOutputs(
            layout.summed(zeros.index_put((rows,), columns[0])),
            None if entropies == "none" else placed(columns[1]),
            None if divergence is None else placed(divergence(self, before, rows)),
        )

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
        """The model without its head."""
        if self.tower is not None:
            return self.model.base_model
        found = self.model.get_decoder()
        # Of some architectures transformers names a layer, or the model with its head.
        if not isinstance(found, PreTrainedModel) or found.get_output_embeddings() is not None:
            found = getattr(found, "model", self.model.base_model)
        return found

    def probe(self, sequences: Sequence[torch.Tensor], pictures: Pictures | None = None) -> list[torch.Tensor]:
        """Logprobs of sequences packed together, 0 at first tokens."""
        tokens, positions, layout = packed(sequences)
        logprobs = self(tokens, positions, layout, positions > 0, entropies="none", pictures=pictures).logprobs
        return list(logprobs.split([len(sequence) for sequence in sequences]))

    def probe_plain(self, token_ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Logprobs of one sequence by transformers' forward pass, 0 at the first token.

        Args:
            inputs: What of its pictures goes with the tokens.
        """
        logits = self.model(input_ids=token_ids[None], **inputs).logits[0, :-1]
        logprobs = torch.log_softmax(logits.float(), dim=-1).gather(1, token_ids[1:, None]).squeeze(1)
        return F.pad(logprobs, (1, 0))

    def leave_out(self, ids: np.ndarray) -> None:
        """Gives ``ids`` of the vocabulary no probability from now on: logprobs and entropies are of the others."""
        if len(ids):
            mask = np.zeros(self.model.config.get_text_config().vocab_size, dtype=bool)
            mask[ids] = True
            self.left_out = torch.from_numpy(mask).to(self.model.device)

    def of_batch(
        self,
        batch: MicroBatch,
        device: torch.device,
        temperature: float = 1.0,
        entropies: Entropies = "values",
        divergence: Divergence | None = None,
    ) -> TokenOutputs:
        """Outputs at the batch's loss tokens."""
        read = read_batch(batch, self.tower)
        outputs = self(
            torch.from_numpy(read.token_ids).to(device),
            torch.from_numpy(read.position_ids).to(device),
            layout_of(read.cu_seqlens, device, self.ranks),
            torch.from_numpy(read.loss_mask).to(device),
            temperature,
            entropies,
            read_pictures(self.tower, read.token_ids, read.cu_seqlens, read.images, device),
            divergence,
        )
        own = slice(len(batch.token_ids))
        others = (None if column is None else column[own] for column in outputs[1:])
        return TokenOutputs(outputs.logprobs[own], *others)

    def _score_all(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, entropies: Entropies
    ) -> tuple[torch.Tensor, ...]:
        """hidden [M, H], targets [M] -> logprobs [M], and entropies [M] where they are wanted; in chunks."""
        head = self.model.get_output_embeddings()
        unchanged = self.softcap is None and self.logit_scale == 1.0 and self.left_out is None
        is_plain = entropies == "none" and temperature == 1.0 and unchanged
        if self.uses_liger and is_plain and type(head) is nn.Linear:
            return (liger.token_logprobs(hidden, head, targets),)
        num_chunks = max(1, -(-len(targets) // self.tokens_of_chunk(hidden)))
        chunk = max(1, -(-len(targets) // num_chunks))
        parts = []
        for start in range(0, max(1, len(targets)), chunk):
            # The last one's are there when the backward pass begins with them.
            is_last = start + chunk >= len(targets)
            run = _call if is_last or not torch.is_grad_enabled() else _recomputed
            own = slice(start, start + chunk)
            parts.append(run(self._score, hidden[own], targets[own], temperature, entropies))
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def tokens_of_chunk(self, hidden: torch.Tensor) -> int:
        """How many tokens' logits fit into ``_CHUNK_BYTES``: in float32, beside what they are made from."""
        of_head = hidden.element_size()
        makes_float32 = of_head == _FLOAT32 and type(self.model.get_output_embeddings()) is nn.Linear
        of_logit = _FLOAT32 + (0 if makes_float32 else of_head)
        return max(1, _CHUNK_BYTES // of_logit // self.model.config.get_text_config().vocab_size)

    def _score(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, entropies: Entropies
    ) -> tuple[torch.Tensor, ...]:
        """What ``_score_all`` returns, of one chunk."""
        logits, scale = self.logits(hidden)
        return chosen_logprobs(logits, targets, scale / temperature, self.left_out, entropies)

    def logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, float]:
        """hidden [M, H] -> float32 [M, V] that nobody else reads, and what they are still to be multiplied by."""
        head = self.model.get_output_embeddings()
        assert head is not None
        # Ranks have different numbers of chunks, and ZeRO 3 gathers weights anew for every call of a module.
        if type(head) is nn.Linear:
            logits = F.linear(hidden, head.weight, head.bias).float()
        else:
            # Its backward pass may need what it returned.
            logits = head(hidden).to(torch.float32, copy=True)
        scale = self.logit_scale
        if self.softcap is not None:
            logits, scale = self.softcap * torch.tanh(logits * (scale / self.softcap)), 1.0
        return logits, scale


def logit_scale(config: Mapping[str, Any]) -> float:
    """What an architecture multiplies its head's output by: Granite and MiniCPM divide, Cohere and Falcon-H1 multiply.

    Args:
        config: Fields of a transformers config.
    """
    multipliers = [config.get(name) for name in ("logit_scale", "lm_head_multiplier")]
    scale = math.prod(multiplier for multiplier in multipliers if multiplier is not None)
    if config.get("dim_model_base"):
        scale *= config["dim_model_base"] / config["hidden_size"]
    return scale / (config.get("logits_scaling") or 1.0)


@torch.no_grad()
def score(module: TokenModel, batches: Sequence[MicroBatch], device: torch.device, temperature: float) -> np.ndarray:
    """Logprobs of the loss tokens, float32 [N] of the micro-batches end to end."""
    return np.concatenate(
        [module.of_batch(batch, device, temperature, "none").logprobs.cpu().numpy() for batch in batches]
    )


def _recomputed(function: Any, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


def _call(function: Any, *args: Any) -> Any:
    return function(*args)


def load_token_model(
    block: ModelBlock,
    *,
    seed: int,
    device: torch.device,
    checkpointing: bool = False,
    tokens_of: ModelBlock | None = None,
    reference: str | None = None,
) -> TokenModel:
    """Loads a model for training or scoring, or makes one with random weights when the recipe gives an architecture.

    Args:
        tokens_of: The policy that writes what is scored: what is no token of its tokenizer gets no probability, as in
            the engines. Without it every id of the vocabulary does, as in transformers.
        reference: See `rlflow.actors.adapters.load_adapted`.

    Raises:
        ValueError: The checkpoint lacks weights, logprobs of short texts are not those of transformers (see probe), or
            the recipe's adapter or Liger's kernels do not fit it.
    """
    dropout_layers: Sequence[Any] = ()
    if block.adapter is not None:
        from rlflow.actors import adapters

        options = {"trust_remote_code": block.trust_remote_code}
        model = adapters.load_adapted(block, seed=seed, device=device, reference=reference, **options)
        dropout_layers = adapters.adapter_layers(model) if block.adapter.drops_out else []
    else:
        model = read_language_model(block, seed=seed)
        choose_trained(model, block)
    # Without dropout: logprobs of one policy must be the same every time. New models come in training mode.
    model.to(device).eval()  # pyright: ignore[reportArgumentType]
    token_model = TokenModel(model, dropout_layers)
    token_model.tower = tower_of(model, block)
    choose_passes(token_model, device)
    prepare_tower(token_model, block, device)
    if checkpointing:
        recompute_layers(model)
    if block.liger:
        _apply_liger(token_model, device)
    if tokens_of is not None:
        size = model.config.get_text_config().vocab_size
        unwritten = ids_without_token(load_tokenizer(tokens_of), size)
        token_model.leave_out(np.union1d(unwritten, placeholder_ids(model.config)).astype(np.int64))
    return token_model


def read_language_model(block: ModelBlock, *, seed: int) -> PreTrainedModel:
    """The model of a recipe that has no adapter, as transformers has it: stored weights, or random ones.

    Raises:
        ValueError: The checkpoint lacks weights.
    """
    assert block.path is not None and block.adapter is None
    options: dict[str, Any] = {"trust_remote_code": block.trust_remote_code, "dtype": getattr(torch, block.dtype)}
    config = AutoConfig.from_pretrained(block.path, revision=block.revision, trust_remote_code=block.trust_remote_code)
    auto_class = language_model_class(config)
    if block.architecture is None:
        return load_whole(auto_class, block.path, revision=block.revision, **options)
    torch.manual_seed(seed)
    return auto_class.from_config(config, **options)


def choose_trained(model: PreTrainedModel, block: ModelBlock) -> None:
    """Freezes what the recipe leaves as it is.

    Raises:
        ValueError: The model has no such part.
    """
    train_parts(model, block.train)
    if block.expand is not None:
        train_new_layers(model, block.expand)


@torch.no_grad()
def _apply_liger(token_model: TokenModel, device: torch.device) -> None:
    """
    Raises:
        ValueError: Its kernels do not leave the logprobs of a few tokens nearly as they were.
    """
    vocabulary = token_model.model.config.get_text_config().vocab_size
    text = [torch.arange(8, device=device) * 7 % vocabulary]
    (before,) = token_model.probe(text)
    liger.apply_kernels(token_model.model)
    token_model.uses_liger = True
    (after,) = token_model.probe(text)
    change = (after - before)[1:].abs().mean().item()
    # In 16 bits other kernels round otherwise, by 0.06 in a logit of 10.
    if not change < (1e-3 if token_model.model.dtype == torch.float32 else 0.1):
        name = type(token_model.model).__name__
        raise ValueError(f"Liger's kernels change {name}'s logprobs by {change:.3g}: set model.liger: false")


def recompute_layers(model: PreTrainedModel) -> None:
    """Gradient checkpointing of a loaded model, which is in evaluation mode: only the layers that recompute leave it,
    so that no dropout wakes up with them."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True
