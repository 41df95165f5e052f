"""An adapter on a base of four bits is trained by two ranks as by one: the base is whole on each of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from free_ports import free_address
from quantized_ranks import main

TIMEOUT_S = 180


def trained_by_two(base: Path, output: Path) -> None:
    address = free_address()
    script = Path(__file__).with_name("quantized_ranks.py")
    arguments = ["2", address, str(base), str(output)]
    ranks = [subprocess.Popen([sys.executable, str(script), str(rank), *arguments]) for rank in range(2)]
    try:
        assert [rank.wait(TIMEOUT_S) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.slow
def test_two_ranks_train_an_adapter_on_four_bits_as_one_does(tiny_model_dir: Path, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    main(0, 1, None, str(tiny_model_dir), tmp_path / "one.pt")
    trained_by_two(tiny_model_dir, tmp_path / "two.pt")
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert one.keys() == two.keys() and len(one) == 28
    for name, values in one.items():
        torch.testing.assert_close(two[name], values, rtol=0, atol=1e-6)
        assert ".lora_A." in name or values.any()
