"""Weights from a trainer's process to a worker's, past the object store: the bits, the speed, and no hang."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import torch
from measurements import Record
from models import SHAPES
from transformers import AutoConfig, AutoModelForCausalLM

from rlflow.actors.weight_carriers import settle
from rlflow.actors.weight_intake import WeightReceiver
from rlflow.actors.weight_stream import WeightSender

GIB = 2**30
JOIN_S = 150.0
"""Two deadlines of a minute, and what a process takes to start."""
_PERIOD = 8191


def transport(record: Record, name: str, size: str, versions: int = 6) -> None:
    """Sends random-looking weights of a model's shapes in bfloat16, then once more to a worker that dies meanwhile.

    Broadcasts want a GPU for each process: with one GPU the worker must be refused, and that is measured.

    Args:
        name: ipc or collective.
    """
    num_gpus = torch.cuda.device_count()
    # A rehearsal.
    size = size if num_gpus else "small"
    worker = torch.device("cuda", 0) if num_gpus else torch.device("cpu")
    trainer = torch.device("cuda", 1) if name == "collective" and num_gpus > 1 else worker
    shapes = _shapes(size)
    num_bytes = sum(2 * shape.numel() for shape in shapes.values())
    parameters = {key: torch.zeros(shape, dtype=torch.bfloat16, device=worker) for key, shape in shapes.items()}
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, name, str(trainer), size, versions), daemon=True)
    process.start()
    taker = Taker(ours, parameters, worker)
    joined, reason, waited = _hear(ours, JOIN_S)
    if name == "collective" and num_gpus == 1:
        record.add("what a group on one GPU ends with", str(reason) if not joined else "it works")
        record.add("until then", waited, "s", most=JOIN_S)
        return
    record.add("probe", "right" if joined else f"refused: {reason}")
    record.add("workers that were taken in", int(joined), least=1)
    if not joined:
        return
    seconds, num_arrived, num_other = [], 0, 0
    for version in range(versions):
        arrived, _, took = _hear(ours, 120.0)
        num_arrived += arrived
        num_other += sum(not torch.equal(parameters[key], tensor) for key, tensor in _weights(shapes, worker, version))
        seconds.append(took)
        taker.dies = version + 1 == versions
        ours.send("go on")
    record.add("versions that came", num_arrived, least=versions)
    record.add("tensors with other bits", num_other, most=0)
    record.add("bytes", num_bytes / GIB, "GiB")
    record.add("first version, with checksums", num_bytes / GIB / seconds[0], "GiB/s")
    record.add("the fastest of the others", num_bytes / GIB / min(seconds[1:]), "GiB/s")
    arrived, _, took = _hear(ours, 120.0)
    record.add("a version is there although its worker died", int(arrived), most=0)
    record.add("until it was given up", took, "s", most=70.0)
    record.add("through host memory, there and back", num_bytes / GIB / _through_host(parameters, worker), "GiB/s")
    process.join(10)
    process.kill()


class Taker:
    """A worker that copies what comes into its parameters."""

    def __init__(self, connection: Any, parameters: dict[str, torch.Tensor], device: torch.device) -> None:
        self.parameters, self.device, self.dies = parameters, device, False
        self.receiver = WeightReceiver(connection.recv(), device, self._load)

    def _load(self, chunks: Any, version: int) -> Future[None]:
        future: Future[None] = Future()

        def copy() -> None:
            try:
                for key, tensor in chunks:
                    self.parameters[key].copy_(tensor)
                    if self.dies:
                        self.receiver.close()
                settle(self.device)
                future.set_result(None)
            # As an engine's thread hands it on.
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=copy, daemon=True).start()
        return future


def _send(connection: Any, name: str, device_name: str, size: str, versions: int) -> None:
    """The trainer's process. Says (whether, why not, seconds) of the joining and of each version."""
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    weights = [dict(_weights(_shapes(size), device, version)) for version in range(2)]
    sender = WeightSender(name, device, "127.0.0.1")
    connection.send(sender.meeting)
    began = time.monotonic()
    while not sender.num_receivers and not sender.lost and time.monotonic() < began + JOIN_S - 20:
        sender.take_in()
        time.sleep(0.01)
    connection.send((bool(sender.num_receivers), "; ".join(sender.lost), time.monotonic() - began))
    for version in range(versions + 1):
        began = time.monotonic()
        arrived = sender.send(weights[version % 2].items(), version + 1)
        connection.send((arrived, "; ".join(sender.lost), time.monotonic() - began))
        if version < versions:
            connection.recv()


def _hear(connection: Any, timeout_s: float) -> tuple[bool, str, float]:
    if not connection.poll(timeout_s):
        return False, f"nothing within {timeout_s:g} s", timeout_s
    return connection.recv()


def _shapes(size: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[size]))
    return {key: parameter.shape for key, parameter in model.named_parameters()}


def _weights(shapes: dict[str, torch.Size], device: torch.device, version: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The same in every process: whole numbers, of two versions in turn."""
    for number, (key, shape) in enumerate(shapes.items()):
        counted = torch.arange(shape.numel(), device=device) % (_PERIOD - number) + version % 2
        yield key, counted.to(torch.bfloat16).view(shape)


def _through_host(parameters: dict[str, torch.Tensor], device: torch.device) -> float:
    """Seconds that a plain copy to the host and back takes, as a snapshot's does at least."""
    began = time.monotonic()
    for tensor in parameters.values():
        tensor.copy_(tensor.to("cpu", copy=True))
    settle(device)
    return time.monotonic() - began
