"""TeacherServer: a teacher behind an OpenAI-compatible server, asked what it would have given to the tokens of texts.

Token ids go in. vLLM's `prompt_logprobs` come back: of each token its logprob, and those of the k most probable ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import NOT_FOUND
from itertools import pairwise
from typing import Any

import numpy as np

from rlflow.actors.rollout_engines.http_calls import Server, ServerError, taking_apart
from rlflow.recipe import ModelBlock
from rlflow.recipe.teacher_block import TeacherBlock
from rlflow.types import MicroBatch

_PROBE_TOKENS = 200
"""Of the policy's tokenizer, whose text the server is asked to tokenise."""
_ROUNDING = 1e-3
"""What a logprob may lie above 0."""


class TeacherServer:
    """The verbs of a TeacherModel, but for hidden states, which no server gives."""

    def __init__(self, *, teacher: TeacherBlock, policy: ModelBlock, longest: int) -> None:
        """
        Args:
            longest: Tokens of the longest sequence that it may be asked about.
        """
        assert teacher.url is not None
        self.server = Server(teacher.url.rstrip("/"), teacher.timeout_s, "teacher.timeout_s", "teacher.url")
        self.policy, self.longest, self.model = policy, longest, teacher.served_model
        self._num_ids = 1 << 24
        """Those of the policy's tokenizer are below; a teacher's embedding may be padded to more."""
        self._threads = ThreadPoolExecutor(teacher.requests_at_once, thread_name_prefix="teacher")

    def ready(self) -> float:
        """Seconds that it took to ask the server whether it can be the teacher.

        Raises:
            ValueError: It serves no such model, or one of another tokenizer or of too short a context.
            ServerError: It does not answer.
        """
        started = time.perf_counter()
        answer = self.server.get("/v1/models")
        with taking_apart(answer, f"{self.server.url}/v1/models"):
            served = {model["id"]: model for model in answer["data"]}
        self.model = self.model or next(iter(served), "")
        if self.model not in served:
            raise ValueError(f"teacher.served_model: {self.server.url} serves {', '.join(served)}, not {self.model}")
        limit = served[self.model].get("max_model_len")
        # It writes one token, as it must write some.
        if limit is not None and self.longest + 1 > limit:
            raise ValueError(
                f"teacher.url: sequences may have {self.longest} tokens, and {self.model} at {self.server.url} takes "
                f"{limit}, one of them its own: start it with a larger --max-model-len, or train shorter ones"
            )
        self._require_tokenizer()
        return time.perf_counter() - started

    def logprobs(self, micro_batches: Sequence[MicroBatch], temperature: float = 1.0) -> np.ndarray:
        """Log-probabilities of the loss tokens, float32 [N] of the micro-batches end to end.

        Raises:
            ServerError: The server does not answer, or with something else, such as numbers that are no logprobs.
        """
        assert temperature == 1.0, "a server's prompt logprobs are of temperature 1"

        def of_token(given: dict[int, float], token: int) -> float:
            return given[token]

        return self._of_loss_tokens(micro_batches, 0, (), of_token)

    def top_logprobs(self, micro_batches: Sequence[MicroBatch], k: int, temperature: float) -> np.ndarray:
        """As a TeacherModel's.

        Raises:
            ServerError: The server does not answer, or with something else, such as fewer tokens, or numbers that are
                no logprobs.
        """
        from rlflow.algorithms.distillation import tail_of

        assert temperature == 1.0, "a server's prompt logprobs are of temperature 1"

        def of_most_probable(given: dict[int, float], token: int) -> np.ndarray:
            # The text's own token is there too, wherever it ranks.
            known = ((id, logprob) for id, logprob in given.items() if id < self._num_ids)
            best = sorted(known, key=lambda pair: -pair[1])[:k]
            if len(best) < k:
                raise ServerError(
                    f"{self.server.url}: {len(best)} of the {k} most probable tokens that algorithm.distill.top_k asks "
                    f"for: lower it, or start vLLM with --max-logprobs {k}"
                )
            return np.array([*best, (-1, 0.0)], dtype=np.float32)

        import torch

        top = self._of_loss_tokens(micro_batches, k, (k + 1, 2), of_most_probable)
        is_asked = top[:, k, 0] == -1
        logprobs = torch.from_numpy(top[is_asked, :k, 1])
        top[is_asked, k, 1] = tail_of(logprobs).squeeze(1).numpy()
        return top

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _of_loss_tokens(
        self,
        micro_batches: Sequence[MicroBatch],
        k: int,
        shape: tuple[int, ...],
        read: Callable[[dict[int, float], int], Any],
    ) -> np.ndarray:
        """float32 [N, *shape]: what ``read`` makes of each loss token's logprobs by id, and of its id."""
        sequences = [
            (batch.token_ids[start:end], batch.loss_mask[start:end])
            for batch in micro_batches
            for start, end in pairwise(batch.cu_seqlens.tolist())
        ]

        def of_sequence(sequence: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
            token_ids, loss_mask = sequence
            values = np.zeros((len(token_ids), *shape), dtype=np.float32)
            if places := np.flatnonzero(loss_mask).tolist():
                given = self._ask(token_ids[: places[-1] + 1].tolist(), k)
                for place in places:
                    values[place] = read(given[place], int(token_ids[place]))
            return values

        return np.concatenate(list(self._threads.map(of_sequence, sequences)))

    def _ask(self, token_ids: list[int], k: int) -> list[dict[int, float]]:
        """Logprobs by id of every token but the first, each with its own among them."""
        body = {
            "model": self.model,
            "prompt": token_ids,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": k,
            "return_token_ids": True,
        }
        answer = self.server.post("/v1/completions", body)
        where = f"{self.server.url}/v1/completions"
        with taking_apart(answer, where):
            choice = answer["choices"][0]
            read, given = choice.get("prompt_token_ids"), choice.get("prompt_logprobs")
        if read is not None and read != token_ids:
            raise ServerError(
                f"{where}: it has read other token ids than it was sent: its model is not the policy's kin"
            )
        if given is None:
            raise ServerError(
                f"{where}: no prompt_logprobs in the answer: rlflow needs a server that has them, as vLLM"
            )
        with taking_apart(given, where):
            by_id = [{int(id): _number(of["logprob"]) for id, of in (at or {}).items()} for at in given]
        if len(by_id) != len(token_ids) or any(id not in at for id, at in list(zip(token_ids, by_id, strict=True))[1:]):
            raise ServerError(f"{where}: {len(by_id)} prompt_logprobs for {len(token_ids)} tokens, or of other ids")
        for of_token in by_id:
            self._require_logprobs(of_token.values(), where)
        return by_id

    def _require_logprobs(self, values: Iterable[float], where: str) -> None:
        for value in values:
            if not math.isfinite(value):
                raise ServerError(
                    f"{where}: logprobs of {self.model} are not finite: its weights are damaged, or too large for the "
                    "dtype that it is served in"
                )
            if value > _ROUNDING:
                raise ServerError(f"{where}: {value:g} is no logprob, which is at most 0: it gives something else")

    def _require_tokenizer(self) -> None:
        """Raises ValueError where the server makes other ids of a text than the policy. Who cannot be asked is not."""
        from rlflow.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self.policy)
        self._num_ids = max(tokenizer.get_vocab().values()) + 1
        special = set(tokenizer.all_special_ids)
        ids = [id for id in sorted(tokenizer.get_vocab().values()) if id not in special]
        text = tokenizer.decode(ids[:: max(1, len(ids) // _PROBE_TOKENS)])
        ours = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        try:
            answer = self.server.post("/tokenize", body)
        except ServerError as error:
            if error.status == NOT_FOUND:
                return
            raise
        with taking_apart(answer, f"{self.server.url}/tokenize"):
            theirs = answer["tokens"]
        if theirs != ours:
            raise ValueError(
                f"teacher.url: {self.model} at {self.server.url} has another tokenizer than {self.policy.path}, whose "
                "ids it is to score: serve a model of the same tokenizer"
            )


def _number(value: Any) -> float:
    """JSON has no number that is none, and null in its place."""
    return math.nan if value is None else float(value)
