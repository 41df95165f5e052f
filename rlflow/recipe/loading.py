"""A recipe file -> validated recipes, one a stage.

    file -- extends --> one document -- stages, overrides --> a document a stage
         -- the algorithm's defaults, absolute paths --> a validated Recipe

Every value keeps its file and line on the way, so that a problem is reported where the user can correct it.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlflow.recipe.algorithm import of_this_version, with_defaults, without_other_kinds
from rlflow.recipe.explain import validate
from rlflow.recipe.local_paths import expand, make_absolute
from rlflow.recipe.model_blocks import OF_THE_ADAPTER
from rlflow.recipe.overrides import Change, Overrides, apply, parse_overrides
from rlflow.recipe.packaged import packaged_recipe, packaged_recipes
from rlflow.recipe.presets import ALGORITHMS, Learning
from rlflow.recipe.problems import Problem, RecipeError, did_you_mean, nearest
from rlflow.recipe.sample_blocks import ROWS_FILE, name_rows, without_shared_sources
from rlflow.recipe.schema import Recipe
from rlflow.recipe.yaml_source import Document, document_of, dump, read_document

GIVEN = "recipe"
"""What problems call a recipe that is in no file."""


@dataclass(frozen=True, slots=True)
class LocatedRecipe:
    """A recipe that remembers where its values were given."""

    recipe: Recipe
    document: Document

    def problem(self, key: str, message: str) -> Problem:
        """A problem with the value at a dotted key, list indices included."""
        path = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
        return Problem.at(self.document.place(path), key, message)


RecipeSource = str | Path | Mapping[str, Any] | Recipe | Sequence[Recipe]
"""A YAML file; what such a file would say; stages that are resolved already."""


def load_recipe(source: RecipeSource, overrides: Overrides = ()) -> list[Recipe]:
    """The recipe's stages, resolved, in order; one for a recipe without ``stages``.

    Args:
        source: A YAML file, in which ``extends: other.yaml`` names a file to start from; where there is none of that
            name, a recipe that comes with rlflow; or a mapping of what such a file would say; or resolved recipes.
        overrides: ``"a.b.c=value"`` each, the value as YAML, or a mapping of such keys to values. They apply to every
            stage; ``stages.<name>.a.b.c`` applies to one. ``rewards.0.weight`` reaches into a list.

    Raises:
        RecipeError: Something is wrong: all of it, each problem with file, line and remedy; of a mapping, with its key.
    """
    return [located.recipe for located in load_located(source, overrides)]


def load_located(source: RecipeSource, overrides: Overrides = ()) -> list[LocatedRecipe]:
    """``load_recipe``, with the places of all values."""
    if isinstance(source, Recipe):
        source = source.model_dump(mode="json")
    if isinstance(source, Sequence) and not isinstance(source, str):
        return [located for stage in source for located in load_located(stage, overrides)]
    problems: list[Problem] = []
    if isinstance(source, Mapping):
        path, document = Path("run"), _with_bases(document_of(source, GIVEN), Path(GIVEN), problems, ())
    else:
        path = Path(source)
        if not path.exists() and (packaged := packaged_recipe(str(source))) is not None:
            path = packaged
        document = _read_with_bases(path, problems, ())
    return _located(path, document, overrides, problems)


def _located(path: Path, document: Document, overrides: Overrides, problems: list[Problem]) -> list[LocatedRecipe]:
    """The stages of a document that has its bases in it.

    Args:
        path: Names the directory of a run whose recipe names none.
    """
    changes = parse_overrides(overrides, problems)
    located: list[LocatedRecipe] = []
    found: dict[str | None, list[Problem]] = {}
    starts_from: dict[str, Any] = {}
    rows_of: dict[str, str | None] = {}
    for stage in _split_stages(document, changes, problems):
        of_stage = found.setdefault(stage.name, [])
        resolved = _resolve(stage, path, starts_from, of_stage)
        name_rows(resolved, resolved.data, rows_of, of_stage)
        if _leaves_policy(resolved.data):
            starts_from = _left_by(resolved.data)
        if stage.name is not None:
            rows_of[stage.name] = _rows_left_by(resolved.data)
        recipe = validate(resolved, of_stage)
        if recipe is not None:
            located.append(LocatedRecipe(recipe, resolved))
    problems += _of_stages(found)
    if problems:
        raise RecipeError(problems)
    return located


def _of_stages(found: Mapping[str | None, Sequence[Problem]]) -> Iterator[Problem]:
    """Where an override suits one stage and not another, the problem says how to set it in one."""
    for stage, problems in found.items():
        for problem in problems:
            if problem.line is not None or all(problem in of_other for of_other in found.values()):
                yield problem
            else:
                hint = f"(in stage {stage}; stages.<name>.{problem.key} is of one stage)"
                yield replace(problem, message=f"{problem.message} {hint}")


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every key; loading it gives the same recipe."""
    return dump(recipe.model_dump(mode="json"))


