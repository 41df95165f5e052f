"""The examples of docs/extend.md, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import rlflow
from tests.local_actors import use_local_actors
from tests.rlflow.test_api import STAGES

DOC = Path(__file__).resolve().parents[2] / "docs" / "extend.md"
EXAMPLES = ["soft_clip", "squared_hinge", "over_median", "make", "hedges", "Patience"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs a recipe in a directory where my.py has the page's examples."""
    code = re.findall(r"^```python\n(.*?)^```", DOC.read_text(), flags=re.MULTILINE | re.DOTALL)
    own = "def sums(completion_ids):\n    return [sum(ids) for ids in completion_ids]\n"
    (tmp_path / "my.py").write_text("\n\n".join([*code, own]))
    monkeypatch.chdir(tmp_path)
    use_local_actors(monkeypatch)
    shared = {key: value for key, value in STAGES.items() if key not in ("stages", "evaluation")}
    return lambda **blocks: rlflow.run({**shared, **blocks})


def test_the_page_has_each_of_them_once():
    assert re.findall(r"^(?:def|class) (\w+)", DOC.read_text(), flags=re.MULTILINE) == EXAMPLES


@pytest.mark.slow
def test_a_loss_an_advantage_an_optimizer_a_metric_and_a_callback_make_a_run(run):
    (algorithm,) = re.findall(
        r"^```yaml\n(algorithm: {name: grpo.*?)^```", DOC.read_text(), flags=re.MULTILINE | re.DOTALL
    )
    block = yaml.safe_load(algorithm)["algorithm"]
    result = run(
        algorithm={**block, "group_size": 3, "advantage": {"estimator": "my.py:over_median"}, "kl": {"coef": 0.0}},
        rewards=[{"plugin": "my.py:sums"}],
        trainer={"learning_rate": 1e-2, "optimizer": {"kind": "my.py:make", "args": {"decay": 0.2}}},
        metrics=[{"plugin": "my.py:hedges", "args": {"words": ["1", "2", "3"]}}],
        evaluation={**STAGES["evaluation"], "every": 1},
        callbacks=[{"plugin": "my.py:Patience", "args": {"evaluations": 1}}],
        run={"steps": 9},
    )
    assert result.final is not None
    records = result.rollouts(1)
    assert result.steps[1]["metric/hedges"] == sum(bool(set("123") & set(r.completion)) for r in records) / len(records)
    assert sorted(record.advantage for record in records)[len(records) // 2] == 0, "the median's"
    scores = [score for _, score in result.series("eval/heldout/pass@1")]
    best = [max(scores[:i], default=-1.0) for i in range(len(scores))]
    assert sum(score <= before for score, before in zip(scores, best, strict=True)) == 2, "it waits for one and stops"
    assert len(scores) < 10


@pytest.mark.slow
def test_a_pair_loss_makes_a_run(run, tmp_path: Path):
    (line,) = re.findall(r"^```yaml\n(algorithm: {name: dpo.*)\n```", DOC.read_text(), flags=re.MULTILINE)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "1+1=", "chosen": "2", "rejected": "3"}\n' * 4)
    data = {**STAGES["data"], "train": {"path": "pairs.jsonl"}}
    result = run(**yaml.safe_load(line), data=data, run={"steps": 2}, trainer={"learning_rate": 1e-2})
    # Before the first update the log-ratios are 0: the hinge is 1.
    assert result.steps[1]["loss/preference"] == pytest.approx(1.0)
    assert result.metrics["loss/preference"] < 1.0
