"""What pages show of a run, as plain JSON without NaN and half surrogate pairs: `rlflow report` embeds it, `rlflow ui`
serves it.

    run_summary(run)                        its stages: name, directory, numbers, charts, recipe, steps with rollouts
    metrics_since(stage, step)              what was logged after a step, metric by metric
    episodes(stage, step, offset, limit)    the rollouts of a step, what they were asked and what they got

``stage`` is the directory of a stage as ``run_summary`` names it. Each call reads files anew, and only reads.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from rlflow.tracking.history import HistoryError, StageHistory, read_stage, read_stages
from rlflow.tracking.lines import duration
from rlflow.tracking.panels import panels_of, phases_of, tiles_of
from rlflow.tracking.rollout_files import rollout_files
from rlflow.tracking.rollouts import RolloutFileError, RolloutRecord, num_rollouts, read_errors, read_rollouts
from rlflow.tracking.shown_pictures import ShownPictures
from rlflow.tracking.token_texts import find_tokenizer, token_texts

SHOWN_FAILURES = 10
"""So many causes for which rewards failed are shown."""
FILES_OF_FAILURES = 50
"""So many rollout files, the newest that have some, are searched for them."""
NO_LIMIT = 10**9


def run_summary(run: Path) -> dict[str, Any]:
    """A run and its stages, in the order in which they ran.

    Raises:
        HistoryError: There is no run in the directory, or it cannot be read.
    """
    return {"name": plain(run.resolve().name), "stages": [stage_summary(stage) for stage in read_stages(run)]}


def stage_summary(stage: StageHistory) -> dict[str, Any]:
    """One stage, but for its curves and its rollouts."""
    recipe, panels = stage.recipe, panels_of(stage)
    summary = {
        "name": stage.name,
        "directory": str(stage.directory),
        "algorithm": _within(recipe, "algorithm", "name"),
        "model": _within(recipe, "model", "path"),
        "last_step": int(stage.steps[-1]["step"]) if stage.steps else 0,
        "num_steps": _within(recipe, "run", "steps"),
        "is_finished": (stage.directory / "final").is_dir(),
        "began": stage.times[0] if stage.steps else None,
        "last_seen": stage.times[-1] if stage.steps else None,
        "seconds": sum(seconds for _, seconds in stage.series("time/step_s").points),
        "tiles": tiles_of(stage),
        "evaluations": stage.evaluations(),
        "panels": panels.main,
        "more_panels": panels.more,
        "unchanging": panels.unchanging,
        "phases": [asdict(phase) for phase in phases_of(stage)],
        "rollout_steps": list(rollout_files(stage.directory)),
        "recipe": recipe,
    }
    facts = [summary["algorithm"], summary["model"] or "new model", f"{summary['last_step']} steps"]
    summary["facts"] = [fact for fact in (*facts, duration(summary["seconds"])) if fact]
    return plain(summary)


def metrics_since(stage: Path, step: int = -1) -> dict[str, Any]:
    """The steps after ``step`` in order, when each was logged (seconds since 1970), and every metric over them; null
    where a step lacks it or it was no finite number.

    Raises:
        HistoryError: The directory's files cannot be read.
    """
    history = read_stage(stage)
    rows = [row for row in history.steps if row["step"] > step]
    keys = [key for key in history.keys if any(key in row for row in rows)]
    return {
        "steps": [int(row["step"]) for row in rows],
        "times": [round(row["time"], 3) if "time" in row else None for row in rows],
        "metrics": {plain(key): [_short(row[key]) if key in row else None for row in rows] for key in keys},
    }


def episodes(
    stage: Path, step: int, offset: int = 0, limit: int = NO_LIMIT, *, most_tokens: int = NO_LIMIT
) -> dict[str, Any]:
    """Rollouts of a step, in the order of their file: rows ``offset`` to ``offset + limit``.

    Args:
        most_tokens: The first episodes have tokens, as many as have no more of them together; 0 leaves all out.

    Returns:
        ``prompts``, each once, and ``episodes``, which name theirs by its index. An episode that has tokens has each
        one's text and logprob, and runs of equal versions as [version, tokens]; the version is -1, and the logprob
        null, where the policy did not write it. ``has_texts`` is false where no tokenizer was found and texts are ids.

    Raises:
        RolloutFileError: The step has no file, or it cannot be read.
        HistoryError: The directory's files cannot be read.
    """
    files = rollout_files(stage)
    if step not in files:
        known = f"it has those of steps {_spans(list(files))}" if files else "it has none"
        raise RolloutFileError(
            f"{stage}: no rollouts of step {step}; {known}. Runs keep those of every run.log_rollouts_every-th step"
        )
    path = files[step]
    records = read_rollouts(path, tokens=False, images=True, rows=slice(offset, offset + limit))
    ends = np.cumsum([record.num_tokens for record in records])
    num_with_tokens = int((ends <= most_tokens).sum()) if most_tokens else 0
    with_tokens = read_rollouts(path, rows=slice(offset, offset + num_with_tokens)) if num_with_tokens else []
    tokenizer = find_tokenizer(stage, _recipe_of(stage)) if with_tokens else None
    prompts: dict[tuple[str, int], int] = {}
    shown, listed, pictures = [], [], ShownPictures()
    for row, record in enumerate(records):
        key = (record.prompt_id, record.epoch)
        if key not in prompts:
            prompts[key] = len(prompts)
            shown.append(_prompt(record) | pictures.of(record))
        episode = {"row": offset + row, "prompt": prompts[key], **_episode(record)}
        if row < num_with_tokens:
            episode |= _tokens(with_tokens[row], token_texts(tokenizer, with_tokens[row].token_ids.tolist()))
        listed.append(episode)
    total = num_rollouts(path)
    page = {"step": step, "total": total, "offset": offset, "prompts": shown, "episodes": listed}
    return plain(page | {"has_texts": tokenizer is not None})


def failures(stage: StageHistory) -> list[tuple[str, int]]:
    """Why reward functions failed on rollouts that are on file, the most frequent cause first, and on how many."""
    with_some = {int(step) for step, value in stage.series("reward/error_fraction").points if value > 0}
    files = [path for step, path in rollout_files(stage.directory).items() if step in with_some]
    causes: Counter[str] = Counter()
    for path in files[-FILES_OF_FAILURES:]:
        try:
            causes.update(read_errors(path))
        except RolloutFileError:
            continue  # the page names damaged files by itself
    return plain(causes.most_common(SHOWN_FAILURES))


def plain(value: Any) -> Any:
    """A copy that JSON holds: what is not finite is null, half of a surrogate pair a question mark, keys are text."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode(errors="replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(one) for key, one in value.items()}
    if isinstance(value, Iterable):
        return [plain(one) for one in value]
    return plain(str(value))


