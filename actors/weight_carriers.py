"""How the bytes of a chunk get from a trainer's buffer to a worker: by a handle to the buffer, or by a broadcast.

    ipc         the worker maps the trainer's buffer, once: memory of the same GPU, or of the same host
    collective  the trainer's rank broadcasts the buffer to all workers: NCCL between GPUs, gloo between hosts

Both run the same code on a CPU and on a GPU but for what a buffer and a group are. On a GPU none of this has run yet.

vLLM's own weight transfer is not used: its broadcast (PyNccl) can neither be given a deadline nor be ended, and the
trainer would have to import vLLM. The engine lives in the worker's process, so that torch's groups reach it.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from rlflow.actors.weight_lines import ANSWER_S, Line, listening_at

ALIGNMENT = 64
"""Tensors begin at multiples of so many bytes in a buffer."""
_ABORT_S = 5.0


def device_name(device: torch.device) -> str:
    """What tells a device apart from all others, whatever number a process sees it under.

    Of a CPU, what may map each other's memory: processes of one user in one container of one host.
    """
    if device.type == "cuda":
        return f"GPU {torch.cuda.get_device_properties(device).uuid}"
    host = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"CPU {host} {os.stat('/proc/self/ns/pid').st_ino} {os.getuid()}"


def settle(device: torch.device) -> None:
    """Waits for what this thread has asked of the device."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def checksum(data: torch.Tensor) -> int:
    """The sum of its bytes, eight at a time and modulo 2**64.

    Args:
        data: uint8 [n]; n is a multiple of 8.
    """
    return int(data.view(torch.int64).sum())


class Buffer(Protocol):
    """Memory that other processes can map."""

    data: torch.Tensor
    """uint8 [n]."""

    def handle(self) -> dict[str, Any]:
        """What `mapped` takes in another process, of plain JSON: one for each that maps it."""
        ...


class HostBuffer:
    """Memory without a name, which ends with the processes that hold it."""

    def __init__(self, size: int) -> None:
        self._descriptor = os.memfd_create("weights")
        weakref.finalize(self, os.close, self._descriptor)
        os.ftruncate(self._descriptor, size)
        self.data = torch.frombuffer(mmap.mmap(self._descriptor, size), dtype=torch.uint8)

    def handle(self) -> dict[str, Any]:
        return {"path": f"/proc/{os.getpid()}/fd/{self._descriptor}", "size": len(self.data)}


class DeviceBuffer:
    """Memory of a GPU."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.data = torch.empty(size, dtype=torch.uint8, device=device)

    def handle(self) -> dict[str, Any]:
        # The number of the device, the seventh, is the exporter's own.
        arguments: Any = reduce_tensor(self.data)[1]
        kept = [part.hex() if isinstance(part, bytes) else part for part in (arguments[3], *arguments[7:])]
        return {"cuda": kept, "size": len(self.data)}


def make_buffer(size: int, device: torch.device) -> Buffer:
    size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    return DeviceBuffer(size, device) if device.type == "cuda" else HostBuffer(size)


def mapped(handle: dict[str, Any], device: torch.device) -> torch.Tensor:
    """The buffer of another process, uint8 [n].

    Args:
        device: The same device as it is numbered here.

    Raises:
        OSError: It is not to be had here.
    """
    size = int(handle["size"])
    if "cuda" not in handle:
        descriptor = os.open(handle["path"], os.O_RDWR)
        try:
            return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
        finally:
            os.close(descriptor)
    parts = [bytes.fromhex(part) if isinstance(part, str) else part for part in handle["cuda"]]
    index = torch.cuda.current_device() if device.index is None else device.index
    return rebuild_cuda_tensor(
        torch.Tensor, torch.Size([size]), (1,), parts[0], torch.storage.TypedStorage, torch.uint8, index, *parts[1:]
    )


class Ipc:
    """The sender's side: buffers are mapped, nothing is sent."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._known: weakref.WeakKeyDictionary[Line, dict[int, weakref.ref[Buffer]]] = weakref.WeakKeyDictionary()
        """Of each line, the buffers that it has mapped, by their places."""

    def connect(self, lines: Sequence[Line]) -> None:
        """Each line is on its own."""

    def header(self, line: Line, place: int, buffer: Buffer) -> dict[str, Any]:
        """What a line must be told of a buffer."""
        known = self._known.setdefault(line, {})
        if place in known and known[place]() is buffer:
            return {}
        try:
            handle = buffer.handle()
        # Of some of torch's allocators nothing can be exported.
        except RuntimeError as error:
            raise ConnectionError(f"the trainer's buffer cannot be mapped: {error}") from error
        known[place] = weakref.ref(buffer)
        return {"handle": handle}

    def send(self, data: torch.Tensor) -> None:
        """It is there already."""

    def close(self) -> None:
        self._known.clear()


