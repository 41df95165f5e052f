"""Weights from a trainer's rank to workers, past the object store: the bytes, who is let in, and what fails."""

from __future__ import annotations

import inspect
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from free_ports import free_ports

from rlflow.actors import weight_carriers, weight_lines, weight_stream
from rlflow.actors.engine_thread import EngineThread
from rlflow.actors.policy_trainer import PolicyTrainer
from rlflow.actors.rollout_engines.torch_engine import TorchEngine
from rlflow.actors.weight_intake import WeightIntake, WeightReceiver
from rlflow.actors.weight_stream import WeightSender
from rlflow.actors.weight_sync import Meeting, WeightSnapshot, unpack_weights
from rlflow.recipe import AdapterBlock, ModelBlock, TrainerBlock

CPU = torch.device("cpu")
NAMED = [
    ("a", torch.randn(3, 5)),
    ("b", torch.randn(7).to(torch.bfloat16)),
    ("c", torch.randn(2, 400).T.to(torch.float16)),
    ("scalar", torch.tensor(2.5)),
    ("large", torch.randn(60, 50)),
    ("ids", torch.arange(9)),
    ("nothing", torch.empty(0, 4)),
    ("flags", torch.tensor([True, False, True])),
]
BOTH = pytest.mark.parametrize("transport", ["ipc", "collective"])


class Taker:
    """A worker without an engine, which keeps copies of what comes."""

    def __init__(self, sender: Any, look: Callable[[int], None] = lambda number: None) -> None:
        """
        Args:
            look: Called before a tensor is copied, with how many have been.
        """
        self.look = look
        self.taken: dict[str, torch.Tensor] = {}
        self.versions: list[int] = []
        self.receiver = WeightReceiver(sender.meeting, CPU, self._load)

    def _load(self, chunks: Any, version: int) -> Future[None]:
        future: Future[None] = Future()

        def copy() -> None:
            try:
                self.taken.clear()
                for name, tensor in chunks:
                    self.look(len(self.taken))
                    self.taken[name] = tensor.clone()
                self.versions.append(version)
                future.set_result(None)
            # As the engine's thread does.
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=copy, daemon=True).start()
        return future

    def has(self, named: list[tuple[str, torch.Tensor]]) -> bool:
        """Whether all of it has come, to the bit, in its order."""
        return list(self.taken) == [name for name, _ in named] and all(
            torch.equal(self.taken[name], tensor) and self.taken[name].dtype == tensor.dtype for name, tensor in named
        )

    def until(self, is_true: Callable[[], object]) -> None:
        deadline = time.monotonic() + 10
        while not is_true():
            assert time.monotonic() < deadline
            time.sleep(0.005)


def take_in(sender: WeightSender, wanted: int) -> None:
    """Until so many are sent to: connections come in at their time."""
    deadline = time.monotonic() + 10
    while sender.num_receivers < wanted:
        assert time.monotonic() < deadline
        sender.take_in()


@BOTH
@pytest.mark.parametrize("chunk_bytes", [1, 4096, 1 << 24])
def test_every_worker_has_every_tensor_to_the_bit_in_chunks_of_any_size(
    make_sender, monkeypatch, transport, chunk_bytes
):
    monkeypatch.setitem(weight_stream.CHUNK_BYTES, "cpu", chunk_bytes)
    sender = make_sender(transport)
    takers = [Taker(sender) for _ in range(2)]
    take_in(sender, 2)
    for version in (1, 2):
        named = [(name, tensor * version) for name, tensor in NAMED]
        # The second version wants larger buffers.
        named += [(f"{number}", torch.randn(4000 * version)) for number in range(2)]
        assert sender.send(iter(named), version)
        assert all(taker.has(named) for taker in takers)
    assert [taker.versions for taker in takers] == [[1, 2], [1, 2]]


@BOTH
def test_two_buffers_serve_a_model_of_any_size(make_sender, monkeypatch, transport):
    monkeypatch.setitem(weight_stream.CHUNK_BYTES, "cpu", 4096)
    made = []
    make_buffer = weight_stream.make_buffer
    monkeypatch.setattr(weight_stream, "make_buffer", lambda *args: made.append(make_buffer(*args)) or made[-1])
    sender = make_sender(transport)
    taker = Taker(sender)
    take_in(sender, 1)
    made.clear()
    named = [(str(number), torch.randn(1000)) for number in range(40)]
    for version in range(3):
        assert sender.send(named, version) and taker.has(named)
    assert len(made) <= 2


