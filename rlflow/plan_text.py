"""A plan as text for a terminal."""

from __future__ import annotations

from rlflow.actor_memory import episodes_at_once
from rlflow.planning import GIB, Plan, gib
from rlflow.policy_weights import sends_merged, weight_transport
from rlflow.preparation_memory import preparation_bytes
from rlflow.recipe import ALGORITHMS, EnvironmentBlock, Recipe
from rlflow.recipe.distill_blocks import DivergenceDistillBlock
from rlflow.recipe.peft_methods import method_of, starts_elsewhere
from rlflow.recipe.prepared_starts import INIT
from rlflow.recipe.yaml_source import dump_value
from rlflow.remedies import shown


def render(plan: Plan) -> str:
    """The plan as text for a terminal."""
    recipe, row = plan.recipe, ALGORITHMS[plan.recipe.algorithm.name]
    machine = f"{plan.machine.cpus} CPUs, {gib(plan.machine.memory)}, {plan.machine.gpus} GPUs"
    if plan.machine.gpu_memory:
        machine += f", {gib(plan.machine.gpu_memory)} on a GPU"
    sections = {
        **({"stage": [recipe.stage]} if recipe.stage else {}),
        "algorithm": [f"{recipe.algorithm.name}: {row.summary} ({row.source})", *_settings_table(plan)],
        "model": _model_lines(plan),
        **({"teacher": [_teacher_line(recipe)]} if recipe.needs_teacher else {}),
        "template": [f"reads {key}: {dump_value(value)}" for key, value in recipe.model.chat_template_kwargs.items()],
        **({"data": [_data_line(plan.num_rows, plan)]} if plan.num_rows is not None else {}),
        **({} if recipe.environment is None else {"turns": _turns_lines(recipe, recipe.environment)}),
        "a step": _step_lines(plan),
        "length": [_length_line(recipe)],
        "actors": _actors_table(plan),
        **({"weights": [_weights_line(recipe)]} if recipe.needs_rollouts and recipe.trains else {}),
        "machine": [f"{machine}; all actors on it: {gib(plan.host_bytes)}" if plan.host_bytes else machine],
        "results": [recipe.run.output_dir],
        "warnings": plan.warnings,
    }
    return "\n".join(
        f"{title if first else '':<10} {line}".rstrip()
        for title, lines in sections.items()
        for first, line in zip([True] + [False] * len(lines), lines, strict=False)
    )


def _settings_table(plan: Plan) -> list[str]:
    return [f"  {s.key:<26} {shown(s.value):<14} {s.source}" for s in plan.settings]


def _model_lines(plan: Plan) -> list[str]:
    how, reason = plan.passes
    said = {
        "packed": "trained and scored with its sequences packed",
        "side by side": f"trained and scored with its sequences side by side, padded, not packed: {reason}",
        "refused": f"refused as soon as it is loaded: {reason}. Choose another model",
    }
    return [_model_line(plan), said[how]]


def _model_line(plan: Plan) -> str:
    model = plan.recipe.model
    name = model.path if model.architecture is None else f"a new {model.architecture['model_type']}, random weights"
    size = "" if isinstance(plan.shape, str) else f", {plan.shape.parameters:,} parameters"
    if not isinstance(plan.shape, str) and plan.shape.frozen and model.adapter is None:
        size += f", {plan.shape.parameters - plan.shape.frozen:,} of them trained"
    if model.expand is not None:
        return f"{name} with {model.expand.new_layers} new layers{size}, {model.dtype}"
    if model.adapter is None:
        return f"{name}{size}, {model.dtype}"
    what = f"rank {model.adapter.rank}" if model.adapter.path is None else f"going on from {model.adapter.path}"
    trained = "" if isinstance(plan.shape, str) else f", {plan.shape.adapter:,} parameters trained"
    said = f"{model.adapter.kind}, {what}{trained}"
    if model.adapter.peft is not None:
        config = model.adapter.config
        how = starts_elsewhere(config)
        said = f"{method_of(config)} of PEFT's" + ("" if how is None else f"; {how}")
        if not isinstance(plan.shape, str) and (needed := preparation_bytes(plan.recipe, plan.shape)):
            said += f"; its start, {config[INIT]}, is computed before the actors start, in some {gib(needed)}"
    return f"{name}{size}, {model.dtype}; {said}{_reference(plan.recipe)}{_sent(plan.recipe)}"


def _reference(recipe: Recipe) -> str:
    """The adapter that an adapter is compared with, where the recipe names one."""
    named = recipe.reference.adapter
    return f"; the reference is {named}, beside it" if named and recipe.held_reference(recipe.model) else ""


