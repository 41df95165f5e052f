"""Generation with transformers alone: any machine, batched, KV-cached, with the logprobs tokens were drawn with.

A prompt is read once for all of its samples. Each sample draws from its own random stream, so what it becomes does
not depend on which others it is batched with (up to rounding in the forward pass).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from rlflow.actors.checkpoint_names import to_model
from rlflow.actors.rollout_engines.torch_reading import ONE_PROMPT, Reader, Reading, read_padded
from rlflow.actors.train_engines.probe import narrow_windows, use_own_attention
from rlflow.recipe import ModelBlock
from rlflow.types import Completion, FinishReason, GenerationRequest, SamplingParams

logger = logging.getLogger(__name__)
_HEATS = (1.0, 10.0)
"""Temperatures at which ways of reading are compared: where one token has nearly all of the probability, its logprob is
0 whatever the others' are."""


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
        self.reader: Reader = read_padded
        self.is_settled = False
        """The reader is known to be right for this model."""
        self.is_adapted = adapted is not None
        if adapted is not None:
            from rlflow.actors import adapters

            options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
            self.model: Any = adapters.load_adapted(adapted, seed=0, device=self.device, **options).eval()
            self.synced = adapters.adapter_parameters(self.model)
            use_own_attention(self.model)
            return
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
        with no_init_weights():
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
            )
        self.model.tie_weights()
        self.model.to(self.device).eval()
        self.synced = dict(self.model.named_parameters())
        use_own_attention(self.model)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies every weight in. The first time, it also settles how the model generates; a cache of the model's own
        is looked at every time, as what it gets wrong may be too small to see in weights that are new.

        Raises:
            ValueError: For a name or shape that the model does not have, or one left out.
        """
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
        if not self.is_settled or self.reader is ONE_PROMPT[0]:
            self._choose_reader()

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
            which, seeds = [place[r] for r, _ in wave], [s for _, s in wave]
            completions += self._generate_wave(prompts, which, seeds, params)
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
        """which [R]: the prompt of each row, in order; seeds [R]."""
        if self.reader is read_padded:
            return self._write(read_padded(self.model, prompts, which), seeds, params)
        completions: list[Completion] = []
        for index, prompt in enumerate(prompts):
            own = [seed for seed, of_prompt in zip(seeds, which, strict=True) if of_prompt == index]
            completions += self._write(self.reader(self.model, [prompt], [0] * len(own)), own, params)
        return completions

    def _write(self, reading: Reading, seeds: list[int], params: SamplingParams) -> list[Completion]:
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
            token, logprob = sample(self._of_tokens(reading.logits), uniforms[alive, t], params)
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
            if num_running <= len(alive) // 2 and reading.can_leave_out:
                keep = running.nonzero().squeeze(1)
                reading.keep(keep)
                alive, token = alive[keep], token[keep]
            reading.write(token)
        return [
            _completion(tokens[r], logprobs[r], int(lengths[r]), "stop" if stopped[r] else "length")
            for r in range(num_rows)
        ]

    @torch.inference_mode()
    def _choose_reader(self) -> None:
        """The first way of reading whose logprobs of a few tokens are those of transformers' forward pass of each
        sequence alone; windows are made shorter than these texts meanwhile, so that they show."""
        vocabulary = self.model.config.get_text_config().vocab_size
        generator = np.random.default_rng(0)
        prompts = [generator.integers(0, vocabulary, size=size).astype(np.int32) for size in (3, 9)]
        requests = [GenerationRequest(prompts[0], (1, 2)), GenerationRequest(prompts[1], (3,))]
        # Padding would enter a state that is carried from token to token; with small weights that does not show yet.
        ways = ONE_PROMPT if self.model._is_stateful else (read_padded, *ONE_PROMPT)
        before = self.reader
        with narrow_windows(self.model):
            if not self._logits(prompts[1]).isfinite().all():
                return
            for self.reader in ways:
                if self.reader is ways[-1] or all(self._is_right(requests, heat) for heat in _HEATS):
                    break
        self.is_settled = True
        if self.reader is not before:
            cache = "" if self.reader is ONE_PROMPT[0] else ", without a cache"
            logger.warning("%s generates from one prompt at a time%s", type(self.model).__name__, cache)

    def _is_right(self, requests: Sequence[GenerationRequest], temperature: float) -> bool:
        params = SamplingParams(max_new_tokens=6, temperature=temperature)
        try:
            completions = self.generate(requests, params)
        except torch.OutOfMemoryError:
            raise
        # What a model's code makes of padding and caches is not ours; the next way may be right.
        except Exception as error:
            logger.info("%s: %s: %s", type(self.model).__name__, type(error).__name__, error)
            return False
        prompts = [request.prompt_token_ids for request in requests for _ in request.seeds]
        differences = []
        for prompt, completion in zip(prompts, completions, strict=True):
            logits = self._logits(np.concatenate([prompt, completion.token_ids]))[len(prompt) - 1 : -1]
            written = torch.from_numpy(completion.token_ids).long().to(self.device)
            logits = self._of_tokens(logits).float() / temperature
            plain = torch.log_softmax(logits, dim=-1).gather(1, written[:, None]).squeeze(1)
            differences.append((plain.cpu() - torch.from_numpy(completion.logprobs)).abs())
        apart = torch.cat(differences)
        # In 16 bits a mixture of experts may route single tokens otherwise.
        exact = self.model.dtype == torch.float32
        return bool(apart.max() < 3e-4) if exact else bool(apart.median() < 0.1)

    def _logits(self, tokens: np.ndarray) -> torch.Tensor:
        """Of a text alone, [L, V], of all ids."""
        ids = torch.from_numpy(tokens).long().to(self.device)
        return self.model(input_ids=ids[None]).logits[0]

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
