"""From recipes to finished runs: what must exist before the first step, in the order that starts it soonest.

    read the rows -> start Ray -> place actors (a thread) --> wait until ready -> the loop -> export
                  -> tokenise (this thread) -------------------^

Rows are read before anything starts, so that bad data costs nothing. Ray starts and actors load their models while
prompts are being tokenised; nothing here imports torch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import ray

from rlflow.actors.actor_group import ActorFailure
from rlflow.actors.trainer import Trainer
from rlflow.checkpoint import saved_steps
from rlflow.data.class_labels import with_labels
from rlflow.data.errors import DataError
from rlflow.data.template_date import pin_template_dates
from rlflow.data.tokenizer import load_tokenizer
from rlflow.driver.book import Book
from rlflow.driver.callbacks import CallbackLike, Callbacks, make_callback
from rlflow.driver.clock import Clock
from rlflow.driver.directory import directory_problem, prepare_directory, prepare_model, verify_models
from rlflow.driver.errors import GO_ON, RunError, StoppedUnsaved, StopRequested
from rlflow.driver.failures import ActorsLost, finding_the_lost, saving_what_failed
from rlflow.driver.final import write_final
from rlflow.driver.learner import Learner
from rlflow.driver.material import load_material, max_model_len, num_steps, tell_of_rows
from rlflow.driver.offline import train_offline
from rlflow.driver.online import train_online
from rlflow.driver.outcome import forget_outcome, recording_outcome, write_outcome
from rlflow.driver.prepared_adapter import prepare_adapter
from rlflow.driver.prepared_stage import PreparedStage
from rlflow.driver.references import check_sources
from rlflow.driver.resuming import (
    Inputs,
    changes_since,
    check_resumable,
    is_finished,
    sums_of_rows,
    trained_steps,
)
from rlflow.driver.run_lock import RunLock
from rlflow.driver.sample import sample_stage
from rlflow.driver.stopping import StopSignals, notice_of, stopped
from rlflow.driver.window import Window
from rlflow.placement import Actors, place, start_ray
from rlflow.plugins import load_plugin
from rlflow.recipe import ModelBlock, Recipe
from rlflow.tracking import make_tracker, missing_packages
from rlflow.tracking.redact import remember_secrets
from rlflow.tracking.report import ReportError, write_report
from rlflow.tracking.tracker import StderrMessages, Tracker

_STOP_S = 10.0
"""How long a run that is asked to stop waits for actors that are being placed."""


def run_recipes(
    recipes: Sequence[Recipe],
    *,
    resume: bool = False,
    seconds_before: float = 0.0,
    process_ends: bool = False,
    callbacks: Sequence[CallbackLike] = (),
) -> None:
    """Runs the stages in order; with ``resume``, from where they stopped.

    Args:
        callbacks: Called in every stage, beside the recipes' own.
        seconds_before: That had passed since the user's command, for the account of the time to the first step.
        process_ends: This is all that the process does: once it was asked to stop, signals are ignored to its end.

    Raises:
        DataError: The data is wrong, or the directory, or the checkpoints are of another recipe; nothing was started.
        StopRequested: SIGTERM or SIGINT came and there is a checkpoint.
        StoppedUnsaved: SIGTERM or SIGINT came before anything was saved.
        RunError, ActorFailure: The run failed; the message says where.
    """
    begun = time.perf_counter() - seconds_before
    load_plugin.cache_clear()
    Callbacks(callbacks)  # what is none is refused before anything starts
    remember_secrets([recipe.model_dump(mode="json") for recipe in recipes])
    for recipe in recipes:
        if problem := directory_problem(Path(recipe.run.output_dir), resume=resume):
            raise DataError(f"run.output_dir: {problem}")
    recipes = [with_labels(recipe) for recipe in pin_template_dates(recipes, resume=resume)]
    for recipe in recipes:
        if not recipe.waits_for_rows:
            check_sources(recipe)
        for key, problem in missing_packages(recipe):
            raise DataError(f"{key}: {problem}")
    stop = StopSignals()
    stop.install()
    try:
        sums = [{} if recipe.waits_for_rows else sums_of_rows(recipe) for recipe in recipes]
        with ExitStack() as held:
            for recipe in recipes:
                lock = RunLock(Path(recipe.run.output_dir))
                lock.take()
                held.callback(lock.release)
            if resume:
                check_resumable(recipes)
            _run_stages(recipes, sums, stop, begun, callbacks, resume=resume)
    except KeyboardInterrupt:
        raise stopped(recipes) from None
    finally:
        stop.restore(process_ends=process_ends)


def _run_stages(
    recipes: Sequence[Recipe],
    sums: Sequence[dict[str, str]],
    stop: StopSignals,
    begun: float,
    callbacks: Sequence[CallbackLike],
    *,
    resume: bool,
) -> None:
    """Starts Ray, runs what is not finished, ends Ray."""
    with ThreadPoolExecutor(1, thread_name_prefix="start-ray") as starter:
        ray_started = starter.submit(start_ray, recipes)
        try:
            for recipe, sums_of_recipe in zip(recipes, sums, strict=True):
                if recipe.waits_for_rows:
                    check_sources(recipe)
                    sums_of_recipe = sums_of_rows(recipe)
                inputs = Inputs.of(recipe, sums_of_recipe)
                if resume and is_finished(recipe):
                    tell_of_finished(recipe, inputs)
                    write_outcome(Path(recipe.run.output_dir), "finished")
                    continue
                clock = Clock(before=time.perf_counter() - begun if recipe is recipes[0] else 0.0)
                of_stage = Callbacks([*callbacks, *map(make_callback, recipe.callbacks)])
                with of_stage.telling_the_end(recipe):
                    run_to_its_end(recipe, inputs, ray_started, stop, clock, of_stage, resume=resume)
                if stop.asked() and recipe is not recipes[-1]:
                    raise StopRequested(f"stopped after stage {recipe.stage}; {GO_ON}")
        finally:
            stop.end()
            failed = ray_started.exception(timeout=recipes[0].run.startup_timeout_s)
            if failed is None and ray_started.result(timeout=0):
                stop.kept_while(ray.shutdown)


def tell_of_finished(recipe: Recipe, inputs: Inputs) -> None:
    """Says what the recipe has changed of a stage that has ended.

    Raises:
        DataError: It is another run's.
    """
    directory = Path(recipe.run.output_dir)
    for change in changes_since(recipe, inputs, directory):
        StderrMessages().message(f"{directory} is finished: it is left as it is, although {change}")


def run_to_its_end(
    recipe: Recipe,
    inputs: Inputs,
    ray_started: Future[bool],
    stop: StopSignals,
    clock: Clock,
    callbacks: Callbacks,
    *,
    resume: bool,
) -> None:
    """One stage, which goes on from its newest checkpoint when it has lost an actor, a bounded number of times.

    Raises:
        ActorsLost: It did so too often, or has no checkpoint.
    """
    losses: list[str] = []
    while True:
        try:
            run_stage(recipe, inputs, ray_started, stop, clock, callbacks, resume=resume, losses=losses)
            return
        except ActorsLost as lost:
            has_checkpoint = bool(saved_steps(Path(recipe.run.output_dir) / "checkpoints"))
            if stop.asked() or not has_checkpoint or len(losses) == recipe.run.max_restarts:
                raise
            losses.append(str(lost))
            forget_outcome(Path(recipe.run.output_dir))
            resume, clock = True, Clock()


def run_stage(
    recipe: Recipe,
    inputs: Inputs,
    ray_started: Future[bool],
    stop: StopSignals,
    clock: Clock,
    callbacks: Callbacks,
    *,
    resume: bool,
    losses: Sequence[str] = (),
) -> None:
    """One stage, from its directory to its ``final/``.

    Args:
        losses: Why it was left before, each time, since this process began.
    """
    verify_models(recipe)
    directory = prepare_directory(recipe, inputs, resume=resume)
    is_placed = False
    try:
        model = prepare_adapter(recipe, prepare_model(recipe, directory.path), directory.path)
        with _placing(recipe, model, directory.path, ray_started, stop) as placing:
            with clock("startup_tokenizer"):
                tokenizer = load_tokenizer(model)
            with clock("startup_data"):
                material = load_material(recipe, model, tokenizer)
            with clock("startup_ray"):
                actors = placing.result(timeout=recipe.run.startup_timeout_s)
                stop.install()
            is_placed = True
            tracker = make_tracker(recipe, directory.path, total_steps=num_steps(recipe, len(material.rows)))
            clock.tell = lambda phase: tracker.progress(phase.removeprefix("startup_"), 0, 0)
            with closing(tracker), recording_outcome(directory.path):
                if losses:
                    times = f"restart {len(losses)} of {recipe.run.max_restarts}"
                    tracker.message(f"the stage goes on with fresh actors ({times}): {losses[-1]}")
                tell_of_rows(tracker, directory.notes, material)
                stage = PreparedStage(
                    recipe,
                    inputs,
                    directory.path,
                    material,
                    actors,
                    tracker,
                    clock,
                    stop,
                    callbacks,
                    resume=resume,
                    num_restarts=len(losses),
                )
                with _leaving_a_report(recipe, directory.path, tracker):
                    work = train_stage if recipe.trains else sample_stage
                    work(stage)
                tracker.finish({})
    except (DataError, RunError, KeyboardInterrupt) as error:
        if not is_placed or (isinstance(error, KeyboardInterrupt) and not trained_steps(directory.path)):
            directory.discard()
        raise


@contextmanager
def _leaving_a_report(recipe: Recipe, directory: Path, tracker: Tracker) -> Iterator[None]:
    """Writes the run's page, also of one that fails within behind its first step; what is trained is not lost where
    that cannot be."""
    try:
        yield
    except (StopRequested, StoppedUnsaved):
        raise
    except (RunError, ActorFailure):
        if trained_steps(directory):
            _write_report(recipe, directory, tracker, "what there is of the run is kept")
        raise
    _write_report(recipe, directory, tracker, "the run is whole")


def _write_report(recipe: Recipe, directory: Path, tracker: Tracker, otherwise: str) -> None:
    if "jsonl" not in recipe.tracking:
        return
    try:
        write_report(directory)
    except ReportError as error:
        tracker.message(f"{otherwise}, but for its report: {error}")


@contextmanager
def _placing(
    recipe: Recipe, model: ModelBlock, directory: Path, ray_started: Future[bool], stop: StopSignals
) -> Iterator[Future[Actors]]:
    """Places the actors in a thread as soon as Ray is up; ends them on the way out."""
    placing: Future[Actors] = Future()

    def place_when_ready() -> None:
        try:
            ray_started.result(timeout=recipe.run.startup_timeout_s)
            placing.set_result(place(recipe, model, directory, max_model_len(recipe)))
        except BaseException as error:
            placing.set_exception(error)
        # What a thread has started may be bound to its life, as the children of a reward server are.
        is_over.wait()

    is_over = threading.Event()
    # A daemon: a process that is asked to stop does not wait for a cluster that has no room.
    threading.Thread(target=place_when_ready, name="place", daemon=True).start()
    try:
        yield placing
    finally:
        wait_s = _STOP_S if stop.asked() else 2 * recipe.run.startup_timeout_s
        done, _ = wait([placing], timeout=wait_s)
        # Actors that are not placed by then end with Ray, or with this process's job.
        if done and placing.exception(timeout=0) is None:
            placing.result(timeout=0).close()
        is_over.set()


def train_stage(stage: PreparedStage) -> None:
    """Waits for the actors, runs the loop, writes what it leaves."""
    recipe, material, actors, clock = stage.recipe, stage.material, stage.actors, stage.clock
    steps = num_steps(recipe, len(material.rows))
    assert actors.trainer is not None
    with clock("startup_actors"):
        stage.wait_ready()
        trainer = actors.trainer
        attention_cost = trainer.get(0, Trainer.attention_cost, trainer.start(0, Trainer.attention_cost))
    learner = Learner(
        recipe,
        clock,
        steps,
        trainer=trainer,
        critic=actors.critic,
        reference=actors.reference,
        teacher=actors.teacher,
        attention_cost=attention_cost,
    )
    learner.give_teacher_head()
    with stage.pool() as pool:
        if pool is not None:
            pool.supply.again = learner.weights_again
        book = Book(stage, learner, stage.evaluators(learner, pool))
        stage.callbacks.run_starts(recipe)
        with stage.stop.finishing_steps(lambda: notice_of(book.step, book.checkpoints, clock)):
            with saving_what_failed(book), finding_the_lost(actors):
                if recipe.family == "online":
                    assert pool is not None
                    window = Window(pool, recipe, material.rows, stage.params, steps, stage.tracker, material.answers)
                    demonstrations = material.demonstrations
                    train_online(
                        recipe, learner, book, window, steps, resume=stage.resume, demonstrations=demonstrations
                    )
                else:
                    train_offline(recipe, learner, book, pool, material.rows, steps, resume=stage.resume)
            book.require_trained()
            with clock("export"):
                write_final(stage.directory, recipe, learner, material.tokenizer, material.model)
