"""Recipe -> what will run where and what it needs, before anything starts. No torch: it answers at once.

Only the config of a model that is on a hub, and not in its cache, is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import zip_longest
from typing import Any

from rlflow import actor_memory, memory
from rlflow.data.image_counts import ImageCounts
from rlflow.machine import Machine, this_machine
from rlflow.memory import ModelShape
from rlflow.preparation_memory import preparation_bytes
from rlflow.recipe import AdapterBlock, AlgorithmBlock, ModelBlock, OnlineBlock, Recipe, algorithm_of
from rlflow.recipe.architectures import How, how_run
from rlflow.recipe.distill_blocks import DivergenceDistillBlock
from rlflow.recipe.reference import options
from rlflow.recipe.token_shares import longest_with_one_rotation
from rlflow.remedies import enough, remedies, shown
from rlflow.roles import Role, roles, rollout_engine

GIB = 2**30
_MOST_REMEDIES = 5
"""Changes that are said of what does not fit."""
Size = Callable[[Recipe, "ModelShape | str", Sequence["PlannedRole"]], int]
"""Bytes of a recipe, or of a part of it, from its model's shape and its roles."""


@dataclass(frozen=True, slots=True)
class Setting:
    """An algorithm key whose value is not the schema's neutral default, or not the row's."""

    key: str
    value: Any
    source: str


@dataclass(frozen=True, slots=True)
class PlannedRole:
    """A role and the memory each of its actors will need."""

    role: Role
    parts: Mapping[str, int] | None
    """What -> bytes; None where the model's shape is not known here."""
    split: int = 1
    """GPUs that each hold a part of one actor's model: vLLM's tensor parallelism."""

    @property
    def bytes_each(self) -> int:
        return sum((self.parts or {}).values())

    @property
    def gpu_bytes_each(self) -> int:
        """Of an actor with GPUs, on each that it uses."""
        return math.ceil((self.bytes_each - actor_memory.away_bytes(self.parts)) / self.split)

    @property
    def host_bytes_each(self) -> int:
        """Of an actor with a GPU, what is outside of it."""
        return actor_memory.PROCESS_BYTES + actor_memory.away_bytes(self.parts)


@dataclass(frozen=True, slots=True)
class Plan:
    """What one stage will do."""

    recipe: Recipe
    settings: tuple[Setting, ...]
    sequences: int
    """Rollouts or examples a step."""
    max_tokens: int
    """Most tokens of all of them, prompts included."""
    shape: ModelShape | str
    """Or why it is not known here."""
    roles: tuple[PlannedRole, ...]
    machine: Machine
    num_rows: int | None = None
    """Of training; None where they were not read."""
    images: ImageCounts = field(default_factory=ImageCounts)
    """Of training."""
    tokenized: bool = True
    """Whether ``num_rows`` are those that the chat template and the limits leave; otherwise they are all that can be
    read."""
    passes: tuple[How, str] = ("packed", "")
    """How sequences go through the policy together, and why not packed."""
    one_rotation: int | None = None
    """Tokens up to which all sequences have the same rotary embedding; None where it never changes."""

    @property
    def updates_per_step(self) -> int:
        return self.recipe.algorithm.num_updates

    @property
    def host_bytes(self) -> int:
        """Memory of all actors outside GPUs, of the driver, and of the weights on their way to the rollout workers."""
        return 0 if isinstance(self.shape, str) else _host_bytes(self.recipe, self.shape, self.roles)

    @property
    def warnings(self) -> list[str]:
        """What will not fit on this machine, and what is probably not meant."""
        return [*_misfits(self), *_oddities(self)]

    def __str__(self) -> str:
        """As `rlflow plan` prints it."""
        from rlflow.plan_text import render

        return render(self)


def settings(algorithm: AlgorithmBlock) -> Iterator[Setting]:
    """What makes the algorithm what it is: every key that differs from neutral, and who says so."""
    name = algorithm.name
    row = {option.key: option.value for option in options(algorithm_of(name))}
    neutral = {option.key: option.value for option in options(type(algorithm).model_construct(name=name))}
    for option in options(algorithm):
        if option.key not in row:
            yield Setting(option.key, option.value, "recipe")
        elif option.value != row[option.key]:
            yield Setting(option.key, option.value, f"recipe ({name}: {shown(row[option.key])})")
        elif option.value != neutral.get(option.key, option.default):
            yield Setting(option.key, option.value, name)