def _prompt(record: RolloutRecord) -> dict[str, Any]:
    return {
        "id": record.prompt_id,
        "epoch": record.epoch,
        "text": record.prompt,
        "messages": record.messages,
        "opened": record.opened,
        "columns": record.columns,
        "inexact_columns": record.inexact_columns,
    }


def _episode(record: RolloutRecord) -> dict[str, Any]:
    return {
        "sample": record.sample_index,
        "completion": record.completion,
        "reward": _short(record.reward),
        "rewards": {name: _short(value) for name, value in record.rewards.items()},
        "error": record.error,
        "advantage": _short(record.advantage),
        "version": record.policy_version,
        "finish_reason": record.finish_reason,
        "state": record.state,
        "num_tokens": record.num_tokens,
    }


def _tokens(record: RolloutRecord, texts: Sequence[str]) -> dict[str, Any]:
    logprobs = np.where(record.is_sampled, record.logprobs, np.nan)
    versions = np.where(record.is_sampled, record.versions, -1).tolist()
    return {
        "tokens": texts,
        "logprobs": [None if math.isnan(value) else round(value, 3) for value in logprobs.tolist()],
        "versions": [[version, len(list(same))] for version, same in groupby(versions)],
    }


def _recipe_of(directory: Path) -> dict[str, Any]:
    """Empty where it cannot be read: only the tokenizer is looked for by it."""
    try:
        return read_stage(directory).recipe
    except HistoryError:
        return {}


def _within(recipe: Mapping[str, Any], block: str, key: str) -> Any:
    """A key of a recipe that another version may have written."""
    found = recipe.get(block)
    return found[key] if isinstance(found, Mapping) and key in found else None


def _short(value: float) -> float | None:
    """Six significant places: more cannot be seen, and fills pages."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _spans(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) if len(steps) <= 6 else f"{steps[0]}, {steps[1]}, ... {steps[-1]}"
