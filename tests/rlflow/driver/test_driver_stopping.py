"""How runs end that are stopped or fail, and what they leave: in this process, with real signals."""

from __future__ import annotations

import ctypes
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_runs import NEW_MODEL, RunRecipe, same_weights, steps_of
from safetensors.numpy import load_file

from rlflow.actors.actor_group import ActorFailure
from rlflow.actors.rollout_worker import RolloutWorker
from rlflow.actors.train_engines import sharded_state
from rlflow.actors.trainer import Trainer, UpdateStats
from rlflow.checkpoint import saved_steps
from rlflow.driver.book import Book
from rlflow.driver.errors import RunError, StoppedUnsaved, StopRequested
from rlflow.driver.learner import Learner
from rlflow.driver.outcome import read_outcome
from rlflow.driver.saving import SaveSchedule
from rlflow.driver.stopping import StopSignals
from rlflow.recipe import RunBlock
from rlflow.tracking.rollouts import read_rollouts

PLUGIN = """
import pathlib
def score(completions, **columns):
    if pathlib.Path(__file__).with_name("broken").exists():
        raise ValueError("out of order")
    return [float(len(text)) for text in completions]
"""
SFT = {
    "algorithm": {"name": "sft"},
    "data": {"train": {"generator": "arithmetic", "args": {"digits": 1}}, "prompts_per_step": 4, "max_tokens": 32},
}
GRPO = {
    "algorithm": {"name": "grpo", "group_size": 2},
    "data": {
        "train": {"generator": "arithmetic", "args": {"digits": 1}},
        "prompts_per_step": 2,
        "max_prompt_tokens": 8,
    },
    "rollout": {"engine": "torch", "max_new_tokens": 3},
}

Run = Callable[..., Path]


@pytest.fixture
def run(run_recipe: RunRecipe, tmp_path: Path) -> Run:
    """Runs ``blocks`` into ``tmp_path / name``; four steps, and a checkpoint only where the run decides so."""
    plugin = tmp_path / "reward.py"
    plugin.write_text(PLUGIN)

    def make(name: str, blocks: dict[str, Any], resume: bool = False, **run_block: Any) -> Path:
        recipe = {"model": NEW_MODEL, "trainer": {"learning_rate": 1e-2}, "run": {"steps": 4, **run_block}, **blocks}
        if recipe.get("algorithm", {}).get("name") == "grpo":
            recipe["rewards"] = [{"plugin": f"{plugin}:score"}]
        return run_recipe(recipe, name, resume=resume)

    return make


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``calls(cls, method, at, act)``: the call number ``at`` of a method, from 1, does ``act(original)`` instead."""

    def replace(owner: Any, method: str, at: int, act: Callable[[Callable[[], Any]], Any]) -> None:
        original, count = getattr(owner, method), 0

        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            do = lambda: original(*args, **kwargs)  # noqa: E731
            return act(do) if count == at else do()

        monkeypatch.setattr(owner, method, call)

    return replace


def signalled(number: int) -> Callable[[Callable[[], Any]], Any]:
    """A call during which the process gets a signal."""

    def act(do: Callable[[], Any]) -> Any:
        os.kill(os.getpid(), number)
        return do()

    return act


def failing(error: Exception) -> Callable[[Callable[[], Any]], Any]:
    def act(do: Callable[[], Any]) -> Any:
        raise error

    return act


@pytest.fixture
def press() -> Iterator[tuple[StopSignals, Callable[[int, float], bool], list[str]]]:
    """Signals, a way to send one at a time of one's own (returns whether it interrupted), and what is waited for."""
    stop, waits_for, clock = StopSignals(), ["step 7"], [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlflow.driver.stopping.time.monotonic", lambda: clock[0])
        stop.install()

        def send(number: int, at: float) -> bool:
            clock[0] = at
            try:
                signal.raise_signal(number)
            except KeyboardInterrupt:
                return True
            return False

        yield stop, send, waits_for
        stop.restore()


def test_in_a_step_the_first_signal_waits_and_says_for_what(press, capsys):
    stop, send, waits_for = press
    with stop.finishing_steps(lambda: waits_for[0]):
        assert not send(signal.SIGTERM, 10.0)
        assert stop.asked() and capsys.readouterr().err == "rlflow: step 7\n"
        assert not send(signal.SIGTERM, 20.0) and capsys.readouterr().err == ""


def test_a_second_ctrl_c_interrupts_and_two_of_one_press_do_not(press):
    stop, send, waits_for = press
    with stop.finishing_steps(lambda: waits_for[0]):
        assert not send(signal.SIGINT, 10.0)
        assert not send(signal.SIGINT, 10.2)
        assert send(signal.SIGINT, 12.0)
        assert not send(signal.SIGINT, 14.0), "what is ending is not interrupted once more"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_the_first_step_a_signal_interrupts_at_once(press, number: int):
    stop, send, waits_for = press
    waits_for[0] = ""
    with stop.finishing_steps(lambda: waits_for[0]):
        assert send(number, 10.0)
    assert stop.asked()


def test_a_process_that_ends_ignores_signals_once_it_was_asked_to_stop(press):
    stop, send, _ = press
    before = signal.getsignal(signal.SIGTERM)
    assert send(signal.SIGTERM, 1.0)
    stop.restore(process_ends=True)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    stop.restore()
    assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, before)


