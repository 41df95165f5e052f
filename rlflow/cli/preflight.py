"""What a recipe names must exist before anything starts: files, functions, models, reward names.

First nothing is loaded or executed: plugins are parsed, models are judged by their files. Of a hub id the config and
the tokenizer are looked at, where the hub can be reached. Where all of that is right, plugins are imported and
generators called, each in a process that can be killed, and the data is read.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlflow.cli.adapter_checks import in_adapter, to_come_as_model, used_as_model
from rlflow.cli.data_checks import in_sources, in_template
from rlflow.cli.id_checks import in_ids, scorer_ids_problem
from rlflow.cli.model_checks import config_problem, in_architecture, in_expansion, in_formats
from rlflow.cli.output_checks import in_output, in_space
from rlflow.cli.plugin_checks import (
    in_functions,
    in_generators,
    in_keep,
    in_rewards,
    in_tried,
    rewards_of,
    sources_of,
    try_environment,
)
from rlflow.cli.row_checks import Reading, is_small, read_data
from rlflow.cli.secret_checks import in_environment, in_masked, remember
from rlflow.cli.sequence_checks import config_of, in_sequence_parallel
from rlflow.data.generated import GENERATORS
from rlflow.environments.adapters import ADAPTERS
from rlflow.machine import named_cluster, this_machine
from rlflow.ray_cluster import require_answer
from rlflow.recipe import EnvironmentBlock, Problem, Recipe, RecipeError, RewardBlock, SourceBlock
from rlflow.recipe.adapter_files import is_adapter
from rlflow.recipe.architectures import has_experts, why_not_vllm
from rlflow.recipe.loading import LocatedRecipe, RecipeSource, load_located
from rlflow.recipe.local_paths import is_hub_id
from rlflow.recipe.model_blocks import QUANTIZED_BASES
from rlflow.recipe.model_files import files_problem
from rlflow.recipe.overrides import Overrides
from rlflow.recipe.own_functions import own_functions
from rlflow.recipe.problems import did_you_mean, nearest
from rlflow.rewards import REWARDS
from rlflow.rewards.reward_model import score_head_problem
from rlflow.roles import roles, rollout_engine
from rlflow.tracking import missing_packages

_OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM", "Model")

Found = Iterator[tuple[str, str]]
"""(dotted key, what is wrong with its value and what to do)."""


def load_runnable(source: RecipeSource, overrides: Overrides = (), *, alone: bool = False) -> list[Recipe]:
    """``load_recipe`` for a run: everything that the recipe names is there and can be used.

    Data that is large or elsewhere is left to the run, which reads it before anything else.

    Args:
        alone: It will run on this machine: the GPUs that it asks for must exist as well.

    Raises:
        RecipeError: All of what is wrong.
        RunError: The cluster that RAY_ADDRESS names does not answer.
    """
    located = load_located(source, overrides)
    check(located, alone=alone)
    if (address := named_cluster()) is not None:
        require_answer(address)
    check_in_use(located, read=is_small)
    return [stage.recipe for stage in located]


def load_checked(path: str | Path, overrides: Overrides = (), *, alone: bool = False) -> list[Recipe]:
    """``load_recipe``, and everything that the recipe names exists; see `check`."""
    located = load_located(path, overrides)
    check(located, alone=alone)
    return [stage.recipe for stage in located]


def check_in_use(
    stages: Sequence[LocatedRecipe], *, read: Callable[[Recipe], bool], tokenize: bool = True
) -> list[Reading]:
    """Imports the functions of the stages, each in a process of its own, and reads their data.

    Args:
        read: Whether a stage's data is to be read.
        tokenize: Whether it is tokenised as well; see `read_data`.

    Returns:
        What was read of each stage.

    Raises:
        RecipeError: All that cannot be used, each with the place where it is named.
    """
    to_come: dict[str, Recipe] = {}
    problems: list[Problem] = []
    readings = []
    for stage in stages:
        recipe = stage.recipe
        is_read = read(recipe) and not recipe.waits_for_rows
        tried = try_environment(recipe)
        found = list(in_generators(recipe, is_called=is_read))
        is_read = is_read and not found and tried.problem is None
        reading = read_data(recipe, to_come, tried.tools, tokenize=tokenize) if is_read else Reading()
        found += [*in_tried(recipe, tried, reading.row), *reading.problems]
        found += [*in_rewards(recipe, reading.row), *in_functions(recipe)]
        found += in_keep(recipe, reading.row)
        problems += [stage.problem(key, message) for key, message in found]
        readings.append(reading)
        if recipe.trains:
            to_come[f"{recipe.run.output_dir}/final"] = recipe
    if problems:
        raise RecipeError(problems)
    return readings


def check(stages: Sequence[LocatedRecipe], *, alone: bool = False) -> None:
    """Looks for every file, function and name of the stages. A model that an earlier stage will write may be missing.

    Raises:
        RecipeError: All that is not there, each with the place where it is named.
    """
    for stage in stages:
        remember(stage.recipe)
    to_come: dict[str, Recipe] = {}
    problems = []
    for stage in stages:
        for key, message in _missing(stage.recipe, to_come):
            problems.append(stage.problem(key, message))
        of_this_machine = _on_this_machine(stage.recipe, to_come) if alone else ()
        problems += [stage.problem(key, message) for key, message in of_this_machine]
        if stage.recipe.trains:
            to_come[f"{stage.recipe.run.output_dir}/final"] = stage.recipe
    if problems:
        raise RecipeError(problems)


def _on_this_machine(recipe: Recipe, to_come: Mapping[str, Recipe]) -> Found:
    """What a run here needs, and a cluster may have."""
    yield from _in_gpus(recipe)
    yield from in_environment(recipe)
    yield from in_space(recipe, to_come)


def _missing(recipe: Recipe, to_come: Mapping[str, Recipe]) -> Found:
    """``to_come``: the directory that each earlier stage will write, and the stage."""
    models = {
        "model.path": recipe.model.path,
        "reference.path": recipe.reference.path,
        "algorithm.critic.path": None if recipe.critic is None else recipe.critic.path,
        "teacher.path": recipe.teacher.path,
    }
    for key, path in models.items():
        if path is not None and path in to_come:
            yield from to_come_as_model(key, path, to_come[path])
        elif path is not None:
            yield from _in_model(key, path)
            if key != "algorithm.critic.path" and recipe.algorithm.learning.head in ("token", "yes_no"):
                yield from _in_head(key, Path(path))
    yield from in_formats(recipe, {key: path for key, path in models.items() if path not in to_come})
    yield from in_masked(recipe)
    if recipe.model.architecture is not None:
        yield from in_architecture(recipe.model.architecture)
    yield from in_adapter(recipe, to_come)
    yield from in_expansion(recipe.model, config_of(recipe.model, to_come))
    yield from in_sequence_parallel(recipe, to_come)
    yield from in_ids(recipe, to_come)
    yield from _in_architecture(recipe)
    template = recipe.model.chat_template
    if template is not None and template.startswith("/") and not Path(template).is_file():
        yield "model.chat_template", f"there is no file {template}"
    for key, source in sources_of(recipe).items():
        yield from _in_source(key, source)
    yield from in_sources({key: source for key, source in sources_of(recipe).items() if source.stage is None})
    yield from in_template(recipe)
    for key, reward in rewards_of(recipe).items():
        yield from _in_reward(key, reward)
        if reward.name == "reward_model":
            yield from _in_reward_model(f"{key}.args", reward.args, to_come)
    for key, function in own_functions(recipe).items():
        yield from _in_function(f"{key}.plugin", function.plugin, "function", [])
    if recipe.environment is not None:
        yield from _in_environment(recipe.environment)
    yield from in_output(recipe)
    yield from missing_packages(recipe)


def _in_model(key: str, path: str) -> Found:
    directory = Path(path)
    if not directory.exists():
        if not is_hub_id(path):
            yield key, f"there is no directory {path}{_similar(directory)}"
    elif not directory.is_dir():
        yield key, f"{path} is a file: name the directory with config.json and the weights"
    elif is_adapter(directory):
        yield key, used_as_model(key, path)
    elif not (directory / "config.json").exists():
        yield key, f"{path} holds no model: it has no config.json"
    elif problem := config_problem(directory):
        yield key, problem
    else:
        yield from _in_weights(key, directory)


def _in_head(key: str, directory: Path) -> Found:
    """What was saved as something else than a language model has no weights for the next token."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    names = (config.get("architectures") if isinstance(config, dict) else None) or [""]
    if all(name.endswith(_OTHER_HEADS) and not name.endswith("LMHeadModel") for name in names):
        yield key, f"{directory} holds a {names[0]}, not a language model: name the policy that it was made from"


