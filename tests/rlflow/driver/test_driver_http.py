"""A run whose rollouts come from a server over HTTP trains what a run with an engine of its own trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import rlflow
from tests.actors.rollout_engines.http_stand_in import serving
from tests.local_actors import use_local_actors


def run(tmp_path: Path, name: str, model_dir: Path, rollout: dict[str, Any], **blocks: Any) -> Path:
    recipe = {
        "algorithm": {"name": "grpo", "group_size": 4},
        "model": {"path": str(model_dir)},
        "data": {"train": {"generator": "arithmetic"}, "prompts_per_step": 4, "max_prompt_tokens": 32},
        "rewards": [{"name": "repetition", "args": {"unit": "tokens", "ngram_size": 1}}],
        "rollout": {"max_new_tokens": 12, "temperature": 0.8, **rollout},
        "trainer": {"learning_rate": 1e-2},
        "run": {"steps": 3, "output_dir": str(tmp_path / name)},
        "tracking": ["jsonl"],
        **blocks,
    }
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    rlflow.run(tmp_path / f"{name}.yaml")
    return tmp_path / name


@pytest.mark.slow
def test_a_run_over_http_ends_with_the_weights_of_one_with_its_own_engine(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_local_actors(monkeypatch)
    own = run(tmp_path, "own", tiny_model_dir, {"engine": "torch"})
    with serving(tiny_model_dir) as (stand_in, url):
        served = run(tmp_path, "served", tiny_model_dir, {"engine": "http"}, rollout_server={"urls": [url]})
        paths = [path for path, _ in stand_in.bodies]
    assert paths.count("/collective_rpc") >= 3
    weights = [
        tiny_model_dir / "model.safetensors",
        *(directory / "final" / "model.safetensors" for directory in (own, served)),
    ]
    start, one, other = (np.concatenate([w.ravel() for _, w in sorted(load_file(path).items())]) for path in weights)
    assert np.abs(one - start).mean() > 1e-2
    # AdamW makes a whole step of a gradient that is nearly nothing, and of its rounding; other tokens move all of it.
    assert np.abs(other - one).mean() < np.abs(one - start).mean() / 10
    for line in (served / "metrics.jsonl").read_text().splitlines():
        assert abs(json.loads(line).get("mismatch/kl", 0.0)) < 1e-5
    assert not any((served / "served_weights").glob("*/version-*")), "each version is taken away once it is loaded"
