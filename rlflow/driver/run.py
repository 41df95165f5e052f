"""From recipes to finished runs: what must exist before the first step, in the order that starts it soonest.

    check recipe -> start Ray (a thread) ----------------> place actors -> wait until ready -> the loop -> export
                 -> tokenizer, data (this thread) --------^

Actors load their models while the data is still being read; nothing here imports torch.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rlflow.data.examples import load_examples
from rlflow.data.prompts import load_prompts
from rlflow.data.tokenizer import load_tokenizer
from rlflow.driver.directory import finished, prepare_directory, prepare_model
from rlflow.driver.evaluation import Evaluator
from rlflow.driver.offline import train_offline
from rlflow.driver.online import train_online
from rlflow.driver.stage import Stage
from rlflow.placement import place, start_ray
from rlflow.recipe import Recipe
from rlflow.tracking import make_tracker


def run_recipes(recipes: Sequence[Recipe], *, resume: bool = False) -> None:
    """Runs the stages in order; with ``resume``, from where they stopped.

    Raises:
        RecipeError, DataError: Something that the user gave is wrong; nothing was started.
        StopRequested: SIGTERM or SIGINT came and a checkpoint was written.
        RunError, ActorFailure: The run failed; the message says where.
    """
    with stop_signals() as should_stop, ThreadPoolExecutor(1, thread_name_prefix="start-ray") as starter:
        ray_started = starter.submit(start_ray, recipes)
        for recipe in recipes:
            if resume and finished(Path(recipe.run.output_dir)):
                continue
            run_stage(recipe, ray_started, should_stop, resume=resume)


def run_stage(recipe: Recipe, ray_started: Future[None], should_stop, *, resume: bool) -> None:
    """One stage, from its directory to its ``final/``."""
    startup = Startup()
    directory = prepare_directory(recipe, resume=resume)
    model = prepare_model(recipe, directory)
    tokenizer = load_tokenizer(model)
    load_train = load_prompts if recipe.family == "online" else load_examples
    ray_started.result(timeout=recipe.run.startup_timeout_s)
    startup.mark("ray and tokenizer")
    actors = place(recipe, model, directory, _max_model_len(recipe))
    try:
        rows = load_train(recipe.data, tokenizer, recipe.run.seed)
        held_out = _held_out(recipe, tokenizer)
        startup.mark("data")
        tracker = make_tracker(recipe, directory, resumed_at=0)
        stage = Stage(recipe, directory, model, tokenizer, actors, tracker, should_stop)
        if recipe.evaluation:
            stage.evaluator = Evaluator(stage, recipe.evaluation, held_out)
        actors.wait_ready(recipe.run.startup_timeout_s)
        startup.mark("actors")
        tracker.message(startup.text())
        train = train_online if recipe.family == "online" else train_offline
        train(stage, rows, num_steps(recipe, len(rows)), resume=resume)
        stage.export()
        tracker.finish({})
    finally:
        actors.close()


def num_steps(recipe: Recipe, num_rows: int) -> int:
    """Optimizer steps: as the recipe says, or its epochs over the data."""
    if recipe.run.steps is not None:
        return recipe.run.steps
    assert recipe.run.epochs is not None
    return max(1, math.ceil(recipe.run.epochs * num_rows / recipe.data.prompts_per_step))
