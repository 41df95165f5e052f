"""A server that gives prompt logprobs as vLLM's does, of a transformers model, and does what a test tells it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class TeacherStandIn:
    def __init__(self, model_dir: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self.max_model_len = 4096
        self.max_logprobs = 20
        self.has_tokenize = True
        self.change: Callable[[dict[str, Any]], Any] = lambda choice: choice
        """What becomes of every choice of an answer."""
        self.failures = 0
        """That many answers are 503."""
        self.delay_s = 0.0
        self.bodies: list[dict[str, Any]] = []

    def answer(self, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        """(status, what is said)."""
        if path == "/v1/models":
            return 200, {"data": [{"id": "teacher", "max_model_len": self.max_model_len}]}
        assert body is not None
        if path == "/tokenize" and self.has_tokenize:
            return 200, {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        if self.failures:
            self.failures -= 1
            return 503, {"detail": "busy"}
        time.sleep(self.delay_s)
        self.bodies.append(body)
        if body["prompt_logprobs"] > self.max_logprobs:
            return 400, {"message": f"Requested prompt logprobs of {body['prompt_logprobs']}, which is greater than 20"}
        return 200, {"choices": [self.change(self.choice(body))]}

    def choice(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, k = body["prompt"], body["prompt_logprobs"]
        with torch.no_grad():
            logprobs = torch.log_softmax(self.model(torch.tensor([ids])).logits[0].double(), -1)
        at: list[dict[str, Any] | None] = [None]
        for place, token in enumerate(ids[1:]):
            chosen = {token, *logprobs[place].topk(k).indices.tolist()}
            at.append({str(id): {"logprob": float(logprobs[place, id]), "rank": 1} for id in chosen})
        return {"text": "x", "prompt_logprobs": at, "prompt_token_ids": ids}


@contextmanager
def serving_teacher(model_dir: Path) -> Iterator[tuple[TeacherStandIn, str]]:
    """The stand-in and its address."""
    stand_in = TeacherStandIn(model_dir)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(None)

        def do_POST(self) -> None:
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, body: Any) -> None:
            status, said = stand_in.answer(self.path, body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    # Of a client that has waited long enough.
    server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield stand_in, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
