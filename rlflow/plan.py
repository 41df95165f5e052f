"""Recipe -> what will run where and what it needs, before anything starts. No torch: it answers at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlflow import actor_memory, memory
from rlflow.machine import Machine, this_machine
from rlflow.memory import ModelShape
from rlflow.recipe import ALGORITHMS, AdapterBlock, AlgorithmBlock, Recipe
from rlflow.recipe.reference import options
from rlflow.remedies import remedies

GIB = 2**30
_MOST_REMEDIES = 5
"""Changes that are said of what does not fit."""


@dataclass(frozen=True, slots=True)
class Role:
    """How many actors of one class, and what Ray reserves for each."""

    name: str
    workers: int
    cpus: float
    gpus: float


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

    @property
    def bytes_each(self) -> int:
        return sum((self.parts or {}).values())

    @property
    def gpu_bytes_each(self) -> int:
        """Of an actor with GPUs, on each of them."""
        away = (self.parts or {}).get(memory.HOST_PART, 0)
        return math.ceil((self.bytes_each - away) / max(1.0, self.role.gpus))

    @property
    def host_bytes_each(self) -> int:
        """Of an actor with a GPU, what is outside of it."""
        return actor_memory.PROCESS_BYTES + (self.parts or {}).get(memory.HOST_PART, 0)


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

    @property
    def updates_per_step(self) -> int:
        groups = self.recipe.algorithm.groups
        return groups.updates_per_step * groups.epochs_per_step if self.recipe.family == "online" else 1

    @property
    def host_bytes(self) -> int:
        """Memory of all actors outside GPUs, of the driver, and of the weights on their way to the rollout workers."""
        return 0 if isinstance(self.shape, str) else _host_bytes(self.recipe, self.shape, self.roles)

    @property
    def warnings(self) -> list[str]:
        """What will not fit on this machine, and what is probably not meant."""
        return [*_misfits(self), *_oddities(self)]


def rollout_engine(recipe: Recipe) -> str:
    """`auto` is vllm where rollout workers have a GPU."""
    if recipe.rollout.engine != "auto":
        return recipe.rollout.engine
    return "vllm" if recipe.rollout.gpus_per_worker else "torch"


def roles(recipe: Recipe) -> list[Role]:
    """Who is placed for a stage."""
    rollout, trainer, reference = recipe.rollout, recipe.trainer, recipe.reference
    found = [Role("trainer", trainer.workers, trainer.cpus_per_worker, trainer.gpus_per_worker)]
    if recipe.needs_rollouts:
        found.append(Role("rollout", rollout.workers, rollout.cpus_per_worker, rollout.gpus_per_worker))
        found.append(Role("rewards", recipe.reward_server.workers, recipe.reward_server.cpus_per_worker, 0.0))
    if recipe.needs_critic:
        critic = recipe.algorithm.critic
        found.append(Role("critic", critic.workers, critic.cpus_per_worker, critic.gpus_per_worker))
    if recipe.places_reference:
        found.append(Role("reference", reference.workers, reference.cpus_per_worker, reference.gpus_per_worker))
    return found


def settings(algorithm: AlgorithmBlock) -> Iterator[Setting]:
    """What makes the algorithm what it is: every key that differs from neutral, and who says so."""
    row = ALGORITHMS[algorithm.name]
    neutral = {option.key: option.value for option in options(AlgorithmBlock.model_construct(name=algorithm.name))}
    for option in options(algorithm):
        default = _at(row.defaults, option.key, neutral[option.key])
        if option.value != default:
            yield Setting(option.key, option.value, f"recipe ({algorithm.name}: {_shown(default)})")
        elif option.value != neutral[option.key]:
            yield Setting(option.key, option.value, algorithm.name)


def make_plans(recipes: Sequence[Recipe], machine: Machine | None = None) -> list[Plan]:
    """What each stage will do on ``machine``, this one when it is left out."""
    machine = machine or this_machine()
    shapes: dict[str | None, ModelShape | str] = {}
    adapters: dict[str | None, AdapterBlock] = {}
    plans = []
    for recipe in recipes:
        # The model that an earlier stage will write has the shape of the one it starts from, and so has an adapter.
        shape = shapes[recipe.model.path] if recipe.model.path in shapes else _shape(recipe)
        final, adapter = f"{recipe.run.output_dir}/final", recipe.model.adapter
        shapes[final] = shape
        if adapter is not None:
            adapters[final] = adapters.get(adapter.path, adapter)
            shape = _with_adapter(shape, adapters[final])
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
            )
        )
    return plans


def render(plan: Plan) -> str:
    """The plan as text for a terminal."""
    recipe, row = plan.recipe, ALGORITHMS[plan.recipe.algorithm.name]
    machine = f"{plan.machine.cpus} CPUs, {_gib(plan.machine.memory)}, {plan.machine.gpus} GPUs"
    if plan.machine.gpu_memory:
        machine += f", {_gib(plan.machine.gpu_memory)} on a GPU"
    sections = {
        **({"stage": [recipe.stage]} if recipe.stage else {}),
        "algorithm": [f"{recipe.algorithm.name}: {row.summary} ({row.source})", *_settings_table(plan)],
        "model": [_model_line(plan)],
        "a step": _step_lines(plan),
        "length": [_length_line(recipe)],
        "actors": _actors_table(plan),
        "machine": [f"{machine}; all actors on it: {_gib(plan.host_bytes)}" if plan.host_bytes else machine],
        "results": [recipe.run.output_dir],
        "warnings": plan.warnings,
    }
    return "\n".join(
        f"{title if first else '':<10} {line}".rstrip()
        for title, lines in sections.items()
        for first, line in zip([True] + [False] * len(lines), lines, strict=False)
    )


def _shape(recipe: Recipe) -> ModelShape | str:
    try:
        return memory.read_shape(recipe.model)
    except memory.UnknownShape as error:
        return str(error)


def _with_adapter(shape: ModelShape | str, adapter: AdapterBlock) -> ModelShape | str:
    if isinstance(shape, str):
        return shape
    try:
        return memory.with_adapter(shape, adapter)
    except memory.UnknownShape as error:
        return str(error)


def _planned(recipe: Recipe, shape: ModelShape | str) -> tuple[PlannedRole, ...]:
    return tuple(PlannedRole(role, _parts(role.name, recipe, shape)) for role in roles(recipe))


def _host_bytes(recipe: Recipe, shape: ModelShape | str, planned: Sequence[PlannedRole]) -> int:
    actors = (each.role.workers * (each.host_bytes_each if each.role.gpus else each.bytes_each) for each in planned)
    assert isinstance(shape, ModelShape)
    snapshot = actor_memory.snapshot_bytes(recipe, shape) if recipe.needs_rollouts else 0
    return sum(actors) + actor_memory.PROCESS_BYTES + snapshot


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
            return actor_memory.trainer_bytes(recipe, shape)
        case "rollout":
            return actor_memory.rollout_bytes(recipe, shape, rollout_engine(recipe))
        case "critic":
            return actor_memory.critic_bytes(recipe, shape)
        case _:
            return actor_memory.reference_bytes(recipe, shape)


def _misfits(plan: Plan) -> Iterator[str]:
    machine = plan.machine
    cpus = sum(planned.role.workers * planned.role.cpus for planned in plan.roles)
    gpus = sum(planned.role.workers * planned.role.gpus for planned in plan.roles)
    if cpus > machine.cpus:
        yield f"actors reserve {cpus:g} CPUs and this machine has {machine.cpus}: they will take turns"
    if gpus > machine.gpus:
        yield f"actors reserve {gpus:g} GPUs and this machine has {machine.gpus}: the run needs a cluster"
    if plan.host_bytes > machine.memory:
        yield f"{_gib(plan.host_bytes)} do not fit into {_gib(machine.memory)} of memory"
        yield from _what_to_change(plan, machine.memory, lambda recipe, shape, roles: _host_bytes(recipe, shape, roles))
    if machine.gpu_memory and isinstance(plan.shape, ModelShape):
        yield from _gpu_misfits(plan)


def _gpu_misfits(plan: Plan) -> Iterator[str]:
    for number, planned in enumerate(plan.roles):
        role, rollout = planned.role, plan.recipe.rollout
        need, of_gpu = planned.gpu_bytes_each, plan.machine.gpu_memory
        is_vllm = role.name == "rollout" and rollout_engine(plan.recipe) == "vllm"
        limit = int(of_gpu * (rollout.gpu_memory_fraction if is_vllm else min(1.0, role.gpus)))
        if not role.gpus or need <= limit:
            continue
        yield f"{role.name}: {_gib(need)} on a GPU do not fit into {_gib(limit)}, its part of {_gib(of_gpu)}"
        if is_vllm and need <= of_gpu:
            yield f"  rollout.gpu_memory_fraction={math.ceil(need / of_gpu * 100) / 100} is enough, with no other actor there"
        yield from _what_to_change(plan, limit, lambda _recipe, _shape, roles, n=number: roles[n].gpu_bytes_each)


def _what_to_change(plan: Plan, limit: int, size: Callable[[Recipe, ModelShape, Sequence[PlannedRole]], int]) -> Found:
    """Overrides, the largest saving first, and how many of them it takes for ``size`` to be within ``limit``."""
    shape = plan.shape
    assert isinstance(shape, ModelShape)

    def bytes_of(recipe: Recipe) -> int:
        adapter = recipe.model.adapter
        changed = shape if adapter is None or shape.adapter is not None else _with_adapter(shape, adapter)
        assert isinstance(changed, ModelShape)
        return size(recipe, changed, _planned(recipe, changed))

    found = remedies(plan.recipe, bytes_of)[:_MOST_REMEDIES]
    enough = [number for number, remedy in enumerate(found, 1) if remedy.together <= limit]
    for remedy in found:
        yield f"  {remedy.key}={remedy.value} saves {_gib(remedy.saves)}"
    if enough:
        yield f"  enough: {'the first' if enough[0] == 1 else f'the first {enough[0]} together'}"
    else:
        yield "  not enough, even together: choose a smaller model, or run on more or larger ones"


def _oddities(plan: Plan) -> Iterator[str]:
    recipe = plan.recipe
    updates, prompts = recipe.algorithm.groups.updates_per_step, recipe.data.prompts_per_step
    if recipe.family == "online" and prompts == updates:
        yield "one prompt an update: gradients will be noisy; raise data.prompts_per_step, or lower updates_per_step"
    total = (recipe.run.steps or 0) * plan.updates_per_step
    if total and recipe.trainer.warmup_steps >= total:
        yield f"the learning rate never reaches its peak: {recipe.trainer.warmup_steps} warm-up steps of {total}"
    if isinstance(plan.shape, str):
        yield f"memory is not estimated: {plan.shape}"
    elif plan.shape.max_positions and actor_memory.longest_sequence(recipe) > plan.shape.max_positions:
        yield (
            f"a sequence may have {actor_memory.longest_sequence(recipe)} tokens, the model was made for "
            f"{plan.shape.max_positions}: lower max_prompt_tokens, max_new_tokens or max_tokens"
        )


def _settings_table(plan: Plan) -> list[str]:
    return [f"  {s.key:<26} {_shown(s.value):<14} {s.source}" for s in plan.settings]


def _model_line(plan: Plan) -> str:
    model = plan.recipe.model
    name = model.path if model.architecture is None else f"a new {model.architecture['model_type']}, random weights"
    size = "" if isinstance(plan.shape, str) else f", {plan.shape.parameters:,} parameters"
    if model.adapter is None:
        return f"{name}{size}, {model.dtype}"
    what = f"rank {model.adapter.rank}" if model.adapter.path is None else f"going on from {model.adapter.path}"
    trained = "" if isinstance(plan.shape, str) else f", {plan.shape.adapter:,} parameters trained"
    return f"{name}{size}, {model.dtype}; {model.adapter.kind}, {what}{trained}"


def _step_lines(plan: Plan) -> list[str]:
    recipe = plan.recipe
    if recipe.family == "online":
        what = f"{recipe.data.prompts_per_step} prompts x {recipe.algorithm.group_size} completions = {plan.sequences}"
        longest = f"({recipe.data.max_prompt_tokens} prompt + {recipe.rollout.max_new_tokens} new)"
        lines = [f"{what} samples, at most {plan.max_tokens:,} tokens {longest}"]
    else:
        lines = [f"{plan.sequences} sequences, at most {plan.max_tokens:,} tokens"]
    count = recipe.algorithm.groups.updates_per_step if recipe.family == "online" else 1
    passes = plan.updates_per_step // count
    updates = f"{plan.updates_per_step} optimizer update{'s' if plan.updates_per_step > 1 else ''}"
    again = f", {passes} passes over them" if passes > 1 else ""
    return [*lines, f"{updates} of {plan.sequences // count} sequences{again}"]


def _length_line(recipe: Recipe) -> str:
    run = recipe.run
    length = f"{run.steps} steps" if run.steps is not None else f"{run.epochs:g} epochs"
    if recipe.family != "online":
        return length
    lag = f"at most {run.max_staleness} versions behind" if run.max_staleness else "synchronous"
    return f"{length}, rollouts {lag}"


def _actors_table(plan: Plan) -> list[str]:
    lines = ["role       workers  CPUs  GPUs  memory each"]
    for planned in plan.roles:
        role, parts = planned.role, planned.parts
        size = "unknown"
        if parts is not None:
            shown = ", ".join(f"{part} {_gib(size)}" for part, size in parts.items() if size >= 0.01 * GIB)
            size = f"{_gib(planned.bytes_each)} ({shown})"
        lines.append(f"{role.name:<10} {role.workers:>7}  {role.cpus:>4g}  {role.gpus:>4g}  {size}")
    return lines


def _at(defaults: Mapping[str, Any], key: str, otherwise: Any) -> Any:
    """The value at a dotted key of nested mappings."""
    value: Any = defaults
    for part in key.split("."):
        if part not in value:
            return otherwise
        value = value[part]
    return value


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:.0f} GiB"
