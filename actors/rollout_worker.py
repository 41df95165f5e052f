"""RolloutWorker: groups of rollouts, each given back when it is done, with weights that may change between two tokens.

    verb           waits for                                     consumes -> produces
    submit         the step under way                            prompts and seeds
    collect        a group that is done, or the time             -> whole groups, and how the worker is doing
    load_weights   the step under way (and, with `running:       weights of a version
                   wait`, for all that is under way)
    abort          nothing                                       ids of groups

Calls come from several threads at a time; the engine is used by one alone (engine_thread).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlflow.actors.completion_texts import decode_completions
from rlflow.actors.engine_groups import EngineGroup, RunningAtUpdate
from rlflow.actors.engine_thread import EngineThread
from rlflow.actors.environment_episodes import Episodes, PlayedEpisode
from rlflow.actors.rollout_engines.engine import CacheAtUpdate, RolloutEngine
from rlflow.actors.rollout_engines.stop_strings import StopStrings
from rlflow.actors.weight_intake import WeightIntake, WeightsTaken
from rlflow.garbage import without_collection
from rlflow.recipe import EnvironmentBlock, ModelBlock, RolloutBlock, RolloutServerBlock
from rlflow.rollout_checks import layout_problem, token_problem
from rlflow.types import Completion, GroupRequest, RolloutBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from rlflow.actors.weight_sync import WeightSnapshot

ORDER_TIMEOUT_S = 600.0
"""One step of an engine, or a load of weights, that takes longer is an error."""
_STANDARD_ERROR = Path("/dev/stderr")
"""Where vLLM's log goes: what this process prints is the actor's log."""


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """What a worker says when it is up."""

    engine: str
    seconds: float


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a worker is doing, and has done since it began."""

    version: int
    num_running: int
    num_waiting: int
    """Completions that have no room yet, or wait for weights or for their environment."""
    num_taken: int
    """Completions that it was ever asked for, as far as it has heard."""
    steps: int
    """Of its engine, and of environments."""
    tokens: int
    busy_s: float
    load_s: float
    reread_tokens: int
    spans: tuple[tuple[str, float, float], ...]
    """(what it did, from, until) since the last answer."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What `collect` returns."""

    batch: RolloutBatch | None
    """Whole groups, in the order in which they were done; None when none was."""
    status: WorkerStatus


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
        run_directory: Path,
        server: RolloutServerBlock | None = None,
        environment: EnvironmentBlock | None = None,
        template_date: date | None = None,
        gets_merged: bool = False,
        is_whole: bool = False,
    ) -> None:
        """
        Args:
            is_whole: The weights are those at the model's path, or a server's, and none arrive: they are version 0.
            gets_merged: Of a policy with an adapter, whole weights arrive, with what the adapter makes of them.
            environment: Of rollouts of several turns.
            template_date: What the chat template writes where it writes the date.
        """
        from rlflow.data.image_processor import load_image_processor
        from rlflow.data.tokenizer import load_tokenizer
        from rlflow.data.vocabulary import token_table

        started = time.perf_counter()
        self.rank = rank
        generator: RolloutEngine
        model = _generating(model, engine, gets_merged=gets_merged, is_whole=is_whole)
        if engine == "http":
            assert server is not None
            generator = _http_engine(server, model, rollout, max_model_len, run_directory, rank, is_whole)
        else:
            generator = _make_engine(engine, model, rollout, max_model_len, num_threads, seed, is_whole)
        self.tokenizer = load_tokenizer(model)
        self.is_token = token_table(self.tokenizer)
        generator.leave_out(_no_tokens(model, self.tokenizer))
        generator = StopStrings(generator, self.tokenizer)
        self.engine = EngineThread(generator, rollout.max_num_seqs, lambda: _use_threads(num_threads))
        self.engine.version = 0 if is_whole else -1
        self.intake = WeightIntake(self.engine, rollout.at_update.running, rollout.at_update.cache)
        if environment is not None:
            self.engine.episodes = Episodes(
                environment,
                self.tokenizer,
                template_date,
                go_on=self.engine.go_on,
                over=self.engine.end_episode,
                fail=self.engine.fail,
                vision=load_image_processor(model),
                at_once=rollout.max_num_seqs,
            )
        self._ready = WorkerReady(engine, time.perf_counter() - started)

    def ready(self) -> WorkerReady:
        return self._ready

    def submit(self, requests: Sequence[GroupRequest]) -> None:
        """Takes groups, to be begun in this order and between the same two steps.

        Raises:
            ValueError: The engine cannot generate one of them; none was taken.
        """
        self.engine.submit(requests).result(ORDER_TIMEOUT_S)

    def collect(self, most: int, timeout_s: float, *, wants_room: bool = False) -> Collected:
        """Up to ``most`` groups, as soon as one is done; none when the time is up.

        Args:
            wants_room: Also return as soon as there is room for more.

        Raises:
            ValueError: The engine returned what is no rollout: tokens that are not in the tokenizer, logprobs that are
                not finite.
        """
        groups = self.engine.take_finished(most, timeout_s, wants_room=wants_room)
        batch = self._batch(groups) if groups else None
        counts = self.engine.counts
        # Read first: what is taken meanwhile is then counted twice, and nobody sends more than there is room for.
        num_taken = counts.samples
        status = WorkerStatus(
            version=self.engine.version,
            num_running=self.engine.engine.num_running,
            num_waiting=self.engine.engine.num_waiting + self.engine.num_held,
            num_taken=num_taken,
            steps=counts.steps + counts.replies,
            tokens=counts.tokens,
            busy_s=counts.busy_s,
            load_s=counts.load_s,
            reread_tokens=counts.reread_tokens,
            spans=self.engine.take_spans(),
        )
        return Collected(batch, status)

    def hurry(self) -> None:
        """Ends the `collect` that waits, or the next."""
        self.engine.hurry()

    def load_weights(
        self, snapshot: WeightSnapshot, running: RunningAtUpdate = "continue", cache: CacheAtUpdate = "recompute"
    ) -> WeightsTaken:
        """Takes new weights between two steps; see `WeightIntake.take`."""
        return self.intake.take(snapshot, running, cache)

    def abort(self, group_ids: Sequence[int]) -> None:
        """Forgets groups, whatever has become of them, after the step under way; waits for nothing."""
        self.engine.abort(group_ids)

    def sleep(self) -> None:
        """Gives accelerator memory back."""
        self.engine.do(self.engine.engine.sleep).result(ORDER_TIMEOUT_S)

    def wake(self) -> None:
        """Takes it again."""
        self.engine.do(self.engine.engine.wake).result(ORDER_TIMEOUT_S)

    def close(self) -> None:
        """Ends the engine, and environments."""
        self.intake.close()
        if self.engine.episodes is not None:
            self.engine.episodes.close()
        self.engine.close()

    def _batch(self, groups: Sequence[EngineGroup]) -> RolloutBatch:
        batch = pack_groups(groups, self.tokenizer)
        longest = [group.request.max_sampled_tokens for group in groups for _ in group.completions]
        problem = layout_problem(batch, np.array(longest)) or token_problem(batch, self.is_token)
        if problem is not None:
            raise ValueError(
                f"the engine, at policy version {self.engine.version}, returned what is no rollout: {problem}"
            )
        return batch


