"""RolloutWorker: prompts in, completions out, with the newest weights it was given."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlflow.actors.rollout_engines.engine import RolloutEngine, generate
from rlflow.garbage import without_collection
from rlflow.recipe import ModelBlock, RolloutBlock, RolloutServerBlock
from rlflow.rollout_checks import layout_problem, token_problem
from rlflow.types import GenerationRequest, RolloutBatch, SampleRequest, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from rlflow.actors.weight_sync import WeightSnapshot


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """What a worker says when it is up."""

    engine: str
    seconds: float


class RolloutWorker:
    @without_collection()
    def __init__(
        self,
        model: ModelBlock,
        rollout: RolloutBlock,
        *,
        rank: int,
        engine: str,
        max_model_len: int,
        num_threads: int,
        seed: int,
        log_directory: Path,
        server: RolloutServerBlock | None = None,
    ) -> None:

        started = time.perf_counter()
        self.rank = rank
        self.version = -1
        if engine == "http":
            assert server is not None
            self.engine = _http_engine(server, model, rollout, max_model_len, log_directory.parent, rank)
        else:
            self.engine = _make_engine(engine, model, rollout, max_model_len, num_threads, seed, log_directory, rank)
        from rlflow.data.tokenizer import load_tokenizer
        from rlflow.data.vocabulary import token_table

        self.tokenizer = load_tokenizer(model)
        self.is_token = token_table(self.tokenizer)
        self.engine.leave_out(_no_tokens(model, self.tokenizer))
        self._turn = threading.Lock()
        """Held by whoever uses the engine: several calls may come in at a time."""
        self._ready = WorkerReady(engine, time.perf_counter() - started)

    def ready(self) -> WorkerReady:
        return self._ready

    def load_weights(self, snapshot: WeightSnapshot) -> float:
        """Takes new weights. Returns seconds."""
        from rlflow.actors.weight_sync import unpack_weights

        started = time.perf_counter()
        with self._turn:
            self.engine.load_weights(unpack_weights(snapshot), snapshot.version)
            self.version = snapshot.version
        return time.perf_counter() - started

    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> RolloutBatch:
        """One completion for every seed of every request, in that order.

        Raises:
            ValueError: The engine returned what is none: tokens that are not in the tokenizer, logprobs that are not
                finite, another number of completions.
        """
        assert self.version >= 0, "generate before the first weights"
        with self._turn:
            return self._generate(requests, params)

    def _generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> RolloutBatch:
        started = time.perf_counter()
        rows = [(request.prompt_token_ids, seed) for request in requests for seed in request.seeds]
        samples = [SampleRequest(i, prompt, seed, params) for i, (prompt, seed) in enumerate(rows)]
        completions = generate(self.engine, samples)
        offsets = np.cumsum([0] + [len(c.token_ids) for c in completions])
        texts = decode_completions(self.tokenizer, [c.token_ids for c in completions], params.stop_token_ids)
        batch = RolloutBatch(
            token_ids=np.concatenate([c.token_ids for c in completions]),
            logprobs=np.concatenate([c.logprobs for c in completions]),
            offsets=offsets.astype(np.int64),
            finish_reasons=tuple(c.finish_reason for c in completions),
            texts=texts,
            policy_version=self.version,
            seconds=time.perf_counter() - started,
        )
        problem = layout_problem(batch, len(rows), params.max_new_tokens) or token_problem(batch, self.is_token)
        if problem is not None:
            raise ValueError(f"the engine, at policy version {self.version}, returned what is no rollout: {problem}")
        return batch

    def sleep(self) -> None:
        self.engine.sleep()

    def wake(self) -> None:
        self.engine.wake()

    def close(self) -> None:
        self.engine.close()


def decode_completions(
    tokenizer: PreTrainedTokenizerFast, completions: Sequence[np.ndarray], stop_token_ids: Sequence[int]
) -> tuple[str, ...]:
    """What the policy wrote, as text: all but stop tokens and padding, special tokens such as ``<think>`` included.

    Args:
        completions: int32 [C] each.
    """
    silent = [*stop_token_ids, *([] if tokenizer.pad_token_id is None else [tokenizer.pad_token_id])]
    written = [token_ids[~np.isin(token_ids, silent)].tolist() for token_ids in completions]
    # Tokenizers that ask for a clean-up would take the space before a full stop away.
    return tuple(tokenizer.batch_decode(written, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _no_tokens(model: ModelBlock, tokenizer: Any) -> np.ndarray:
    """Ids of the vocabulary that are no token of the tokenizer."""
    from transformers import AutoConfig

    from rlflow.data.vocabulary import ids_without_token

    assert model.path is not None
    config = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    return ids_without_token(tokenizer, config.get_text_config().vocab_size)


def _http_engine(
    server: RolloutServerBlock, model: ModelBlock, rollout: RolloutBlock, max_model_len: int, directory: Path, rank: int
) -> RolloutEngine:
    from rlflow.actors.rollout_engines.http_engine import HttpEngine

    assert model.path is not None
    if rank >= len(server.urls):
        raise ValueError(f"rollout worker {rank} has no server: rollout_server.urls names {len(server.urls)}")
    weights = directory / "served_weights" if server.directory is None else Path(server.directory)
    return HttpEngine(
        model.path,
        url=server.urls[rank],
        api=server.api,
        timeout_s=server.timeout_s,
        directory=weights.resolve() / f"worker-{rank}",
        max_model_len=max_model_len,
        max_num_seqs=rollout.max_num_seqs,
        trust_remote_code=model.trust_remote_code,
    )


def _make_engine(
    name: str,
    model: ModelBlock,
    rollout: RolloutBlock,
    max_model_len: int,
    num_threads: int,
    seed: int,
    log_directory: Path,
    rank: int,
) -> RolloutEngine:
    assert model.path is not None
    common: dict[str, Any] = {
        "dtype": model.dtype,
        "max_num_seqs": rollout.max_num_seqs,
        "trust_remote_code": model.trust_remote_code,
        "adapted": None if model.adapter is None else model,
    }
    if name == "vllm":
        from rlflow.actors.rollout_engines.vllm_engine import VllmEngine

        return VllmEngine(
            model.path,
            max_model_len=max_model_len,
            seed=seed,
            gpu_memory_fraction=rollout.gpu_memory_fraction,
            kv_cache_gib=rollout.kv_cache_gib,
            tensor_parallel_size=rollout.tensor_parallel_size,
            log_path=log_directory / f"vllm-{rank}.log",
            num_threads=num_threads,
            **common,
        )
    import torch

    from rlflow.actors.rollout_engines.torch_engine import TorchEngine

    torch.set_num_threads(num_threads)
    return TorchEngine(model.path, **common)