def _read_with_bases(path: Path, problems: list[Problem], extended_by: tuple[Path, ...]) -> Document:
    if path.is_dir():
        raise RecipeError([Problem(str(path), None, "", "is a directory: name a .yaml file")])
    if path.suffix in (".sh", ".bash"):
        convert = shlex.join(["rlflow", "convert", str(path)])
        said = f"is a shell script: `{convert}` makes recipes of ms-swift's, TRL's and verl's commands in it"
        raise RecipeError([Problem(str(path), None, "", said)])
    if not path.is_file():
        raise RecipeError([Problem(str(path), None, "", f"there is no such file{_elsewhere(path)}")])
    return _with_bases(read_document(path, problems), path, problems, extended_by)


def _with_bases(document: Document, path: Path, problems: list[Problem], extended_by: tuple[Path, ...]) -> Document:
    """The document over the files that it extends, relative to ``path``, its own."""
    document = document.cut_to(of_this_version(document.data))
    if "extends" not in document.data:
        return document
    base, place = document.data["extends"], document.places["extends",]
    if not isinstance(base, str):
        raise RecipeError([Problem.at(place, "extends", "must name one file, relative to this one")])
    try:
        base_path = path.parent / expand(base)
    except ValueError as error:
        raise RecipeError([Problem.at(place, "extends", str(error))]) from error
    chain = (*extended_by, path)
    if base_path.resolve() in [file.resolve() for file in chain]:
        names = " -> ".join(str(file) for file in (*chain, base_path))
        raise RecipeError([Problem.at(place, "extends", f"goes in a circle: {names}")])
    if not base_path.is_file():
        message = f"there is no file {base_path}{_similar_file(base_path)}"
        raise RecipeError([Problem.at(place, "extends", message)])
    return _merged(document.without("extends"), _read_with_bases(base_path, problems, chain))


def _merged(own: Document, base: Document) -> Document:
    """``own`` over ``base``, of which options go that a kind named in ``own`` does not have."""
    return without_other_kinds(own.merged_over(base), own.places.keys())


def _with_changes(document: Document, changes: Sequence[Change], problems: list[Problem]) -> Document:
    """The document with overrides; options in its files go that a kind named in an override does not have."""
    changed = apply(document, changes, problems)
    return without_other_kinds(changed, {path for path, place in changed.places.items() if place.line is None})


def _elsewhere(path: Path) -> str:
    """A file beside it that may be meant, or one that comes with rlflow."""
    if packaged_recipe(path.stem) is not None:
        return f" (one comes with rlflow: `{path.stem}` names it, `rlflow recipes {shlex.quote(path.stem)}` prints it)"
    return _similar_file(path) or _similar_recipe(path)


def _similar_file(path: Path) -> str:
    siblings = {file.stem: file for file in path.parent.glob("*.y*ml")}
    near = nearest(path.stem, siblings)
    return f" (did you mean {siblings[near]}?)" if near else ""


def _similar_recipe(path: Path) -> str:
    """One that comes with rlflow, for a name without a directory."""
    near = nearest(path.stem, packaged_recipes()) if path.parent == Path() else None
    return f" (did you mean {near}? `rlflow recipes` lists what comes with rlflow)" if near else ""


_OF_THE_START = {"path", "revision", "architecture", "characters", "expand"}


@dataclass(frozen=True, slots=True)
class _Stage:
    """What one stage was given."""

    name: str | None
    """None for a recipe without ``stages``."""
    document: Document
    own_model: bool
    """Whether it says itself which model it starts from."""


def _split_stages(document: Document, changes: Sequence[Change], problems: list[Problem]) -> list[_Stage]:
    for_all = [change for change in changes if change.path[0] != "stages"]
    for_one = [change for change in changes if change.path[0] == "stages"]
    if "stages" not in document.data:
        problems += [change.problem("the recipe has no stages: leave out stages.<name>") for change in for_one]
        return [_Stage(None, _with_changes(document, for_all, problems), own_model=True)]
    names = _stage_names(document, problems)
    for change in for_one:
        if len(change.path) < 3:
            problems.append(change.problem("does not say what to set: write stages.<name>.<key>=value"))
        elif change.path[1] not in names:
            problems.append(change.problem(f"there is no such stage ({did_you_mean(change.path[1], names)})"))
    stages = []
    shared = document.without("stages")
    for index, name in enumerate(names):
        own_changes = [
            Change(change.path[2:], change.value, change.place) for change in for_one if change.path[1:2] == (name,)
        ]
        own = _with_changes(document.below(("stages", index)).without("name"), own_changes, problems)
        own_model = bool({"path", "architecture"} & _block(own.data, "model").keys())
        common = shared.cut_to(without_shared_sources(own.data, shared.data))
        merged = _merged(own, common.without("algorithm") if _other_algorithm(own, shared) else common)
        merged.data["stage"] = name
        stages.append(_Stage(name, _with_changes(merged, for_all, problems), own_model or index == 0))
    return stages