def make_plans(
    recipes: Sequence[Recipe],
    machine: Machine | None = None,
    num_rows: Sequence[int | None] = (),
    images: Sequence[ImageCounts] = (),
    tokenized: Sequence[bool] = (),
) -> list[Plan]:
    """What each stage will do.

    Args:
        machine: Where; this one when it is left out.
        num_rows: Rows of each stage's training data, as far as they were read.
        images: Their pictures.
        tokenized: Whether they were tokenised.
    """
    machine = machine or this_machine()
    shapes: dict[tuple[str | None, str | None], ModelShape | str] = {}
    configs: dict[tuple[str | None, str | None], Mapping[str, Any]] = {}
    adapters: dict[str | None, AdapterBlock] = {}
    plans = []
    for recipe, rows, pictures, whole in zip_longest(recipes, num_rows, images, tokenized):
        # The model that an earlier stage will write has the shape of the one it starts from, and so has an adapter.
        model = (recipe.model.path, recipe.model.revision)
        shape = shapes[model] if model[0] and model in shapes else _shape(recipe)
        final, adapter = f"{recipe.run.output_dir}/final", recipe.model.adapter
        shapes[model] = shape
        if not isinstance(shape, str):
            shape = memory.with_trained_parts(shape, recipe.model.train)
            shape = memory.with_new_layers(shape, recipe.model.expand)
        shapes[final, None] = shape if isinstance(shape, str) else replace(shape, frozen=0)
        config = configs[model] if model[0] and model in configs else _config(recipe)
        configs[model] = configs[final, None] = config
        if adapter is not None:
            adapters[final] = adapters.get(adapter.path, adapter)
            shape = _with_adapter(shape, adapters[final], recipe)
        sequences = actor_memory.sequences_per_step(recipe)
        plans.append(
            Plan(
                recipe=recipe,
                settings=tuple(settings(recipe.algorithm)),
                sequences=sequences,
                max_tokens=sequences * actor_memory.longest_sequence(recipe),
                shape=shape,
                roles=_planned(recipe, shape),
                machine=machine,
                num_rows=rows,
                images=pictures or ImageCounts(),
                tokenized=whole is not False,
                passes=how_run(config),
                one_rotation=longest_with_one_rotation(config),
            )
        )
    return plans


def _shape(recipe: Recipe) -> ModelShape | str:
    try:
        return memory.read_shape(recipe.model)
    except memory.UnknownShape as error:
        return str(error)


def _config(recipe: Recipe) -> Mapping[str, Any]:
    """Fields of the model's config; none where it is not to be had."""
    try:
        return memory.read_model_config(recipe.model)
    except memory.UnknownShape:
        return {}


def _with_adapter(shape: ModelShape | str, adapter: AdapterBlock, recipe: Recipe) -> ModelShape | str:
    if isinstance(shape, str):
        return shape
    try:
        return memory.with_adapter(shape, adapter, recipe.model.train)
    except memory.UnknownShape as error:
        return str(error)


def _planned(recipe: Recipe, shape: ModelShape | str) -> tuple[PlannedRole, ...]:
    return tuple(
        PlannedRole(
            role,
            _parts(role.name, recipe, shape),
            split=recipe.rollout.tensor_parallel_size if role.name == "rollout" else 1,
        )
        for role in roles(recipe)
    )


def _host_bytes(recipe: Recipe, shape: ModelShape | str, planned: Sequence[PlannedRole]) -> int:
    actors = (each.role.workers * (each.host_bytes_each if each.role.gpus else each.bytes_each) for each in planned)
    assert isinstance(shape, ModelShape)
    snapshot = actor_memory.snapshot_bytes(recipe, shape) if recipe.needs_rollouts else 0
    # Ray's copy, and the one that a trainer on GPUs makes here; on CPUs it is a part of that trainer.
    copies = 2 if recipe.trainer.gpus_per_worker else 1
    return max(sum(actors) + copies * snapshot, preparation_bytes(recipe, shape)) + actor_memory.PROCESS_BYTES


