"""Whether a run goes on from its checkpoints under the recipe that is given now, and what has changed since.

    recipe.yaml   the resolved recipe that the newest steps were trained under
    inputs.json   what its names stood for then: sums of the rows, of the user's functions, of models with a manifest

What a checkpoint takes for granted cannot be changed: the algorithm, the model, the rows and their order, the kind of
optimizer. Everything else can, and is told.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlflow import checkpoint
from rlflow.data.errors import DataError
from rlflow.data.sources import Table, read_table
from rlflow.recipe import Recipe, RewardBlock
from rlflow.recipe.adapter_files import CONFIG, same_model
from rlflow.recipe.algorithm import of_this_version
from rlflow.recipe.block import Block
from rlflow.recipe.own_functions import own_functions
from rlflow.recipe.sample_blocks import ROWS_FILE
from rlflow.recipe.yaml_source import dump, dump_value, read_document
from rlflow.tracking.jsonl import read_metrics
from rlflow.tracking.redact import redact
from rlflow.tracking.rollout_files import rollout_files

RECIPE, INPUTS = "recipe.yaml", "inputs.json"

_TRAINED = ("data.train", "demonstrations.train")
"""Whose rows a resumed run must find as they were."""
_FIXED = (
    "algorithm.name",
    "model.characters",
    "data.prompts_per_step",
    "data.shuffle",
    "demonstrations.per_step",
    "trainer.optimizer.kind",
    "trainer.optimizer.plugin",
    "run.seed",
)
_BLOCKS = frozenset(
    ("algorithm", "model", "data", "rewards", "reward_server", "rollout", "trainer", "reference", "run", "tracking")
)
"""Of a resolved recipe, whichever version wrote it: a recipe that a user wrote never has all of them."""
_SAMPLED = re.compile(r"data\.train(\.\d+)?\.rows")
_DRAWN = re.compile(
    r"(model|sampling|environment|rewards)\b.*|algorithm\.group_size|rollout\.(max_new_tokens|temperature|top_p|top_k)"
)
"""What answers depend on that a stage has sampled: those of two kinds are not mixed."""
_UNTOLD = ("run.output_dir", "run.steps", "run.epochs", "stage")
_LENGTH = ("steps", "epochs", "stop_at_score")
"""Of the run block: what ends a run."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a recipe's names stand for, beside the recipe: each dotted key with a sum of what is there."""

    rows: dict[str, str]
    """``data.train``, ``evaluation.data``: of the rows, as they were read."""
    files: dict[str, str]
    """The user's functions: of the file that defines them."""
    models: dict[str, str]
    """Models that have a manifest, as every ``final/``: of that manifest."""

    @classmethod
    def of(cls, recipe: Recipe, rows: dict[str, str]) -> Inputs:
        """``rows``: what `sums_of_rows` gave."""
        files = {}
        for key, reward in rewards_of(recipe).items():
            if reward.plugin is not None:
                files[f"{key}.plugin"] = checkpoint.sha256(Path(reward.plugin.rpartition(":")[0]))
        for key, function in own_functions(recipe).items():
            files[f"{key}.plugin"] = checkpoint.sha256(Path(function.plugin.rpartition(":")[0]))
        if recipe.environment is not None:
            for key, file in recipe.environment.files.items():
                files[f"environment.{key}"] = checkpoint.sha256(Path(file))
        models = {}
        for key, path in models_of(recipe).items():
            manifest = Path(path) / checkpoint.FINAL_MANIFEST
            if manifest.is_file():
                models[key] = checkpoint.sha256(manifest)
        return cls(rows, files, models)

    def write(self, directory: Path) -> None:
        sums = {"rows": self.rows, "files": self.files, "models": self.models}
        (directory / INPUTS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Inputs | None:
        """None where there is none, or it is damaged."""
        try:
            return cls(**json.loads((directory / INPUTS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


def sums_of_rows(recipe: Recipe) -> dict[str, str]:
    """Reads all rows: the sum of those of ``data.train`` and of each evaluation.

    Raises:
        DataError: A source cannot be read.
    """
    train = recipe.data.train if isinstance(recipe.data.train, list) else [recipe.data.train]
    sums = {"data.train": sum_of_rows([read_table(source) for source in train])}
    if recipe.demonstrations is not None:
        shown = recipe.demonstrations.train
        shown = shown if isinstance(shown, list) else [shown]
        sums["demonstrations.train"] = sum_of_rows([read_table(source) for source in shown])
    for key, block in recipe.evaluations.items():
        sums[f"{key}.data"] = sum_of_rows([read_table(block.data)])
    return sums


def rewards_of(recipe: Recipe) -> dict[str, RewardBlock]:
    """Every function that scores, by dotted key."""
    rewards = {f"rewards.{index}": reward for index, reward in enumerate(recipe.rewards)}
    for key, block in recipe.evaluations.items():
        if block.reward is not None:
            rewards[f"{key}.reward"] = block.reward
    return rewards


def models_of(recipe: Recipe) -> dict[str, str]:
    """Every model and adapter that the recipe names and a stage loads, by dotted key."""
    adapter = recipe.model.adapter
    named = {
        "model.path": recipe.model.path,
        "model.adapter.path": None if adapter is None else adapter.path,
        "reference.path": recipe.reference.path if recipe.needs_reference else None,
        "reference.adapter": recipe.reference.adapter if recipe.needs_reference else None,
        "algorithm.critic.path": None if recipe.critic is None else recipe.critic.path,
        "teacher.path": recipe.teacher.path if recipe.needs_teacher else None,
    }
    for key, reward in rewards_of(recipe).items():
        if reward.name == "reward_model" and "path" in reward.args:
            named[f"{key}.args.path"] = str(reward.args["path"])
    return {key: path for key, path in named.items() if path is not None}


def sum_of_rows(tables: Sequence[Table]) -> str:
    """SHA-256 of all rows, their order included; where they lie and what they are called does not count."""
    total = hashlib.sha256()
    for table in tables:
        for row in table.rows:
            try:
                text = json.dumps(row.columns, ensure_ascii=False, default=repr)
            except (TypeError, ValueError, RecursionError) as error:
                raise DataError(f"{table.place}, row {row.number}: cannot be written as JSON: {error}") from error
            total.update(text.encode(errors="surrogatepass") + b"\n")
    return total.hexdigest()


def write_recipe(recipe: Recipe, inputs: Inputs, directory: Path) -> None:
    """The resolved recipe, and what its names stand for, beside what it made.

    It is without its secrets: who resumes the run gives them again.
    """
    inputs.write(directory)
    (directory / RECIPE).write_text(dump(redact(recipe.model_dump(mode="json"))), encoding="utf-8")


def read_recipe(directory: Path) -> dict[str, Any] | None:
    """The resolved recipe in a run's directory; None when there is none: this is no run's directory."""
    try:
        data = read_document(directory / RECIPE, []).data
    except (OSError, ValueError):
        return None
    return of_this_version(data) if data.keys() >= _BLOCKS else None


def trained_steps(directory: Path) -> int:
    """The last step that the directory knows of, saved or not; 0 when nothing was trained there."""
    steps = checkpoint.saved_steps(directory / "checkpoints")
    if (metrics := directory / "metrics.jsonl").exists():
        steps += [int(row["step"]) for row in read_metrics(metrics)]
    rollouts = (path.stem.removeprefix("step_") for path in (directory / "rollouts").glob("step_*.parquet"))
    steps += [int(number) for number in rollouts if number.isdecimal()]
    return max(steps, default=0)


def whole_steps(directory: Path) -> int:
    """The steps that a stage which samples has drawn, without a gap from the first."""
    steps = rollout_files(directory)
    return next(step for step in itertools.count(1) if step not in steps) - 1


def kept_steps(recipe: Recipe) -> int:
    """The step that a run of the recipe goes on from; 0 where it begins anew."""
    directory = Path(recipe.run.output_dir)
    saved = checkpoint.saved_steps(directory / "checkpoints")
    return max(saved, default=0) if recipe.trains else whole_steps(directory)


def length_of(recipe: Recipe) -> dict[str, Any]:
    """What ends the run: a run that ended so goes on when it may last longer."""
    return {key: getattr(recipe.run, key) for key in _LENGTH}


def lasts_longer(before: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether the recipe asks for more than a run that ended after ``before``, a `length_of`."""
    now = length_of(recipe)
    for key in ("steps", "epochs"):
        if now[key] != before[key] and (now[key] is None or before[key] is None or now[key] > before[key]):
            return True
    bar = before["stop_at_score"]
    return bar is not None and (now["stop_at_score"] is None or now["stop_at_score"] > bar)


def is_finished(recipe: Recipe) -> bool:
    """Whether the stage has left its final model or adapter, and the recipe asks for no more steps than it had."""
    final = Path(recipe.run.output_dir) / "final"
    written = final / ("config.json" if recipe.model.adapter is None else CONFIG)
    if not (written if recipe.trains else Path(recipe.run.output_dir) / ROWS_FILE).exists():
        return False
    try:
        before = checkpoint.read_manifest(final, checkpoint.FINAL_MANIFEST)["length"]
        return not lasts_longer(before, recipe)
    except (checkpoint.CheckpointError, KeyError, TypeError):
        return True


def sum_of_measure(recipe: Recipe, inputs: Inputs) -> str:
    """What the held-out score, the first evaluation's, is of: scores of another measure cannot be compared with it."""
    reward = recipe.evaluation_reward
    key, block = next(iter(recipe.evaluations.items()), ("evaluation", None))
    # Keys that blocks had not always count where they are given.
    later = {name for name in ("top_p", "top_k", "min_p") if block is not None and getattr(block, name) is None}
    parts: list[Any] = [
        None if block is None else block.model_dump(mode="json", exclude={"every", "data", *later}),
        None if reward is None else reward.model_dump(mode="json", exclude={"weight", "timeout_s", "prompts_per_call"}),
        inputs.rows.get(f"{key}.data"),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def check_resumable(recipes: Sequence[Recipe]) -> None:
    """What can be told of ``--resume`` before anything starts.

    Raises:
        DataError: There is nothing left to go on from, or the steps that are asked for are behind it.
    """
    goes_on: Recipe | None = None
    for recipe in recipes:
        directory = Path(recipe.run.output_dir)
        trained, saved = trained_steps(directory), checkpoint.saved_steps(directory / "checkpoints")
        if goes_on is not None and trained:
            raise DataError(
                f"{directory} was trained from what stage {goes_on.stage} had left before, which now goes on: set its "
                "steps back, or choose another run.output_dir"
            )
        if recipe.run.steps is not None and saved and recipe.run.steps < saved[-1]:
            more = saved[-1] + recipe.run.steps
            raise DataError(
                f"{directory} has trained {saved[-1]} steps and run.steps is {recipe.run.steps}, which counts from the "
                f"first: run.steps={more} trains {recipe.run.steps} more"
            )
        if is_finished(recipe):
            continue
        if trained and not saved and recipe.trains:
            raise DataError(
                f"{directory}: {trained} steps were trained and no checkpoint is left of them. Without --resume the "
                "run starts anew and this directory moves aside; run.save_every and run.save_every_minutes say when "
                "checkpoints are written"
            )
        if (directory / "final").exists():
            goes_on = recipe


def changes_since(recipe: Recipe, inputs: Inputs, directory: Path) -> list[str]:
    """What is another now than when the newest steps were trained, each for people to read.

    Raises:
        DataError: Something that the checkpoints take for granted: what, and what to do.
    """
    stored = read_recipe(directory)
    if stored is None or not kept_steps(recipe):
        return []
    changes = dict(_changes(recipe, stored, ""))
    starts_anew = recipe.model.adapter is not None or (recipe.needs_reference and recipe.reference.path is None)
    refused = {key: text for key, text in changes.items() if key in _FIXED or _SAMPLED.fullmatch(key)}
    if not recipe.trains:
        refused |= {key: text for key, text in changes.items() if _DRAWN.fullmatch(key)}
    if starts_anew and "model.path" in changes and not _is_same_model(recipe, stored):
        refused["model.path"] = changes["model.path"]
    before = Inputs.read(directory)
    if before is not None:
        rows = _other_sums(before.rows, inputs.rows)
        refused |= {key: "has other rows" for key in rows if key in _TRAINED}
        changes |= {key: "has other rows" for key in rows if key not in _TRAINED}
        changes |= dict.fromkeys(_other_sums(before.files, inputs.files), "has another content")
        models = dict.fromkeys(_other_sums(before.models, inputs.models), "is another model")
        refused |= {key: text for key, text in models.items() if key == "model.path" and starts_anew}
        changes |= models
    if refused:
        listed = "".join(f"\n  {key} {text}" for key, text in refused.items())
        raise DataError(
            f"{directory} has checkpoints that this recipe cannot go on from:{listed}\nSet it back, or start another "
            f"run from the weights: another run.output_dir, and the run's final/ as model.path"
        )
    return [f"{key} {text}" for key, text in changes.items() if key not in _UNTOLD]


def _is_same_model(recipe: Recipe, stored: Mapping[str, Any]) -> bool:
    """Whether the reference is still what it was, as far as names tell: the model that the run started from."""
    before, now = stored["model"]["path"], recipe.model.path
    return bool(before and now and same_model(before, now))


def _other_sums(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [key for key, total in now.items() if before.get(key, total) != total]


def _changes(now: Block, stored: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """Dotted key, and "was ..., is ..." of every value that is another. Keys that another version had are left out."""
    # Secrets are not written down, and not to be shown.
    written, stored = redact(now.model_dump(mode="json")), redact(stored)
    for name in type(now).model_fields:
        if name not in stored:
            continue
        value, before, key = getattr(now, name), stored[name], f"{prefix}{name}"
        if isinstance(value, Block) and isinstance(before, dict):
            yield from _changes(value, before, f"{key}.")
        elif isinstance(value, list) and isinstance(before, list) and len(before) == len(value) and _are_blocks(value):
            for index, (block, of_before) in enumerate(zip(value, before, strict=True)):
                yield from _changes(block, of_before, f"{key}.{index}.")
        else:
            yield from _changed_values(key, before, written[name])


def _changed_values(key: str, before: Any, now: Any) -> Iterator[tuple[str, str]]:
    """Of mappings that are the user's own, such as arguments: key by key."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            yield from _changed_values(f"{key}.{name}", before.get(name), now.get(name))
    elif before != now:
        was, is_now = (json.dumps(v) if isinstance(v, dict | list) else dump_value(v) for v in (before, now))
        yield key, f"was {was}, is {is_now}"


def _are_blocks(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(item, Block) for item in values)
