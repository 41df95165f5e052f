"""Weights from the trainer's own memory into engines, a chunk at a time, without a second copy of the model.

    trainer's rank                                            rollout worker
    take_in   <-- token, device -------------------------     WeightReceiver
              --- probe: random bytes through the carrier ->
              <-- their checksum -------------------------
    send      --- version ------------------------------->    its engine makes no step from here on
              --- chunk: names, shapes; bytes by a carrier ->  copied into the engine
              <-- answer: the buffer may be filled again --
              --- end ----------------------------------->
              <-- loaded ---------------------------------

There are two buffers of packed whole tensors: one is filled while the other is read. Whoever says nothing for a minute,
or is gone, or finds another checksum, is not sent to any more: `send` says that not all have the version, and the
trainer hands it to Ray's store.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from rlflow.actors.weight_carriers import (
    ALIGNMENT,
    Broadcasting,
    Buffer,
    Ipc,
    checksum,
    device_name,
    make_buffer,
    settle,
)
from rlflow.actors.weight_lines import LOOPBACK, Line, listening_at
from rlflow.actors.weight_sync import Meeting

Named = Iterable[tuple[str, torch.Tensor]]
CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Of a buffer, by the kind of its device: a CPU's caches should hold it. A larger tensor makes a larger buffer."""
_PROBE_BYTES = 1 << 20
"""At most: no more than a buffer has."""
_GREETING_S = 5.0
"""Who has not greeted for so long is a stranger."""
_GREETING_BYTES = 1024
_MOST_STRANGERS = 256
"""Connections that have not greeted, at the same time. Others wait until these have ended."""