class MappedBuffers:
    """The receiver's side."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[int, torch.Tensor] = {}

    def take(self, header: dict[str, Any]) -> torch.Tensor:
        """The bytes of a chunk, uint8 [n]; valid until it is answered."""
        place = int(header["place"])
        if "handle" in header:
            # Before the new one is there, as a GPU may have no room for both.
            self._buffers.pop(place, None)
            self._buffers[place] = mapped(header["handle"], self.device)
        return self._buffers[place][: int(header["size"])]

    def close(self) -> None:
        self._buffers.clear()


class Broadcasting:
    """The sender's side: it is rank 0 of a group that is made anew whenever the receivers change."""

    def __init__(self, device: torch.device, host: str) -> None:
        self.device, self._host = device, host
        self._group: Group | None = None

    def connect(self, lines: Sequence[Line]) -> None:
        """Makes a group with all of them.

        Raises:
            ConnectionError: One did not come.
        """
        self.close()
        if not lines:
            return
        world_size = len(lines) + 1
        Store = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
        limit = timedelta(seconds=ANSWER_S)
        # By itself a store listens at all addresses of the machine.
        listening = listening_at(self._host)
        port = listening.getsockname()[1]
        store = Store(
            self._host,
            port,
            world_size,
            is_master=True,
            wait_for_workers=False,
            timeout=limit,
            master_listen_fd=listening.detach(),
        )
        for rank, line in enumerate(lines, start=1):
            line.say("group", host=self._host, port=store.port, rank=rank, world_size=world_size)
        for line in lines:
            line.hear("ready")
        self._group = Group(store, 0, world_size, self.device)

    def header(self, line: Line, place: int, buffer: Buffer) -> dict[str, Any]:
        return {}

    def send(self, data: torch.Tensor) -> None:
        assert self._group is not None, "nothing is sent before somebody has come"
        self._group.broadcast(data)

    def close(self) -> None:
        if self._group is not None:
            self._group.abort()
            self._group = None


class Listening:
    """The receiver's side."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._group: Group | None = None
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)

    def join(self, message: dict[str, Any]) -> None:
        """Takes part in the group that the sender makes."""
        self.close()
        Store = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
        limit = timedelta(seconds=ANSWER_S)
        world_size = int(message["world_size"])
        store = Store(message["host"], int(message["port"]), world_size, is_master=False, timeout=limit)
        self._group = Group(store, int(message["rank"]), world_size, self.device)

    def take(self, header: dict[str, Any]) -> torch.Tensor:
        """The bytes of a chunk, uint8 [n]; valid until it is answered."""
        size = int(header["size"])
        if self._group is None:
            raise ConnectionError("a chunk came before the group")
        if len(self._buffer) < size:
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._group.broadcast(self._buffer[:size])
        return self._buffer[:size]

    def close(self) -> None:
        if self._group is not None:
            self._group.abort()
            self._group = None


class Group:
    """A process group beside the process's own: gloo, or NCCL on a GPU. What it waits for has a deadline."""

    def __init__(self, store: Any, rank: int, world_size: int, device: torch.device) -> None:
        """Raises ConnectionError when the others do not come."""
        self._device, self._store = device, store
        limit = timedelta(seconds=ANSWER_S)
        try:
            if device.type == "cuda":
                self._backend = _nccl(store, rank, world_size, device, limit)
            else:
                self._backend: Any = dist.ProcessGroupGloo(store, rank, world_size, limit)
        except (RuntimeError, ValueError) as error:
            raise ConnectionError(f"no group of {world_size}: {error}") from error

    def broadcast(self, data: torch.Tensor) -> None:
        """From rank 0 to all others; done when this returns.

        Raises:
            ConnectionError: One of them is gone, or the time is up. The group is of no use any more.
        """
        try:
            if self._device.type == "cuda":
                # NCCL meets its peers in the first call, without a deadline, and later waits are for the stream alone.
                _within(ANSWER_S, lambda: self._broadcast_here(data), "a broadcast")
            else:
                self._backend.broadcast([data], dist.BroadcastOptions()).wait()
        except RuntimeError as error:
            raise ConnectionError(f"a broadcast failed: {error}") from error

    def _broadcast_here(self, data: torch.Tensor) -> None:
        torch.cuda.set_device(self._device)
        work = self._backend.broadcast([data], dist.BroadcastOptions())
        while not work.is_completed():
            time.sleep(0.0002)
        work.wait()

    def abort(self) -> None:
        """Ends it, whatever is under way."""
        if self._device.type == "cuda":
            # What NCCL does not end goes on in a thread that nobody waits for.
            with suppress(ConnectionError):
                _within(_ABORT_S, self._backend.abort, "the end of a group")
        del self._backend, self._store


def _within(seconds: float, do: Callable[[], object], what: str) -> None:
    """Does something in a thread of its own.

    Raises:
        ConnectionError: It took longer, and goes on without anybody.
    """
    done: Future[object] = Future()

    def settle_it() -> None:
        try:
            done.set_result(do())
        # Whoever waits is told.
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=settle_it, daemon=True).start()
    try:
        done.result(seconds)
    except FutureTimeoutError as error:
        raise ConnectionError(f"{what} did not end within {seconds:g} s") from error


def _nccl(store: Any, rank: int, world_size: int, device: torch.device, limit: timedelta) -> Any:
    """A group of its own over NCCL. A peer's death is this group's affair: the watchdog that torch starts beside other
    groups would tell the process's own, whose monitor ends the process. With blocking waits there is none."""
    variable = "TORCH_NCCL_BLOCKING_WAIT"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        torch.cuda.set_device(device)
        Nccl: Any = dist.ProcessGroupNCCL
        options = Nccl.Options()
        # Longer than this end waits, which then ends it.
        options._timeout = 4 * limit
        return Nccl(store, rank, world_size, options)
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
