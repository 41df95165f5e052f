"""How fast weights get from a trainer's process into an engine's on one host: through Ray's object store, and past it.

    python benchmarks/weight_sync.py                       # 134.5M parameters of SmolLM2's shapes, float32
    python benchmarks/weight_sync.py --copied              # gathered as from a sharded trainer: each tensor is new

Through the store, the trainer sends all tensors (`pack_weights`), the worker takes them out (`receive`) and copies them
into parameters of its own, as the torch engine does. With `ipc` it copies them out of the trainer's two buffers, with
`collective` out of what gloo has brought over the loopback interface (`actors/weight_stream.py`). Beside them: one
memcpy of as many bytes between arrays that are there. Each turn does all of them one after the other. The best of ten
turns, after two for the store's pages, on two cores that others used as well; and how fast each was beside the memcpy
of its turn, in the median:

| | seconds | GiB/s | share of memcpy | with --copied: seconds | GiB/s | share of memcpy |
|---|---|---|---|---|---|---|
| memcpy | 0.026 | 19.2 | 1 | 0.026 | 19.0 | 1 |
| pack | 0.060 | 8.4 | 0.43 | 0.124 | 4.0 | 0.14 |
| receive | 0.001 | 455.5 | | 0.001 | 403.2 | |
| load | 0.032 | 15.8 | 0.90 | 0.033 | 15.2 | 0.80 |
| packed to loaded | 0.105 | 4.8 | 0.24 | 0.179 | 2.8 | 0.11 |
| ipc | 0.081 | 6.2 | 0.42 | 0.091 | 5.5 | 0.19 |
| collective | 0.260 | 1.9 | 0.13 | 0.291 | 1.7 | 0.08 |

A loopback broadcast of gloo is slower than the store; on GPUs, for which it is meant, nothing of this was measured yet.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import ray
import torch

from rlflow.actors.rollout_engines.sent_weights import Chunks
from rlflow.actors.weight_intake import WeightReceiver
from rlflow.actors.weight_stream import WeightSender
from rlflow.actors.weight_sync import Meeting, WeightSnapshot, pack_weights, receive, tensors_of

GIB = 2**30
STREAMS = ("ipc", "collective")
LAYER = {
    "q": (576, 576),
    "k": (192, 576),
    "v": (192, 576),
    "o": (576, 576),
    "gate": (1536, 576),
    "up": (1536, 576),
    "down": (576, 1536),
    "norm_1": (576,),
    "norm_2": (576,),
}
SHAPES = {"embeddings": (49152, 576)} | {f"{i}.{name}": shape for i in range(30) for name, shape in LAYER.items()}
"""SmolLM2-135M's, tied."""


class Holder:
    """A trainer's or an engine's parameters."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.senders: dict[str, WeightSender] = {}
        self.receivers: list[WeightReceiver] = []
        self.parameters = {name: torch.randn(shape) for name, shape in SHAPES.items()}

    def send(self, version: int, copied: bool) -> tuple[WeightSnapshot, float]:
        """The snapshot, and seconds."""
        started = time.perf_counter()
        snapshot = pack_weights(self._named(copied), version)
        return snapshot, time.perf_counter() - started

    def _named(self, copied: bool) -> Iterator:
        for name, tensor in self.parameters.items():
            yield name, tensor.clone() if copied else tensor

    def load(self, snapshot: WeightSnapshot) -> tuple[float, float]:
        """Seconds that the weights took to come, and to be copied."""
        started = time.perf_counter()
        arrays = receive(snapshot)
        received = time.perf_counter()
        for name, tensor in tensors_of(snapshot, arrays):
            self.parameters[name].copy_(tensor)
        return received - started, time.perf_counter() - received

    def meet(self, transport: str) -> Meeting:
        """The trainer: takes workers in from now on."""
        self.senders[transport] = WeightSender(transport, torch.device("cpu"), "127.0.0.1")
        return self.senders[transport].meeting

    def join(self, meeting: Meeting) -> None:
        """The worker."""
        self.receivers.append(WeightReceiver(meeting, torch.device("cpu"), self._take))

    def take_in(self, transport: str) -> None:
        while not self.senders[transport].num_receivers:
            self.senders[transport].take_in()

    def stream(self, transport: str, version: int, copied: bool) -> None:
        assert self.senders[transport].send(self._named(copied), version)

    def _take(self, chunks: Chunks, version: int) -> Future[None]:
        done: Future[None] = Future()

        def copy() -> None:
            torch.set_num_threads(1)
            for name, tensor in chunks:
                self.parameters[name].copy_(tensor)
            done.set_result(None)

        threading.Thread(target=copy, daemon=True).start()
        return done

    def checksum(self) -> float:
        return float(sum(tensor.double().sum() for tensor in self.parameters.values()))

    def memcpy(self) -> float:
        """Seconds for as many bytes, from array to array."""
        source = np.ones(num_bytes(), dtype=np.uint8)
        target = np.zeros_like(source)
        started = time.perf_counter()
        np.copyto(target, source)
        return time.perf_counter() - started


def num_bytes() -> int:
    return 4 * sum(int(np.prod(shape)) for shape in SHAPES.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copied", action="store_true", help="every tensor is made when it is sent")
    parser.add_argument("--turns", type=int, default=10)
    given = parser.parse_args()
    ray.init(include_dashboard=False, log_to_driver=False, object_store_memory=2 << 30)
    trainer, worker = (ray.remote(Holder).remote() for _ in range(2))
    for transport in STREAMS:
        ray.get(worker.join.remote(trainer.meet.remote(transport)), timeout=60)
        ray.get(trainer.take_in.remote(transport), timeout=60)
    names = ("memcpy", "pack", "receive", "load", "packed to loaded", *STREAMS)
    columns: dict[str, list[float]] = {name: [] for name in names}
    for version in range(given.turns + 2):
        copied = ray.get(trainer.memcpy.remote(), timeout=60)
        started = time.perf_counter()
        snapshot, packed = ray.get(trainer.send.remote(version, given.copied), timeout=60)
        received, loaded = ray.get(worker.load.remote(snapshot), timeout=60)
        seconds = [copied, packed, received, loaded, time.perf_counter() - started]
        for transport in STREAMS:
            started = time.perf_counter()
            ray.get(trainer.stream.remote(transport, version, given.copied), timeout=60)
            seconds.append(time.perf_counter() - started)
        if version >= 2:
            for column, value in zip(columns.values(), seconds, strict=True):
                column.append(float(value))
    assert ray.get(trainer.checksum.remote(), timeout=60) == ray.get(worker.checksum.remote(), timeout=60)
    print(f"{num_bytes() / GIB:.2f} GiB\n\n| | seconds | GiB/s | share of memcpy's speed, median |\n|---|---|---|---|")
    for name, column in columns.items():
        share = float(np.median(np.array(columns["memcpy"]) / np.array(column)))
        print(f"| {name} | {min(column):.3f} | {num_bytes() / GIB / min(column):.1f} | {share:.2f} |")
    ray.shutdown()


if __name__ == "__main__":
    main()