def test_after_a_run_signals_do_what_they_did_before(run: Run):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run("done", SFT, steps=1)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_handlers_that_a_library_resets_at_its_end_are_put_back(press):
    stop, send, waits_for = press
    c_library, default = ctypes.CDLL(None), ctypes.c_void_p(0)
    c_library.signal.restype, c_library.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    found: list[bool] = []

    def work() -> None:
        c_library.signal(signal.SIGTERM, default)
        for _ in range(1000):
            # The call returns the handler that it replaces.
            handler = c_library.signal(signal.SIGTERM, default)
            if handler:
                c_library.signal(signal.SIGTERM, handler)
                found.append(True)
                return
            time.sleep(0.01)

    stop.kept_while(work)
    assert found == [True]
    with stop.finishing_steps(lambda: waits_for[0]):
        assert not send(signal.SIGTERM, 1.0) and stop.asked()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "blocks"), [("sft", SFT), ("grpo", GRPO)])
def test_a_run_stopped_in_a_step_goes_on_to_the_same_weights(run: Run, calls, capsys, name: str, blocks: dict):
    whole = run("whole", blocks)
    with pytest.raises(StopRequested, match="stopped after step 2; go on with --resume"):
        calls(Trainer, "forward_backward", 2, signalled(signal.SIGTERM))
        run(name, blocks)
    said = capsys.readouterr().err
    owed = r"( \(trainer\[0\]: forward_backward\))?"
    assert re.search(rf"after step 2, waiting for train{owed}; Ctrl-C again stops at once, and nothing is saved", said)
    assert saved_steps(whole.with_name(name) / "checkpoints") == [2]
    ended = [read_outcome(directory) for directory in (whole, whole.with_name(name))]
    assert [outcome and outcome.ending for outcome in ended] == ["finished", "stopped"]
    resumed = run(name, blocks, resume=True)
    assert same_weights(whole, resumed) and steps_of(resumed) == [0, 1, 2, 3, 4]


def test_a_stop_in_the_last_step_lets_the_run_end(run: Run, calls):
    calls(Trainer, "forward_backward", 4, signalled(signal.SIGTERM))
    assert (run("run", SFT) / "final" / "config.json").exists()


