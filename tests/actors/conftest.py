"""A reward server with a plugin that misbehaves; a trainer's end of what weights are sent through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rlflow.actors.reward_server import RewardServer
from rlflow.recipe import RewardBlock
from tests.actors.reward_servers import PLUGIN

if TYPE_CHECKING:
    from rlflow.actors.weight_stream import WeightSender


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "misbehaviour.py"
    path.write_text(PLUGIN)
    return path


@pytest.fixture
def serve(plugin: Path) -> Iterator[Any]:
    servers: list[RewardServer] = []

    def start(*functions: str | RewardBlock, children: int = 1, timeout_s: float = 60.0) -> RewardServer:
        blocks = [
            function
            if isinstance(function, RewardBlock)
            else RewardBlock(plugin=f"{plugin}:{function}", timeout_s=timeout_s)
            for function in functions
        ]
        servers.append(RewardServer(blocks, children))
        servers[-1].ready()
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def make_sender() -> Iterator[Callable[[str], WeightSender]]:
    """Of a transport, on the CPU."""
    import torch

    from rlflow.actors.weight_stream import WeightSender

    made: list[WeightSender] = []

    def make(transport: str) -> WeightSender:
        made.append(WeightSender(transport, torch.device("cpu"), "127.0.0.1"))
        return made[-1]

    yield make
    for sender in made:
        sender.close()