def pack_groups(groups: Sequence[EngineGroup], tokenizer: PreTrainedTokenizerFast) -> RolloutBatch:
    """Prompts and completions, or episodes, end to end."""
    if any(isinstance(made, PlayedEpisode) for group in groups for made in group.completions):
        return pack_episodes(groups, tokenizer)
    rows = [
        (g.request, completion) for g in groups for completion in g.completions if isinstance(completion, Completion)
    ]
    prompts = [request.prompt.token_ids for request, _ in rows]
    written = [completion.token_ids for _, completion in rows]
    lengths = np.array([part for prompt, c in zip(prompts, written, strict=True) for part in (len(prompt), len(c))])
    is_sampled = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    logprobs = np.zeros(len(is_sampled), dtype=np.float32)
    versions = np.full(len(is_sampled), -1, dtype=np.int32)
    logprobs[is_sampled] = np.concatenate([completion.logprobs for _, completion in rows])
    versions[is_sampled] = np.concatenate([completion.versions for _, completion in rows])
    parts = [part for pair in zip(prompts, written, strict=True) for part in pair]
    return RolloutBatch(
        group_ids=tuple(group.request.id for group in groups),
        sizes=tuple(len(group.completions) for group in groups),
        offsets=np.concatenate([[0], np.cumsum(lengths)[1::2]]).astype(np.int64),
        token_ids=np.concatenate(parts).astype(np.int32, copy=False),
        is_sampled=is_sampled,
        logprobs=logprobs,
        versions=versions,
        finish_reasons=tuple(completion.finish_reason for _, completion in rows),
        texts=decode_completions(tokenizer, written, [request.params.stop_token_ids for request, _ in rows]),
    )