def test_a_stop_in_the_last_step_of_a_stage_does_not_start_the_next(run: Run, calls):
    stages = {"stages": [{"name": "one", **SFT}, {"name": "two", **SFT}]}
    with pytest.raises(StopRequested, match="stopped after stage one"):
        calls(Trainer, "forward_backward", 4, signalled(signal.SIGINT))
        run("run", stages)
    directory = run("run", stages, resume=True)
    assert steps_of(directory / "one") == steps_of(directory / "two") == [0, 1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_while_it_starts_leaves_what_was_there(run: Run, calls, number: int):
    earlier = run("run", SFT)
    before = {path: path.stat().st_mtime_ns for path in earlier.rglob("*")}
    calls(Trainer, "attention_cost", 1, signalled(number))
    with pytest.raises(StopRequested, match="checkpoint of step 4"):
        run("run", SFT)
    assert {path: path.stat().st_mtime_ns for path in earlier.rglob("*")}.keys() == before.keys()
    assert not earlier.with_name("run.1").exists()


def test_a_new_run_stopped_while_it_starts_leaves_nothing(run: Run, calls, tmp_path: Path):
    calls(Trainer, "attention_cost", 1, signalled(signal.SIGTERM))
    with pytest.raises(StoppedUnsaved, match="before anything was saved"):
        run("run", SFT)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_the_checkpoint_there_was(run: Run, calls, monkeypatch, tmp_path: Path):
    monkeypatch.setattr("rlflow.driver.stopping.SAME_PRESS_S", -1.0)
    calls(Trainer, "forward_backward", 3, signalled(signal.SIGINT))
    calls(Trainer, "optim_step", 3, signalled(signal.SIGINT))
    with pytest.raises(StopRequested, match=r"run has the checkpoint of step 2: go on with --resume"):
        run("run", SFT, save_every=2)
    assert steps_of(tmp_path / "run") == [0, 1, 2]
    assert same_weights(run("whole", SFT), run("run", SFT, resume=True))


@pytest.mark.slow
def test_a_stop_for_gradients_that_are_not_finite_leaves_the_last_good_step_and_the_rollouts(
    run: Run, monkeypatch, capsys, tmp_path: Path
):
    original, count = Trainer.optim_step, 0

    def optim_step(trainer: Trainer, learning_rate: float, *update: int) -> UpdateStats:
        nonlocal count
        count += 1
        if count == 1 or count > 4:
            return original(trainer, learning_rate, *update)
        trainer.engine.step(0.0)
        return UpdateStats(math.nan, True)

    monkeypatch.setattr(Trainer, "optim_step", optim_step)
    with pytest.raises(RunError, match="step 4: the gradient was not finite for 3 updates in a row"):
        run("run", GRPO, log_rollouts_every=100)
    assert saved_steps(tmp_path / "run" / "checkpoints") == [3]
    ended = read_outcome(tmp_path / "run")
    assert ended is not None and ended.ending == "failed" and "was not finite for 3 updates" in ended.message
    kept = {path.name for path in (tmp_path / "run" / "rollouts").iterdir()}
    assert kept == {"step_000001.parquet", "step_000004.parquet"}
    assert "the checkpoint of step 3 was saved: go on with --resume" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stop_for_reward_errors_leaves_a_checkpoint_from_which_the_same_run_goes_on(run: Run, calls, tmp_path: Path):
    whole = run("whole", GRPO)

    def break_reward(do: Callable[[], Any]) -> Any:
        (tmp_path / "broken").touch()
        return do()

    with pytest.raises(RunError, match="could not be scored"):
        calls(RolloutWorker, "submit", 3, break_reward)
        run("run", GRPO)
    assert saved_steps(tmp_path / "run" / "checkpoints") == [2]
    records = read_rollouts(tmp_path / "run" / "rollouts" / "step_000003.parquet")
    assert len(records) == 4 and all(math.isnan(record.reward) and record.state == "masked" for record in records)
    (tmp_path / "broken").unlink()
    assert same_weights(whole, run("run", GRPO, resume=True))


@pytest.mark.slow
def test_a_worker_that_dies_too_often_leaves_a_checkpoint(run: Run, calls, tmp_path: Path):
    calls(RolloutWorker, "submit", 3, failing(OSError("the machine is gone")))
    recovery = {"max_restarts": 0}
    with pytest.raises(RunError, match=r"rollout\[0\].submit: OSError: the machine is gone"):
        run("run", {**GRPO, "rollout": {**GRPO["rollout"], "recovery": recovery}})
    assert saved_steps(tmp_path / "run" / "checkpoints") == [2]


def test_trainers_that_failed_are_not_asked_for_a_checkpoint(run: Run, calls, capsys, tmp_path: Path):
    calls(Learner, "update", 3, failing(ActorFailure("trainer[1]", "forward_backward", "no answer within 20 s")))
    with pytest.raises(RunError, match=r"trainer\[1\]"):
        run("run", SFT)
    assert saved_steps(tmp_path / "run" / "checkpoints") == []
    assert "no checkpoint of step 2 was saved: the trainers failed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_that_failed_behind_its_first_update_leaves_no_checkpoint(run: Run, calls, capsys, tmp_path: Path):
    """It would be trained once more, from parameters that it has moved."""
    blocks = {**GRPO, "algorithm": {"name": "grpo", "group_size": 2, "groups": {"updates_per_step": 2}}}
    calls(Learner, "_update_once", 4, failing(ActorFailure("reference[0]", "logprobs", "the actor died")))
    with pytest.raises(RunError, match="reference"):
        run("run", blocks)
    assert saved_steps(tmp_path / "run" / "checkpoints") == []
    assert "parameters have moved since" in capsys.readouterr().err


def test_a_full_disk_is_named_with_its_bytes_and_the_older_checkpoint_stands(run: Run, calls, tmp_path: Path):
    calls(sharded_state, "save_file", 2, failing(OSError(28, "No space left on device")))
    says = r"trainer\[0\]\.save: DiskError: .*step_000002.*: writing of [\d,]+ bytes failed with [\d,]+ bytes free: "
    with pytest.raises(RunError, match=says):
        run("run", SFT, save_every=1)
    assert saved_steps(tmp_path / "run" / "checkpoints") == [1]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_a_checkpoint_is_due_by_steps_and_by_minutes():
    now = [0.0]
    schedule = SaveSchedule(RunBlock(steps=9, save_every=4, save_every_minutes=10.0), lambda: now[0])
    assert [step for step in range(1, 9) if schedule.is_due(step)] == [4, 8]
    now[0] = 599.0
    assert not schedule.is_due(5)
    now[0] = 600.0
    assert schedule.is_due(5)
    schedule.saved()
    now[0] = 1199.0
    assert not schedule.is_due(6)


def test_checkpoints_by_time_are_on_by_default_and_can_be_switched_off():
    now = [0.0]
    by_default = SaveSchedule(RunBlock(steps=9), lambda: now[0])
    off = SaveSchedule(RunBlock(steps=9, save_every_minutes=None), lambda: now[0])
    now[0] = 3600.0
    assert by_default.is_due(1) and not off.is_due(1)


def test_a_run_writes_them_and_ends_with_the_same_weights(run: Run, monkeypatch):
    whole = run("whole", SFT)
    seen: list[int] = []
    original = Book.save

    def save(book: Book, ended: Any) -> None:
        seen.append(ended.step)
        original(book, ended)

    monkeypatch.setattr(Book, "save", save)
    assert same_weights(whole, run("often", SFT, save_every_minutes=1e-9))
    assert seen == [1, 2, 3, 4]
    assert np.isfinite(load_file(whole / "final" / "model.safetensors")["model.norm.weight"]).all()
