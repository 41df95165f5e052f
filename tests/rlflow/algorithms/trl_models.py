"""A tiny random model, a tokenizer of 30 words, and TRL's padded batches as TensorBatch."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rlflow.algorithms.batch import TensorBatch

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(30))]
CPU = {"use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False}


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def _config(**fields) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.5,
        **fields,
    )


def causal_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(_config()).eval()


def reward_model(seed: int) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(_config(num_labels=1)).eval()


def logprobs(model: torch.nn.Module, ids: torch.Tensor, attention: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropies of every token, [rows * T]: ours, from plain logits."""
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
    table = torch.log_softmax(logits, dim=-1)
    taken = table.gather(2, ids[:, 1:, None]).squeeze(2)
    entropies = -(table.exp() * table).sum(-1)
    return tuple(torch.nn.functional.pad(x, (1, 0)).flatten() for x in (taken, entropies))


def tensor_batch(mask: torch.Tensor, weights: torch.Tensor | None = None, labels=None, **fields):
    """A batch whose padding is just not trained.

    Args:
        mask: [rows, T].
        weights: [rows].
        fields: Of a token, [rows, T] or [rows * T], or of a row, [rows].
    """
    rows, length = mask.shape
    weights = torch.zeros(rows) if weights is None else weights
    return TensorBatch(
        token_ids=torch.zeros(rows * length, dtype=torch.int64),
        position_ids=torch.arange(length).repeat(rows),
        loss_mask=mask.bool().flatten(),
        loss_weights=weights.repeat_interleave(length),
        sequence_ids=torch.arange(rows).repeat_interleave(length),
        labels=torch.zeros(rows) if labels is None else labels,
        **{name: x.flatten() for name, x in fields.items()},
    )


def assert_same_loss_and_gradient(ours: torch.Tensor, theirs: torch.Tensor, model: torch.nn.Module) -> None:
    """Losses to 1e-6. Gradients to 1e-5 of their largest element: float32 sums of two different orders."""
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours_g, theirs_g = (torch.cat([g.flatten() for g in torch.autograd.grad(x, parameters)]) for x in (ours, theirs))
    assert theirs_g.abs().max() > 0
    torch.testing.assert_close(ours_g, theirs_g, rtol=0.0, atol=1e-5 * float(theirs_g.abs().max()))