def _in_weights(key: str, directory: Path) -> Found:
    if problem := files_problem(directory):
        yield key, problem
    elif not list(directory.glob("*.safetensors")):
        yield key, f"{directory} has no *.safetensors: fetch the weights, or write them with save_pretrained"


def _in_architecture(recipe: Recipe) -> Found:
    """Of a config that is here; the trainers and engines know of all others."""
    config = recipe.model.architecture
    if config is None:
        try:
            config = json.loads((Path(recipe.model.path or "") / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
    if not isinstance(config, dict):
        return
    if recipe.model.router.is_on and not has_experts(config):
        yield "model.router", "is of mixtures of experts, and the model has no experts: remove it"
    if recipe.needs_rollouts and rollout_engine(recipe) == "vllm":
        reason = why_not_vllm(config, on_cpu=not recipe.rollout.gpus_per_worker)
        if reason is not None:
            yield "rollout.engine", f"vllm cannot sample this model: {reason}: set torch"


def _in_gpus(recipe: Recipe) -> Found:
    """Of this machine. An adapter in 4 bits is named alone: other keys cannot be 0 before it is gone."""
    asking = [role for role in roles(recipe) if role.gpus]
    machine = this_machine()
    # What /dev/kfd stands for, AMD's GPUs, is not counted here: Ray will.
    if Path("/dev/kfd").exists() or sum(role.workers * role.gpus for role in asking) <= machine.gpus:
        return
    remedy = "or set RAY_ADDRESS to join a cluster that has some"
    adapter = recipe.model.adapter
    base = None if adapter is None else QUANTIZED_BASES.get(adapter.quantize)
    if adapter is not None and base is not None and base.needs_gpu and not machine.gpus:
        kind = adapter.quantize
        yield "model.adapter.quantize", f"{kind} needs a GPU, and there is none here: set quantize: none, {remedy}"
        return
    all_of_them = ", ".join(f"{role.name} {role.workers} x {role.gpus:g}" for role in asking)
    for role in asking if machine.gpus == 0 else asking[:1]:
        block = {"rewards": "reward_server", "critic": "algorithm.critic"}.get(role.name, role.name)
        if machine.gpus == 0:
            yield f"{block}.gpus_per_worker", f"asks for GPUs, and there are none here: set 0, {remedy}"
        else:
            reason = f"actors reserve more GPUs ({all_of_them}) than the {machine.gpus} that there are: lower them"
            yield f"{block}.gpus_per_worker", f"{reason}, {remedy.replace('some', 'more')}"


def _in_source(key: str, source: SourceBlock) -> Found:
    if source.stage is not None:
        return  # an earlier stage writes it
    if source.path is not None and not Path(source.path).exists():
        if not is_hub_id(source.path) and "://" not in source.path:
            yield f"{key}.path", f"there is no file {source.path}{_similar(Path(source.path))}"
    elif source.generator is not None:
        yield from _in_function(f"{key}.generator", source.generator, "generator", list(GENERATORS))


def _in_reward(key: str, reward: RewardBlock) -> Found:
    if reward.plugin is not None:
        yield from _in_function(f"{key}.plugin", reward.plugin, "reward", [])
    elif reward.name is not None and reward.name not in REWARDS:
        remedy = did_you_mean(reward.name, list(REWARDS))
        yield f"{key}.name", f"no reward is called {reward.name} ({remedy} Your own: plugin: file.py:function)"


def _in_environment(block: EnvironmentBlock) -> Found:
    if block.plugin is not None:
        yield from _in_function("environment.plugin", block.plugin, "environment", [])
    elif block.name is not None and block.name not in ADAPTERS:
        remedy = did_you_mean(block.name, list(ADAPTERS))
        yield "environment.name", f"no environment is called {block.name} ({remedy} Your own: plugin: file.py:Class)"
    for index, tool in enumerate(block.tools):
        if tool.rpartition(":")[0].endswith(".py"):
            yield from _in_function(f"environment.tools.{index}", tool, "tool", [])


def _in_reward_model(key: str, args: Mapping[str, Any], to_come: Mapping[str, Recipe]) -> Found:
    if "path" not in args or not isinstance(args["path"], str):
        yield key, "reward_model needs path, a model directory or hub id: args: {path: runs/rm/final}"
        return
    path = args["path"]
    if path in to_come:
        algorithm = to_come[path].algorithm
        if algorithm.learning.objective != "reward_model":
            yield (
                f"{key}.path",
                f"{path} will be no reward model ({algorithm.name}): name the final/ of a reward_model stage",
            )
        else:
            yield from to_come_as_model(f"{key}.path", path, to_come[path])
    elif problems := list(_in_model(f"{key}.path", path)):
        yield from problems
    elif (config := Path(path) / "config.json").exists():
        try:
            fields = json.loads(config.read_text(encoding="utf-8"))
        except ValueError:
            problem = "cannot be used, its config.json is no JSON: fetch it again"
        else:
            problem = score_head_problem(fields) or scorer_ids_problem(path, fields, args)
        if problem:
            yield f"{key}.path", f"{path} {problem}"


def _in_function(key: str, spec: str, kind: str, names: list[str]) -> Found:
    """``spec``: a name among ``names``, or ``file.py:function``."""
    file, colon, function = spec.rpartition(":")
    if not colon:
        if spec not in names:
            yield key, f"no {kind} is called {spec} ({did_you_mean(spec, names)} Your own: file.py:function)"
        return
    path = Path(file)
    if not path.is_file():
        yield key, f"there is no file {path}{_similar(path)}"
        return
    try:
        defined = list(_defined_names(ast.parse(path.read_bytes(), filename=file)))
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        yield key, f"{path}{line} is not Python: {error.msg if isinstance(error, SyntaxError) else error}"
        return
    if function not in defined and "*" not in defined:
        near = nearest(function, defined)
        remedy = f"did you mean {near}?" if near else f"it defines {', '.join(defined[:8]) or 'nothing'}"
        yield key, f"{path} has no function {function} ({remedy})"


def _defined_names(node: ast.AST) -> Iterator[str]:
    """What importing the module binds, in whichever branch; ``*`` when that cannot be told."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.alias(name=name, asname=asname):
                yield asname or name
            case _:
                yield from _defined_names(child)


def _similar(path: Path) -> str:
    if path.is_symlink():
        return f" (it is a link to {os.readlink(path)}, which is not there)"
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(path.name, siblings)
    return f" (did you mean {path.parent / near}?)" if near else ""