def _sent(recipe: Recipe) -> str:
    """What rollout workers get of an adapter, where it is not the adapter."""
    return "; rollout workers get it merged into the model's weights" if sends_merged(recipe) else ""


def _teacher_line(recipe: Recipe) -> str:
    """Who the teacher is, and what is asked of it."""
    teacher, distill = recipe.teacher, recipe.online.distill
    asked = "the logprob of each token"
    if isinstance(distill, DivergenceDistillBlock):
        asked = "whole distributions" if distill.top_k is None else f"its {distill.top_k} most probable tokens"
    if teacher.url is not None:
        return f"{teacher.url}, asked for {asked} over HTTP"
    if not recipe.places_teacher:
        return f"{teacher.path}: the trainer with its adapter off; {asked}"
    return f"{teacher.path}, {teacher.dtype or recipe.model.dtype}; {asked}"


def _data_line(num_rows: int, plan: Plan) -> str:
    if plan.images.images:
        return f"{_counted(num_rows, 'row')} with {plan.images}"
    return _counted(num_rows, "row") + ("" if plan.tokenized else "; how many of them fit: --tokenize")


def _step_lines(plan: Plan) -> list[str]:
    recipe = plan.recipe
    if recipe.generates:
        each = plan.sequences // recipe.data.prompts_per_step
        prompts, completions = _counted(recipe.data.prompts_per_step, "prompt"), _counted(each, "completion")
        longest = f"({recipe.data.max_prompt_tokens} prompt + {recipe.max_completion_tokens} new)"
        samples = _counted(plan.sequences, "sample")
        lines = [f"{prompts} x {completions} = {samples}, at most {plan.max_tokens:,} tokens {longest}"]
    else:
        lines = [f"{_counted(plan.sequences, 'sequence')}, at most {plan.max_tokens:,} tokens"]
    if not recipe.trains:
        return lines
    count = recipe.algorithm.num_mini_batches
    passes = plan.updates_per_step // count
    updates = _counted(plan.updates_per_step, "optimizer update")
    again = f", {passes} passes over them" if passes > 1 else ""
    return [*lines, f"{updates} of {_counted(plan.sequences // count, 'sequence')}{again}"]


def _turns_lines(recipe: Recipe, environment: EnvironmentBlock) -> list[str]:
    who = environment.name or environment.plugin or ", ".join(environment.tools)
    turns = _counted(environment.max_turns, "turn")
    processes = f"at most {_counted(episodes_at_once(recipe), 'process', 'es')} of environments a worker"
    return [
        f"{who}, at most {turns} of {recipe.rollout.max_new_tokens} tokens, {recipe.max_completion_tokens} in all",
        f"{processes}, each of which may take {environment.memory_gib:g} GiB (environment.memory_gib)",
    ]


def _length_line(recipe: Recipe) -> str:
    run = recipe.run
    length = _counted(run.steps, "step") if run.steps is not None else _counted(run.epochs or 0, "epoch")
    if recipe.family != "online":
        return length
    lag = f"at most {_counted(run.max_staleness, 'version')} behind" if run.max_staleness else "synchronous"
    return f"{length}, rollouts {lag}"


def _weights_line(recipe: Recipe) -> str:
    """How new weights get to rollout workers, and why so."""
    transport = weight_transport(recipe)
    says = {
        "objects": "new weights go through Ray's object store",
        "ipc": "rollout workers read new weights in the trainer's memory (ipc)",
        "collective": "the trainer broadcasts new weights to rollout workers (collective)",
    }
    probed = "" if transport.name == "objects" else "; a worker that cannot takes them out of Ray's object store"
    return f"{says[transport.name]}: {transport.reason}{probed}"


def _counted(number: float, thing: str, ending: str = "s") -> str:
    """``1 epoch``, ``1.5 epochs``, ``2,000 steps``."""
    shown = f"{int(number):,}" if number == int(number) else f"{number:g}"
    return f"{shown} {thing}{'' if number == 1 else ending}"


def _actors_table(plan: Plan) -> list[str]:
    lines = ["role       workers  CPUs  threads  GPUs  memory each"]
    for planned in plan.roles:
        role, parts = planned.role, planned.parts
        size = "unknown"
        if parts is not None:
            listed = ", ".join(f"{part} {gib(size)}" for part, size in parts.items() if size >= 0.01 * GIB)
            size = f"{gib(planned.bytes_each)} ({listed})"
        lines.append(f"{role.name:<10} {role.workers:>7}  {role.cpus:>4g}  {role.threads:>7}  {role.gpus:>4g}  {size}")
    server = plan.recipe.rollout_server
    if plan.recipe.needs_rollouts and plan.recipe.rollout.engine == "http":
        lines.append(f"rollouts are generated by {server.api} servers: {', '.join(server.urls)}")
    return lines
