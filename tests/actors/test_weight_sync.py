from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch

from rlflow.actors import weight_sync
from rlflow.actors.weight_sync import CHANNELS, SameProcess, pack_weights, receive, unpack_weights

NAMED = [
    ("a", torch.randn(3, 5)),
    ("b", torch.randn(7).to(torch.bfloat16)),
    ("c", torch.randn(2, 4).T.to(torch.float16)),
    ("scalar", torch.tensor(2.5)),
]


@pytest.fixture
def alone(monkeypatch):
    """No Ray is up, whatever other tests have started in this process."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def assert_same(snapshot) -> None:
    assert snapshot.num_bytes == sum(tensor.nbytes for _, tensor in NAMED)
    for (name, tensor), (name_back, tensor_back) in zip(NAMED, unpack_weights(snapshot), strict=True):
        assert name == name_back
        assert tensor.dtype == tensor_back.dtype
        assert torch.equal(tensor, tensor_back)


@pytest.mark.parametrize("chunk_bytes", [1, 70, 1 << 28])
def test_what_is_unpacked_equals_what_was_packed_in_every_dtype_shape_and_chunk(alone, monkeypatch, chunk_bytes):
    monkeypatch.setattr(weight_sync, "CHUNK_BYTES", chunk_bytes)
    snapshot = pack_weights(NAMED, version=3)
    assert (snapshot.version, snapshot.channel) == (3, "process")
    # 60, 14, 16 and 4 bytes: with 70 the first two go together.
    assert len(snapshot.handles) == {1: 4, 70: 2, 1 << 28: 1}[chunk_bytes]
    assert_same(snapshot)


def test_a_snapshot_keeps_the_weights_that_a_trainer_in_the_same_process_writes_over(alone):
    weight = torch.ones(3)
    snapshot = pack_weights([("a", weight)], version=0)
    weight.fill_(2.0)
    [(_, tensor)] = list(unpack_weights(snapshot))
    assert tensor.tolist() == [1.0, 1.0, 1.0]


def test_whole_tensors_are_let_go_with_their_chunk(alone, monkeypatch):
    """A sharded trainer gathers each as it is asked for."""
    monkeypatch.setattr(weight_sync, "CHUNK_BYTES", 1000)
    alive: list[weakref.ref] = []
    most = 0

    def gathered():
        nonlocal most
        for index in range(20):
            tensor = torch.zeros(100)
            alive.append(weakref.ref(tensor.untyped_storage()))
            most = max(most, sum(reference() is not None for reference in alive))
            yield f"w{index}", tensor

    gc.disable()
    try:
        pack_weights(gathered(), 1, SameProcess())
    finally:
        gc.enable()
    assert most <= 4


def test_what_arrives_is_read_only_and_a_tensor_without_a_warning(recwarn):
    snapshot = pack_weights([("a", torch.ones(4))], version=0)
    assert not any(array.flags.writeable for array in receive(snapshot))
    [(_, tensor)] = list(unpack_weights(snapshot))
    assert np.array_equal(tensor.numpy(), np.ones(4, dtype=np.float32))
    assert not recwarn.list


def test_weights_of_another_version_or_another_size_are_refused(alone):
    first, second = (pack_weights(NAMED, version) for version in (1, 2))
    with pytest.raises(ValueError, match=r"'process' are not the weights of policy version 2 that were sent"):
        unpack_weights(replace(second, handles=first.handles))
    with pytest.raises(ValueError, match="a tensor's size differs"):
        unpack_weights(replace(first, tensors=first.tensors[:-1]))


@pytest.mark.ray
def test_chunks_reach_other_processes_through_ray_and_end_with_their_snapshot(monkeypatch, ray_session):
    monkeypatch.setattr(weight_sync, "CHUNK_BYTES", 70)
    snapshot = pack_weights(NAMED, 5)
    assert (snapshot.channel, len(snapshot.handles)) == ("ray", 2)
    assert_same(snapshot)

    @ray.remote
    def total(snapshot) -> float:
        return sum(float(tensor.sum()) for _, tensor in unpack_weights(snapshot))

    expected = sum(float(tensor.sum()) for _, tensor in NAMED)
    assert ray.get(total.remote(snapshot), timeout=60) == pytest.approx(expected)
    assert not any(array.flags.writeable for array in CHANNELS["ray"].get(snapshot.handles[0])[:1])
