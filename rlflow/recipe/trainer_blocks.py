"""Who trains and how: the optimizer, and each engine's own options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from rlflow.recipe.algorithm_blocks import CriticBlock
from rlflow.recipe.block import (
    Block,
    Conflict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    malformed_function,
)
from rlflow.recipe.model_blocks import ModelBlock

Beta = Annotated[float, Field(strict=True, ge=0, lt=1)]


class OptimizerBlock(Block):
    kind: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    """adamw_8bit: bitsandbytes', moments in 8 bits, on GPUs. muon: the layers' matrices are orthogonalised
    (arXiv 2502.16982), AdamW has the rest: embeddings, head, norms, biases."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's; Muon's momentum is 0.95."""
    eps: PositiveFloat = 1e-8
    """AdamW's."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled, on matrices only."""


class OwnOptimizerBlock(Block):
    kind: Literal["function"]
    """Your own; `kind: file.py:function` says the same, see docs/extend.md."""
    plugin: str
    """`file.py:function` of parameters, or of named_parameters, that returns a torch.optim.Optimizer."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from malformed_function("plugin", self.plugin)


Optimizer = OptimizerBlock | OwnOptimizerBlock


class FsdpBlock(Block):
    reshard_after_forward: bool = True
    """Gather a layer's weights again in the backward pass: false trades memory for communication."""
    offload: bool = False
    """Keep weights, gradients and moments in the host's memory, and step there."""
    mixed_precision: bool = False
    """Compute in bfloat16; weights and sums over ranks stay float32. So is a bfloat16 model trained without this, but
    for adapters, and its rollouts, reference and exports are bfloat16 too."""
    replicas: PositiveInt = 1
    """Hybrid sharding: so many copies of the weights, each sharded over workers / replicas ranks."""


