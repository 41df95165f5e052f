"""A script of another framework -> recipes and command lines of rlflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlflow.convert import other_commands, swift_folds, swift_sampling, trl_folds, verl_folds
from rlflow.convert.commands import Invocation, invocation_of, read_yaml, take_launcher_flags
from rlflow.convert.given import Draft, Given, Note, flags_of, plain, shown, walk
from rlflow.convert.shell import read_commands
from rlflow.convert.text import problems_of, render, without_defaults
from rlflow.data.errors import DataError
from rlflow.recipe.foreign import swift, trl, verl
from rlflow.recipe.foreign.rows import Table, find_row
from rlflow.recipe.foreign.swift_sample import SAMPLE
from rlflow.recipe.problems import did_you_mean, nearest

_TRAINING = {
    "swift": ("sft", "pt", "rlhf", "sample"),
    "megatron": ("sft", "pt", "rlhf"),
    "trl": tuple(trl.TABLES),
    "verl": tuple(verl.TABLES),
}


_RECKONED = (
    "per_device_train_batch_size gradient_accumulation_steps num_generations num_train_epochs max_epochs max_steps "
    "warmup_ratio warmup_steps save_steps save_total_limit eval_steps vllm_max_model_len max_length "
    "max_completion_length "
    "response_length vllm_tensor_parallel_size tensor_parallel_size split_dataset_ratio steps_per_generation "
    "num_iterations "
    "generation_batch_size sequence_parallel_size lora_rank lora_r lora_alpha lora_dropout epsilon epsilon_high beta "
    "learning_rate lr num_ppo_epochs num_mini_batches global_batch_size train_iters lr_warmup_fraction lr_warmup_iters "
    "max_resample_times top_p top_k context_parallel_size "
    "train_batch_size max_prompt_length max_response_length ppo_mini_batch_size ppo_max_token_len_per_gpu n "
    "tensor_model_parallel_size ulysses_sequence_parallel_size total_training_steps total_epochs "
    "n_gpus_per_node nnodes "
    "lr_warmup_steps lr_warmup_steps_ratio warmup_steps_ratio train_max_samples val_max_samples len penalty_factor "
    "save_freq test_freq kl_coef kl_loss_coef critic_warmup max_num_gen_batches clip_ratio clip_ratio_low "
    "clip_ratio_high "
    "max_actor_ckpt_to_keep max_ckpt_to_keep rollout_is_threshold"
)
_NUMBERS = frozenset(_RECKONED.split())
"""Flags that are reckoned with; of verl's, the last part."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What one command becomes."""

    title: str
    """The command's beginning, e.g. ``swift rlhf --rlhf_type grpo``."""
    recipe: str | None
    """YAML; None where it is no training, or of a kind that rlflow does not have."""
    command: str | None
    """The command line of rlflow that does the same, where it is no training."""
    notes: tuple[Note, ...]


def convert(script: str, gpus: int | None = None) -> list[Conversion]:
    """Everything in a script that another framework would run.

    Args:
        script: A command line, or a shell script of several.
        gpus: How many GPUs the training commands have, where they do not say it.

    Raises:
        DataError: There is no such command in it, or one that names a file that cannot be read.
    """
    found = [each for command in read_commands(script) if (each := invocation_of(command, gpus)) is not None]
    if not found:
        raise DataError(
            "there is no command here that is known: swift, megatron, trl, python -m verl.trainer.main_ppo, and these "
            "behind accelerate launch, torchrun and deepspeed"
        )
    return [_converted(invocation) for invocation in found]


def _converted(invocation: Invocation) -> Conversion:
    framework, verb = invocation.framework, invocation.verb
    broken = _broken(invocation)
    if verb not in _TRAINING.get(framework, ()):
        other = _other(invocation)
        return replace(other, notes=(*broken, *other.notes))
    environment = dict(invocation.environment)
    if framework == "verl":
        given, unread = _hydra(invocation)
        unclear = _take_no_numbers(given)
        draft: Draft | None = verl_folds.draft_of(verb, given, invocation.machines)
        if unread:
            draft.note("to do", f"{unread} is not here: what it says is taken to be verl's defaults")
    else:
        table = (
            SAMPLE
            if verb == "sample"
            else swift.SWIFT
            if framework == "swift"
            else swift.MEGATRON_SWIFT
            if framework == "megatron"
            else trl.TABLES[verb]
        )
        values = _flags(invocation, table)
        invocation = take_launcher_flags(values, invocation)
        environment = dict(invocation.environment)
        given = Given(values, table, lambda name, value: f"--{name} {shown(name, value)}")
        unclear = _take_no_numbers(given)
        if verb == "sample":
            draft = swift_sampling.draft_of(given, invocation.machines)
        elif framework == "trl":
            draft = trl_folds.draft_of(verb, given, invocation.machines, invocation.engine)
        else:
            draft = swift_folds.draft_of(verb, given, invocation.machines, environment)
    kind = f" --rlhf_type {given['rlhf_type']}" if verb == "rlhf" else ""
    title = {"verl": f"verl ({'main_ppo' if verb == 'ppo' else verb})"}.get(framework, f"{framework} {verb}") + kind
    if draft is None:
        note = Note(
            "missing", f"{title}: rlflow has no such algorithm yet; `rlflow algorithms` lists those that there are"
        )
        return Conversion(title, None, None, (note,))
    for note in broken:
        draft.note(note.kind, note.text)
    for text in unclear:
        draft.note("to do", f"{text}: not a number; what holds without it is written")
    _say_the_rest(given, draft, environment, invocation.unset)
    return Conversion(
        title, render(draft, f"From {title}. `rlflow plan` says what it will do."), None, tuple(draft.notes)
    )


