"""Who may speak to a trainer's rank that sends weights: where it listens, strangers' bytes, and ends in every phase."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from rlflow.actors import weight_stream
from rlflow.actors.weight_carriers import MappedBuffers, checksum
from rlflow.actors.weight_intake import WeightReceiver
from rlflow.actors.weight_lines import Line
from rlflow.actors.weight_stream import WeightSender

CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("transport", ["ipc", "collective"])


def framed(said: bytes) -> bytes:
    return struct.pack(">I", len(said)) + said


def greeting(**what: object) -> bytes:
    return framed(json.dumps({"kind": "greeting", **what}).encode())


STRANGE = {
    "nothing": b"",
    "half a length": b"\0\0",
    "half a message": greeting(token="x", device="CPU")[:-3],
    "a huge length": b"\xff\xff\xff\xff" + b"x" * 100,
    "a long message": framed(b" " * 5000),
    "a browser": b"GET / HTTP/1.1\r\n\r\n",
    "no JSON": framed(b"\x80\x81"),
    "a list": framed(b"[]"),
    "brackets": framed(b"[" * 1000),
    "no kind": framed(b"{}"),
    "a kind that is a list": framed(b'{"kind": ["greeting"]}'),
    "a reason that is a number": framed(b'{"kind": "error", "reason": 3}'),
    "no token": greeting(),
    "a token beyond ASCII": greeting(token="\u00e9", device="CPU"),
    "half a surrogate": greeting(token="\ud800", device="CPU"),
}


@pytest.fixture
def sender(transport: str) -> Iterator[WeightSender]:
    sender = WeightSender(transport, CPU, "127.0.0.1")
    yield sender
    sender.close()


def listening() -> set[str]:
    """Addresses at which this process takes connections, as Linux writes them: hexadecimal, the lowest byte first."""
    own = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            own.add(str(entry.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in own:
                found.add(local)
    return found


def joins(sender: WeightSender) -> WeightReceiver:
    """A worker that has been taken in."""

    def load(chunks, version):
        raise AssertionError("nothing is sent")

    receiver = WeightReceiver(sender.meeting, CPU, load)
    deadline = time.monotonic() + 10
    while not sender.num_receivers:
        assert time.monotonic() < deadline
        sender.take_in()
    return receiver


@BOTH
def test_weights_are_listened_for_at_the_address_that_is_told_and_no_other(monkeypatch, transport):
    # By another name of this machine, gloo's own sockets would be somewhere else.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    before = listening()
    # Who maps memory is on this machine, whatever its address is.
    sender = WeightSender(transport, CPU, "127.0.0.1" if transport == "collective" else "192.0.2.1")
    receiver = joins(sender)
    new = listening() - before
    assert {address.split(":")[0] for address in new} == {"0100007F"}
    assert len(new) >= (1 if transport == "ipc" else 2)
    receiver.close()
    sender.close()


@pytest.mark.parametrize("transport", ["ipc"])
def test_whatever_strangers_say_holds_nobody_up(monkeypatch, transport, sender):
    strangers = []
    for said in STRANGE.values():
        strangers.append(socket.create_connection(sender.meeting.address))
        strangers[-1].sendall(said)
    began = time.monotonic()
    receiver = joins(sender)
    assert time.monotonic() - began < weight_stream._GREETING_S / 2
    assert sender.num_receivers == 1 and not sender.lost
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + weight_stream._GREETING_S)
    sender.take_in()
    for name, stranger in zip(STRANGE, strangers, strict=True):
        stranger.settimeout(5)
        with suppress(ConnectionResetError):
            assert stranger.recv(1) == b"", name
    receiver.close()


def test_a_message_that_comes_a_byte_at_a_time_has_one_deadline():
    ours, theirs = socket.socketpair()
    line = Line.__new__(Line)
    line._connection = ours
    is_over = threading.Event()

    def drip() -> None:
        with suppress(OSError):
            for byte in greeting(token="x" * 100):
                if is_over.wait(0.05):
                    return
                theirs.send(bytes([byte]))

    thread = threading.Thread(target=drip)
    thread.start()
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=r"no answer within 0\.3 s"):
        line.hear("greeting", timeout_s=0.3)
    assert time.monotonic() - began < 2
    is_over.set()
    thread.join()
    ours.close()
    theirs.close()


@pytest.mark.parametrize("transport", ["ipc"])
@pytest.mark.parametrize("phase", ["greeting", "probe", "checksum", "weights", "chunk", "answer", "end"])
def test_a_worker_may_end_in_any_phase_and_the_next_is_sent_to(monkeypatch, transport, sender, phase):
    monkeypatch.setitem(weight_stream.CHUNK_BYTES, "cpu", 4096)
    line = Line(socket.create_connection(sender.meeting.address))
    buffers = MappedBuffers(CPU)

    def live() -> None:
        """Does what a worker does, and ends after that phase."""
        line.say("greeting", token=sender.meeting.token, device=sender.meeting.device)
        asked = answered = "greeting"
        answers = {"probe": "checksum", "chunk": "answer"}
        while phase not in (asked, answered):
            message = line.hear("probe", "weights", "chunk", "end")
            asked = answered = message["kind"]
            if asked in answers and phase != asked:
                answered = answers[asked]
                line.say(answered, **({"value": checksum(buffers.take(message))} if asked == "probe" else {}))
        line.close()

    thread = threading.Thread(target=live)
    thread.start()
    named = [(str(number), torch.full((1000,), float(number))) for number in range(8)]
    began = time.monotonic()
    while not sender.lost:
        assert time.monotonic() - began < 10
        sender.take_in()
        if sender.num_receivers:
            assert not sender.send(iter(named), 1)
    thread.join()
    assert sender.num_receivers == 0
    joins(sender).close()
