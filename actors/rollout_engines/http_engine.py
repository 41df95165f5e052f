"""A server over HTTP as an engine: vLLM's, SGLang's, or another that speaks as one of them does.

The server has the weights and the batch. A bounded number of threads each wait for one answer of it, and `step` waits a
little for any of them. New weights are written as a checkpoint, which the server loads while it generates nothing: what
is under way is stopped, and then goes on from the tokens it had, as another request. So the version of a token is what
the server had loaded when it was asked, never a guess, and its logprob is exactly that version's.
"""

from __future__ import annotations

import hashlib
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from rlflow.actors.rollout_engines.engine import Written
from rlflow.actors.rollout_engines.http_calls import Server, ServerError
from rlflow.actors.rollout_engines.http_servers import Ask, CompletionServer, Piece, SglangServer, VllmServer
from rlflow.actors.rollout_engines.sent_weights import check_weights, weight_shapes
from rlflow.types import Completion, FinishReason, SampleRequest

if TYPE_CHECKING:
    from rlflow.actors.rollout_engines.engine import CacheAtUpdate

SERVERS = {"vllm": VllmServer, "sglang": SglangServer}
STEP_S = 0.1
"""Longest that a step waits: other calls to the engine come between two steps."""
_MOST_EMPTY = 3


@dataclass(slots=True)
class UnderWay:
    """A request, and what the server has written of it so far."""

    request: SampleRequest
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    key: str = ""
    """Of the newest call."""
    answer: Future[Piece] | None = None
    version: int = -1
    """That the server had loaded at the newest call."""
    num_empty: int = 0
    """Answers in a row without a token."""

    def take(self) -> None:
        """Joins what the newest call brought to what was there.

        Raises:
            ServerError: The call failed.
        """
        assert self.answer is not None
        piece = self.answer.result()
        stop = self.request.params.stop_token_ids
        length = next((i + 1 for i, token in enumerate(piece.token_ids) if token in stop), len(piece.token_ids))
        self.token_ids += piece.token_ids[:length]
        self.logprobs += piece.logprobs[:length]
        self.versions += [self.version] * length
        self.num_empty = 0 if length else self.num_empty + 1
        if length and self.token_ids[-1] in stop:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.request.params.max_new_tokens:
            self.finish_reason = "length"

    def completion(self, finish_reason: FinishReason) -> Completion:
        return Completion(
            id=self.request.id,
            token_ids=np.array(self.token_ids, dtype=np.int32),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            versions=np.array(self.versions, dtype=np.int32),
            finish_reason=finish_reason,
        )