class WeightSender:
    """One of the trainer's ranks, and the workers it sends to."""

    def __init__(self, transport: str, device: torch.device, host: str) -> None:
        """
        Args:
            transport: ipc or collective.
            host: This machine's address, as workers know it. It is listened at with collective alone: who maps a
                buffer is on this machine.
        """
        self._device, self._transport = device, transport
        host = LOOPBACK if transport == "ipc" else host
        self._listening = listening_at(host)
        self._listening.setblocking(False)
        self._strangers: list[tuple[Line, float]] = []
        """Connections that have not greeted, and until when each may."""
        port = self._listening.getsockname()[1]
        self.meeting = Meeting(transport, (host, port), secrets.token_hex(16), device_name(device))
        self._carrier = Ipc(device) if transport == "ipc" else Broadcasting(device, host)
        self._lines: list[Line] = []
        self._buffers: list[Buffer | None] = [None, None]
        self._is_whole = True
        """Nobody has left the group since it was made."""
        self.lost: list[str] = []
        """Why workers were given up."""

    @property
    def num_receivers(self) -> int:
        return len(self._lines)

    def take_in(self) -> None:
        """Takes in the workers that have come since, each of which is probed first."""
        for line in [line for line in self._lines if line.is_gone]:
            self._lines.remove(line)
            line.close()
            self._is_whole = False
        new = self._greeted()
        if not new and self._is_whole:
            return
        everyone, self._lines = [*self._lines, *new], []
        try:
            self._carrier.connect(everyone)
            self._is_whole = True
        except (ConnectionError, RuntimeError) as error:
            gone = any(line.is_gone for line in everyone)
            for line in everyone:
                if gone:
                    # The others may come again.
                    self._lost(line, ConnectionError(f"no group came together: {error}"))
                else:
                    self._refuse(line, f"no group came together: {error}")
            return
        self._lines = everyone
        try:
            self._probe()
        except ConnectionError as error:
            self._give_up(error)

    def send(self, named: Named, version: int) -> bool:
        """Sends all of it. Returns whether every worker that had been taken in has loaded it.

        Args:
            named: Drained to the end in any case.
        """
        before = self.num_receivers
        self._each(lambda line: line.say("weights", version=version))
        for place, tensors, size in self._packed(named):
            self._pass_on(
                "chunk", place, size, with_checksum=not all(line.is_proven for line in self._lines), tensors=tensors
            )
        self._each(_hear_all)
        self._each(lambda line: line.say("end"))
        self._each(_hear_loaded)
        return self.num_receivers == before

    def close(self) -> None:
        """Ends all connections."""
        for line in [*self._lines, *(line for line, _ in self._strangers)]:
            line.close()
        self._lines, self._strangers = [], []
        self._carrier.close()
        self._listening.close()

    def _greeted(self) -> list[Line]:
        """Connections of those who know the token and have the right device. Waits for nobody."""
        found = []
        self._accept()
        strangers, self._strangers = self._strangers, []
        for line, deadline in strangers:
            try:
                if not line.has_message(_GREETING_BYTES):
                    if time.monotonic() < deadline:
                        self._strangers.append((line, deadline))
                    else:
                        line.close()
                    continue
                greeting = line.hear("greeting")
            except ConnectionError:
                line.close()
                continue
            token = str(greeting.get("token")).encode(errors="replace")
            if not secrets.compare_digest(token, self.meeting.token.encode()):
                line.close()
            elif (reason := self._unfit(device := str(greeting.get("device")), [*self._lines, *found])) is not None:
                self._refuse(line, reason)
            else:
                line.device = device
                found.append(line)
        return found

    def _accept(self) -> None:
        """Takes what connections there are."""
        while len(self._strangers) < _MOST_STRANGERS:
            try:
                connection, _ = self._listening.accept()
            except BlockingIOError:
                return
            # It has ended before it was taken.
            except ConnectionError:
                continue
            self._strangers.append((Line(connection), time.monotonic() + _GREETING_S))

    def _unfit(self, device: str, others: Iterable[Line]) -> str | None:
        """Why a worker on that device cannot be sent to beside the others."""
        own = self.meeting.device
        fits = device == own if self._transport == "ipc" else device.partition(" ")[0] == own.partition(" ")[0]
        if not fits:
            return f"its device is {device}, the trainer's {own}"
        is_taken = device in (own, *(line.device for line in others))
        if self._transport == "collective" and device.startswith("GPU") and is_taken:
            return f"it shares {device} with another of the group, which NCCL cannot serve"
        return None

    def _refuse(self, line: Line, reason: str) -> None:
        self.lost.append(reason)
        # It may be gone anyway.
        with suppress(ConnectionError):
            line.say("refused", reason=reason)
        line.close()

    def _probe(self) -> None:
        self._make_room(0, 1)
        data = self._data(0)[:_PROBE_BYTES]
        data.copy_(torch.frombuffer(bytearray(secrets.token_bytes(len(data))), dtype=torch.uint8))
        expected = checksum(data)
        self._pass_on("probe", 0, len(data))
        answers: dict[Line, int] = {}
        self._each(lambda line: answers.update({line: int(line.hear("checksum")["value"])}))
        self._each(_forget)
        for line in list(self._lines):
            if answers[line] != expected:
                self._lines.remove(line)
                self._refuse(line, "other bytes came than were sent")
        if self._transport == "collective" and len(self._lines) < len(answers):
            self._give_up(ConnectionError("another worker of the group was refused"))

    def _packed(self, named: Named) -> Iterator[tuple[int, list[list[Any]], int]]:
        """Whole tensors packed into one buffer after the other: (its place, what is where in it, bytes)."""
        place, tensors, used = 0, [], 0
        for name, tensor in named:
            if not self._lines:
                # Other ranks gather as well, and wait for this one.
                continue
            size = tensor.numel() * tensor.element_size()
            if tensors and used + size > len(self._data(place)):
                yield place, tensors, used
                place, tensors, used = 1 - place, [], 0
            if not tensors:
                self._wait_for(place)
                try:
                    self._make_room(place, size)
                except ConnectionError as error:
                    self._give_up(error)
                    continue
            values = tensor.detach().contiguous().view(-1).view(torch.uint8)
            self._data(place)[used : used + size].copy_(values)
            tensors.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), used])
            used += -(-size // ALIGNMENT) * ALIGNMENT
        if tensors:
            yield place, tensors, used

    def _wait_for(self, place: int) -> None:
        """Until nobody reads that buffer any more."""

        def until_read(line: Line) -> None:
            while place in line.outstanding:
                line.hear("answer")
                line.outstanding.popleft()

        self._each(until_read)

    def _make_room(self, place: int, size: int) -> None:
        """Raises ConnectionError where the device has none."""
        buffer = self._buffers[place]
        if buffer is None or len(buffer.data) < size:
            self._buffers[place] = None
            most = max(size, CHUNK_BYTES[self._device.type])
            try:
                self._buffers[place] = make_buffer(most, self._device)
            except (torch.OutOfMemoryError, OSError) as error:
                raise ConnectionError(f"no room for a buffer of {most:,} bytes: {error}") from error

    def _data(self, place: int) -> torch.Tensor:
        buffer = self._buffers[place]
        assert buffer is not None
        return buffer.data

    def _pass_on(self, kind: str, place: int, size: int, *, with_checksum: bool = False, **what: Any) -> None:
        """Tells every worker of a chunk, and gets its bytes there."""
        buffer = self._buffers[place]
        if buffer is None or not self._lines:
            return
        data = buffer.data[:size]
        settle(self._device)
        if with_checksum:
            what["checksum"] = checksum(data)

        def tell(line: Line) -> None:
            line.outstanding.append(place)
            line.say(kind, place=place, size=size, **self._carrier.header(line, place, buffer), **what)

        self._each(tell)
        if not self._lines:
            return
        try:
            self._carrier.send(data)
        except ConnectionError as error:
            self._give_up(error)

    def _each(self, do: Callable[[Line], object]) -> None:
        """The same with every worker. Those with whom it fails are given up; of a group, all of it."""
        for line in list(self._lines):
            try:
                do(line)
            except ConnectionError as error:
                if self._transport == "collective":
                    self._give_up(error)
                    return
                self._lines.remove(line)
                self._lost(line, error)

    def _give_up(self, error: ConnectionError) -> None:
        """Sends to nobody any more of those who are here."""
        lines, self._lines = self._lines, []
        self._carrier.close()
        for line in lines:
            self._lost(line, error)

    def _lost(self, line: Line, error: ConnectionError) -> None:
        self.lost.append(str(error))
        line.close()


def _hear_all(line: Line) -> None:
    while line.outstanding:
        line.hear("answer")
        line.outstanding.popleft()


def _forget(line: Line) -> None:
    line.outstanding.clear()


def _hear_loaded(line: Line) -> None:
    line.hear("loaded")
    line.is_proven = True


class RankStream:
    """This rank's part in what all of the trainer's ranks send: with ipc each sends to the workers on its device."""

    def __init__(self, transport: str, device: torch.device, host: str, rank: int, world_size: int) -> None:
        """All ranks make theirs at the same time."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._world_size = world_size
        self._sender = WeightSender(transport, device, host) if transport == "ipc" or rank == 0 else None
        mine = None if self._sender is None else self._sender.meeting
        found: list[Meeting | None] = [mine]
        if world_size > 1:
            found = [None] * world_size
            dist.all_gather_object(found, mine)
        self.meetings = tuple(meeting for meeting in found if meeting is not None)
        """Of all ranks."""

    def send(self, sent: Callable[[], Named], gathered: Callable[[], Named], version: int) -> bool:
        """Sends a version to the workers that were taken in. All ranks take part.

        Args:
            sent: The weights under the names that engines know; asked for where this rank has a worker.
            gathered: The same as the model names them, in the same order.

        Returns:
            Whether there were any, and all have it: the same on every rank.
        """
        sender = self._sender
        if sender is not None:
            sender.take_in()
        own = 0 if sender is None else sender.num_receivers
        if not self._total(own):
            return False
        is_whole = True
        if sender is not None and own:
            is_whole = sender.send(sent(), version)
        else:
            for _ in gathered():
                pass
        return not self._total(0 if is_whole else 1)

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()

    def _total(self, number: int) -> int:
        """Over all ranks."""
        if self._world_size == 1:
            return number
        total = torch.tensor([number])
        dist.all_reduce(total)
        return int(total)
