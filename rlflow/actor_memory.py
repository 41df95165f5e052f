"""How much memory each actor needs at its peak, what of it is for what, from the model's shape and the recipe.

A step has a few moments that can be its peak; each is the sum of what is alive then, and the largest is the estimate:

    scoring     all activations are kept, logits are there, chunk by chunk
    pictures    a vision tower reads them, before the language model begins
    last layer  its backward pass begins; with gradient checkpointing its activations were just computed again
    embeddings  the backward pass ends: no activations, all gradients
    snapshot    weights go to the rollout workers, chunk by chunk: no activations, no gradients; from GPUs to the host

benchmarks/memory.md compares estimates with measured peaks. Not counted: what an allocator keeps of freed memory, the
padding of sequences whose lengths differ by less than a quarter, DoRA's own activations, those of adapters in a vision
tower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from rlflow import activations
from rlflow.memory import (
    DTYPE_BYTES,
    HOST_PART,
    ModelShape,
    computed_bytes,
    is_mixed,
    state_bytes,
    weight_bytes,
    with_trained_parts,
)
from rlflow.policy_weights import sends_merged
from rlflow.recipe import OnlineBlock, Recipe, SampleBlock

Parts = dict[str, int]
"""What -> bytes."""

PROCESS_BYTES = 1 << 29
"""Of an actor with torch and transformers imported, before it holds anything (benchmarks/memory.md)."""
VLLM_PROCESS_BYTES = 3 << 28
"""Of an actor with vLLM, beside weights and cache (the same)."""
REWARD_PROCESS_BYTES = 1 << 27
"""Of a process that only runs reward functions."""
ENVIRONMENT_SOURCE_BYTES = 1 << 26
"""Of the process that a rollout worker's episodes start from, with an environment that imports little."""
EPISODE_BYTES = 1 << 22
"""Of an episode's process that holds nothing yet: what it does not share with the one that it was forked from."""
ENVIRONMENTS_PART = "environments"
LOGITS_BYTES = 1 << 28
"""Trainer and reference score tokens in chunks whose logits take as much: token_model._CHUNK_BYTES."""
SNAPSHOT_CHUNK_BYTES = 1 << 28
"""Of weights on their way to the rollout workers that a trainer holds at a time: weight_sync.CHUNK_BYTES."""
BUCKET_ELEMENTS = 100_000_000
"""Of ZeRO's buffer of gradients, where there are as many parameters: deepspeed_engine._config."""
SUMMED_ELEMENTS = 500_000_000
"""Of gradients that ZeRO 1 sums at a time in bfloat16: DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE."""
CHUNKS_OF_COMPARED = 6
"""A divergence is taken of so many times fewer tokens at a time than logprobs: divergences._ARRAYS."""
COMPARED_ARRAYS = 10
"""Of a chunk's logits' size that are there in its backward pass: both models' logits and logprobs, the mixture, what is
made of them, and gradients."""
SAMPLING = 6
"""Arrays of float32 [sequences, vocabulary] that sampling a token holds; the cumulative one is of float64: twice."""


def trainer_bytes(recipe: Recipe, shape: ModelShape) -> Parts:
    """Of one rank of the trainer."""
    trainer = recipe.trainer
    state = state_bytes(recipe, shape, trainer.workers, bool(trainer.gpus_per_worker))
    scores = recipe.algorithm.learning.head == "token"
    moments = _step(recipe, shape, state, trainer.workers, scores=scores, on_gpu=bool(trainer.gpus_per_worker))
    if recipe.needs_rollouts and not trainer.gpus_per_worker:
        chunk = min(snapshot_bytes(recipe, shape), SNAPSHOT_CHUNK_BYTES)
        moments.append({**state, "gradients": 0, "snapshot": chunk})
    return _largest(moments)


def critic_bytes(recipe: Recipe, shape: ModelShape) -> Parts:
    """Of one rank of the critic: a trainer of all weights, without logits."""
    critic = recipe.critic
    assert critic is not None
    whole = with_trained_parts(replace(shape, adapter=None, frozen=0), recipe.model.train)
    state = state_bytes(recipe, whole, critic.workers, bool(critic.gpus_per_worker))
    return _largest(_step(recipe, shape, state, critic.workers, scores=False, on_gpu=bool(critic.gpus_per_worker)))


def reference_bytes(recipe: Recipe, shape: ModelShape) -> Parts:
    """Of one ReferenceModel: it keeps nothing for a backward pass."""
    return _frozen_bytes(recipe, shape, DTYPE_BYTES[recipe.model.dtype])