class HttpEngine:
    def __init__(
        self,
        model_dir: str,
        *,
        url: str,
        api: Literal["vllm", "sglang"],
        timeout_s: float,
        directory: Path,
        max_model_len: int,
        max_num_seqs: int,
        trust_remote_code: bool,
        is_whole: bool = False,
    ) -> None:
        """Finds the server, which has been started with this model.

        Args:
            model_dir: Directory or hub id with the model's config.
            url: Of the server, such as ``http://10.0.0.5:8000``.
            api: What the server speaks.
            timeout_s: Longest wait for a completion, and for weights to be loaded.
            directory: Weights are written here, where the server must see them under the same path.
            max_model_len: Longest sequence in tokens, prompt and completion.
            max_num_seqs: Requests at the server at a time.
            trust_remote_code: Run code that the model repository brings.
            is_whole: The server's weights stay what they are: version 0.

        Raises:
            ServerError: It is not there, or does not speak ``api``.
        """
        self.server: CompletionServer = SERVERS[api](Server(url.rstrip("/"), timeout_s))
        self.url, self.timeout_s, self.directory = url, timeout_s, directory
        self.model_dir, self.trust_remote_code = model_dir, trust_remote_code
        self.max_model_len = max_model_len
        self.shapes = weight_shapes(model_dir, trust_remote_code)
        self.version = 0 if is_whole else -1
        self._left_out: tuple[int, ...] = ()
        self._is_temperature_checked = False
        self._under_way: dict[int, UnderWay] = {}
        self.num_running = self.num_waiting = 0
        """Requests that the server has or has answered, and those that are not sent yet, as of the newest call. Other
        threads may read them at any time."""
        self._threads = ThreadPoolExecutor(max_num_seqs, thread_name_prefix="completions")
        self._name, self._calls = uuid.uuid4().hex[:12], count()

    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], version: int, cache: CacheAtUpdate = "recompute"
    ) -> int:
        """Writes the weights and has the server load them, between the tokens of what is under way.

        Raises:
            ValueError: A name or shape that the model does not have, one left out, or a cache that is to be kept.
            ServerError: The server did not stop, or did not load them.
        """
        if cache == "keep":
            raise ValueError(
                f"{self.url} forgets what it has read when it loads weights: what is under way cannot be kept with "
                "its cache over HTTP; have it recomputed"
            )
        tensors = list(weights)
        check_weights(tensors, self.shapes)
        self._stop([one for one in self._under_way.values() if one.finish_reason is None])
        written = self._write(dict(tensors), version)
        self.server.load(written, version)
        shutil.rmtree(written)
        self.version = version
        going_on = [one for one in self._under_way.values() if one.finish_reason is None]
        for one in going_on:
            self._send(one)
        self._count()
        return sum(len(one.request.token_ids) + len(one.token_ids) for one in going_on if one.token_ids)

    def leave_out(self, ids: np.ndarray) -> None:
        """Gives ``ids`` of the vocabulary no probability to speak of from now on, and those of an earlier call theirs
        back."""
        self._left_out = tuple(ids.tolist())

    def add(self, requests: Sequence[SampleRequest]) -> None:
        """Takes requests; they are sent in this order, as answers come.

        Raises:
            ValueError: A prompt is empty, has pictures or leaves no room for its completion, or its id is here. None
                was taken then.
            ServerError: The server's logprobs are of another temperature than the requests'.
        """
        ids = [*self._under_way, *(request.id for request in requests)]
        if len(set(ids)) < len(ids):
            raise ValueError("one of the requests has an id that is under way")
        if any(request.images for request in requests):
            raise ValueError(
                "rollout_server: a prompt has pictures, and servers are sent tokens alone: set rollout.engine: vllm or "
                "torch"
            )
        for request in requests:
            num_prompt, num_new = len(request.token_ids), request.params.max_new_tokens
            if not num_prompt or num_new < 1 or num_prompt + num_new > self.max_model_len:
                raise ValueError(
                    f"request {request.id}: {num_prompt} prompt tokens and {num_new} new ones: each must be there, and "
                    f"together within the max_model_len of {self.max_model_len}"
                )
            if request.params.temperature not in (0.0, 1.0) and not self._is_temperature_checked:
                self.server.check_temperature(request.token_ids.tolist())
                self._is_temperature_checked = True
        for request in requests:
            self._under_way[request.id] = UnderWay(request)
            self._send(self._under_way[request.id])
        self._count()

    def step(self) -> list[Completion]:
        """Waits a little for answers. Returns what has finished, in the order it was added.

        Raises:
            ServerError: A call failed for good, or the server ends a request again and again without a token.
        """
        for one in self._under_way.values():
            if one.finish_reason is None and one.answer is None:
                self._send(one)
        answers = [one.answer for one in self._under_way.values() if one.finish_reason is None and one.answer]
        if len(answers) == len(self._under_way):
            wait(answers, STEP_S, FIRST_COMPLETED)
        finished = []
        for one in list(self._under_way.values()):
            if one.finish_reason is None and one.answer is not None and one.answer.done():
                one.take()
                if one.num_empty > _MOST_EMPTY:
                    raise ServerError(f"{self.url}: request {one.request.id} was ended {one.num_empty} times unbegun")
                # Unless it has ended, the server has stop tokens of its own, or somebody else stopped it: the next step
                # goes on from here. Who finds a stop string in its text ends it before.
                one.answer = None
            if one.finish_reason is not None:
                del self._under_way[one.request.id]
                finished.append(one.completion(one.finish_reason))
        self._count()
        return finished

    def written(self, seen: Mapping[int, int]) -> dict[int, Written]:
        """What the server's answers have brought so far: all of a completion at once, unless it was interrupted."""
        newer = ((id, self._under_way[id], start) for id, start in seen.items() if id in self._under_way)
        return {
            id: Written(one.token_ids[start:], one.logprobs[start:])
            for id, one, start in newer
            if len(one.token_ids) > start
        }

    def abort(self, ids: Sequence[int]) -> list[Completion]:
        """Ends requests, at the server too. Returns what was written, with the finish reason ``abort``."""
        ended = [self._under_way.pop(id) for id in dict.fromkeys(ids) if id in self._under_way]
        self._stop([one for one in ended if one.finish_reason is None])
        self._count()
        return [one.completion("abort") for one in ended]

    def sleep(self) -> None:
        """The server's memory is its own."""

    def wake(self) -> None:
        """Nothing was given back."""

    def close(self) -> None:
        """Leaves the server as it is, without requests of ours."""
        self.abort(list(self._under_way))
        self._threads.shutdown(cancel_futures=True)

    def _count(self) -> None:
        answers = [one.answer for one in self._under_way.values() if one.finish_reason is None and one.answer]
        self.num_waiting = sum(not answer.running() and not answer.done() for answer in answers)
        self.num_running = len(self._under_way) - self.num_waiting

    def _send(self, one: UnderWay) -> None:
        """Hands a request, or what is left of it, to the next thread that is free."""
        request, num_written = one.request, len(one.token_ids)
        one.key, one.version = f"{self._name}-{next(self._calls)}", self.version
        ask = Ask(
            key=one.key,
            token_ids=[*request.token_ids.tolist(), *one.token_ids],
            num_new=request.params.max_new_tokens - num_written,
            seed=_seed_at(request.seed, num_written),
            params=request.params,
            left_out=self._left_out,
        )
        one.answer = self._threads.submit(self.server.generate, ask, self.version)

    def _stop(self, unfinished: Sequence[UnderWay]) -> None:
        """Ends the newest call of each, and takes what came of it.

        The server is told again and again, as a call may reach it after the word to stop it.
        """
        begun = [one for one in unfinished if one.answer is not None and not one.answer.cancel()]
        deadline = time.monotonic() + self.timeout_s
        while unanswered := [one for one in begun if one.answer is not None and not one.answer.done()]:
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self.url}: {len(unanswered)} requests were stopped and not answered in {self.timeout_s:g} s"
                )
            self.server.stop([one.key for one in unanswered])
            wait([one.answer for one in unanswered if one.answer is not None], STEP_S)
        for one in begun:
            one.take()

    def _write(self, weights: dict[str, torch.Tensor], version: int) -> Path:
        from safetensors.torch import save_file
        from transformers import AutoConfig

        directory = self.directory / f"version-{version}"
        shutil.rmtree(directory, ignore_errors=True)
        config = AutoConfig.from_pretrained(self.model_dir, trust_remote_code=self.trust_remote_code)
        config.save_pretrained(directory)
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return directory


def _seed_at(seed: int, num_written: int) -> int:
    """The seed of a completion that goes on from its tokens: from the start it would draw the same numbers again."""
    if not num_written:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{num_written}".encode(), digest_size=8).digest()) >> 1
