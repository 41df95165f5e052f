"""Generation with transformers alone: any machine, batched, KV-cached, with the logprobs tokens were drawn with.

A prompt is read once for all of its samples. Each sample draws from its own random stream, so what it becomes does
not depend on which others it is batched with (up to rounding in the forward pass).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.initialization import no_init_weights

from rlflow.actors.checkpoint_names import to_model
from rlflow.recipe import ModelBlock
from rlflow.types import Completion, FinishReason, GenerationRequest, SamplingParams


class TorchEngine:
    def __init__(
        self,
        model_dir: str,
        *,
        dtype: str,
        max_num_seqs: int,
        trust_remote_code: bool = False,
        adapted: ModelBlock | None = None,
    ) -> None:
        """Builds the model without weights: they arrive through load_weights.

        Args:
            adapted: Of a policy with an adapter, its block: the base is loaded here, once, and what arrives is the
                adapter alone.
        """
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.max_num_seqs = max_num_seqs
        self.left_out: torch.Tensor | None = None
        self.is_adapted = adapted is not None
        if adapted is not None:
            from rlflow.actors import adapters

            options: dict[str, Any] = {"attn_implementation": "sdpa", "trust_remote_code": trust_remote_code}
            self.model: Any = adapters.load_adapted(adapted, seed=0, device=self.device, **options).eval()
            self.synced = adapters.adapter_parameters(self.model)
            return
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
        with no_init_weights():
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), attn_implementation="sdpa", trust_remote_code=trust_remote_code
            )
        self.model.tie_weights()
        self.model.to(self.device).eval()
        self.synced = dict(self.model.named_parameters())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies every weight in. Raises ValueError for a name or shape the model does not have, or one left out."""
        parameters = self.synced
        missing = set(parameters)
        with torch.no_grad():
            for name, tensor in weights if self.is_adapted else to_model(self.model, weights):
                if name not in parameters:
                    raise ValueError(f"weight sync: the engine's model has no parameter {name}")
                if parameters[name].shape != tensor.shape:
                    shapes = f"{tuple(tensor.shape)} sent, {tuple(parameters[name].shape)} here"
                    raise ValueError(f"weight sync: {name} has another shape: {shapes}")
                parameters[name].copy_(tensor)
                missing.discard(name)
        if missing:
            raise ValueError(f"weight sync: {len(missing)} parameters were not sent, among them {sorted(missing)[0]}")

    def leave_out(self, ids: np.ndarray) -> None:
        """Gives ``ids`` of the vocabulary no probability from now on, and those of an earlier call theirs back."""
        self.left_out = torch.from_numpy(ids).to(self.device) if len(ids) else None

    @torch.inference_mode()
    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[Completion]:
        """One completion a seed, in the order of requests and of their seeds."""
        rows = [(r, seed) for r, request in enumerate(requests) for seed in request.seeds]
        completions: list[Completion] = []
        for start in range(0, len(rows), self.max_num_seqs):
            wave = rows[start : start + self.max_num_seqs]
            place = {r: i for i, r in enumerate(sorted({r for r, _ in wave}))}
            prompts = [requests[r].prompt_token_ids for r in place]
            completions += self._generate_wave(prompts, [place[r] for r, _ in wave], [s for _, s in wave], params)
        return completions

    def sleep(self) -> None:
        """Gives GPU memory back between generations."""
        self.model.to("cpu")

    def wake(self) -> None:
        self.model.to(self.device)

    def close(self) -> None:
        """Nothing outlives the process."""

    def _generate_wave(
        self, prompts: list[np.ndarray], which: list[int], seeds: list[int], params: SamplingParams
    ) -> list[Completion]:
        """which [R]: the prompt of each row; seeds [R]."""
        logits, cache, mask = self._prefill(prompts)
        row_of = torch.tensor(which, device=self.device)
        cache.batch_select_indices(row_of)
        logits, mask = logits[row_of], mask[row_of]
        uniforms = torch.from_numpy(
            np.stack([np.random.Generator(np.random.Philox(key=s)).random(params.max_new_tokens) for s in seeds])
        ).to(self.device)
        stop = torch.tensor(params.stop_token_ids, device=self.device, dtype=torch.long)

        num_rows = len(seeds)
        tokens = torch.zeros(num_rows, params.max_new_tokens, dtype=torch.long, device=self.device)
        logprobs = torch.zeros(num_rows, params.max_new_tokens, dtype=torch.float32, device=self.device)
        lengths = torch.full((num_rows,), params.max_new_tokens, device=self.device)
        stopped = torch.zeros(num_rows, dtype=torch.bool, device=self.device)
        alive = torch.arange(num_rows, device=self.device)
        for t in range(params.max_new_tokens):
            token, logprob = sample(logits, uniforms[alive, t], params)
            running = ~stopped[alive]
            tokens[alive, t] = torch.where(running, token, 0)
            logprobs[alive, t] = torch.where(running, logprob, 0.0)
            ends = running & torch.isin(token, stop)
            lengths[alive[ends]] = t + 1
            stopped[alive[ends]] = True
            running &= ~ends
            num_running = int(running.sum())
            if num_running == 0 or t + 1 == params.max_new_tokens:
                break
            if num_running <= len(alive) // 2:
                keep = running.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                alive, token, mask = alive[keep], token[keep], mask[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = self._decode(token, cache, mask)
        return [
            _completion(tokens[r], logprobs[r], int(lengths[r]), "stop" if stopped[r] else "length")
            for r in range(num_rows)
        ]

    def _prefill(self, prompts: list[np.ndarray]) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
        """Left-padded prompts -> logits of the next token [P, V], cache, mask [P, L]."""
        longest = max(len(prompt) for prompt in prompts)
        ids = np.zeros((len(prompts), longest), dtype=np.int64)
        mask = np.zeros((len(prompts), longest), dtype=np.int64)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = prompt
            mask[i, longest - len(prompt) :] = 1
        attention_mask = torch.from_numpy(mask).to(self.device)
        cache = DynamicCache(config=self.model.config)
        output = self.model(
            input_ids=torch.from_numpy(ids).to(self.device),
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return self._of_tokens(output.logits[:, -1]), cache, attention_mask

    def _decode(self, token: torch.Tensor, cache: DynamicCache, mask: torch.Tensor) -> torch.Tensor:
        """token [R] -> logits of the next one [R, V]."""
        output = self.model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        )
        return self._of_tokens(output.logits[:, -1])

    def _of_tokens(self, logits: torch.Tensor) -> torch.Tensor:
        """[R, V]."""
        return logits if self.left_out is None else logits.index_fill_(-1, self.left_out, -torch.inf)


def sample(logits: torch.Tensor, uniforms: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws by inverse transform: the first token at which the cumulative probability passes the uniform.

    Args:
        logits: [R, V].
        uniforms: float64 [R] in [0, 1).

    Returns:
        Tokens [R], and the logprobs [R] of the distribution they were drawn from: after temperature, top-k and top-p.
        Greedy tokens (temperature 0) come with their logprob at temperature 1.
    """
    logits = logits.float()
    if params.temperature == 0:
        logprobs = torch.log_softmax(logits, dim=-1)
        token = logits.argmax(dim=-1)
        return token, logprobs.gather(1, token[:, None]).squeeze(1)
    logits = logits / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        kth = logits.topk(params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if params.top_p < 1.0:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= params.top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    logprobs = torch.log_softmax(logits, dim=-1)
    cumulative = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
    token = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    token = token.clamp(max=logits.shape[-1] - 1)
    return token.squeeze(1), logprobs.gather(1, token).squeeze(1)


def _completion(tokens: torch.Tensor, logprobs: torch.Tensor, length: int, reason: FinishReason) -> Completion:
    return Completion(
        token_ids=tokens[:length].cpu().numpy().astype(np.int32),
        logprobs=logprobs[:length].cpu().numpy(),
        finish_reason=reason,
    )
