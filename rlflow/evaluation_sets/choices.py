"""Multiple choice by likelihood: plain forward passes of the text with each of its possible ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rlflow.evaluation_sets.sets import Choice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TOKENS_AT_ONCE = 4096
"""Of a forward pass, padding included."""


def score_choices(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Choice],
    context: int,
    progress: Callable[[int, int], None],
) -> list[list[float]]:
    """The logprob of each end given the text, of each problem.

    ``sum over the end's tokens t of log softmax(logits[t - 1])[t]``, where text and end are tokenised together and the
    end's tokens are those behind as many as the text alone has (as in EleutherAI's lm-evaluation-harness).

    Args:
        model: A transformers language model, or PEFT's.
        context: Tokens that it reads; a longer text loses its beginning.
    """
    pairs = [(p, e) for p, problem in enumerate(problems) for e in range(len(problem.ends))]
    encoded = [encode_pair(tokenizer, problems[p].text, problems[p].ends[e], context) for p, e in pairs]
    scores = [[0.0] * len(problem.ends) for problem in problems]
    # Those of like length go together, the longest first: what does not fit into memory is found at once.
    order = sorted(range(len(pairs)), key=lambda index: -len(encoded[index][0]))
    done = 0
    while done < len(order):
        size = max(1, _TOKENS_AT_ONCE // len(encoded[order[done]][0]))
        batch = order[done : done + size]
        for index, logprob in zip(batch, _logprobs(model, [encoded[i] for i in batch]), strict=True):
            p, e = pairs[index]
            scores[p][e] = logprob
        done += len(batch)
        progress(done, len(order))
    return scores


def encode_pair(tokenizer: PreTrainedTokenizerFast, text: str, end: str, context: int) -> tuple[list[int], int]:
    """The tokens of both, and how many of them are the end's; no more than ``context``."""
    bos = tokenizer.bos_token_id
    begin = [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []
    whole, before = (tokenizer(part, add_special_tokens=False).input_ids for part in (text + end, text))
    length = max(1, len(whole) - len(before))
    return [*begin, *whole][-context:], min(length, context - 1)


@torch.inference_mode()
def _logprobs(model: Any, encoded: Sequence[tuple[list[int], int]]) -> list[float]:
    longest = max(len(tokens) for tokens, _ in encoded)
    # Padding behind a text changes nothing of what stands before it.
    padded = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in encoded], device=model.device)
    mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in encoded])
    logits = model(input_ids=padded, attention_mask=mask.to(model.device)).logits
    totals = []
    for row, (tokens, length) in enumerate(encoded):
        first = len(tokens) - length
        predicted = logits[row, first - 1 : len(tokens) - 1].float().log_softmax(-1)
        chosen = padded[row, first : len(tokens), None]
        totals.append(float(predicted.gather(1, chosen).sum()))
    return totals


def best_of(scores: Sequence[float], lengths: Sequence[int] | None = None) -> int:
    """The likeliest, or with ``lengths`` the likeliest a character; of equals the first."""
    values = scores if lengths is None else [score / max(1, n) for score, n in zip(scores, lengths, strict=True)]
    return max(range(len(values)), key=lambda index: values[index])
