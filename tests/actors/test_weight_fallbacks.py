"""Who cannot be sent weights from the trainer's memory is left to the object store, and takes no other with it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import torch
from test_weight_stream import Taker, take_in

from rlflow.actors import weight_carriers, weight_lines, weight_stream
from rlflow.actors.weight_sync import Meeting


def test_a_worker_that_says_nothing_takes_no_other_with_it(make_sender, monkeypatch):
    monkeypatch.setattr(weight_lines.Line.hear, "__kwdefaults__", {"timeout_s": 0.5})
    monkeypatch.setitem(weight_stream.CHUNK_BYTES, "cpu", 4096)
    named = [(str(number), torch.randn(1000)) for number in range(20)]
    sender = make_sender("ipc")
    is_over = threading.Event()
    Taker(sender, lambda number: is_over.wait(20) if number == 3 else None)
    sound = Taker(sender)
    take_in(sender, 2)
    assert not sender.send(named, 1)
    sound.until(lambda: sound.versions)
    assert sender.num_receivers == 1 and sound.has(named)
    is_over.set()


def test_a_buffer_that_cannot_be_mapped_leaves_a_worker_to_the_object_store(make_sender, monkeypatch):
    def handle(buffer: Any) -> dict[str, Any]:
        raise RuntimeError("this allocator does not yet support shareIpcHandle")

    monkeypatch.setattr(weight_carriers.HostBuffer, "handle", handle)
    sender = make_sender("ipc")
    taker = Taker(sender)
    taker.until(lambda: sender.take_in() or sender.lost)
    assert sender.num_receivers == 0 and "does not yet support shareIpcHandle" in sender.lost[0]


def test_a_device_without_room_for_a_buffer_leaves_workers_to_the_object_store(make_sender, monkeypatch):
    monkeypatch.setitem(weight_stream.CHUNK_BYTES, "cpu", 4096)
    sender = make_sender("ipc")
    Taker(sender)
    take_in(sender, 1)

    def make_buffer(size: int, device: torch.device) -> Any:
        raise torch.OutOfMemoryError(f"tried to allocate {size}")

    monkeypatch.setattr(weight_stream, "make_buffer", make_buffer)
    drained = []
    named = [("small", torch.zeros(8)), ("large", torch.zeros(10_000)), ("last", torch.zeros(8))]
    assert not sender.send((drained.append(name) or (name, tensor) for name, tensor in named), 1)
    assert len(drained) == 3 and sender.num_receivers == 0 and "no room for a buffer of 40,000 bytes" in sender.lost[0]


def test_of_a_group_each_has_a_gpu_of_its_own(make_sender, monkeypatch):
    for module in (weight_stream, weight_carriers):
        monkeypatch.setattr(module, "device_name", lambda device: "GPU one")
    sender = make_sender("collective")
    taker = Taker(sender)
    taker.until(lambda: sender.take_in() or taker.receiver.refusal)
    assert sender.num_receivers == 0 and "shares GPU one with another of the group" in taker.receiver.refusal


def test_the_trainers_gpu_has_a_number(monkeypatch):
    devices = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    meeting = Meeting("collective", ("127.0.0.1", 1), "token", "GPU one")
    monkeypatch.setattr(
        weight_stream,
        "WeightSender",
        lambda _, gpu, host: devices.append(gpu) or SimpleNamespace(meeting=meeting),
    )
    weight_stream.RankStream("collective", torch.device("cuda"), "127.0.0.1", 0, 1)
    assert devices == [torch.device("cuda", 2)]