def _broken(invocation: Invocation) -> list[Note]:
    """What is said of lines that no backslash joins to the command."""
    if not invocation.broken:
        return []
    lines = ", ".join(map(str, invocation.broken))
    said = (
        f"line {lines} begins with an option, and no backslash joins it to the command (none at the end of the line "
        "before, something behind it, or a comment between): a shell runs the command without it; here it is read as "
        "part of it"
    )
    return [Note("trap", said)]


def _take_no_numbers(given: Given) -> list[str]:
    """Takes flags out that are no numbers and should be, as of a variable that nothing sets. Returns them."""
    wrong = [
        name
        for name in given.values
        if name.rpartition(".")[2] in _NUMBERS and not isinstance(plain(given.values[name]), int | float | None)
    ]
    unclear = [given.text(name) for name in wrong]
    empty = [
        name for name, value in given.values.items() if name.rpartition(".")[2] in _NUMBERS and plain(value) is None
    ]
    for name in [*wrong, *empty]:
        del given.values[name]
    return unclear


def _say_the_rest(given: Given, draft: Draft, environment: Mapping[str, str], unset: Set[str]) -> None:
    for name in given.unknown():
        near = nearest(name, given.table, cutoff=0.8)
        draft.note(
            "missing", f"{given.text(name)}: not a flag that is known" + (f" (did you mean {near}?)" if near else "")
        )
    for name in given.values:
        row = find_row(given.table, name)
        if row is not None and row.kind == "fold" and name not in given.looked_at:
            draft.note("unneeded", f"{given.text(name)}: without effect in this command")
    kept = without_defaults(draft.values)
    for key in draft.values.keys() - kept.keys():
        for name, value in given.values.items():
            if given.spelled(name, value) in draft.why[key]:
                draft.note("unneeded", f"{given.text(name)}: as it is by default ({key})")
    draft.values = kept
    said = "\n".join([*(draft.why[name] for name in draft.values), *(note.text for note in draft.notes)])
    for name, value in given.values.items():
        if given.spelled(name, value) not in said:
            row = find_row(given.table, name)
            is_part = (
                row is not None and row.kind == "fold" and any(f"{key}.".startswith(f"{row.key}.") for key in kept)
            )
            where = f" ({row.key})" if row is not None and row.key else ""
            draft.note(
                "unneeded", f"{given.text(name)}: " + (f"in {row.key}" if row and is_part else f"nothing to set{where}")
            )
    if environment:
        draft.note("unneeded", f"variables that rlflow does not read: {', '.join(sorted(environment))}")
    for name, value in draft.values.items():
        left = sorted(text for text in unset - {"$HOME", "${HOME}"} if text in str(value))
        if left:
            draft.note("to do", f"{name}: {', '.join(left)} is not set in what was converted: set it, or write it out")
    for problem in problems_of(draft.values):
        draft.note("to do", f"{problem.key}: {problem.message}")


def _flags(invocation: Invocation, table: Table) -> dict[str, Any]:
    """The flags of a command line over those of the YAML or JSON file that it names."""
    values, before = flags_of(invocation.words, table)
    files = (
        [values.pop("config")]
        if "config" in values
        else [word for word in before if word.endswith((".yaml", ".yml", ".json"))]
    )
    for file in files:
        content = read_yaml(str(file), f"{invocation.framework} {invocation.verb}")
        for name in ("ENV", "env"):
            content.pop(name, None)
        values = {**content, **values}
    return values


def _hydra(invocation: Invocation) -> tuple[Given, str | None]:
    """Overrides ``a.b=c`` and ``+a.b=c`` over a configuration file; and the file's name where it is not here."""
    table = verl.TABLES[invocation.verb]
    values: dict[str, Any] = {}
    unread = None
    name, folder = _option(invocation.words, "--config-name"), _option(invocation.words, "--config-path")
    if name and folder:
        file = Path(str(folder)) / f"{str(name).removesuffix('.yaml')}.yaml"
        unread = None if file.is_file() else str(file)
        values = dict(walk(read_yaml(str(file), "--config-name"))) if unread is None else {}
        values = {
            key: value
            for key, value in values.items()
            if not key.startswith(("defaults", "hydra")) and "_target_" not in key
        }
    for word in invocation.words:
        key, equals, value = word.lstrip("+").partition("=")
        if equals and not word.startswith(("-", "~")):
            values[key] = value
    return Given(verl_folds.with_references(values), table, lambda name, value: f"{name}={shown(name, value)}"), unread


def _option(words: Sequence[str], name: str) -> str | None:
    """The value of ``--name value`` or ``--name=value``."""
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2].strip("'\"")
    return None


def _other(invocation: Invocation) -> Conversion:
    title = f"{invocation.framework} {invocation.verb}"
    if invocation.framework == "openrlhf":
        text = "OpenRLHF's commands are not converted yet: docs/recipe.md has every key of a recipe"
        return Conversion(title, None, None, (Note("missing", text),))
    command, notes = other_commands.command_of(invocation)
    if command is None:
        remedy = did_you_mean(invocation.verb, [*_TRAINING.get(invocation.framework, ()), *other_commands.COMMANDS])
        notes = (*notes, Note("missing", f"{title}: has no counterpart ({remedy})"))
    return Conversion(title, None, command, notes)
