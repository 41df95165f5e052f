"""The random state in a checkpoint is that of the devices that a rank uses."""

from __future__ import annotations

import pytest
import torch

from rlflow.actors.train_engines.engine import load_with_random_state, save_with_random_state
from rlflow.actors.train_engines.sharded_state import shard_of


def test_a_rank_on_the_cpu_leaves_the_machines_gpus_alone(tmp_path, monkeypatch: pytest.MonkeyPatch):
    def touched(*_: object) -> None:
        raise AssertionError("this opens a context on a GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", touched)
    monkeypatch.setattr(torch.cuda, "set_rng_state", touched)
    shards = {"model/weight": shard_of(torch.ones(3))}
    save_with_random_state(tmp_path, 0, 1, shards)
    drawn = torch.rand(4)
    load_with_random_state(tmp_path, 0, shards)
    assert torch.equal(torch.rand(4), drawn)