def _parts(role: str, recipe: Recipe, shape: ModelShape | str) -> Mapping[str, int] | None:
    if role == "rewards":
        server = recipe.reward_server
        holds_model = any(reward.name == "reward_model" for reward in recipe.scoring)
        child = int(server.memory_gib * GIB) if holds_model else actor_memory.REWARD_PROCESS_BYTES
        return {"processes": actor_memory.REWARD_PROCESS_BYTES + server.children * child}
    if isinstance(shape, str):
        return None
    match role:
        case "trainer":
            return {**actor_memory.trainer_bytes(recipe, shape), **_compared(recipe, shape)}
        case "rollout":
            needed = actor_memory.rollout_bytes(recipe, shape, rollout_engine(recipe))
            return {**needed, **actor_memory.environments_bytes(recipe)}
        case "critic":
            return actor_memory.critic_bytes(recipe, shape)
        case "teacher":
            return _of_teacher(recipe)
        case _:
            return actor_memory.reference_bytes(recipe, shape)


def _of_teacher(recipe: Recipe) -> Mapping[str, int] | None:
    """None where its shape is not known here."""
    if recipe.teacher.path is None:
        return {"process": actor_memory.PROCESS_BYTES}
    shape = _teacher_shape(recipe.teacher.path)
    return None if shape is None else actor_memory.teacher_bytes(recipe, shape)


def _compared(recipe: Recipe, shape: ModelShape) -> Mapping[str, int]:
    """What a trainer needs to compare distributions, where it does."""
    algorithm = recipe.algorithm
    distill = algorithm.distill if isinstance(algorithm, OnlineBlock) else None
    if not isinstance(distill, DivergenceDistillBlock):
        return {}
    path = recipe.teacher.path if distill.top_k is None else None
    return actor_memory.compared_bytes(recipe, shape, None if path is None else _teacher_shape(path))


@cache
def _teacher_shape(path: str) -> ModelShape | None:
    try:
        return memory.read_shape(ModelBlock(path=path))
    except memory.UnknownShape:
        return None


def _misfits(plan: Plan) -> Iterator[str]:
    machine = plan.machine
    cpus = sum(planned.role.workers * planned.role.cpus for planned in plan.roles)
    gpus = sum(planned.role.workers * planned.role.gpus for planned in plan.roles)
    if cpus > machine.cpus:
        yield f"actors reserve {cpus:g} CPUs and this machine has {machine.cpus}: they will take turns"
    if gpus > machine.gpus:
        yield f"actors reserve {gpus:g} GPUs and this machine has {machine.gpus}: the run needs a cluster"
    if plan.host_bytes > machine.memory:
        yield f"{gib(plan.host_bytes)} do not fit into {gib(machine.memory)} of memory"
        yield from _what_to_change(plan, machine.memory, _host_bytes)
    if machine.gpu_memory and isinstance(plan.shape, ModelShape):
        yield from _gpu_misfits(plan)


def _gpu_misfits(plan: Plan) -> Iterator[str]:
    """Of actors that need more of a GPU than the share of it that is theirs."""
    of_gpu = plan.machine.gpu_memory
    for planned in plan.roles:
        role, need, limit = planned.role, planned.gpu_bytes_each, int(of_gpu * min(1.0, planned.role.gpus))
        if role.name == "rollout" and rollout_engine(plan.recipe) == "vllm" and role.gpus:
            yield from _vllm_misfits(plan, planned)
        elif role.gpus and need > limit:
            yield f"{role.name}: {gib(need)} do not fit into {gib(limit)} of a GPU's {gib(of_gpu)}"
            yield from _what_to_change(plan, limit, partial(_gpu_bytes, role.name))


def _vllm_misfits(plan: Plan, planned: PlannedRole) -> Iterator[str]:
    """vLLM lets sequences wait for which it has no cache, but one must fit."""
    shape, recipe, parts = plan.shape, plan.recipe, planned.parts or {}
    assert isinstance(shape, ModelShape)
    longest = recipe.data.max_prompt_tokens + recipe.max_completion_tokens
    one = longest * shape.cache_per_token * memory.DTYPE_BYTES[recipe.model.dtype]
    need, limit = planned.gpu_bytes_each, int(plan.machine.gpu_memory * recipe.rollout.gpu_memory_fraction)
    least = need - math.ceil(max(0, parts["KV cache"] - one) / planned.split)
    share = f"rollout.gpu_memory_fraction ({recipe.rollout.gpu_memory_fraction:g}) of a GPU's memory is {gib(limit)}"
    if least > limit:
        yield (
            f"rollout: {share}, one sequence needs {gib(least)}: raise it, or set rollout.tensor_parallel_size and "
            "gpus_per_worker"
        )
    elif need > limit:
        yield f"rollout: {share}, all sequences at once need {gib(need)}: some will wait; raise it if you can"


