"""A server that speaks vLLM's and SGLang's ways, over the torch engine, and does what a test tells it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from rlflow.actors.rollout_engines.torch_engine import TorchEngine
from rlflow.types import Completion, SampleRequest, SamplingParams

DEADLINE_S = 30.0


class StandIn:
    def __init__(self, model_dir: Path) -> None:
        self.engine = TorchEngine(str(model_dir), dtype="float32", max_num_seqs=64)
        self.num_steps: float = float("inf")
        """That it may still make."""
        self.faults: list[Callable[[BaseHTTPRequestHandler], None]] = []
        """Each takes the place of one answer."""
        self.bodies: list[tuple[str, Any]] = []
        """What was asked, in order."""
        self.has_control = True
        self.own_stops: tuple[int, ...] = ()
        """What ends a completion of SGLang's besides what is asked for, as a model's own stop tokens do."""
        self.label: str | None = None
        """SGLang's name of the weights; what was loaded when None."""
        self.heats_logprobs = True
        self._loaded = "default"
        self._lock = threading.RLock()
        self._ids, self._of_key = count(), {}
        self._done: dict[int, Completion] = {}
        self._is_over = threading.Event()

    def run(self) -> None:
        """Steps as long as it may."""
        while not self._is_over.is_set():
            with self._lock:
                has_work = self.engine.num_running + self.engine.num_waiting > 0
                if has_work and self.num_steps > 0:
                    self.num_steps -= 1
                    self._done |= {completion.id: completion for completion in self.engine.step()}
            time.sleep(0.0005)

    def wait_until(self, is_true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not is_true():
            if self._is_over.is_set():
                # Nobody waits for an answer any more: the thread of this request ends without a word.
                raise SystemExit
            assert time.monotonic() < deadline
            time.sleep(0.001)

    @property
    def num_here(self) -> int:
        with self._lock:
            return self.engine.num_running + self.engine.num_waiting

    def end(self) -> None:
        self._is_over.set()

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """(status, what is said)."""
        if path == "/v1/models":
            return 200, {"data": [{"id": "policy"}]}
        if path == "/v1/completions":
            return 200, {"choices": [self._as_vllm(body)]}
        if path == "/generate":
            return 200, self._as_sglang(body)
        if not self.has_control:
            return 404, {"detail": "Not Found"}
        if path == "/abort_requests":
            return 200, {"aborted": self._abort([key.removeprefix("cmpl-")[:-2] for key in body["request_ids"]])}
        if path == "/abort_request":
            return 200, {"aborted": self._abort([body["rid"]])}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self._load(body["kwargs"]["weights_path"], "unnamed")
            return 200, {"results": [None]}
        if path == "/reset_prefix_cache?reset_running_requests=true":
            return 200, {"success": True}
        if path == "/update_weights_from_disk":
            if not Path(body["model_path"]).is_dir():
                return 400, {"success": False, "message": "no such directory"}
            assert body["abort_all_requests"] and body["flush_cache"]
            self._load(body["model_path"], body["weight_version"])
            return 200, {"success": True, "message": "Succeeded"}
        return 404, {"detail": "Not Found"}

    def _load(self, directory: str, name: str) -> None:
        with self._lock:
            assert self.num_here == 0, "weights came while something was under way"
            self.engine.load_weights(load_file(Path(directory) / "model.safetensors").items(), 0)
            self._loaded = name

    def _abort(self, keys: list[str]) -> int:
        with self._lock:
            ids = [self._of_key[key] for key in keys if key in self._of_key]
            ended = self.engine.abort(ids)
            self._done |= {completion.id: completion for completion in ended}
            return len(ended)

    def _generate(self, key: str, token_ids: list[int], seed: int, params: SamplingParams, bias: Any) -> Completion:
        request = SampleRequest(next(self._ids), np.array(token_ids, dtype=np.int32), seed, params)
        with self._lock:
            assert all(value == -100.0 for value in (bias or {}).values())
            self.engine.leave_out(np.array([int(token) for token in bias or {}], dtype=np.int64))
            self._of_key[key] = request.id
            self.engine.add([request])
        self.wait_until(lambda: request.id in self._done)
        return self._done.pop(request.id)

    def _as_vllm(self, body: Any) -> Any:
        params = _params(body, body["max_tokens"], body["stop_token_ids"])
        assert body["ignore_eos"] and body["return_token_ids"]
        if body["logprobs"] == 1:
            heat = params.temperature if self.heats_logprobs else 1.0
            return {"token_ids": [5], "logprobs": {"token_logprobs": [-2.0], "top_logprobs": [{"x": -2.0 / heat}]}}
        written = self._generate(body["request_id"], body["prompt"], body["seed"], params, body["logit_bias"])
        logprobs = {"token_logprobs": written.logprobs.tolist(), "top_logprobs": []}
        return {"token_ids": written.token_ids.tolist(), "logprobs": logprobs, "finish_reason": written.finish_reason}

    def _as_sglang(self, body: Any) -> Any:
        """It looks at the stop tokens that are asked for only where it also heeds those of the model."""
        told = body["sampling_params"]
        assert not told["ignore_eos"], "it would write on after the stop tokens"
        stop = (*told["stop_token_ids"], *self.own_stops)
        params = _params(told, told["max_new_tokens"], stop)
        written = self._generate(body["rid"], body["input_ids"], told["sampling_seed"], params, told["logit_bias"])
        meta: dict[str, Any] = {"finish_reason": {"type": written.finish_reason}}
        meta["weight_version"] = self._loaded if self.label is None else self.label
        if len(written.token_ids) or written.finish_reason != "abort":
            pairs = zip(written.logprobs.tolist(), written.token_ids.tolist(), strict=True)
            meta["output_token_logprobs"] = [[logprob, token, None] for logprob, token in pairs]
        return {"text": "", "meta_info": meta}


def _params(told: Any, max_new_tokens: int, stop_token_ids: Iterable[int]) -> SamplingParams:
    """Stop strings are not heeded: a server may be slower to see one than who asks it."""
    assert told["stop"] is None or all(isinstance(text, str) for text in told["stop"])
    return SamplingParams(
        max_new_tokens,
        told["temperature"],
        told["top_p"],
        max(told["top_k"], 0),
        tuple(stop_token_ids),
        told["min_p"],
        told["repetition_penalty"],
    )


@contextmanager
def serving(model_dir: Path) -> Iterator[tuple[StandIn, str]]:
    """The stand-in and its address."""
    stand_in = StandIn(model_dir)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(None)

        def do_POST(self) -> None:
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, body: Any) -> None:
            stand_in.bodies.append((self.path, body))
            if stand_in.faults:
                stand_in.faults.pop(0)(self)
                return
            status, said = stand_in.answer(self.path, body)
            send(self, status, json.dumps(said))

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    serve = partial(server.serve_forever, poll_interval=0.02)
    threads = [threading.Thread(target=run, daemon=True) for run in (serve, stand_in.run)]
    for thread in threads:
        thread.start()
    try:
        yield stand_in, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        stand_in.end()
        server.shutdown()
        server.server_close()
        for thread in threads:
            thread.join(DEADLINE_S)


def send(handler: BaseHTTPRequestHandler, status: int, text: str) -> None:
    handler.send_response(status)
    handler.end_headers()
    handler.wfile.write(text.encode())
