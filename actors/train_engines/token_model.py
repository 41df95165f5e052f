"""A causal language model that returns log-probabilities of chosen tokens instead of logits.

The [tokens, vocabulary] logits are computed only for the tokens asked for, in chunks, and computed again in the
backward pass, so they are never whole in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlflow.actors.pretrained import load_whole
from rlflow.actors.train_engines import liger, packed_attention
from rlflow.actors.train_engines.packed_attention import PackedLayout
from rlflow.actors.train_engines.sequence_parallel import SequenceRanks, layout_of
from rlflow.data.tokenizer import load_tokenizer
from rlflow.data.vocabulary import ids_without_token
from rlflow.recipe import ModelBlock
from rlflow.types import MicroBatch

_CHUNK_ELEMENTS = 1 << 25
"""Logits held at a time (128 MiB in float32)."""
Entropies = Literal["none", "values", "gradient"]
"""Whether they are wanted, and with a gradient."""


class TokenOutputs(NamedTuple):
    logprobs: torch.Tensor
    """[N]: log-probability of the token at each asked-for position, 0 elsewhere."""
    entropies: torch.Tensor | None
    """[N]: entropy of the distribution it was drawn from, in nats, 0 elsewhere."""


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
        self.softcap: float | None = model.config.to_dict().get("final_logit_softcapping")
        self.left_out: torch.Tensor | None = None
        """bool [V]: ids that get no probability; None where all of the vocabulary do."""

    def forward(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
        layout: PackedLayout,
        wanted: torch.Tensor,
        temperature: float = 1.0,
        entropies: Entropies = "values",
    ) -> TokenOutputs:
        """token_ids, position_ids int [N], wanted bool [N] (never the first token of a sequence).

        ``logprobs[t] = log softmax(logits[t - 1] / temperature)[token_ids[t]]``.
        """
        for layer in self.dropout_layers:
            layer.train(torch.is_grad_enabled())
        hidden = self.hidden_states(token_ids, position_ids, layout)
        rows = wanted.nonzero().squeeze(1)
        rows = rows[layout.held(rows - 1)]
        # Filler and batches without a loss token must still reach every parameter, or ranks fall out of step.
        zeros = torch.zeros(token_ids.shape, dtype=torch.float32, device=hidden.device)
        zeros = zeros + 0.0 * hidden.sum(dtype=torch.float32)
        columns = self._score_all(hidden[rows - 1 - layout.first], token_ids[rows], temperature, entropies)
        logprobs = layout.summed(zeros.index_put((rows,), columns[0]))
        if entropies == "none":
            return TokenOutputs(logprobs, None)
        return TokenOutputs(logprobs, layout.summed(torch.zeros_like(zeros).index_put((rows,), columns[1])))

    def hidden_states(self, token_ids: torch.Tensor, position_ids: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        """token_ids, position_ids int [N] -> [n, H] of the tokens that this rank holds."""
        return self.model.get_decoder()(
            input_ids=layout.own(token_ids)[None],
            position_ids=layout.own(position_ids)[None],
            layout=layout,
            use_cache=False,
        ).last_hidden_state[0]

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
    ) -> TokenOutputs:
        """Outputs at the batch's loss tokens."""
        return self(
            torch.from_numpy(batch.token_ids).to(device),
            torch.from_numpy(batch.position_ids).to(device),
            layout_of(batch.cu_seqlens, device, self.ranks),
            torch.from_numpy(batch.loss_mask).to(device),
            temperature,
            entropies,
        )

    def _score_all(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, entropies: Entropies
    ) -> tuple[torch.Tensor, ...]:
        """hidden [M, H], targets [M] -> logprobs [M], and entropies [M] where they are wanted; in chunks."""
        head = self.model.get_output_embeddings()
        is_plain = entropies == "none" and temperature == 1.0 and self.softcap is None and self.left_out is None
        if self.uses_liger and is_plain and type(head) is nn.Linear:
            return (liger.token_logprobs(hidden, head, targets),)
        chunk = max(1, _CHUNK_ELEMENTS // self.model.config.vocab_size)
        run = _recomputed if len(targets) > chunk and torch.is_grad_enabled() else _call
        parts = [
            run(self._score, hidden[i : i + chunk], targets[i : i + chunk], temperature, entropies)
            for i in range(0, max(1, len(targets)), chunk)
        ]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _score(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, entropies: Entropies
    ) -> tuple[torch.Tensor, ...]:
        """Of one chunk."""
        head = self.model.get_output_embeddings()
        assert head is not None
        # Ranks have different numbers of chunks, and ZeRO 3 gathers weights anew for every call of a module.
        plain = type(head) is nn.Linear
        logits = (F.linear(hidden, head.weight, head.bias) if plain else head(hidden)).float()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if temperature != 1.0:
            logits = logits.div_(temperature)
        if self.left_out is not None:
            # Not infinity, whose product with a probability of 0 is no entropy.
            logits = logits.masked_fill_(self.left_out, torch.finfo(torch.float32).min)
        logprobs = torch.log_softmax(logits, dim=-1)
        del logits
        chosen = logprobs.gather(1, targets[:, None].long()).squeeze(1)
        # Two arrays of this size are alive here, three in the backward pass: memory.py counts on it.
        match entropies:
            case "none":
                return (chosen,)
            case "values":
                return chosen, -logprobs.detach().exp().mul_(logprobs.detach()).sum(dim=-1)
            case "gradient":
                return chosen, -(logprobs.exp() * logprobs).sum(dim=-1)


@torch.no_grad()
def score(
    module: TokenModel, batches: Sequence[MicroBatch], device: torch.device, temperature: float
) -> list[np.ndarray]:
    """Logprobs of the loss tokens, float32 [N] for each micro-batch."""
    return [module.of_batch(batch, device, temperature, "none").logprobs.cpu().numpy() for batch in batches]


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
) -> TokenModel:
    """Loads a model for training or scoring, or makes one with random weights when the recipe gives an architecture.

    Args:
        tokens_of: The policy that writes what is scored: what is no token of its tokenizer gets no probability, as in
            the engines. Without it every id of the vocabulary does, as in transformers.

    Raises:
        ValueError: The checkpoint lacks weights, the architecture computes its logits in a way that TokenModel does not
            (checked on a short text), or the recipe's adapter or Liger's kernels do not fit it.
    """
    assert block.path is not None
    dtype = getattr(torch, block.dtype)
    options: dict[str, Any] = {
        "trust_remote_code": block.trust_remote_code,
        "attn_implementation": packed_attention.NAME,
    }
    dropout_layers: Sequence[Any] = ()
    if block.architecture is not None:
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(block.path)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    elif block.adapter is not None:
        from rlflow.actors import adapters

        model = adapters.load_adapted(block, seed=seed, device=device, keep_start=True, **options)
        dropout_layers = adapters.adapter_layers(model) if block.adapter.dropout else []
    else:
        model = load_whole(AutoModelForCausalLM, block.path, revision=block.revision, dtype=dtype, **options)
    # Without dropout: logprobs of one policy must be the same every time. New models come in training mode.
    model.to(device).eval()  # pyright: ignore[reportArgumentType]
    if checkpointing:
        recompute_layers(model)
    token_model = TokenModel(model, dropout_layers)
    theirs = _check(token_model, device)
    if block.liger:
        liger.apply_kernels(model)
        token_model.uses_liger = True
        _check_kernels(token_model, theirs, device)
    if tokens_of is not None:
        size = model.config.get_text_config().vocab_size
        token_model.leave_out(ids_without_token(load_tokenizer(tokens_of), size))
    return token_model