def _gpu_bytes(role: str, _recipe: Recipe, _shape: ModelShape | str, planned: Sequence[PlannedRole]) -> int:
    """Of an actor of this role, which a change may have made unnecessary."""
    return max((each.gpu_bytes_each for each in planned if each.role.name == role), default=0)


def _what_to_change(plan: Plan, limit: int, size: Size) -> Iterator[str]:
    """Overrides, the largest saving first, and how many of them it takes for ``size`` to be within ``limit``."""
    shape = plan.shape
    assert isinstance(shape, ModelShape)

    def bytes_of(recipe: Recipe) -> int:
        adapter = recipe.model.adapter
        changed = shape if adapter is None or shape.adapter is not None else _with_adapter(shape, adapter, recipe)
        return size(recipe, changed, _planned(recipe, changed))

    found = remedies(plan.recipe, bytes_of)[:_MOST_REMEDIES]
    for remedy in found:
        yield f"  {remedy} saves {gib(remedy.saves)}"
    if chosen := enough(plan.recipe, found, bytes_of, limit):
        yield f"  enough: {' '.join(map(str, chosen))}"
    else:
        yield "  not enough, even together: choose a smaller model, or run on more or larger ones"


def _oddities(plan: Plan) -> Iterator[str]:
    recipe = plan.recipe
    prompts = recipe.data.prompts_per_step
    if recipe.family == "online" and prompts == recipe.algorithm.num_mini_batches:
        yield "one prompt an update: gradients will be noisy; raise data.prompts_per_step, or lower updates_per_step"
    yield from _cut_sampling(recipe)
    yield from _other_rotations(plan)
    if plan.num_rows is not None and prompts > plan.num_rows:
        yield (
            f"a step of {prompts} is more than the {plan.num_rows} rows of data.train, which then come several times "
            "in it: lower data.prompts_per_step"
        )
    yield from _idle_policy(recipe)
    if isinstance(plan.shape, str):
        yield f"memory is not estimated: {plan.shape}"


def _cut_sampling(recipe: Recipe) -> Iterator[str]:
    """What cannot be had of logprobs of another distribution."""
    if recipe.family == "online" and recipe.cut_by is not None:
        verb = "bends" if recipe.cut_by == "sampling.repetition_penalty" else "cuts"
        stale = " or for older weights (run.max_staleness)" if recipe.run.max_staleness else ""
        yield (
            f"{recipe.cut_by} {verb} sampling, so the engine's logprobs are of another distribution than "
            f"the trainer's: nothing corrects for their difference{stale}, and mismatch/... is not measured"
        )


def _other_rotations(plan: Plan) -> Iterator[str]:
    """An engine has turned the first tokens of a sequence before it knows how long it will be, or turns all alike."""
    data, limit = plan.recipe.data, plan.one_rotation
    longest = data.max_prompt_tokens + plan.recipe.max_completion_tokens
    if plan.recipe.family == "online" and limit is not None and longest > limit:
        yield (
            f"the model's rotary embedding is another one in sequences of more than {limit} tokens, and these may have "
            f"{longest} (data.max_prompt_tokens + rollout.max_new_tokens): engines and trainer then differ, by what "
            f"mismatch/... says; keep them within {limit}"
        )


def _idle_policy(recipe: Recipe) -> Iterator[str]:
    """Steps that are over before the policy is trained, or trained at its full rate."""
    steps, warmup = recipe.run.steps, recipe.trainer.warmup_steps
    if steps is None:
        return
    for_critic = 0 if recipe.critic is None else recipe.critic.warmup_steps
    if for_critic >= steps:
        yield f"the policy is never trained: algorithm.critic.warmup_steps is {for_critic} of {steps} steps"
    elif warmup >= steps - for_critic:
        yield f"the learning rate never reaches its peak: {warmup} warm-up steps of {steps - for_critic}"


def gib(size: int) -> str:
    """A number of bytes."""
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:.0f} GiB"
