"""How vLLM's and SGLang's servers are asked: for completions of token ids, to stop, and to load weights from a disk.

Both are told which tokens to go on from, and may end early; what ends a completion is decided here, from its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import NOT_FOUND
from pathlib import Path
from typing import Any, Protocol

from rlflow.actors.rollout_engines.http_calls import Server, ServerError, taking_apart
from rlflow.types import SamplingParams

NEVER = -100.0
"""Added to the logits of tokens that must not be drawn: 1e-43 of their probability is left."""
_HOTTER = 2.0
"""The highest temperature that vLLM's server takes."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One call for tokens."""

    key: str
    """Names it when it is to be stopped."""
    token_ids: list[int]
    num_new: int
    seed: int
    params: SamplingParams
    left_out: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """What came back: a completion, or the beginning of one."""

    token_ids: list[int]
    logprobs: list[float]


class CompletionServer(Protocol):
    """What the two have in common."""

    def generate(self, ask: Ask, version: int) -> Piece:
        """Waits for the answer. What was stopped is answered with what was written of it."""
        ...

    def stop(self, keys: Sequence[str]) -> None:
        """Ends those of them that the server has."""
        ...

    def load(self, directory: Path, version: int) -> None:
        """Loads a checkpoint's weights, and forgets what was read with those before. Nothing of ours is under way; what
        a worker that died has left there does not matter."""
        ...

    def check_temperature(self, prompt: list[int]) -> None:
        """Raises ServerError where the logprobs are those of another temperature than tokens are drawn at."""
        ...


class VllmServer:
    """``VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs``, version 0.32 or later."""

    def __init__(self, server: Server) -> None:
        self.server = server
        answer = server.get("/v1/models")
        with taking_apart(answer, f"{server.url}/v1/models"):
            self.model = answer["data"][0]["id"]

    def generate(self, ask: Ask, version: int) -> Piece:
        choice = self._complete(ask)
        where = f"{self.server.url}/v1/completions"
        with taking_apart(choice, where):
            token_ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if token_ids is None or logprobs is None:
            raise ServerError(
                f"{where}: no token_ids and logprobs in the answer, which return_token_ids "
                "and logprobs ask for: rlflow needs a server that has them, as vLLM 0.32 does"
            )
        return _piece(self.server, token_ids, logprobs)

    def stop(self, keys: Sequence[str]) -> None:
        self._control("/abort_requests", {"request_ids": [f"cmpl-{key}-0" for key in keys]})

    def load(self, directory: Path, version: int) -> None:
        rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
        self._control("/collective_rpc", rpc)
        if not self._control("/reset_prefix_cache?reset_running_requests=true", {}).get("success"):
            raise ServerError(f"{self.server.url}/reset_prefix_cache: it kept what older weights have written")

    def check_temperature(self, prompt: list[int]) -> None:
        largest = []
        for temperature in (1.0, _HOTTER):
            ask = Ask("temperature", prompt, 1, 0, SamplingParams(1, temperature), ())
            largest.append(max(self._complete(ask, num_logprobs=1)["logprobs"]["top_logprobs"][0].values()))
        if math.isclose(*largest, abs_tol=1e-6):
            raise ServerError(
                f"{self.server.url} reports logprobs of temperature 1, whatever rollout.temperature is: start it with "
                "--logprobs-mode processed_logprobs, or set rollout.temperature: 1"
            )

    def _control(self, path: str, body: dict[str, Any]) -> Any:
        try:
            return self.server.post(path, body)
        except ServerError as error:
            if error.status != NOT_FOUND:
                raise
            raise ServerError(
                f"{error}. Start vLLM 0.32 or later with VLLM_SERVER_DEV_MODE=1, so that it takes new weights"
            ) from error

    def _complete(self, ask: Ask, num_logprobs: int = 0) -> Any:
        """Everything that a model's generation config may have set on the server is set here."""
        body = {
            "model": self.model,
            "request_id": ask.key,
            "prompt": ask.token_ids,
            "max_tokens": ask.num_new,
            "temperature": ask.params.temperature,
            "top_p": ask.params.top_p,
            "top_k": ask.params.top_k or -1,
            "min_p": ask.params.min_p,
            "repetition_penalty": ask.params.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": ask.seed,
            "stop": list(ask.params.stop) or None,
            "stop_token_ids": list(ask.params.stop_token_ids),
            "ignore_eos": True,
            "logprobs": num_logprobs,
            "return_token_ids": True,
            "logit_bias": {str(token): NEVER for token in ask.left_out} or None,
        }
        answer = self.server.post("/v1/completions", body)
        with taking_apart(answer, f"{self.server.url}/v1/completions"):
            return answer["choices"][0]


class SglangServer:
    """``python -m sglang.launch_server --model-path MODEL``."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def generate(self, ask: Ask, version: int) -> Piece:
        sampling = {
            "max_new_tokens": ask.num_new,
            "temperature": ask.params.temperature,
            "top_p": ask.params.top_p,
            "top_k": ask.params.top_k or -1,
            "min_p": ask.params.min_p,
            "repetition_penalty": ask.params.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            # It keeps 31 bits, and with ignore_eos it would not look at these tokens.
            "sampling_seed": (ask.seed ^ ask.seed >> 32) & 0x7FFFFFFF,
            "stop": list(ask.params.stop) or None,
            "stop_token_ids": list(ask.params.stop_token_ids),
            "ignore_eos": False,
            "logit_bias": {str(token): NEVER for token in ask.left_out} or None,
        }
        body = {"rid": ask.key, "input_ids": ask.token_ids, "sampling_params": sampling, "return_logprob": True}
        answer = self.server.post("/generate", body)
        with taking_apart(answer, f"{self.server.url}/generate"):
            return self._piece_of(answer["meta_info"], version)

    def _piece_of(self, told: dict[str, Any], version: int) -> Piece:
        if (loaded := told.get("weight_version")) not in (None, "default", str(version)):
            raise ServerError(
                f"{self.server.url}/generate: written with weights {loaded}, not the {version} that were loaded: does "
                "another run load weights into this server?"
            )
        pairs = told.get("output_token_logprobs")
        if pairs is None and told["finish_reason"]["type"] == "abort":
            pairs = []
        if pairs is None:
            raise ServerError(f"{self.server.url}/generate: no output_token_logprobs, which return_logprob asks for")
        return _piece(self.server, [pair[1] for pair in pairs], [pair[0] for pair in pairs])

    def stop(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.server.post("/abort_request", {"rid": key})

    def load(self, directory: Path, version: int) -> None:
        body = {
            "model_path": str(directory),
            "weight_version": str(version),
            "abort_all_requests": True,
            "flush_cache": True,
        }
        answer = self.server.post("/update_weights_from_disk", body)
        if not answer.get("success"):
            said = answer.get("message", "")
            raise ServerError(f"{self.server.url}/update_weights_from_disk: it did not load {directory}: {said}")

    def check_temperature(self, prompt: list[int]) -> None:
        """SGLang's logprobs are those of the temperature, unless its environment asks for others."""


def _piece(server: Server, token_ids: Sequence[Any], logprobs: Sequence[Any]) -> Piece:
    if len(token_ids) != len(logprobs) or any(logprob is None for logprob in logprobs):
        raise ServerError(f"{server.url}: {len(token_ids)} tokens with {len(logprobs)} logprobs, or some without one")
    with taking_apart([token_ids, logprobs], server.url):
        return Piece([int(token) for token in token_ids], [float(logprob) for logprob in logprobs])
