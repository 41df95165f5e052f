"""Generation with vLLM, in this process, a step at a time: CPU builds and CUDA builds alike.

The engine starts without weights and takes every version of them from the trainer, between two steps. Each sample has
its own seed, and an engine that has nothing under way has forgotten what it read, so that what becomes of requests
which are added together is a function of the weights and those requests alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import torch

from rlflow.actors.rollout_engines import vllm_start
from rlflow.actors.rollout_engines.engine import Written
from rlflow.actors.rollout_engines.sent_weights import checked, weight_shapes
from rlflow.actors.rollout_engines.vllm_experts import pack_experts
from rlflow.actors.rollout_engines.vllm_pictures import forget_pictures, picture_options, prompt_of
from rlflow.recipe import ModelBlock
from rlflow.types import Completion, FinishReason, SampleRequest

if TYPE_CHECKING:
    import vllm

    from rlflow.actors.rollout_engines.engine import CacheAtUpdate
    from rlflow.actors.rollout_engines.vllm_adapter import VllmAdapter

LOWEST_TEMPERATURE = 0.01
"""vLLM samples at this temperature when it is asked for less, other than 0."""


@dataclass(slots=True)
class UnderWay:
    """A request that vLLM has."""

    request: SampleRequest
    name: str
    """What vLLM calls it."""
    starts: list[tuple[int, int]]
    """(version, index of the first token that it sampled), in the order of the updates."""


class VllmEngine:
    def __init__(
        self,
        model_dir: str,
        *,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        seed: int,
        gpu_memory_fraction: float,
        kv_cache_gib: float,
        tensor_parallel_size: int,
        trust_remote_code: bool,
        log_path: Path | None,
        num_threads: int,
        adapted: ModelBlock | None = None,
        is_whole: bool = False,
    ) -> None:
        """Builds the model without weights: they arrive through load_weights, and model_dir need not hold any.

        Args:
            model_dir: Directory or hub id with the model's config.
            dtype: Of the weights, as torch spells it.
            max_model_len: Longest sequence in tokens, prompt and completion.
            max_num_seqs: Completions generated at a time.
            seed: Of vLLM's own random state; samples never draw from it.
            gpu_memory_fraction: Share of the GPU's memory for weights and key-value cache (GPU only).
            kv_cache_gib: Size of the key-value cache in GiB (CPU only).
            tensor_parallel_size: GPUs the model is split over.
            trust_remote_code: Run code that the model repository brings.
            log_path: Where vLLM's log is appended; dropped when None.
            num_threads: Compute threads (CPU).
            adapted: Of a policy with an adapter, its block: the base is read from model_dir, and what arrives through
                load_weights is the adapter alone.
            is_whole: The weights of model_dir are there, and the adapter at the path of ``adapted``: none arrive.

        Raises:
            ValueError: vLLM is not installed, it refuses these settings for this model (a max_model_len beyond the
                model's, a cache too small for one sequence), or it could not take new weights for it.
        """
        vllm_start.prepare_process(num_threads, log_path)
        self.adapter = None if adapted is None else _adapter_of(adapted)
        self.shapes = weight_shapes(model_dir, trust_remote_code) if self.adapter is None else self.adapter.shapes
        options: dict[str, Any] = {"dtype": dtype, "max_model_len": max_model_len, "max_num_seqs": max_num_seqs}
        options |= {"seed": seed % 2**32, "trust_remote_code": trust_remote_code}
        options |= {"load_format": "auto"} if self.adapter is not None or is_whole else {}
        if self.adapter is not None:
            options |= self.adapter.options
        self.sees, of_pictures = picture_options(model_dir, trust_remote_code)
        with vllm_start.quiet(log_path):
            self.on_cpu, own = vllm_start.platform_options(gpu_memory_fraction, kv_cache_gib, tensor_parallel_size)
            self.llm = vllm_start.start(model_dir, options | of_pictures | own, self.on_cpu, is_whole)
        self.max_model_len = max_model_len
        self.version, self._num_loads = 0 if is_whole else -1, 0
        if self.adapter is not None and is_whole:
            self.adapter.load_given(self.llm)
        self._under_way: dict[int, UnderWay] = {}
        self._not_begun: deque[int] = deque()
        """Requests by their ids, and the ids of those without a token, in the order in which they were added."""
        self.num_running = self.num_waiting = 0
        """Completions that have a token, and requests that have none yet. Other threads may read them at any time."""

    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], version: int, cache: CacheAtUpdate = "recompute"
    ) -> int:
        """Copies every weight in, cast to the engine's dtype. The engine must be awake.

        Whatever becomes of the cache of completions under way, what is begun from now on reads nothing that older
        weights have written.

        Args:
            weights: A checkpoint's names and whole tensors; a tied lm_head is left out.
            version: Of the weights.
            cache: ``recompute`` the keys and values of what is under way, or ``keep`` them.

        Returns:
            How many tokens of completions under way are read again.

        Raises:
            ValueError: A name the model does not have, another shape, or a weight left out. Nothing was loaded then,
                of weights that were here.
            WeightsLost: They stopped coming.
        """
        chunks = checked(weights, self.shapes)
        if self.adapter is not None:
            self.adapter.load(self.llm, [(name, tensor.clone()) for chunk in chunks for name, tensor in chunk])
        else:
            self._load(chunks)
        self.version = version
        self._num_loads += 1
        if self.sees:
            forget_pictures(self.llm)
        num_read_again, not_begun = 0, []
        for one in self._under_way.values():
            num_written = self._state(one).detokenizer.num_output_tokens()
            one.starts.append((version, num_written))
            if num_written:
                num_read_again += len(one.request.token_ids) + num_written
            else:
                not_begun.append(one)
        if cache == "recompute":
            self.llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
            return num_read_again
        # What vLLM has taken note of for them is under the salt of older weights.
        self.llm.llm_engine.abort_request([str(one.request.id) for one in not_begun])
        for one in not_begun:
            one.name = self._hand_over(one.request)
        return 0

    def _load(self, chunks: Iterable[list[tuple[str, torch.Tensor]]]) -> None:
        """Copies whole weights in, a chunk at a time."""
        unset: list[set[str]] = []
        for chunk in chunks:
            left = self.llm.apply_model(partial(_load_into, tensors=chunk))
            unset = [before & now for before, now in zip(unset or left, left, strict=True)]
        for names in unset:
            if names:
                raise ValueError(
                    f"weight sync: vLLM's model got no values for {shorten(', '.join(sorted(names)), 200)}: "
                    "set rollout.engine: torch"
                )
        if self.on_cpu:
            self.llm.apply_model(pack_experts)

    def leave_out(self, ids: np.ndarray) -> None:
        """Gives ``ids`` of the vocabulary no probability from now on, and those of an earlier call theirs back."""
        self.llm.apply_model(partial(_leave_out, ids=torch.from_numpy(ids)))

    def add(self, requests: Sequence[SampleRequest]) -> None:
        """Takes requests; vLLM begins them in this order, and those of one prompt share what was read of it.

        Raises:
            ValueError: A prompt leaves no room for its completion, vLLM cannot sample with its parameters, or its id is
                here. None of the requests was taken then.
        """
        from vllm.exceptions import VLLMValidationError

        if not self._under_way:
            was_reset = self.llm.llm_engine.reset_prefix_cache()
            assert was_reset, "vLLM still runs requests that have ended"
        added: list[int] = []
        for request in requests:
            try:
                if request.id in self._under_way:
                    raise ValueError("one of this id is under way")
                name = self._hand_over(request)
            except (ValueError, VLLMValidationError) as error:
                self.abort(added)
                raise ValueError(f"request {request.id}: {error}") from error
            self._under_way[request.id] = UnderWay(request, name, [(self.version, 0)])
            added.append(request.id)
        self._not_begun += added
        self._count()

    def step(self) -> list[Completion]:
        """Makes the next token of everything under way. Returns what has finished, in the order it was added."""
        # One of vLLM's sampling helpers is a torch.compile function: on a CPU, half a minute of C++ at the first token.
        with torch.compiler.set_stance("force_eager") if self.on_cpu else nullcontext():
            outputs = cast("list[vllm.RequestOutput]", self.llm.llm_engine.step())
        finished = {int(output.request_id): output.outputs[0] for output in outputs}
        ended = [one for id, one in self._under_way.items() if id in finished] if finished else []
        for one in ended:
            del self._under_way[one.request.id]
        self._count()
        return [_completion(one, finished[one.request.id]) for one in ended]

    def written(self, seen: Mapping[int, int]) -> dict[int, Written]:
        """Shows what is under way: of each request the tokens behind so many, and their logprobs."""
        newer = {}
        for id, start in seen.items():
            if id in self._under_way:
                state = self._state(self._under_way[id])
                if state.detokenizer.num_output_tokens() > start:
                    logprobs = state.logprobs_processor.logprobs.logprobs
                    newer[id] = Written(state.detokenizer.output_token_ids[start:], logprobs[start:])
        return newer

    def abort(self, ids: Sequence[int]) -> list[Completion]:
        """Ends requests. Returns what was written of them, with the finish reason ``abort``."""
        from vllm.v1.engine import FinishReason as VllmFinishReason

        ended = [self._under_way.pop(id) for id in dict.fromkeys(ids) if id in self._under_way]
        outputs = [self._state(one).make_request_output([], None, VllmFinishReason.ABORT, None) for one in ended]
        self.llm.llm_engine.abort_request([str(one.request.id) for one in ended])
        self._not_begun = deque(id for id in self._not_begun if id in self._under_way)
        self._count()
        return [_completion(one, output.outputs[0]) for one, output in zip(ended, outputs, strict=True)]

    def sleep(self) -> None:
        """Gives GPU memory back between generations: weights to host memory, key-value cache dropped. No-op on CPU."""
        assert not self._under_way, "an engine that falls asleep would lose what is under way"
        if not self.on_cpu:
            self.llm.sleep(level=1)

    def wake(self) -> None:
        """Takes the GPU memory again; the weights are those it fell asleep with. No-op on CPU."""
        if not self.on_cpu:
            self.llm.wake_up()

    def close(self) -> None:
        """Stops vLLM and frees its memory. The engine cannot be used afterwards."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm

    def sampling_of(self, request: SampleRequest) -> vllm.SamplingParams:
        """A request's parameters as vLLM takes them."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = request.params
        if 0 < params.temperature < LOWEST_TEMPERATURE:
            raise ValueError(
                f"temperature {params.temperature}: vLLM would sample at {LOWEST_TEMPERATURE}; use 0 for greedy"
            )
        if len(request.token_ids) + params.max_new_tokens > self.max_model_len:
            raise ValueError(
                f"{len(request.token_ids)} prompt tokens and {params.max_new_tokens} new ones exceed the engine's "
                f"max_model_len of {self.max_model_len}"
            )
        return SamplingParams(
            max_tokens=params.max_new_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            seed=_fold(request.seed) if self.on_cpu else request.seed,
            stop_token_ids=list(params.stop_token_ids),
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _hand_over(self, request: SampleRequest) -> str:
        """Adds a request to vLLM's. Returns what vLLM calls it."""
        assert self.adapter is None or self.adapter.request is not None, "generate before the first adapter"
        return self.llm.llm_engine.add_request(
            str(request.id),
            prompt_of(self.llm, request, salt=str(self._num_loads)),
            self.sampling_of(request),
            lora_request=None if self.adapter is None else self.adapter.request,
        )

    def _count(self) -> None:
        """vLLM begins requests in their order: those at the front that have a token, or have ended, are looked at."""
        while self._not_begun:
            one = self._under_way.get(self._not_begun[0])
            if one is not None and self._state(one).is_prefilling:
                break
            self._not_begun.popleft()
        self.num_waiting = len(self._not_begun)
        self.num_running = max(0, len(self._under_way) - self.num_waiting)

    def _state(self, one: UnderWay) -> Any:
        """What vLLM has of a request so far: it tells neither how many tokens nor which before the end."""
        return self.llm.llm_engine.output_processor.request_states[one.name]


def _adapter_of(block: ModelBlock) -> VllmAdapter:
    from rlflow.actors.rollout_engines.vllm_adapter import VllmAdapter

    return VllmAdapter(block)


def _fold(seed: int) -> int:
    """63 bits to 32, which is all that vLLM's CPU random generators keep: without it 0 and 2**62 are one seed."""
    return (seed ^ seed >> 32) & 0xFFFFFFFF


def _load_into(model: Any, tensors: list[tuple[str, torch.Tensor]]) -> set[str]:
    """Runs in every worker of the engine. Returns vLLM's names of parameters that no tensor reached."""
    reached = model.load_weights(iter(tensors))
    return {name for name, _ in model.named_parameters()} - reached


def _leave_out(model: Any, ids: torch.Tensor) -> None:
    """Runs in every worker of the engine. What vLLM makes of logits, cuts and logprobs, comes after the model's own."""
    vars(model).pop("compute_logits", None)
    if not len(ids):
        return
    compute_logits, ids = model.compute_logits, ids.to(next(model.parameters()).device)

    def of_tokens(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        logits = compute_logits(*args, **kwargs)
        # Of workers that share a model one alone has them.
        return None if logits is None else logits.index_fill_(-1, ids, -torch.inf)

    model.compute_logits = of_tokens


def _completion(one: UnderWay, output: vllm.CompletionOutput) -> Completion:
    from vllm.logprobs import FlatLogprobs

    assert isinstance(output.logprobs, FlatLogprobs)
    token_ids = np.array(output.token_ids, dtype=np.int32)
    logprobs = np.array(output.logprobs.logprobs, dtype=np.float32)
    assert len(token_ids) == len(logprobs), "vLLM returned another number of logprobs than of tokens"
    assert output.finish_reason in get_args(FinishReason), f"vLLM finished for {output.finish_reason}"
    firsts = [first for _, first in one.starts]
    return Completion(
        id=one.request.id,
        token_ids=token_ids,
        logprobs=logprobs,
        versions=np.repeat([version for version, _ in one.starts], np.diff([*firsts, len(token_ids)])).astype(np.int32),
        finish_reason=cast(FinishReason, output.finish_reason),
    )
