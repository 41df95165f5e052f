"""What a recipe names must exist before anything starts: files, functions, models, reward names.

Nothing is loaded or executed: plugins are parsed, models are judged by their files. Of a hub id
the config and the tokenizer are looked at, where the hub can be reached.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlflow.cli.adapter_checks import in_adapter, to_come_as_model, used_as_model
from rlflow.cli.data_checks import in_sources, in_template
from rlflow.cli.id_checks import in_ids, scorer_ids_problem
from rlflow.cli.secret_checks import in_environment, in_masked
from rlflow.cli.sequence_checks import in_sequence_parallel
from rlflow.data.generated import GENERATORS
from rlflow.machine import this_machine
from rlflow.plan import roles
from rlflow.recipe import Recipe, RecipeError, RewardBlock, SourceBlock
from rlflow.recipe.adapter_files import is_adapter
from rlflow.recipe.loading import LocatedRecipe, load_located
from rlflow.recipe.local_paths import is_hub_id
from rlflow.recipe.overrides import Overrides
from rlflow.recipe.problems import did_you_mean, nearest
from rlflow.rewards import REWARDS
from rlflow.rewards.reward_model import score_head_problem

_EXPERTS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
"""One of them is in the config of every mixture of experts."""

_OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM", "Model")

Found = Iterator[tuple[str, str]]
"""(dotted key, what is wrong with its value and what to do)."""


def load_checked(path: str | Path, overrides: Overrides = (), *, alone: bool = False) -> list[Recipe]:
    """``load_recipe``, and everything that the recipe names exists.

    Args:
        alone: It will run on this machine: the GPUs that it asks for must exist as well.

    Raises:
        RecipeError: All of what is wrong.
    """
    located = load_located(path, overrides)
    check(located, alone=alone)
    return [stage.recipe for stage in located]


def check(stages: Sequence[LocatedRecipe], *, alone: bool = False) -> None:
    """Looks for every file, function and name of the stages. A model that an earlier stage will write may be missing.

    Raises:
        RecipeError: All that is not there, each with the place where it is named.
    """
    to_come: dict[str, Recipe] = {}
    problems = []
    for stage in stages:
        for key, message in _missing(stage.recipe, to_come):
            problems.append(stage.problem(key, message))
        of_this_machine = [*_in_gpus(stage.recipe), *in_environment(stage.recipe)] if alone else []
        problems += [stage.problem(key, message) for key, message in of_this_machine]
        to_come[f"{stage.recipe.run.output_dir}/final"] = stage.recipe
    if problems:
        raise RecipeError(problems)


def _missing(recipe: Recipe, to_come: Mapping[str, Recipe]) -> Found:
    """``to_come``: the directory that each earlier stage will write, and the stage."""
    models = {
        "model.path": recipe.model.path,
        "reference.path": recipe.reference.path,
        "algorithm.critic.path": recipe.algorithm.critic.path,
    }
    for key, path in models.items():
        if path is not None and path in to_come:
            yield from to_come_as_model(key, path, to_come[path])
        elif path is not None:
            yield from _in_model(key, path)
            if key != "algorithm.critic.path" and recipe.algorithm.name != "reward_model":
                yield from _in_head(key, Path(path))
    yield from in_masked(recipe)
    yield from in_adapter(recipe, to_come)
    yield from in_sequence_parallel(recipe, to_come)
    yield from in_ids(recipe, to_come)
    yield from _in_router(recipe)
    template = recipe.model.chat_template
    if template is not None and template.startswith("/") and not Path(template).is_file():
        yield "model.chat_template", f"there is no file {template}"
    train = recipe.data.train
    sources = {f"data.train.{i}": s for i, s in enumerate(train)} if isinstance(train, list) else {"data.train": train}
    if recipe.evaluation is not None:
        sources["evaluation.data"] = recipe.evaluation.data
    for key, source in sources.items():
        yield from _in_source(key, source)
    yield from in_sources(sources)
    yield from in_template(recipe)
    rewards = {f"rewards.{i}": reward for i, reward in enumerate(recipe.rewards)}
    if recipe.evaluation is not None and recipe.evaluation.reward is not None:
        rewards["evaluation.reward"] = recipe.evaluation.reward
    for key, reward in rewards.items():
        yield from _in_reward(key, reward)
        if reward.name == "reward_model":
            yield from _in_reward_model(f"{key}.args", reward.args, to_come)
    if Path(recipe.run.output_dir).is_file():
        yield "run.output_dir", f"{recipe.run.output_dir} is a file: name a directory"


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
    else:
        yield from _in_weights(key, directory)


def _in_head(key: str, directory: Path) -> Found:
    """What was saved as something else than a language model has no weights for the next token."""
    try:
        names = json.loads((directory / "config.json").read_text()).get("architectures") or [""]
    except (OSError, ValueError):
        return
    if all(name.endswith(_OTHER_HEADS) and not name.endswith("LMHeadModel") for name in names):
        yield key, f"{directory} holds a {names[0]}, not a language model: name the policy that it was made from"


def _in_weights(key: str, directory: Path) -> Found:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError):
            yield key, f"{index} cannot be read: fetch it again"
            return
        if missing := sorted(name for name in named if not (directory / name).exists()):
            yield key, f"{directory} lacks {', '.join(missing)}, which its index names: fetch it again"
    elif not list(directory.glob("*.safetensors")):
        yield key, f"{directory} has no *.safetensors: fetch the weights, or write them with save_pretrained"


def _in_router(recipe: Recipe) -> Found:
    """Of a config that is here; the trainers know of all others."""
    if not recipe.model.router.is_on:
        return
    config = recipe.model.architecture
    if config is None:
        try:
            config = json.loads((Path(recipe.model.path or "") / "config.json").read_text())
        except (OSError, ValueError):
            return
    if not str(config.get("model_type")).endswith("_moe") and not _EXPERTS & config.get("text_config", config).keys():
        yield "model.router", "is of mixtures of experts, and the model has no experts: remove it"


def _in_gpus(recipe: Recipe) -> Found:
    """Of this machine. An adapter in 4 bits is named alone: other keys cannot be 0 before it is gone."""
    asking = [role for role in roles(recipe) if role.gpus]
    # What /dev/kfd stands for, AMD's GPUs, is not counted here: Ray will.
    if not asking or this_machine().gpus or Path("/dev/kfd").exists():
        return
    remedy = "or set RAY_ADDRESS to join a cluster that has some"
    adapter = recipe.model.adapter
    if adapter is not None and adapter.quantize == "nf4":
        yield "model.adapter.quantize", f"nf4 needs a GPU, and there is none here: set quantize: none, {remedy}"
        return
    for role in asking:
        block = {"rewards": "reward_server", "critic": "algorithm.critic"}.get(role.name, role.name)
        yield f"{block}.gpus_per_worker", f"asks for GPUs, and there are none here: set 0, {remedy}"


def _in_source(key: str, source: SourceBlock) -> Found:
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


def _in_reward_model(key: str, args: Mapping[str, Any], to_come: Mapping[str, Recipe]) -> Found:
    if "path" not in args or not isinstance(args["path"], str):
        yield key, "reward_model needs path, a model directory or hub id: args: {path: runs/rm/final}"
        return
    path = args["path"]
    if path in to_come:
        algorithm = to_come[path].algorithm.name
        if algorithm != "reward_model":
            yield f"{key}.path", f"{path} will be a policy ({algorithm}): name the final/ of a reward_model stage"
        else:
            yield from to_come_as_model(f"{key}.path", path, to_come[path])
    elif problems := list(_in_model(f"{key}.path", path)):
        yield from problems
    elif (config := Path(path) / "config.json").exists():
        try:
            fields = json.loads(config.read_text())
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
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(path.name, siblings)
    return f" (did you mean {path.parent / near}?)" if near else ""
