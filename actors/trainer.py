"""Trainer: one rank of a model's training. It knows verbs, not algorithms: the recipe's row binds the objective.

PolicyTrainer, ValueTrainer and SequenceTrainer differ in the module they load and in what it computes of a batch.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlflow.actors.weight_lines import LOOPBACK, listening_at
from rlflow.checkpoint import naming_the_disk
from rlflow.garbage import without_collection
from rlflow.metrics import Metric, over_ranks
from rlflow.recipe import AlgorithmBlock, ModelBlock, TrainerBlock
from rlflow.types import Denominators, MicroBatch

if TYPE_CHECKING:
    import torch

    from rlflow.actors.rank_schedule import RankSchedule
    from rlflow.actors.weight_stream import RankStream
    from rlflow.actors.weight_sync import WeightSnapshot
    from rlflow.algorithms.batch import TensorBatch
    from rlflow.memory import ModelShape

Objective = tuple["torch.Tensor", dict[str, Metric]]
"""This micro-batch's share of the loss, and of the metrics."""
_SMALL_STEP = 1 << 30
"""Bytes of weights and activations up to which a trainer keeps freed memory from step to step."""


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """What optim_step reports."""

    grad_norm: float
    """Before clipping; NaN when the step was skipped."""
    skipped: bool
    """The gradient was not finite: no parameter and no moment changed."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What evaluate reports: this rank's share."""

    loss: float
    """The objective's, without what routers add."""
    metrics: dict[str, Metric]


