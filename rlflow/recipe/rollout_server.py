"""Servers over HTTP that generate in the place of engines of our own, and what they rule out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from pydantic import Field

from rlflow.recipe.block import Block, Conflict, PositiveFloat

if TYPE_CHECKING:
    from rlflow.recipe.schema import Recipe


class RolloutServerBlock(Block):
    urls: list[str] = Field(default_factory=list)
    """The servers, one for each rollout worker, started with the recipe's model, e.g. [http://10.0.0.5:8000]."""
    api: Literal["vllm", "sglang"] = "vllm"
    """What they are: vLLM's (0.32 or later, with VLLM_SERVER_DEV_MODE=1 and --logprobs-mode processed_logprobs), or
    SGLang's."""
    directory: str | None = None
    """Each version of the weights is written here, where the servers must find it under the same path; the run's own
    directory when absent."""
    timeout_s: PositiveFloat = 600.0
    """Longest wait for a completion, and for weights to be loaded."""


def rollout_server_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """What does not go together with ``rollout_server``, or without."""
    server, rollout = recipe.rollout_server, recipe.rollout
    if rollout.engine != "http":
        if server != RolloutServerBlock():
            reason = f"are of engine http, and the engine is {rollout.engine}: set rollout.engine: http, or remove them"
            yield Conflict(("rollout_server", "rollout.engine"), reason)
        return
    if len(server.urls) != rollout.workers:
        reason = f"{len(server.urls)} servers for {rollout.workers} workers: each worker has a server of its own"
        yield Conflict(("rollout_server.urls", "rollout.workers"), reason)
    if len(set(server.urls)) < len(server.urls):
        yield Conflict(("rollout_server.urls",), "names a server twice: two workers would load weights into it")
    for url in server.urls:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            yield Conflict(("rollout_server.urls",), f"{url} is no address: write e.g. http://10.0.0.5:8000")
    if rollout.gpus_per_worker or rollout.tensor_parallel_size > 1:
        reason = "is the servers' own: leave gpus_per_worker and tensor_parallel_size out"
        yield Conflict(("rollout.gpus_per_worker", "rollout.engine"), reason)
    if rollout.at_update.transport in ("ipc", "collective"):
        reason = "servers read new weights from files: leave it out"
        yield Conflict(("rollout.at_update.transport", "rollout.engine"), reason)
    if rollout.at_update.cache == "keep":
        reason = "servers forget what they have read when they load weights: set recompute"
        yield Conflict(("rollout.at_update.cache", "rollout.engine"), reason)
