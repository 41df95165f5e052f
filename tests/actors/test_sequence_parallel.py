"""Ranks that share the tokens of a micro-batch compute what one rank does."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from token_shares import SETTINGS
from transformers import LlamaConfig

from rlflow.actors.policy_trainer import PolicyTrainer
from rlflow.actors.sequence_trainer import SequenceTrainer
from rlflow.actors.train_engines import sequence_parallel
from rlflow.actors.train_engines.packed_attention import PackedLayout
from rlflow.actors.train_engines.sequence_parallel import SequenceRanks, SplitLayout
from rlflow.recipe import ModelBlock, TrainerBlock, algorithm_of

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
processes = [pytest.mark.slow, pytest.mark.timeout(900)]
SPLITS = [(name, *split) for name, setting in SETTINGS.items() for split in setting.splits]


def write_model(directory: Path, **options: Any) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"vocab_size": 100, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**sizes, initializer_range=0.25, **options)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    write_model(directory / "grouped", num_attention_heads=2, num_key_value_heads=1)
    four = {"num_attention_heads": 4, "num_key_value_heads": 2}
    write_model(directory / "heads", **four)
    window = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    write_model(directory / "window", **four, **window)
    write_model(directory / "three", num_attention_heads=3, num_key_value_heads=3)
    return directory


@pytest.fixture(scope="module")
def directory(models, tmp_path_factory) -> Path:
    """Every setting on one rank without sharing, and on two and four with it, as files."""
    output = tmp_path_factory.mktemp("shares")
    command = [sys.executable, str(ROOT / "tests" / "actors" / "token_shares.py"), str(models), str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        environment.pop(name, None)
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return output


class TestOnSeveralRanks:
    pytestmark = processes

    @pytest.mark.parametrize(("name", "ranks", "share"), SPLITS)
    def test_logprobs_metrics_and_the_step_are_those_of_one_rank(self, directory, models, name, ranks, share):
        one = load_file(directory / f"{name}-1-1.safetensors")
        split = load_file(directory / f"{name}-{ranks}-{share}.safetensors")
        assert split.keys() == one.keys()
        assert float((split["logprobs"] - one["logprobs"]).norm()) < 1e-6 * float(one["logprobs"].norm())
        assert split["metrics"].tolist() == pytest.approx(one["metrics"].tolist(), rel=1e-5, abs=1e-6)
        assert split["grad_norm"].item() == pytest.approx(one["grad_norm"].item(), rel=1e-6)
        start = load_file(models / SETTINGS[name].model / "model.safetensors")
        moved = apart = 0.0
        for key in (key for key in one if key.startswith("model/")):
            if "lora_A" not in key:
                before = start[key.removeprefix("model/")] if "lora" not in key else torch.zeros_like(one[key])
                moved += float((one[key] - before).double().square().sum())
            apart += float((split[key] - one[key]).double().square().sum())
        assert moved > 1e-4
        assert apart**0.5 < 1e-5 * moved**0.5

    def test_a_model_that_mixes_tokens_outside_attention_is_refused(self, directory):
        # The first slice cannot know.
        assert (directory / "refusal-0.txt").read_text() == "accepted"
        said = (directory / "refusal-1.txt").read_text()
        assert "other layers than attention mix tokens: set trainer.sequence_parallel: 1" in said


@pytest.mark.parametrize("cls", [PolicyTrainer, SequenceTrainer])
def test_heads_that_do_not_divide_are_refused_before_anything_is_exchanged(models, cls):
    block = TrainerBlock(workers=2, sequence_parallel=2)
    model = ModelBlock(path=str(models / "three"))
    of_head = {"algorithm": algorithm_of("reward_model")} if cls is SequenceTrainer else {}
    trainer = cls(model, block, rank=0, world_size=2, num_threads=1, seed=0, **of_head)
    if cls is SequenceTrainer:
        config = models / "three" / "config.json"
        config.write_text(config.read_text().replace('"pad_token_id": null', '"pad_token_id": 0'))
    with pytest.raises(ValueError, match="3 attention heads and 3 key-value heads do not divide over 2 ranks: set"):
        trainer.setup(None)


def layout(lengths: list[int], size: int, index: int) -> SplitLayout:
    group: Any = SimpleNamespace()
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return SplitLayout(bounds, CPU, SequenceRanks(group, size, index))


@pytest.mark.parametrize(("lengths", "size"), [([5, 2], 2), ([4, 4], 2), ([1, 9, 3], 4), ([2], 4)])
def test_slices_have_equal_lengths_and_every_token_is_held_once(lengths, size):
    tokens = torch.arange(1, sum(lengths) + 1)
    parts = [layout(lengths, size, index).own(tokens) for index in range(size)]
    assert len({len(part) for part in parts}) == 1
    whole = torch.cat(parts)
    assert whole[: len(tokens)].tolist() == tokens.tolist()
    assert not whole[len(tokens) :].any() and len(whole) - len(tokens) < size
    positions = torch.arange(len(tokens))
    assert sum(layout(lengths, size, index).held(positions).int() for index in range(size)).tolist() == [1] * len(
        tokens
    )


def test_filler_is_a_sequence_of_its_own():
    filled = layout([5, 2], 4, 0)
    assert filled.num_tokens == 8
    # Bucket rows hold one sequence each; 8 is what pads them.
    rows = [sorted(set(row.tolist()) - {8}) for bucket in filled.padded[0] for row in bucket]
    assert sorted(rows) == [[0, 1, 2, 3, 4], [5, 6], [7]]


@pytest.mark.parametrize(("size", "key_value_heads"), [(2, 2), (4, 2)])
def test_what_ranks_attend_to_together_is_what_one_attends_to(monkeypatch, size, key_value_heads):
    """Ranks are threads, and what they exchange lies in a list."""
    sent: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=60)

    def exchange(pieces: torch.Tensor, index: Any) -> torch.Tensor:
        sent[index] = pieces
        barrier.wait()
        received = torch.stack([pieces[index] for pieces in sent])
        barrier.wait()
        return received

    monkeypatch.setattr(sequence_parallel, "_all_to_all", exchange)
    bounds = np.array([0, 5, 7, 11], np.int32)
    query = torch.randn(11, 4, 8, generator=torch.Generator().manual_seed(0))
    key, value = torch.randn(2, 11, key_value_heads, 8, generator=torch.Generator().manual_seed(1))
    sinks = torch.tensor([-1.0, 0.5, 2.0, 3.0])
    whole = PackedLayout(bounds, CPU).attend(query, key, value, None, None, sinks=sinks)

    def own(split: SplitLayout, tokens: torch.Tensor) -> torch.Tensor:
        filled = torch.cat([tokens, torch.zeros(split.filler, *tokens.shape[1:])])
        return filled[split.first : split.first + split.share]

    def attend(index: int) -> torch.Tensor:
        split = SplitLayout(bounds, CPU, SequenceRanks(cast(Any, index), size, index))
        with torch.no_grad():
            return split.attend(*(own(split, part) for part in (query, key, value)), None, None, sinks=sinks)

    with ThreadPoolExecutor(size) as threads:
        parts = list(threads.map(attend, range(size)))
    torch.testing.assert_close(torch.cat(parts)[:11], whole, atol=1e-6, rtol=1e-5)


@pytest.fixture
def one_rank():
    # An engine that other tests had in this process may have left its own.
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("dtype", "difference", "is_right"),
    [
        (torch.float32, 5e-4, True),
        (torch.float32, 5e-3, False),
        (torch.bfloat16, 5e-3, True),
        (torch.bfloat16, 0.1, False),
        (torch.float32, float("nan"), False),
    ],
)
def test_slices_may_differ_from_the_whole_by_rounding_alone(monkeypatch, one_rank, dtype, difference, is_right):
    monkeypatch.setattr(sequence_parallel, "_difference", lambda *_: difference)
    module: Any = SimpleNamespace(
        model=SimpleNamespace(config=LlamaConfig(), dtype=dtype),
        passes=SimpleNamespace(packs=True, names_boundaries=False),
        ranks=None,
        tower=None,
    )
    context = nullcontext() if is_right else pytest.raises(ValueError, match="other layers than attention mix tokens")
    with context:
        sequence_parallel.share_tokens(module, 1, CPU, 60.0)
    assert (module.ranks.size, module.ranks.index) == (1, 0)


def test_what_is_run_one_sequence_at_a_time_cannot_be_shared():
    module: Any = SimpleNamespace(
        model=SimpleNamespace(config=LlamaConfig()),
        passes=SimpleNamespace(packs=False, reason="it recurs"),
        ranks=None,
        tower=None,
    )
    with pytest.raises(ValueError, match=r"ranks can share what attention alone mixes \(it recurs\)"):
        sequence_parallel.share_tokens(module, 2, CPU, 60.0)