@BOTH
def test_a_worker_that_dies_in_the_middle_holds_nobody_up_and_the_others_join_again(
    make_sender, monkeypatch, transport
):
    monkeypatch.setitem(weight_stream.CHUNK_BYTES, "cpu", 4096)
    sender = make_sender(transport)
    named = [(str(number), torch.randn(1000)) for number in range(20)]

    def die(number: int) -> None:
        if number == 5:
            dying.receiver.close()

    dying, other = Taker(sender, die), Taker(sender)
    take_in(sender, 2)
    drained: list[str] = []
    began = time.monotonic()
    assert not sender.send((drained.append(name) or (name, tensor) for name, tensor in named), 1)
    assert time.monotonic() - began < 10 and len(drained) == 20
    # Of a group nobody is left; a mapped buffer is each one's own affair.
    assert (sender.num_receivers, other.has(named)) == ((1, True) if transport == "ipc" else (0, False))
    assert dying.versions == []
    dying.until(lambda: not dying.receiver.is_alive)
    again = [Taker(sender) for _ in range(1 if transport == "ipc" else 2)]
    take_in(sender, 2)
    assert sender.send(named, 2) and all(taker.has(named) for taker in again)


@BOTH
def test_a_worker_that_says_nothing_is_given_up_after_the_deadline(make_sender, monkeypatch, transport):
    for module in (weight_lines, weight_carriers):
        monkeypatch.setattr(module, "ANSWER_S", 0.5)
    monkeypatch.setattr(weight_lines.Line.hear, "__kwdefaults__", {"timeout_s": 0.5})
    monkeypatch.setitem(weight_stream.CHUNK_BYTES, "cpu", 4096)
    sender = make_sender(transport)
    is_over = threading.Event()
    Taker(sender, lambda number: is_over.wait(20) if number == 3 else None)
    take_in(sender, 1)
    began = time.monotonic()
    assert not sender.send([(str(number), torch.randn(1000)) for number in range(20)], 1)
    assert 0.4 < time.monotonic() - began < 10 and sender.num_receivers == 0
    is_over.set()


@BOTH
def test_a_worker_to_which_other_bytes_come_is_refused_when_it_joins(make_sender, monkeypatch, transport):
    taking = weight_carriers.MappedBuffers if transport == "ipc" else weight_carriers.Listening
    take = taking.take
    monkeypatch.setattr(taking, "take", lambda self, header: take(self, header) * 2)
    sender = make_sender(transport)
    taker = Taker(sender)
    taker.until(lambda: sender.take_in() or sender.lost)
    taker.until(lambda: taker.receiver.refusal)
    assert sender.num_receivers == 0 and taker.receiver.refusal == "other bytes came than were sent"


def test_the_first_version_is_compared_chunk_by_chunk_before_it_is_loaded(make_sender, monkeypatch):
    sender = make_sender("ipc")
    taker = Taker(sender)
    take_in(sender, 1)
    take = weight_carriers.MappedBuffers.take
    monkeypatch.setattr(weight_carriers.MappedBuffers, "take", lambda self, header: take(self, header) + 1)
    assert not sender.send(NAMED, 1) and not taker.taken
    taker.until(lambda: "other bytes came than were sent" in taker.receiver.failure)


def test_strangers_and_workers_on_another_device_are_not_let_in(make_sender, monkeypatch):
    sender = make_sender("ipc")
    stranger = weight_lines.Line(socket.create_connection(sender.meeting.address))
    stranger.say("greeting", token="guessed", device=sender.meeting.device)
    with pytest.raises(ConnectionError):
        while True:
            sender.take_in()
            stranger.hear("probe", timeout_s=0.05)
            break
    assert sender.num_receivers == 0
    monkeypatch.setattr(weight_carriers, "device_name", lambda device: "GPU another")
    taker = Taker(sender)
    taker.until(lambda: sender.take_in() or taker.receiver.refusal)
    assert sender.num_receivers == 0 and taker.receiver.refusal.startswith(
        "its device is GPU another, the trainer's CPU"
    )


def test_host_memory_ends_with_those_who_hold_it():
    buffer = weight_carriers.HostBuffer(8192)
    handle = buffer.handle()
    mapped = weight_carriers.mapped(handle, CPU)
    buffer.data[:3] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    assert mapped[:4].tolist() == [1, 2, 3, 0]
    del buffer
    assert not Path(handle["path"]).exists() and mapped[:3].tolist() == [1, 2, 3]


def test_a_gpus_memory_is_opened_under_the_number_that_this_process_has_for_the_gpu(monkeypatch):
    kinds = (torch.Tensor, torch.Size([4096]), (1,), 0, torch.storage.TypedStorage, torch.uint8)
    arguments = (*kinds, 3, b"\x01\xff", 1 << 21, 512, False, b"count", 7, b"event", True)
    names = list(inspect.signature(weight_carriers.rebuild_cuda_tensor).parameters)
    assert len(names) == len(arguments) and names[6] == "storage_device"
    opened = []
    monkeypatch.setattr(weight_carriers, "reduce_tensor", lambda tensor: (None, arguments))
    monkeypatch.setattr(weight_carriers, "rebuild_cuda_tensor", lambda *given: opened.append(given))
    handle = json.loads(json.dumps(weight_carriers.DeviceBuffer(4096, CPU).handle()))
    weight_carriers.mapped(handle, torch.device("cuda", 0))
    assert opened == [(*kinds, 0, *arguments[7:])]