def pack_episodes(groups: Sequence[EngineGroup], tokenizer: PreTrainedTokenizerFast) -> RolloutBatch:
    """Episodes, end to end."""
    rows = [(group.request, made) for group in groups for made in group.completions if isinstance(made, PlayedEpisode)]
    episodes = [episode for _, episode in rows]
    return RolloutBatch(
        group_ids=tuple(group.request.id for group in groups),
        sizes=tuple(len(group.completions) for group in groups),
        offsets=np.cumsum([0, *(len(episode.token_ids) for episode in episodes)]).astype(np.int64),
        token_ids=np.concatenate([episode.token_ids for episode in episodes]),
        is_sampled=np.concatenate([episode.is_sampled for episode in episodes]),
        logprobs=np.concatenate([episode.logprobs for episode in episodes]),
        versions=np.concatenate([episode.versions for episode in episodes]),
        finish_reasons=tuple(episode.finish_reason for episode in episodes),
        texts=decode_completions(
            tokenizer,
            [episode.token_ids[episode.is_sampled] for episode in episodes],
            [request.params.stop_token_ids for request, _ in rows],
        ),
        episodes=tuple(episode.episode for episode in episodes),
    )


def _use_threads(num_threads: int) -> None:
    """torch counts its compute threads for each thread that computes."""
    import torch

    torch.set_num_threads(num_threads)


def _no_tokens(model: ModelBlock, tokenizer: Any) -> np.ndarray:
    """Ids of the vocabulary that no completion has: what is no token of the tokenizer, and placeholders of pictures."""
    from transformers import AutoConfig

    from rlflow.data.vocabulary import ids_without_token, placeholder_ids

    assert model.path is not None
    config = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    unwritten = ids_without_token(tokenizer, config.get_text_config().vocab_size)
    return np.union1d(unwritten, placeholder_ids(config)).astype(np.int64)


def _generating(model: ModelBlock, engine: str, *, gets_merged: bool, is_whole: bool) -> ModelBlock:
    """The model as the engine has it: without an adapter that arrives merged, or that is new and changes nothing.

    Raises:
        ValueError: The engine takes an adapter merged alone, and nobody merges it.
    """
    adapter = model.adapter
    is_new = adapter is not None and adapter.path is None
    if is_whole and gets_merged and not is_new:
        raise ValueError(
            f"model.adapter: engine {engine} takes this adapter merged into its base alone: rlflow export --merge "
            "makes such a model, name it as model.path"
        )
    return model.model_copy(update={"adapter": None}) if gets_merged or (is_whole and is_new) else model


def _http_engine(
    server: RolloutServerBlock,
    model: ModelBlock,
    rollout: RolloutBlock,
    max_model_len: int,
    directory: Path,
    rank: int,
    is_whole: bool,
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
        is_whole=is_whole,
    )


def _make_engine(
    name: str,
    model: ModelBlock,
    rollout: RolloutBlock,
    max_model_len: int,
    num_threads: int,
    seed: int,
    is_whole: bool,
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
            log_path=_STANDARD_ERROR,
            num_threads=num_threads,
            is_whole=is_whole,
            **common,
        )
    import torch

    from rlflow.actors.rollout_engines.torch_engine import TorchEngine

    torch.set_num_threads(num_threads)
    return TorchEngine(model.path, **common, model=_whole_model(model, seed) if is_whole else None)


def _whole_model(model: ModelBlock, seed: int) -> Any:
    """The model with the weights at its path, and with its adapter's."""
    import torch
    from transformers import AutoConfig

    from rlflow.actors import adapters
    from rlflow.actors.pretrained import load_whole
    from rlflow.actors.vision import language_model_class

    if model.adapter is not None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return adapters.load_adapted(model, seed=seed, device=device, trust_remote_code=model.trust_remote_code)
    assert model.path is not None
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    auto_class = language_model_class(AutoConfig.from_pretrained(model.path, **options))
    return load_whole(auto_class, model.path, dtype=getattr(torch, model.dtype), **options)