def _stage_names(document: Document, problems: list[Problem]) -> list[str]:
    """The stages' names, in order; none when one of them is wrong."""
    entries = document.data["stages"]
    names: list[str] = []
    wrong: list[Problem] = []
    if not isinstance(entries, list) or not entries:
        message = "must be a list of stages, each `- name: ...` with the blocks that differ"
        wrong.append(Problem.at(document.places["stages",], "stages", message))
        entries = []
    for index, entry in enumerate(entries):
        name = entry["name"] if isinstance(entry, dict) and "name" in entry else None
        message = None
        if not isinstance(name, str):
            message = "needs a name, e.g. `- name: sft`"
        elif not re.fullmatch(r"[\w-]+", name):
            message = f"{name} names a directory: use letters, digits, - and _ only"
        elif name in names:
            message = f"there are two stages called {name}: rename one"
        if message is not None:
            wrong.append(Problem.at(document.place(("stages", index, "name")), f"stages.{index}.name", message))
        names.append(str(name))
    problems += wrong
    return [] if wrong else names


def _other_algorithm(own: Document, shared: Document) -> bool:
    mine, theirs = _block(own.data, "algorithm"), _block(shared.data, "algorithm")
    return "name" in mine and "name" in theirs and mine["name"] != theirs["name"]


def _block(data: dict[str, Any], name: str) -> dict[str, Any]:
    """A block as it was given, empty when it was not."""
    return data[name] if name in data and isinstance(data[name], dict) else {}


def _leaves_policy(data: dict[str, Any]) -> bool:
    """Whether the stage leaves a model that writes: neither one that scores, nor rows alone."""
    learning = _learning(data)
    return learning is None or (learning.head == "token" and learning.objective != "none")


def _rows_left_by(data: dict[str, Any]) -> str | None:
    """The file of rows that the stage leaves; None where it trains a model."""
    learning, run = _learning(data), data["run"]
    is_sampling = learning is not None and learning.objective == "none" and isinstance(run, dict)
    return f"{run['output_dir']}/{ROWS_FILE}" if is_sampling else None


def _learning(data: dict[str, Any]) -> Learning | None:
    """Of the algorithm that a stage names; None where the table has none of that name."""
    name = _block(data, "algorithm").get("name")
    return ALGORITHMS[name].learning if isinstance(name, str) and name in ALGORITHMS else None


def _left_by(data: dict[str, Any]) -> dict[str, Any]:
    """The model block's keys for going on from what a stage leaves: its model, or its adapter on the same base.

    The stage after one that leaves no policy goes on from the stage before it.
    """
    run, model = data["run"], _block(data, "model")
    if not isinstance(run, dict):
        return {}
    final = f"{run['output_dir']}/final"
    if "adapter" not in model or not isinstance(model["adapter"], dict):
        return {"path": final}
    base = {key: model[key] for key in ("path", "revision") if key in model}
    return {**base, "adapter": {"path": final}}


def _resolve(stage: _Stage, path: Path, starts_from: dict[str, Any], problems: list[Problem]) -> Document:
    """Fills in what the recipe leaves to be derived. ``starts_from``: see ``_left_by``, of the stage before."""
    data = {"run": {}, **make_absolute(stage.document, problems)}
    if isinstance(data["run"], dict):
        run = {"output_dir": os.path.abspath(f"runs/{path.stem}"), **data["run"]}
        if isinstance(run["output_dir"], str) and stage.name is not None:
            run["output_dir"] = os.path.join(run["output_dir"], stage.name)
        data["run"] = run
    algorithm = _block(data, "algorithm")
    if "name" in algorithm and algorithm["name"] in list(ALGORITHMS):
        data["algorithm"] = with_defaults(_with_correction(algorithm, _sampling_of(data)))
    if not stage.own_model and starts_from:
        model = _block(data, "model")
        kept = {key: value for key, value in model.items() if key not in _OF_THE_START}
        data["model"] = {**kept, **starts_from}
        if "adapter" in starts_from:
            own = {key: value for key, value in _block(model, "adapter").items() if key not in OF_THE_ADAPTER}
            data["model"]["adapter"] = {**own, **starts_from["adapter"]}
            if "adapter" in model and model["adapter"] is None:
                # A stage that trains all weights needs a merged model; the preflight says so.
                data["model"] |= {"path": starts_from["adapter"]["path"], "adapter": None}
    return Document(data, stage.document.places)


_WHOLE_SAMPLING = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def _sampling_of(data: dict[str, Any]) -> dict[str, Any]:
    """What a stage says of the distribution that is sampled."""
    said = {**_block(data, "rollout"), **_block(data, "sampling")}
    return {key: value for key, value in said.items() if key in _WHOLE_SAMPLING}


def _with_correction(algorithm: dict[str, Any], sampling: dict[str, Any]) -> dict[str, Any]:
    """The algorithm block, without a correction between engine and trainer where nobody asked for one and none can be.

    It needs the trainer's logprobs under the ratio, and the engine's of a distribution that was sampled whole.
    """
    correction = algorithm.get("correction", {})
    if ALGORITHMS[algorithm["name"]].objective != "policy" or not isinstance(correction, dict) or "mode" in correction:
        return algorithm
    is_cut = not sampling.items() <= _WHOLE_SAMPLING.items()
    if correction.get("old_policy") == "engine" or (is_cut and not correction.keys() - {"old_policy"}):
        return {**algorithm, "correction": {**correction, "mode": "none"}}
    return algorithm