def test_a_broadcast_on_a_gpu_that_never_ends_is_left_at_its_deadline(monkeypatch):
    is_over = threading.Event()
    stuck = SimpleNamespace(broadcast=lambda tensors, options: is_over.wait(20), abort=lambda: is_over.wait(20))
    monkeypatch.setattr(weight_carriers, "_nccl", lambda *args: stuck)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name in ("ANSWER_S", "_ABORT_S"):
        monkeypatch.setattr(weight_carriers, name, 0.2)
    group = weight_carriers.Group(None, 0, 2, torch.device("cuda", 0))
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=r"a broadcast did not end within 0.2 s"):
        group.broadcast(torch.zeros(8, dtype=torch.uint8))
    group.abort()
    assert time.monotonic() - began < 5
    is_over.set()


class Pair:
    """A trainer's rank and a worker's engine: what comes through a stream, and the same through a snapshot."""

    def __init__(self, model: ModelBlock, transport: str, *, sends_merged: bool) -> None:
        self.trainer = PolicyTrainer(
            model,
            TrainerBlock(),
            rank=0,
            world_size=1,
            num_threads=1,
            seed=0,
            sends_merged=sends_merged,
            transport=transport,
        )
        self.trainer.setup(None)
        adapted = None if sends_merged or model.adapter is None else model
        assert model.path is not None
        engines = [TorchEngine(model.path, dtype="float32", max_num_seqs=4, adapted=adapted) for _ in range(2)]
        self.streamed, self.packed = engines
        self.thread = EngineThread(self.streamed, 4)
        self.intake = WeightIntake(self.thread, "continue", "recompute")

    def move(self) -> None:
        with torch.no_grad():
            for parameter in self.trainer.module.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)

    def close(self) -> None:
        self.intake.close()
        self.thread.close()
        if self.trainer._stream is not None:
            self.trainer._stream.close()


@BOTH
@pytest.mark.parametrize("which", ["tied", "experts", "adapter alone", "adapter merged"])
def test_an_engine_has_the_bits_that_a_snapshot_would_have_brought(
    tiny_model_dir, tiny_moe_dir, monkeypatch, transport, which
):
    monkeypatch.setattr(weight_stream, "CHUNK_BYTES", {"cpu": 4096})
    adapter = AdapterBlock(rank=2) if "adapter" in which else None
    model = ModelBlock(path=str(tiny_moe_dir if which == "experts" else tiny_model_dir), adapter=adapter)
    pair = Pair(model, transport, sends_merged=which == "adapter merged")
    first = pair.trainer.weights(0)
    assert first is not None and not first.is_streamed and len(first.meetings) == 1
    assert pair.intake.take(first, "continue", "recompute").are_here
    streamed = WeightSnapshot(0)
    deadline = time.monotonic() + 20
    while not streamed.is_streamed:
        assert time.monotonic() < deadline
        pair.move()
        version = streamed.version + 1
        sent = pair.trainer.weights(version)
        assert sent is not None
        streamed = sent
        assert pair.intake.take(streamed, "continue", "recompute").are_here
    assert pair.thread.version == streamed.version and streamed.handles == ()
    whole = pair.trainer.weights(streamed.version, whole=True)
    assert whole is not None and whole.handles
    pair.packed.load_weights(unpack_weights(whole), 0)
    ours, theirs = (engine.model.state_dict() for engine in (pair.streamed, pair.packed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    pair.close()


@pytest.mark.slow
def test_two_ranks_with_shards_send_whole_tensors_from_their_processes(tiny_moe_dir, tmp_path):
    script = Path(__file__).with_name("streaming_ranks.py")
    given = [f"127.0.0.1:{free_ports(1)[0]}", str(tiny_moe_dir), str(tmp_path)]
    ranks = [subprocess.Popen([sys.executable, str(script), str(rank), *given]) for rank in range(2)]
    takers: dict[str, list[Taker]] = {}
    try:
        for transport, num_meetings in (("ipc", 2), ("collective", 1)):
            wait_for(tmp_path / transport / "meetings.json")
            meetings = [
                Meeting(**{**meeting, "address": tuple(meeting["address"])})
                for meeting in read_json(tmp_path / transport / "meetings.json")
            ]
            assert [meeting.device for meeting in meetings] == [weight_carriers.device_name(CPU)] * num_meetings
            takers[transport] = [Taker(SimpleNamespace(meeting=meeting)) for meeting in (meetings[0], meetings[-1])]
            (tmp_path / transport / "joined").touch()
        assert [rank.wait(120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    for transport, of_transport in takers.items():
        assert read_json(tmp_path / transport / "streamed.json") == [True] * 4
        newest = list(torch.load(tmp_path / transport / "4.pt", weights_only=True).items())
        assert all(taker.versions == [1, 2, 3, 4] and taker.has(newest) for taker in of_transport)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
