"""The gradient of a batch is one number a parameter: no micro-batch size, packing, number of ranks or
sharing of tokens between them can change it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from free_ports import free_address
from gradient_splits import MAX_TOKENS, OBJECTIVES, SPLITS, WHOLE, Case, cases_of
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def directory(tiny_model_dir, tiny_moe_dir, tmp_path_factory):
    """Gradients of every objective on 1 to 4 ranks, as files."""
    output = tmp_path_factory.mktemp("gradients")
    directories = (tiny_model_dir, tiny_moe_dir, output)
    for world_size in sorted({ranks for ranks, _ in SPLITS}):
        address = free_address()
        script = ROOT / "tests" / "actors" / "gradient_splits.py"
        commands = [
            [sys.executable, str(script), str(rank), str(world_size), address, *map(str, directories)]
            for rank in range(world_size)
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        ranks = [
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for command in commands
        ]
        try:
            errors = [rank.communicate(timeout=400)[1] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        failed = {index: rank.returncode for index, rank in enumerate(ranks) if rank.returncode}
        assert not failed, f"{failed}: " + "\n".join(error[-2000:] for error in errors)
    return output


@pytest.mark.parametrize("batch", MAX_TOKENS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_split_has_the_gradient_and_the_metrics_of_the_whole(directory, name, batch):
    whole = load_file(directory / Case(name, batch, *WHOLE).file)
    norm = sum(float(value.double().square().sum()) for key, value in whole.items() if key != "metrics") ** 0.5
    assert norm > 1e-3
    for case in (case for case in cases_of(name) if case.batch == batch):
        split = load_file(directory / case.file)
        assert split.keys() == whole.keys()
        parts = [(split[key] - whole[key]).double().square().sum() for key in whole if key != "metrics"]
        # Sums in another order round otherwise: by 1e-6 of the norm on one kind of CPU, by a little more on another.
        assert float(sum(parts)) ** 0.5 < 3e-6 * norm, case
        assert split["metrics"].tolist() == pytest.approx(whole["metrics"].tolist(), rel=1e-5, abs=1e-6)
