"""Callbacks and metrics of the user's own: what they hear, how they end a run, and what becomes of their errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from finished_runs import NEW_MODEL

import rlflow
from tests.local_actors import use_local_actors

SFT: dict[str, Any] = {
    "algorithm": {"name": "sft"},
    "model": NEW_MODEL,
    "data": {"train": {"generator": "arithmetic", "args": {"digits": 1}}, "prompts_per_step": 4, "max_tokens": 32},
    "evaluation": {
        "data": {"generator": "arithmetic", "args": {"digits": 1, "split": "heldout"}, "rows": 2},
        "every": 2,
    },
    "tracking": ["jsonl"],
    "run": {"steps": 4, "save_every": 2},
}
GRPO: dict[str, Any] = {
    "algorithm": {"name": "grpo", "group_size": 2},
    "model": NEW_MODEL,
    "data": {
        "train": {"generator": "arithmetic", "args": {"digits": 1}},
        "prompts_per_step": 2,
        "max_prompt_tokens": 16,
    },
    "rollout": {"engine": "torch", "max_new_tokens": 4},
    "tracking": ["jsonl"],
    "run": {"steps": 1},
}
PLUGIN = """\
import json
from pathlib import Path


class Journal:
    def __init__(self, path, stop_at=None):
        self.path, self.stop_at = Path(path), stop_at

    def on_step(self, step, metrics):
        with self.path.open("a") as file:
            file.write(json.dumps([step, metrics["loss/sft"]]) + "\\n")
        return "stop" if step == self.stop_at else None


def note(step, metrics, path):
    Path(path).write_text(str(step))


def sum_of_ids(prompts, completions, completion_ids, **columns):
    return [float(sum(ids)) for ids in completion_ids]


def shares(groups, letter="1"):
    texts = [rollout.text for group in groups for rollout in group.rollouts]
    return {"rollouts": len(texts), letter: sum(letter in text for text in texts) / len(texts)}


def tokens(groups):
    return sum(len(rollout.completion_ids) for group in groups for rollout in group.rollouts)


def broken(groups):
    return "many"