class Trainer:
    moe_prefix = ""
    """Before the names of a mixture of experts' metrics."""
    sends_merged = False
    """Whether what the adapter makes of the model's weights is sent, whole."""
    transport = "objects"
    """How rollout workers get new weights: see AtUpdateBlock."""

    def __init__(
        self, model: ModelBlock, trainer: TrainerBlock, *, rank: int, world_size: int, num_threads: int, seed: int
    ) -> None:
        self.block, self.trainer = model, trainer
        self.rank, self.world_size = rank, world_size
        self.num_threads, self.seed = num_threads, seed
        self._listening: socket.socket | None = None
        self._stream: RankStream | None = None

    def load_module(self) -> Any:
        """The model to train, on ``self.device``: the subclass knows which."""
        raise NotImplementedError

    def objective(
        self,
        micro_batch: MicroBatch,
        batch: TensorBatch,
        algorithm: AlgorithmBlock,
        denominators: Denominators,
        temperature: float,
    ) -> Objective:
        """Forward pass and loss of one micro-batch: the subclass knows which."""
        raise NotImplementedError

    def rendezvous(self) -> str:
        """``host:port`` at which rank 0 listens from now on: nobody takes the port until its process group is there."""
        self._listening = listening_at(_own_address())
        return f"{_own_address()}:{self._listening.getsockname()[1]}"

    @without_collection()
    def setup(self, address: str | None) -> float:
        """Loads the model, joins the other ranks. Returns seconds.

        Raises:
            ValueError: The model cannot be trained this way; with a remedy.
        """
        import torch

        from rlflow.actors.host_memory import keep_freed_memory
        from rlflow.actors.learning_rates import learning_rate_shares
        from rlflow.actors.train_engines.engine import init_process_group, make_engine
        from rlflow.actors.train_engines.routers import find_routers
        from rlflow.actors.train_engines.sequence_parallel import share_tokens

        started = time.perf_counter()
        torch.set_num_threads(self.num_threads)
        torch.manual_seed(self.seed)
        self.device = torch.device("cuda" if self.trainer.gpus_per_worker else "cpu")
        if address is not None:
            init_process_group(self.rank, self.world_size, address, self.trainer.timeout_s, self._listening)
        self.module = self.load_module()
        self.routers = None
        if self.trainer.sequence_parallel > 1:
            # A rank's routers see a slice of each sequence: neither losses on whole sequences nor metrics.
            share_tokens(self.module, self.trainer.sequence_parallel, self.device, self.trainer.timeout_s)
        else:
            self.routers = find_routers(self.module, self.block.router, self.device)
        if self.world_size > 1:
            if self.module.tower is not None:
                self.module.tower.run_always()
            self.module.passes.ranks = torch.distributed.group.WORLD
        self.is_small = self._step_bytes() <= _SMALL_STEP
        if self.is_small:
            keep_freed_memory()
        shares = learning_rate_shares(self.module.model, self.block, self.trainer.learning_rate)
        self.engine = make_engine(self.module, self.trainer, rank=self.rank, world_size=self.world_size, shares=shares)
        self.ranks = self._rank_schedule()
        return time.perf_counter() - started

    def attention_cost(self) -> float:
        """Of this model, as `rlflow.batching.pack` takes it; 0 where its config has not the common fields."""
        shape = self._shape()
        return 0.0 if shape is None else shape.attention_cost

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        algorithm: AlgorithmBlock,
        denominators: Denominators,
        temperature: float = 1.0,
    ) -> dict[str, Metric]:
        """Adds the gradient of this rank's micro-batches.

        Returns:
            The objective's metrics, this rank's part of each. Ranks that share tokens all return those of the whole.
        """
        parts = []
        for micro_batch in micro_batches:
            loss, of_routers, metrics = self._losses_of(micro_batch, algorithm, denominators, temperature)
            self.engine.backward(loss if of_routers is None else loss + of_routers)
            parts.append(_numbers(metrics))
        of_adapter = {} if self.ranks is None else {"adapter/rank": Metric(self.ranks.mean_rank())}
        return over_ranks(parts) | self._router_load() | of_adapter

    def evaluate(
        self,
        micro_batches: Sequence[MicroBatch],
        algorithm: AlgorithmBlock,
        denominators: Denominators,
        temperature: float = 1.0,
    ) -> Measured:
        """The loss and the metrics of forward_backward, without a gradient."""
        import torch

        losses, parts = [], []
        with torch.no_grad():
            for micro_batch in micro_batches:
                loss, _, metrics = self._losses_of(micro_batch, algorithm, denominators, temperature)
                losses.append(float(loss))
                parts.append(_numbers(metrics))
        return Measured(sum(losses), over_ranks(parts) | self._router_load())

    def optim_step(self, learning_rate: float, number: int = 0, num_updates: int = 1) -> UpdateStats:
        """Clips and applies the gradient that forward_backward gathered.

        Args:
            number: Of the update, counted from 0.
            num_updates: Of the whole run.

        Raises:
            ValueError: They are too few for the adapter's own schedule.
        """
        if self.ranks is not None:
            self.ranks.begin(number, num_updates)
            self.engine.backward(self.ranks.orthogonality())
        grad_norm = self.engine.step(learning_rate)
        return UpdateStats(float("nan") if grad_norm is None else grad_norm, grad_norm is None)

    def _rank_schedule(self) -> RankSchedule | None:
        """Of an adapter that gives its ranks out as it is trained: it then stands before the optimizer."""
        if self.block.adapter is None:
            return None
        from rlflow.actors.rank_schedule import RankSchedule, gives_out_ranks
        from rlflow.actors.train_engines.fsdp_engine import FsdpEngine

        if not gives_out_ranks(self.module.model):
            return None
        assert isinstance(self.engine, FsdpEngine) and self.world_size == 1, "the recipe refuses others"
        self.engine.optimizer = RankSchedule(self.module.model, self.engine.optimizer)
        return self.engine.optimizer

    def weights(self, version: int, whole: bool = False) -> WeightSnapshot | None:
        """All ranks take part; rank 0 returns the snapshot: of an adapter alone where engines take it as it is.

        Args:
            whole: The weights are in the snapshot in any case. Else, where all rollout workers that have joined get
                them directly, they have them when this returns, and the snapshot is empty.
        """
        from rlflow.actors.checkpoint_names import to_checkpoint
        from rlflow.actors.host_memory import release_freed_memory
        from rlflow.actors.weight_stream import RankStream
        from rlflow.actors.weight_sync import WeightSnapshot, pack_weights

        if not self.is_small:
            # Others may need it now, and a snapshot is too large for what lies between.
            release_freed_memory()
        sends_adapter = self.block.adapter is not None and not self.sends_merged

        def gathered() -> Iterator[tuple[str, torch.Tensor]]:
            return self._merged_weights() if self.sends_merged else self.engine.full_weights(trained_only=sends_adapter)

        def sent() -> Iterator[tuple[str, torch.Tensor]]:
            return gathered() if sends_adapter else to_checkpoint(self.module.model, gathered())

        meetings = ()
        if self.transport != "objects":
            if self._stream is None:
                self._stream = RankStream(self.transport, self.device, _own_address(), self.rank, self.world_size)
            meetings = self._stream.meetings
            if not whole and self._stream.send(sent, gathered, version):
                return WeightSnapshot(version, is_streamed=True, meetings=meetings) if self.rank == 0 else None
        if self.rank == 0:
            return pack_weights(sent(), version, meetings=meetings)
        for _ in gathered():
            pass
        return None

    def _merged_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        from torch.distributed.fsdp import FSDPModule

        from rlflow.actors.merged_weights import merged_weights

        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        return merged_weights(self.module.model)

    def save(self, directory: Path) -> None:
        """Writes this rank's part of a checkpoint into an existing directory.

        Raises:
            DiskError: It cannot be written.
        """
        self.engine.save_state(directory)

    def load(self, directory: Path) -> None:
        """Takes up the state that any number of ranks saved."""
        self.engine.load_state(directory)

    def export(self, directory: Path) -> None:
        """Writes a Hugging Face directory, or an adapter's as PEFT has it. The driver adds the rest of ``final/``.

        Raises:
            DiskError: It cannot be written.
        """
        from rlflow.actors.model_files import write_trained

        # Whole tensors one by one: only rank 0 keeps them, in its host's memory.
        weights = {
            name: tensor.cpu()
            for name, tensor in self.engine.full_weights(trained_only=self.block.adapter is not None)
            if self.rank == 0
        }
        if self.rank == 0:
            with naming_the_disk(directory, sum(tensor.nbytes for tensor in weights.values())):
                write_trained(self.module.model, self.block, directory, weights)

    def _shape(self) -> ModelShape | None:
        """None where the config has not the common fields."""
        from rlflow.memory import UnknownShape, shape_of

        try:
            return shape_of(self.module.model.config.to_dict())
        except UnknownShape:
            return None

    def _step_bytes(self) -> float:
        """Weights, and what a full micro-batch keeps for its backward pass; infinite where nobody knows."""
        from rlflow import activations
        from rlflow.memory import DTYPE_BYTES

        shape, size = self._shape(), DTYPE_BYTES[self.block.dtype]
        if shape is None:
            return math.inf
        of_token = shape.layers * activations.kept(shape, size)
        return size * shape.parameters + self.trainer.tokens_per_micro_batch * of_token

    def _losses_of(
        self, micro_batch: MicroBatch, algorithm: AlgorithmBlock, denominators: Denominators, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, Metric]]:
        """The objective's loss, the routers' where there are any, and the metrics of both."""
        from rlflow.algorithms.batch import TensorBatch

        batch = TensorBatch.from_numpy(micro_batch, self.device)
        if self.routers is None:
            loss, metrics = self.objective(micro_batch, batch, algorithm, denominators, temperature)
            return loss, None, metrics
        with self.routers.watched() as seen:
            loss, metrics = self.objective(micro_batch, batch, algorithm, denominators, temperature)
        of_routers, parts = self.routers.loss(seen, batch, self.block.router, denominators)
        return loss, of_routers, metrics | self._named(parts)

    def _router_load(self) -> dict[str, Metric]:
        return {} if self.routers is None else self._named(self.routers.load(self.world_size))

    def _named(self, of_routers: Mapping[str, Any]) -> dict[str, Metric]:
        return {self.moe_prefix + name: Metric(value) for name, value in of_routers.items()}


def _own_address() -> str:
    """Of this machine, as Ray's other nodes know it. Without Ray nobody is anywhere else."""
    import ray

    return ray.util.get_node_ip_address() if ray.is_initialized() else LOOPBACK


def _numbers(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """With floats in the place of tensors."""
    return {name: metric._replace(value=float(metric.value)) for name, metric in metrics.items()}
