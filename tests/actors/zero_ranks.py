"""One rank of a batch that GradCache computes with DeepSpeed. Run as a script by the test."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from test_gradient_cache import ROWS, samples_of, trainer_of

from rlflow.algorithms.weighing import weigh
from rlflow.batching import pack
from rlflow.metrics import over_ranks
from rlflow.recipe import algorithm_of


def main(model: str, name: str, rank: int, num_ranks: int, address: str, written: str) -> None:
    row, options = ROWS[name]
    algorithm = algorithm_of(row, **options)
    trainer = trainer_of(Path(model), algorithm, rank, num_ranks, address, engine="deepspeed", deepspeed={"stage": 3})
    samples, denominators = weigh(samples_of(name), algorithm, 64)
    micro_batches = pack(samples, max_tokens=24, num_ranks=num_ranks)[rank]
    metrics = over_ranks([trainer.forward_backward(micro_batches, algorithm, denominators)])
    stats = trainer.optim_step(1e-2)
    said = {name: float(metric.value) for name, metric in metrics.items()} | {"grad_norm": stats.grad_norm}
    Path(f"{written}.{rank}").write_text(json.dumps(said))


if __name__ == "__main__":
    model, name, rank, num_ranks, address, written = sys.argv[1:]
    main(model, name, int(rank), int(num_ranks), address, written)
