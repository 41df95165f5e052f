"""The GPU check on a machine without a GPU: what runs there, and that one part's end is no other's."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check"
BROKEN = """
import os, time
def crash(record):
    record.add("before", 1.0)
    print("out of memory")
    os.abort()
def hang(record): time.sleep(600)
def wrong(record):
    record.add("small", 1.0, most=2.0)
    record.add("large", float("nan"), least=0.0)
def skips(record):
    from measurements import Skip
    raise Skip("there is no moon")
"""


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch):
    """The check's main module; its neighbours are imported from its directory and forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("measurements", "parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("gpu_check", CHECK / "__main__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    yield module
    for name in ("measurements", "parts"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_a_part_that_crashes_hangs_or_is_wrong_stops_no_other(check, monkeypatch, tmp_path, capsys):
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    parts = [check.Part(n, "", f"broken:{n}", 10, needs_gpu=False) for n in ("crash", "wrong", "skips")]
    parts.append(check.Part("hang", "", "broken:hang", 0.3, needs_gpu=False))
    parts.append(check.Part("away", "", "broken:wrong", 1, needs_gpu=False, packages=("no_such_package",)))
    monkeypatch.setattr(check, "PARTS", parts)
    monkeypatch.setattr(check, "LEAST_DEADLINE_S", 1.0)
    assert check.main(["--output", str(tmp_path / "out")]) == 1
    results = {r["part"]: r for r in json.loads((tmp_path / "out" / "results.json").read_text())}
    assert {name: r["verdict"] for name, r in results.items()} == {
        "crash": "FAILED",
        "wrong": "WRONG",
        "skips": "skipped",
        "hang": "FAILED",
        "away": "skipped",
    }
    assert "SIGABRT: out of memory" in results["crash"]["reason"]
    assert [m["name"] for m in results["crash"]["measurements"]] == ["before"]
    assert results["hang"]["reason"].startswith("no end within 1 s")
    assert results["skips"]["reason"] == "there is no moon"
    assert results["away"]["reason"] == "needs no_such_package"
    table = capsys.readouterr().out
    assert "| wrong | small | 1 | <= 2 | ok |\n| wrong | large | nan | >= 0 | WRONG |" in table
    assert "1 WRONG, 2 FAILED, 2 skipped" in table


@pytest.mark.slow
def test_without_a_gpu_its_parts_are_skipped_by_name(check, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    names = ["machine", "vllm_bfloat16", "liger", "nf4", "quickstart", "training_1.5B"]
    assert check.main(["--output", str(tmp_path), *names]) == 0
    results = {r["part"]: r for r in json.loads((tmp_path / "results.json").read_text())}
    assert results.pop("machine")["verdict"] == "ok"
    assert all(r["verdict"] == "skipped" and r["reason"].startswith("needs a GPU") for r in results.values())
    assert len(results) == 5


@pytest.mark.slow
def test_numbers_of_an_engine_and_of_a_trainer_are_right_on_a_cpu(check, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check.main(["--output", str(tmp_path), "torch_float32", "fsdp"]) == 0
    results = {r["part"]: r for r in json.loads((tmp_path / "results.json").read_text())}
    assert [r["verdict"] for r in results.values()] == ["ok", "ok"]
    assert len(results["torch_float32"]["measurements"]) == 10
    assert len(results["fsdp"]["measurements"]) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["transport_ipc", "transport_collective"])
def test_weights_reach_another_process_past_the_object_store_on_a_gpu(check, tmp_path, part):
    assert check.main(["--output", str(tmp_path), part]) == 0