def recompute_layers(model: PreTrainedModel) -> None:
    """Gradient checkpointing of a loaded model, which is in evaluation mode: only the layers that recompute leave it,
    so that no dropout wakes up with them."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True


def _short_text(model: PreTrainedModel, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, PackedLayout]:
    """Tokens [8], their positions [8] and their layout."""
    positions = torch.arange(8, device=device)
    tokens = positions * 7 % model.config.get_text_config().vocab_size
    return tokens, positions, PackedLayout(np.array([0, 8]), device)


@torch.no_grad()
def _check_kernels(token_model: TokenModel, before: torch.Tensor, device: torch.device) -> None:
    """Liger's kernels must leave the logprobs of a few tokens, [7], nearly as they were."""
    tokens, positions, layout = _short_text(token_model.model, device)
    after = token_model(tokens, positions, layout, positions > 0, entropies="none").logprobs[1:]
    change = (after - before).abs().mean().item()
    # In 16 bits other kernels round otherwise, by 0.06 in a logit of 10.
    if not change < (1e-3 if token_model.model.dtype == torch.float32 else 0.1):
        name = type(token_model.model).__name__
        raise ValueError(f"Liger's kernels change {name}'s logprobs by {change:.3g}: set model.liger: false")


@torch.no_grad()
def _check(token_model: TokenModel, device: torch.device) -> torch.Tensor:
    """Our logprobs of a few tokens must equal those of the model's own forward pass. Returns them, [7]."""
    tokens, positions, layout = _short_text(token_model.model, device)
    ours = token_model(tokens, positions, layout, positions > 0, entropies="none").logprobs[1:]
    logits = token_model.model(
        input_ids=tokens[None], position_ids=positions[None], layout=layout, use_cache=False
    ).logits
    theirs = torch.log_softmax(logits[0, :-1].float(), dim=-1).gather(1, tokens[1:, None]).squeeze(1)
    difference = (ours - theirs).abs().max().item()
    # The tolerance covers bfloat16; a missing scale or cap on the logits is off by whole units.
    if not difference < 0.05:
        name = type(token_model.model).__name__
        raise ValueError(
            f"{name}: logits differ from the model's own forward pass by {difference:.3g}; not supported yet"
        )
    return ours