class DeepSpeedBlock(Block):
    stage: Literal[1, 2, 3] = 2
    """ZeRO shards over ranks: 1 the moments, 2 gradients too, 3 weights too."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What is kept in the host's memory: moments (and the step there), or weights as well."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.offload == "all" and self.stage != 3:
            reason = "weights can leave the GPU when they are sharded: set stage: 3, or offload: optimizer"
            yield Conflict(("offload", "stage"), reason)


class TrainerBlock(Block):
    engine: Literal["fsdp", "deepspeed"] = "fsdp"
    """FSDP2, or DeepSpeed's ZeRO."""
    workers: PositiveInt = 1
    """Ranks."""
    sequence_parallel: PositiveInt = 1
    """So many ranks share the tokens and attention heads of each micro-batch (Ulysses, arXiv 2309.14509): a rank holds
    that share of the activations. It divides workers."""
    learning_rate: PositiveFloat = 1e-6
    """Peak."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Steps in which the learning rate rises from 0."""
    optimizer: Optimizer = Field(default=OptimizerBlock(), discriminator="kind")
    """What makes a step of a gradient."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""
    tokens_per_micro_batch: PositiveInt = 8192
    """Bound of a packed micro-batch; a longer sequence is alone in its own."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass to save memory."""
    fsdp: FsdpBlock = FsdpBlock()
    """Options of engine fsdp."""
    deepspeed: DeepSpeedBlock = DeepSpeedBlock()
    """Options of engine deepspeed."""
    cpus_per_worker: PositiveFloat | None = None
    """Ray CPUs, and compute threads, of each rank. Left out: 1 Ray CPU, and as many threads as there are cores that
    nobody else computes on meanwhile, where the run starts Ray itself and the rank has no GPU."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """Ray GPUs of each rank."""
    timeout_s: PositiveFloat = 1800.0
    """A call longer than this is an error that names the rank."""

    @property
    def data_parallel(self) -> int:
        """Micro-batches that are worked on at a time, each by a group of ranks."""
        return self.workers // self.sequence_parallel

    def conflicts(self) -> Iterator[Conflict]:
        if self.engine != "deepspeed" and self.deepspeed != DeepSpeedBlock():
            reason = f"are not of engine {self.engine}: set engine: deepspeed, or remove them"
            yield Conflict(("deepspeed", "engine"), reason)
        if self.engine != "fsdp" and self.fsdp != FsdpBlock():
            reason = f"are not of engine {self.engine}: set engine: fsdp, or remove them"
            yield Conflict(("fsdp", "engine"), reason)
        replicas = self.fsdp.replicas
        if self.workers % replicas:
            reason = f"{replicas} does not divide workers ({self.workers}): every copy has as many ranks"
            yield Conflict(("fsdp.replicas", "workers"), reason)
        if self.workers % self.sequence_parallel:
            yield Conflict(
                ("sequence_parallel", "workers"), _undivided(self.sequence_parallel, "workers", self.workers)
            )
        if self.workers > 1 and 0 < self.gpus_per_worker < 1:
            yield Conflict(("gpus_per_worker", "workers"), _shared_gpu("", self.workers, self.gpus_per_worker))
        kind = self.optimizer.kind
        if kind != "adamw" and self.engine == "deepspeed":
            shown = self.optimizer.plugin if isinstance(self.optimizer, OwnOptimizerBlock) else kind
            reason = f"ZeRO cuts weights into flat pieces, which {shown} cannot step: set engine: fsdp, or kind: adamw"
            yield Conflict(("optimizer.kind", "engine"), reason)
        elif kind == "adamw_8bit" and not self.gpus_per_worker:
            yield Conflict(("optimizer.kind", "gpus_per_worker"), "runs on GPUs: set gpus_per_worker, or kind: adamw")
        elif kind == "adamw_8bit" and self.fsdp.offload:
            reason = "keeps moments small on the GPU, and offload moves them away: choose one"
            yield Conflict(("optimizer.kind", "fsdp.offload"), reason)


def trainer_conflicts(trainer: TrainerBlock, model: ModelBlock, critic: CriticBlock | None) -> Iterator[Conflict]:
    """What does not go together with the model, or with the critic where there is one."""
    dtype = model.dtype
    if trainer.fsdp.mixed_precision and dtype != "float32":
        reason = f"keeps weights in float32, and they are {dtype}: remove it, or set model.dtype: float32"
        yield Conflict(("trainer.fsdp.mixed_precision", "model.dtype"), reason)
    if dtype == "float16":
        reason = "float16 is not trained here, small gradients would be 0 in it (no loss scaling): set bfloat16"
        yield Conflict(("model.dtype",), reason)
    if model.liger and not trainer.gpus_per_worker:
        reason = "are kernels for GPUs: set trainer.gpus_per_worker, or liger: false"
        yield Conflict(("model.liger", "trainer.gpus_per_worker"), reason)
    if model.learning_rates and trainer.optimizer.kind in ("muon", "function"):
        reason = "are of AdamW: set trainer.optimizer.kind: adamw, or remove them"
        yield Conflict(("model.learning_rates", "trainer.optimizer.kind"), reason)
    if model.train != ("language",) and trainer.sequence_parallel > 1:
        reason = "runs the tower, and ranks would share the tokens of its pictures: set trainer.sequence_parallel: 1"
        yield Conflict(("model.train", "trainer.sequence_parallel"), reason)
    if model.router.is_on and trainer.sequence_parallel > 1:
        reason = "weighs whole sequences, and ranks would have slices of them: set trainer.sequence_parallel: 1"
        yield Conflict(("model.router", "trainer.sequence_parallel"), reason)
    if critic is not None and critic.workers % trainer.fsdp.replicas:
        reason = f"{trainer.fsdp.replicas} does not divide algorithm.critic.workers ({critic.workers}), sharded as well"
        yield Conflict(("trainer.fsdp.replicas", "algorithm.critic.workers"), reason)
    if critic is not None and critic.workers > 1 and 0 < critic.gpus_per_worker < 1:
        reason = _shared_gpu("algorithm.critic.", critic.workers, critic.gpus_per_worker)
        yield Conflict(("algorithm.critic.gpus_per_worker", "algorithm.critic.workers"), reason)
    if critic is not None and critic.workers % trainer.sequence_parallel:
        reason = _undivided(trainer.sequence_parallel, "algorithm.critic.workers", critic.workers)
        yield Conflict(("trainer.sequence_parallel", "algorithm.critic.workers"), reason)
    if critic is not None and trainer.optimizer.kind == "adamw_8bit" and not critic.gpus_per_worker:
        reason = "steps the critic too, on GPUs: set algorithm.critic.gpus_per_worker, or kind: adamw"
        yield Conflict(("trainer.optimizer.kind", "algorithm.critic.gpus_per_worker"), reason)


def _shared_gpu(block: str, workers: int, gpus: float) -> str:
    remedy = f"set {block}gpus_per_worker: 1, or {block}workers: 1"
    return f"{workers} ranks with {gpus:g} of a GPU would share one, which NCCL refuses (Duplicate GPU): {remedy}"


def _undivided(sequence_parallel: int, key: str, workers: int) -> str:
    remedy = f"set {key} to a multiple of it, or sequence_parallel: 1"
    return f"{sequence_parallel} does not divide {key} ({workers}), and so many ranks share each micro-batch: {remedy}"
