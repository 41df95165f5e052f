"""How fast weights get from a trainer's process into an engine's, through Ray's object store on one host.

    python benchmarks/weight_sync.py                       # 134.5M parameters of SmolLM2's shapes, float32
    python benchmarks/weight_sync.py --copied              # gathered as from a sharded trainer: each tensor is new

The trainer sends all tensors (`pack_weights`), the worker takes them from the store (`receive`) and copies them into
parameters of its own, as the torch engine does. Beside it: one memcpy of as many bytes between arrays that are there.
The best of ten, after two for the store's pages. On two cores with little else to do:

| | seconds | GiB/s |
|---|---|---|
| memcpy | 0.025 | 19.7 |
| pack | 0.052 | 9.7 |
| receive | 0.001 | 427.2 |
| load | 0.031 | 16.0 |
| packed to loaded | 0.095 | 5.3 |

With --copied, on cores that others used as well, 2.7 GiB/s where memcpy made 10.4.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np
import ray

from rlflow.actors.weight_sync import WeightSnapshot, pack_weights, receive, tensors_of

GIB = 2**30
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
        import torch

        torch.set_num_threads(1)
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
    columns: dict[str, list[float]] = {name: [] for name in ("memcpy", "pack", "receive", "load", "packed to loaded")}
    for version in range(given.turns + 2):
        copied = ray.get(trainer.memcpy.remote(), timeout=60)
        started = time.perf_counter()
        snapshot, packed = ray.get(trainer.send.remote(version, given.copied), timeout=60)
        received, loaded = ray.get(worker.load.remote(snapshot), timeout=60)
        seconds = (copied, packed, received, loaded, time.perf_counter() - started)
        if version >= 2:
            for column, value in zip(columns.values(), seconds, strict=True):
                column.append(float(value))
    assert ray.get(trainer.checksum.remote(), timeout=60) == ray.get(worker.checksum.remote(), timeout=60)
    print(f"{num_bytes() / GIB:.2f} GiB\n\n| | seconds | GiB/s |\n|---|---|---|")
    for name, column in columns.items():
        print(f"| {name} | {min(column):.3f} | {num_bytes() / GIB / min(column):.1f} |")
    ray.shutdown()


if __name__ == "__main__":
    main()