def teacher_bytes(recipe: Recipe, shape: ModelShape) -> Parts:
    """Of one TeacherModel.

    Args:
        shape: The teacher's.
    """
    return _frozen_bytes(recipe, shape, DTYPE_BYTES[recipe.teacher.dtype or recipe.model.dtype])


def compared_bytes(recipe: Recipe, shape: ModelShape, teacher: ModelShape | None) -> Parts:
    """What a rank of the trainer has beside its other parts where whole distributions are compared with a teacher's.

    Args:
        teacher: The teacher's shape; None where it is not known, or its head is not needed.
    """
    size = DTYPE_BYTES[recipe.teacher.dtype or recipe.model.dtype]
    head = {} if teacher is None else {"teacher's head": teacher.vocabulary * teacher.hidden * size}
    rows = micro_batch_tokens(recipe) * shape.vocabulary * activations.FLOAT32
    return {**head, "divergence": COMPARED_ARRAYS * min(rows, LOGITS_BYTES // CHUNKS_OF_COMPARED)}


def _frozen_bytes(recipe: Recipe, shape: ModelShape, size: int) -> Parts:
    """Of a model that scores. ``size``: bytes of a number."""
    tokens = micro_batch_tokens(recipe)
    weights = {"weights": shape.parameters * size}
    forward = max(tokens * activations.layer_forward(shape, size), _reading_bytes(shape, tokens, size))
    scoring = tokens * 2 * shape.hidden * size
    _, logits = _chunks(tokens, shape, size)
    return _largest([{**weights, "activations": forward}, {**weights, "activations": scoring, "logits": logits}])


def rollout_bytes(recipe: Recipe, shape: ModelShape, engine: str) -> Parts:
    """Of one RolloutWorker. The key-value cache is vLLM's fixed one on a CPU, or what the longest completions fill.

    Over HTTP the servers hold everything.

    On a GPU vLLM takes ``gpu_memory_fraction`` of it, which should be more.
    """
    rollout, size = recipe.rollout, DTYPE_BYTES[recipe.model.dtype]
    if engine == "http":
        return {"process": PROCESS_BYTES}
    sequences = rollout.max_num_seqs
    prompts = sequences
    if recipe.generates:
        group = recipe.rollouts_per_prompt
        share = math.ceil(recipe.data.prompts_per_step / rollout.workers) * group
        sequences = min(sequences, share)
        prompts = math.ceil(sequences / group)
    weights = {"weights": weight_bytes(recipe, shape.parameters, shape.adapter)}
    logits = SAMPLING * sequences * shape.vocabulary * activations.FLOAT32
    longest = recipe.data.max_prompt_tokens
    length = longest + recipe.max_completion_tokens
    written = sequences * length * shape.cache_per_token * size
    if engine == "vllm":
        cache = written if rollout.gpus_per_worker else int(rollout.kv_cache_gib * 2**30)
        return {**weights, "KV cache": cache, "logits": logits, "process": VLLM_PROCESS_BYTES}
    reading = {
        "KV cache": prompts * longest * shape.cache_per_token * size,
        "activations": max(
            prompts * longest * activations.layer_forward(shape, size), _reading_bytes(shape, prompts * longest, size)
        ),
    }
    # A layer's keys are there twice while rows are laid out anew; where attention is not grouped, keys and values are
    # repeated for the query heads that share them.
    repeated = 2 * shape.query_width if shape.key_width < shape.query_width else 0
    writing = {
        "KV cache": written,
        "activations": max(0, sequences * length * (shape.key_width + repeated) * size - logits),
        "logits": logits,
    }
    return _largest([{**weights, **reading}, {**weights, **writing}])


def episodes_at_once(recipe: Recipe) -> int:
    """The most episodes that one rollout worker has under way, each with a process of its own."""
    most = recipe.rollout.max_num_seqs
    if recipe.evaluations:
        return most
    prompts = math.ceil(recipe.data.prompts_per_step / recipe.rollout.workers) * (1 + recipe.run.max_staleness)
    return min(most, prompts * recipe.online.rollouts_per_prompt)


def environments_bytes(recipe: Recipe) -> Parts:
    """Of the processes of one worker's environments, before these hold anything; empty where there are none."""
    if recipe.environment is None:
        return {}
    return {ENVIRONMENTS_PART: ENVIRONMENT_SOURCE_BYTES + episodes_at_once(recipe) * EPISODE_BYTES}


def away_bytes(parts: Mapping[str, int] | None) -> int:
    """What an actor with a GPU has in the host's memory, of its parts."""
    return sum((parts or {}).get(part, 0) for part in (HOST_PART, ENVIRONMENTS_PART))


def snapshot_bytes(recipe: Recipe, shape: ModelShape) -> int:
    """Of the weights on their way to the rollout workers: of an adapter alone where engines take it as it is."""
    if shape.adapter is not None and not sends_merged(recipe):
        return activations.FLOAT32 * shape.adapter
    return shape.parameters * DTYPE_BYTES[recipe.model.dtype]


def micro_batch_tokens(recipe: Recipe) -> int:
    """Most tokens in one forward pass of a rank: the packing budget, one longer sequence, or all there is."""
    longest = longest_sequence(recipe)
    per_rank = math.ceil(sequences_per_step(recipe) / recipe.trainer.data_parallel) * longest
    return max(longest, min(recipe.trainer.tokens_per_micro_batch, per_rank))


def longest_sequence(recipe: Recipe) -> int:
    """Tokens of the longest sequence that is trained."""
    if not recipe.generates:
        return recipe.data.max_tokens
    of_policy = recipe.data.max_prompt_tokens + recipe.max_completion_tokens
    has_given = recipe.trains_answers or recipe.demonstrations is not None
    return max(of_policy, recipe.data.max_tokens) if has_given else of_policy


def sequences_per_step(recipe: Recipe) -> int:
    """Rollouts, examples, or both answers of every pair."""
    if isinstance(recipe.algorithm, OnlineBlock | SampleBlock) and recipe.generates:
        return recipe.data.prompts_per_step * recipe.algorithm.group_size
    return recipe.data.prompts_per_step * recipe.algorithm.learning.sequences_a_row


def _step(recipe: Recipe, shape: ModelShape, state: Parts, ranks: int, *, scores: bool, on_gpu: bool) -> list[Parts]:
    """The moments of forward and backward passes.

    Gradients wait only where an update has several micro-batches: before the first one there are none.
    """
    size, layers, share = computed_bytes(recipe), shape.layers, recipe.trainer.sequence_parallel
    tokens = math.ceil(micro_batch_tokens(recipe) / share)
    trains_all = shape.adapter is None or not scores
    targets = None if trains_all else shape.adapter_targets
    # Mixed precision computes in 16 bits in adapters as well.
    of_adapter = size if recipe.trainer.fsdp.mixed_precision else activations.FLOAT32
    layer = activations.kept(shape, size, targets, shape.adapter_rank, of_adapter)
    if on_gpu and size == activations.FLOAT32:
        # There attention reads a key and a value for each query.
        layer += 2 * size * (shape.query_width - shape.key_width)
    if recipe.trainer.gradient_checkpointing:
        kept = layers * shape.hidden * size
        # In float32 the input that was kept is the tensor that the first norm keeps.
        again = layer - (shape.hidden * size if size == activations.FLOAT32 else 0)
    else:
        kept, again = layers * layer, 0
    head = shape.head_parameters * size if trains_all and scores else 0
    state = {**state, **_bucket_bytes(recipe, shape)}
    gathered = _gathered_bytes(recipe, shape, ranks, 2)
    waits = 2 if recipe.trainer.fsdp.reshard_after_forward else layers
    begun = {**state, **_gathered_bytes(recipe, shape, ranks, waits)}
    if _micro_batches(recipe, ranks // share) == 1:
        begun["gradients"] = 0
    tower_kept, tower_ends = _tower_bytes(recipe, shape, tokens, size)
    at_scoring = tower_kept + tokens * (kept + activations.final_norm(shape, size, is_trained=trains_all))
    at_last_layer = tower_kept + tokens * (kept + again + activations.layer_backward(shape, size))
    scoring = _scoring_bytes(recipe, shape, tokens, head) if scores else 0
    # The gradient of tied embeddings waits for its second half, that of the lookup, until the end.
    waiting = head if shape.is_tied else 0
    # Gradients of what is whole, on their way into the sum over ranks, which is of float32 in mixed precision.
    widened = activations.FLOAT32 // size if is_mixed(recipe, shape) else 1
    at_end = head + waiting + widened * sum(gathered.values())
    return [
        {**begun, "activations": at_scoring, "logits": scoring},
        {**begun, "activations": at_last_layer, "logits": waiting},
        {**begun, "activations": _reading_bytes(shape, tokens, size)},
        {**state, **gathered, "activations": tower_ends, "logits": at_end},
    ]


def _tower_bytes(recipe: Recipe, shape: ModelShape, tokens: int, size: int) -> tuple[int, int]:
    """Of a vision tower, where every token of a pass stands for a part of a picture: its pictures and what it keeps for
    its backward pass, and what is there as that ends, behind the language model's."""
    tower = shape.tower
    if tower is None:
        return 0, 0
    patches = tokens * tower.patches_per_token
    pixels = patches * tower.values * activations.FLOAT32
    if not {"vision", "audio"} & set(recipe.model.train):
        return pixels, 0
    layer = patches * activations.kept_by_tower(tower, size)
    kept = tower.layers * layer
    again = 0
    if recipe.trainer.gradient_checkpointing:
        kept, again = tower.layers * patches * tower.hidden * size, layer
    return pixels + kept, pixels + kept + again + patches * activations.layer_backward(tower, size)


def _reading_bytes(shape: ModelShape, tokens: int, size: int) -> int:
    """Of a tower that keeps nothing for a backward pass: its pictures, and its largest layer."""
    tower = shape.tower
    if tower is None:
        return 0
    patches = tokens * tower.patches_per_token
    return patches * (tower.values * activations.FLOAT32 + activations.layer_forward(tower, size))


def _gathered_bytes(recipe: Recipe, shape: ModelShape, ranks: int, layers: int) -> Parts:
    """What a rank holds whole, as it computes with it, of weights that it owns a part of, or that are elsewhere or in
    another dtype: embeddings and head all along, and so many layers. FSDP2 copies them on one rank too."""
    trainer = recipe.trainer
    if trainer.engine == "deepspeed":
        is_away = bool(trainer.gpus_per_worker) and trainer.deepspeed.offload == "all"
        is_gathered = trainer.deepspeed.stage == 3 and (ranks > 1 or is_away)
    else:
        is_gathered = ranks > 1 or trainer.fsdp.offload or is_mixed(recipe, shape)
    if not is_gathered:
        return {}
    heads = (1 if shape.is_tied else 2) * shape.head_parameters
    return {"gathered": computed_bytes(recipe) * (heads + layers * shape.layer_parameters)}


def _bucket_bytes(recipe: Recipe, shape: ModelShape) -> Parts:
    """ZeRO's buffer in which gradients wait to be summed over ranks, in float32.

    Stages 1 and 2 make it in each backward pass, stage 3 has it all along.
    In bfloat16 stage 1 has a copy of what it sums instead, and stage 2 one beside a buffer of bfloat16. Weights are
    gathered in place.
    """
    stage, dtype = recipe.trainer.deepspeed.stage, recipe.model.dtype
    if recipe.trainer.engine != "deepspeed":
        return {}
    size = activations.FLOAT32 + (2 if stage == 2 and dtype == "bfloat16" else 0)
    most = SUMMED_ELEMENTS if stage == 1 and dtype == "bfloat16" else BUCKET_ELEMENTS
    return {"bucket": size * (min(shape.parameters + (shape.adapter or 0), most) // 2 * 2)}


def _scoring_bytes(recipe: Recipe, shape: ModelShape, tokens: int, head: int) -> int:
    """Of the backward pass of a chunk of logits, with the head's gradient of the chunks before it and of its own."""
    number, chunk = _chunks(tokens, shape, computed_bytes(recipe))
    return chunk + min(number, 2) * head


def _chunks(tokens: int, shape: ModelShape, size: int) -> tuple[int, int]:
    """How many chunks the logits of ``tokens`` are made in, and the bytes of one: logits of ``size`` bytes, and what
    they are in float32."""
    of_token = shape.vocabulary * (activations.FLOAT32 + (size if size != activations.FLOAT32 else 0))
    number = math.ceil(tokens / max(1, LOGITS_BYTES // of_token))
    return number, math.ceil(tokens / number) * of_token


def _micro_batches(recipe: Recipe, ranks: int) -> int:
    """Of one of ``ranks`` that have their own, in one update, where all sequences are as long as they may be."""
    sequences = math.ceil(sequences_per_step(recipe) / recipe.algorithm.num_mini_batches / ranks)
    return math.ceil(sequences * longest_sequence(recipe) / micro_batch_tokens(recipe))


def _largest(moments: list[Parts]) -> Parts:
    largest = max(moments, key=lambda parts: sum(parts.values()))
    return {**largest, "process": PROCESS_BYTES}
