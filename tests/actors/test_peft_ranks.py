"""Every one of PEFT's methods that may have several ranks is trained by two as by one: weights, norms, reference."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from free_ports import free_ports
from peft_ranks import main
from test_peft_training import peft

from rlflow.recipe.peft_methods import METHODS

SEVERAL = [name for name, method in METHODS.items() if not method.gives_out_ranks]
TIMEOUT_S = 300


def trained_by_two(asked: Path) -> None:
    script = Path(__file__).with_name("peft_ranks.py")
    ranks = [subprocess.Popen([sys.executable, str(script), str(rank), "2", str(asked)]) for rank in range(2)]
    try:
        assert [rank.wait(TIMEOUT_S) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_ranks_train_every_method_as_one_does(tiny_model_dir: Path, tiny_moe_dir: Path, tmp_path: Path):
    blocks: dict[str, Any] = {name: peft(name) for name in SEVERAL}
    if find_spec("bitsandbytes"):
        # The base is whole on each of them.
        blocks["four bits"] = {"rank": 4, "quantize": "nf4"}
    for ranks, addresses in (
        ("one", [None] * len(blocks)),
        ("two", [f"127.0.0.1:{port}" for port in free_ports(len(blocks))]),
    ):
        asked = []
        for (name, block), address in zip(blocks.items(), addresses, strict=True):
            base = tiny_moe_dir if name == "TRAINABLE_TOKENS" else tiny_model_dir
            asked.append((block, str(base), address, str(tmp_path / f"{name}.{ranks}")))
        (tmp_path / f"{ranks}.json").write_text(json.dumps(asked))
    main(0, 1, tmp_path / "one.json")
    trained_by_two(tmp_path / "two.json")
    for name in blocks:
        one, two = (torch.load(tmp_path / f"{name}.{ranks}", weights_only=True) for ranks in ("one", "two"))
        assert one.keys() == two.keys() and len(one) > 2, name
        for key, values in one.items():
            assert torch.allclose(two[key], values, rtol=1e-5, atol=5e-6), f"{name}: {key}"