"""


class Heard(rlflow.Callback):
    """Notes every call."""

    def __init__(self, answers: Mapping[tuple[str, int], Callable[[], Any]] | None = None) -> None:
        self.calls: list[tuple] = []
        self._answers = answers or {}

    def _note(self, method: str, *arguments: Any) -> Any:
        self.calls.append((method, *arguments))
        return self._answers.get((method, arguments[0]), lambda: None)()

    def on_run_start(self, recipe: rlflow.Recipe) -> None:
        self._note("start", recipe.run.output_dir)

    def on_step(self, step: int, metrics: Mapping[str, float]) -> Any:
        return self._note("step", step, metrics["loss/sft"])

    def on_evaluation(self, step: int, name: str, metrics: Mapping[str, float]) -> Any:
        return self._note("evaluation", step, name, metrics["loss/sft"])

    def on_checkpoint(self, step: int, path: Path) -> Any:
        return self._note("checkpoint", step, path.name)

    def on_run_end(self, recipe: rlflow.Recipe, outcome: str) -> None:
        self._note("end", outcome)

    @property
    def order(self) -> list[tuple]:
        return [call[:2] for call in self.calls if call[0] != "start"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., rlflow.Result]:
    use_local_actors(monkeypatch)

    def run(recipe: dict[str, Any], *callbacks: Any, resume: bool = False, **blocks: Any) -> rlflow.Result:
        run_block = {**recipe["run"], "output_dir": str(tmp_path / "run")}
        return rlflow.run({**recipe, **blocks, "run": run_block}, callbacks=callbacks, resume=resume)

    return run


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    return str(path)


def raising(error: BaseException) -> Callable[[], Any]:
    def answer() -> Any:
        raise error

    return answer


def lines_of(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_callback_hears_steps_evaluations_and_checkpoints_in_their_order_with_the_logged_numbers(run, tmp_path):
    heard = Heard()
    result = run(SFT, heard)
    assert heard.order == [
        ("evaluation", 0),
        ("step", 1),
        ("step", 2),
        ("evaluation", 2),
        ("checkpoint", 2),
        ("step", 3),
        ("step", 4),
        ("evaluation", 4),
        ("checkpoint", 4),
        ("end", "finished"),
    ]
    assert heard.calls[0] == ("start", str(tmp_path / "run"))
    by_step = {int(line["step"]): line for line in lines_of(result.directory)}
    assert [c[2] for c in heard.calls if c[0] == "step"] == [by_step[step]["loss/sft"] for step in (1, 2, 3, 4)]
    measured = [c[3] for c in heard.calls if c[0] == "evaluation"]
    assert measured == [by_step[step]["eval/heldout/loss/sft"] for step in (0, 2, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("answer", [lambda: "stop", raising(rlflow.StopTraining())])
def test_a_callback_that_asks_to_stop_ends_the_run_with_a_checkpoint_and_its_model(run, answer):
    heard = Heard({("step", 3): answer})
    result = run(SFT, heard)
    assert heard.order[-3:] == [("step", 3), ("checkpoint", 3), ("end", "finished")]
    assert result.final is not None and (result.final / "model.safetensors").exists()
    assert [line["step"] for line in lines_of(result.directory)] == [0, 1, 2, 3]
    again = Heard()
    run(SFT, again, resume=True)
    assert again.calls == [], "it is finished"


def test_a_callback_that_raises_ends_the_run_in_an_error_that_names_it_and_loses_no_step(run, tmp_path):
    heard = Heard({("step", 3): raising(KeyError("no such thing"))})
    with pytest.raises(rlflow.CallbackError, match=r"callback Heard: on_step of step 3 raised KeyError: .*\.py:\d+"):
        run(SFT, heard)
    assert (tmp_path / "run" / "checkpoints" / "step_000003").is_dir()
    assert ("checkpoint", 3) not in heard.order, "what has raised is not called again"
    again = Heard()
    run(SFT, again, resume=True)
    assert again.order[0] == ("step", 4)


def test_a_failure_is_told_as_one(run):
    heard = Heard()
    with pytest.raises(rlflow.CallbackError, match='on_step returned 3: return "stop", or nothing'):
        run(SFT, lambda step, metrics: 3, heard)
    assert heard.order == [("evaluation", 0), ("checkpoint", 1), ("end", "failed")]


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (3, "callback int is no function and has none of on_run_start"),
        (Heard, r"callback Heard is a class: give an object of it, Heard\(\)"),
        (type("Typo", (), {"on_steps": print})(), r"callback Typo has on_steps \(did you mean on_step\?"),
    ],
)
def test_what_is_no_callback_is_refused_before_anything_starts(run, tmp_path, callback, message):
    with pytest.raises(TypeError, match=message):
        run(SFT, callback)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_recipe_names_callbacks_with_their_arguments(run, plugin, tmp_path):
    journal = {"plugin": f"{plugin}:Journal", "args": {"path": str(tmp_path / "journal"), "stop_at": 2}}
    noting = {"plugin": f"{plugin}:note", "args": {"path": str(tmp_path / "note")}}
    result = run(SFT, callbacks=[journal, noting])
    lines = [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]
    assert lines == [[step, loss] for step, loss in result.series("loss/sft")] and len(lines) == 2
    assert (tmp_path / "note").read_text() == "2"


@pytest.mark.slow
def test_metrics_of_the_recipes_own_are_logged_under_their_names(run, plugin):
    result = run(
        GRPO,
        rewards=[{"plugin": f"{plugin}:sum_of_ids"}],
        metrics=[
            f"{plugin}:tokens",
            {"plugin": f"{plugin}:shares", "args": {"letter": "7"}, "label": "texts"},
        ],
    )
    records = result.rollouts(1)
    assert result.metrics["metric/texts/rollouts"] == len(records) == 4
    assert result.metrics["metric/texts/7"] == sum("7" in record.completion for record in records) / 4
    assert result.metrics["metric/tokens"] == 4 * result.metrics["completion/mean_tokens"]


@pytest.mark.slow
def test_a_metric_that_returns_no_number_ends_the_run_in_an_error_that_names_it(run, plugin):
    with pytest.raises(rlflow.RunError, match=r"mine\.py:broken returned a str: return a number"):
        run(GRPO, rewards=[{"plugin": f"{plugin}:sum_of_ids"}], metrics=[f"{plugin}:broken"])


@pytest.mark.slow
def test_a_file_that_changed_between_two_runs_of_a_process_is_read_again(run, plugin):
    options = {"rewards": [{"plugin": f"{plugin}:sum_of_ids"}], "metrics": [f"{plugin}:tokens"]}
    first = run(GRPO, **options).metrics["metric/tokens"]
    Path(plugin).write_text(PLUGIN.replace("return sum(len(", "return 1000 + sum(len("))
    assert first < 1000 <= run(GRPO, **options).metrics["metric/tokens"]
