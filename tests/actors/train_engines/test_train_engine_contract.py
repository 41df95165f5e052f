"""Every training engine, on every number of ranks, does what plain torch does on one."""

from __future__ import annotations

import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from engine_ranks import Run, launch
from engine_scenarios import (
    CPU,
    LEARNING_RATES,
    RESUMED,
    RESUMED_ALONE,
    SCENARIOS,
    Scenario,
    fsdp,
    loss_of,
    micro_batches,
    new_module,
    pairs,
    scenarios,
    trainer_block,
    weights_of,
    zero,
)
from plain_engine import plain_gradient, plain_run
from safetensors.torch import load_file, save_file
from torch import nn

from rlflow.actors.train_engines import sharded_state
from rlflow.actors.train_engines.engine import Engine, decoder_layers, make_engine
from rlflow.actors.train_engines.sharded_state import Shard

TRAINED = [pytest.param(world, name, id=f"{name} on {world}") for world in (1, 2, 4) for name in scenarios(world)]
RESUMES = [
    pytest.param(reading, writing, reader, writer, id=f"{reader} on {reading} from {writer} on {writing}")
    for reading, writing in ((1, 4), (2, 1), (2, 2), (2, 4))
    for reader, writer in pairs(reading, writing)
]

processes = [pytest.mark.slow, pytest.mark.timeout(1500)]


@cache
def plain(name: str):
    return plain_run(SCENARIOS[name])


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def answers(directory) -> dict[str, dict]:
    """What rank 0 says of every job: all that are trained, and all that read a checkpoint, on as few launches."""
    found = {}
    for world, writing_worlds in {1: (), 4: (), 2: (1, 2, 4)}.items():
        resumes = [resume_jobs(world, writing, directory) for writing in writing_worlds]
        jobs = train_jobs(world, directory) | {key: job for group in resumes for key, job in group.items()}
        found |= dict(zip(jobs, launch(list(jobs.values()), world, directory), strict=True))
    last = resume_jobs(1, 4, directory)
    return found | dict(zip(last, launch(list(last.values()), 1, directory), strict=True))


def train_jobs(world: int, directory: Path) -> dict[str, dict]:
    return {
        f"{name} on {world}": {"kind": "train", "scenario": name, "directory": str(directory / name)}
        for name in scenarios(world)
    }


def resume_jobs(reading: int, writing: int, directory: Path) -> dict[str, dict]:
    return {
        (key := f"{reader} on {reading} from {writer} on {writing}"): {
            "kind": "resume",
            "scenario": reader,
            "checkpoint": str(directory / writer / f"of-{writing}"),
            "into": str(directory / f"{key}.safetensors"),
        }
        for reader, writer in pairs(reading, writing)
    }


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor.float(), expected[name].float(), atol=tolerance, rtol=0, msg=name)


class TestOnSeveralRanks:
    pytestmark = processes

    @pytest.mark.parametrize(("world", "name"), TRAINED)
    def test_losses_norms_and_weights_are_those_of_plain_torch(self, answers, directory, world, name):
        answer, tolerance = answers[f"{name} on {world}"], SCENARIOS[name].tolerance
        losses, norms, weights = plain(name)
        assert answer["losses"] == pytest.approx(losses, abs=tolerance)
        assert answer["norms"] == pytest.approx(norms, rel=tolerance)
        assert_close(load_file(directory / name / f"weights-of-{world}.safetensors"), weights, tolerance)

    @pytest.mark.parametrize(("world", "name"), TRAINED)
    def test_every_gradient_is_plain_torchs(self, answers, directory, world, name):
        """Read out of the optimizer's first moment, which is a known share of it after the first step."""
        expected = plain_gradient(SCENARIOS[name])
        muon = {key for key, p in expected.items() if name == "fsdp, Muon" and ".layers." in key and p.ndim == 2}
        shares = {key: ("momentum_buffer", 0.05) if key in muon else ("exp_avg", 0.1) for key in expected}
        got = {key: torch.full((p.numel(),), float("nan")) for key, p in expected.items()}
        wanted = {f"{shares[key][0]}/{key}": Shard(got[key], 0, tuple(p.shape)) for key, p in expected.items()}
        sharded_state.load(directory / name / f"first-of-{world}", wanted)
        gradients = {key: (got[key] / shares[key][1]).view_as(p) for key, p in expected.items()}
        norm = torch.stack([p.norm() for p in expected.values()]).norm()
        apart = torch.stack([(gradients[key] - p).norm() for key, p in expected.items()]).norm()
        assert apart < SCENARIOS[name].tolerance * norm

    @pytest.mark.parametrize(("world", "name"), TRAINED)
    def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(self, answers, world, name):
        answer = answers[f"{name} on {world}"]
        assert answer["skipped"] and answer["unchanged"]

    @pytest.mark.parametrize(("reading", "writing", "reader", "writer"), RESUMES)
    def test_a_checkpoint_goes_on_like_a_run_never_stopped(self, answers, directory, reading, writing, reader, writer):
        key = f"{reader} on {reading} from {writer} on {writing}"
        losses, norms, weights = plain(reader)
        tolerance = SCENARIOS[reader].tolerance
        assert answers[key]["loss"] == pytest.approx(losses[-1], abs=tolerance)
        assert answers[key]["norm"] == pytest.approx(norms[-1], rel=tolerance)
        assert_close(load_file(directory / f"{key}.safetensors"), weights, tolerance)

    @pytest.mark.parametrize("name", [*RESUMED, *RESUMED_ALONE])
    def test_the_same_ranks_and_engine_go_on_to_the_bit(self, answers, directory, name):
        never_stopped = load_file(directory / name / "weights-of-2.safetensors")
        weights = load_file(directory / f"{name} on 2 from {name} on 2.safetensors")
        assert all(torch.equal(weights[key], tensor) for key, tensor in never_stopped.items())


def engine_of(scenario: Scenario) -> tuple[nn.Module, Engine]:
    module = new_module(scenario)
    return module, make_engine(module, trainer_block(scenario), rank=0, world_size=1)


@pytest.mark.parametrize("name", ["fsdp", "fsdp, checkpointing", "fsdp, classifier"])
def test_one_rank_without_a_process_group_equals_plain_torch(name):
    run = Run(SCENARIOS[name], 0, 1)
    assert not torch.distributed.is_initialized()
    results = [run.step(step) for step in range(len(LEARNING_RATES))]
    losses, norms, weights = plain(name)
    assert [loss for loss, _ in results] == pytest.approx(losses, abs=1e-6)
    assert [norm for _, norm in results] == pytest.approx(norms, rel=1e-5)
    assert_close(run.weights(), weights, 1e-6)


@pytest.mark.parametrize("kind", ["adamw", "muon", "adamw_8bit"])
def test_every_optimizer_goes_on_to_the_bit_from_a_checkpoint(kind, tmp_path, monkeypatch):
    if kind == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    scenario = Scenario({"optimizer": {"kind": kind}, "gpus_per_worker": 1})
    never_stopped = Run(scenario, 0, 1)
    never_stopped.step(0)
    never_stopped.save(tmp_path)
    never_stopped.step(1)
    later = Run(scenario, 0, 1)
    later.engine.load_state(tmp_path)
    later.step(1)
    assert all(torch.equal(tensor, later.weights()[name]) for name, tensor in never_stopped.weights().items())


def test_moments_in_8_bits_train_almost_like_moments_in_32():
    pytest.importorskip("bitsandbytes")
    eight = Run(Scenario({"optimizer": {"kind": "adamw_8bit"}, "gpus_per_worker": 1}), 0, 1)
    plain = Run(fsdp(), 0, 1)
    for step in range(3):
        assert eight.step(step)[0] == pytest.approx(plain.step(step)[0], abs=1e-2)


def test_8_bits_without_bitsandbytes_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ValueError, match=r"adamw_8bit needs bitsandbytes: pip install bitsandbytes, or use kind: adamw"
    ):
        engine_of(Scenario({"optimizer": {"kind": "adamw_8bit"}, "gpus_per_worker": 1}))


def test_deepspeed_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match=r"needs DeepSpeed: pip install deepspeed, or use engine: fsdp"):
        engine_of(zero(2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_bfloat16_weights_learn_at_rates_that_their_eight_bits_cannot_hold(kind):
    """As with ZeRO, float32 weights stand behind them: after 20 steps at 1e-6 they are where float32 training is."""
    moves = {}
    for dtype in ("float32", "bfloat16"):
        module, engine = engine_of(Scenario({"optimizer": {"kind": kind}}, dtype=dtype))
        before = {name: shard.values.clone() for name, shard in engine._shards(engine._moments()).items()}
        for step in range(20):
            engine.backward(loss_of(module, micro_batches(step)[0], 10))
            assert engine.step(1e-6) is not None
        after = engine._shards(engine._moments())
        moved = [after[name].values - values for name, values in before.items() if name.startswith("model/")]
        moves[dtype] = torch.cat([values.flatten() for values in moved])
        assert all(tensor.dtype == getattr(torch, dtype) for _, tensor in engine.full_weights())
    assert torch.nn.functional.cosine_similarity(moves["bfloat16"], moves["float32"], dim=0) > 0.9
    assert moves["bfloat16"].norm() == pytest.approx(float(moves["float32"].norm()), rel=0.1)


def test_a_checkpoint_of_before_the_first_step_is_one_like_any_other(tmp_path):
    _, engine = engine_of(fsdp())
    engine.save_state(tmp_path)
    later = Run(fsdp(), 0, 1)
    later.step(2)
    later.engine.load_state(tmp_path)
    for step in range(3):
        later.step(step)
    assert_close(later.weights(), plain("fsdp")[2], 1e-6)


def test_a_checkpoint_of_another_optimizer_model_or_version_is_refused(tmp_path):
    for name, scenario in {"fsdp": fsdp(), "classifier": Scenario(model="values")}.items():
        (tmp_path / name).mkdir()
        engine_of(scenario)[1].save_state(tmp_path / name)
    _, muon = engine_of(SCENARIOS["fsdp, Muon"])
    with pytest.raises(ValueError, match=r"no tensor momentum_buffer/.*another model or optimizer"):
        muon.load_state(tmp_path / "fsdp")
    with pytest.raises(ValueError, match=r"no tensor model/score\.weight"):
        engine_of(Scenario(model="values"))[1].load_state(tmp_path / "fsdp")
    save_file({"a": torch.zeros(2)}, tmp_path / "state-00000-of-00001.safetensors")
    with pytest.raises(ValueError, match="not of this version of rlflow"):
        engine_of(fsdp())[1].load_state(tmp_path)


def test_gradients_are_clipped_once_over_all_micro_batches():
    """Not micro-batch by micro-batch: halving every loss halves the norm, and leaves a clipped step the same."""
    results = []
    for scale in (1.0, 0.5):
        module, engine = engine_of(fsdp())
        for batch in micro_batches(1):
            engine.backward(scale * loss_of(module, batch, 10))
        results.append((engine.step(1e-2), weights_of(module)))
    assert results[0][0] == pytest.approx(2 * results[1][0])
    assert results[1][0] > 0.5
    assert_close(results[0][1], results[1][1], 1e-6)


def test_a_step_of_muon_is_that_of_torchs_own():
    run = Run(SCENARIOS["fsdp, Muon"], 0, 1)
    _, norm = run.step(0)
    _, norms, weights = plain_run(SCENARIOS["fsdp, Muon"], num_steps=1)
    assert norm == pytest.approx(norms[0], rel=1e-6)
    # Newton-Schulz runs in bfloat16: the last of its eight bits may flip, in a step of some 2e-3 a weight.
    assert_close(run.weights(), weights, 1e-4)
    # Golden: every update has the size of AdamW's, 0.2 a weight (arXiv 2502.16982, section 2.2), times the rate.
    before = weights_of(new_module(fsdp()))["model.layers.0.mlp.up_proj.weight"]
    change = weights["model.layers.0.mlp.up_proj.weight"] - before * (1 - 1e-2 * 0.1)
    assert change.square().mean().sqrt() == pytest.approx(0.2e-2, rel=0.2)


def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest(tmp_path):
    _, engine = engine_of(SCENARIOS["fsdp, Muon"])
    engine.save_state(tmp_path)
    names = load_file(tmp_path / "state-00000-of-00001.safetensors").keys()
    orthogonal = {name for name in names if name.startswith("momentum_buffer/")}
    assert len(orthogonal) == 2 * 7
    assert all("layers." in name and "norm" not in name for name in orthogonal)
    assert "exp_avg/model.embed_tokens.weight" in names and "exp_avg/model.norm.weight" in names


@pytest.mark.parametrize("cuts", [(), (5,), (1, 2, 11), (12,)], ids=str)
def test_shards_of_any_cut_are_read_as_shards_of_any_other(cuts, tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    bounds = [0, *cuts, 12]
    for rank, (start, end) in enumerate(pairwise(bounds)):
        shard = Shard(whole.view(-1)[start:end], start, (3, 4))
        copy = Shard(whole.view(-1)[:3] + 100, 0, (3, 4), is_copy=True)
        sharded_state.save(tmp_path, rank, len(bounds) - 1, {"a": shard, "b": copy} if end > start else {})
    for start, end in [(0, 12), (0, 4), (3, 9), (11, 12), (7, 7)]:
        into = torch.full((end - start,), -1.0)
        sharded_state.load(tmp_path, {"a": Shard(into, start, (3, 4))})
        assert torch.equal(into, whole.view(-1)[start:end])
    with pytest.raises(ValueError, match="no tensor b"):
        sharded_state.load(tmp_path, {"b": Shard(torch.zeros(1), 0, (3, 4))})
    with pytest.raises(ValueError, match=r"a has shape \[3, 4\], the model wants \[4, 3\]"):
        sharded_state.load(tmp_path, {"a": Shard(torch.zeros(1), 0, (4, 3))})


def test_layers_are_found_in_language_models_and_classifiers_of_any_naming():
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config

    for scenario in (fsdp(), Scenario(model="values")):
        assert [type(layer).__name__ for layer in decoder_layers(new_module(scenario))] == ["Qwen3DecoderLayer"] * 2
    config = GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=20, n_positions=8)
    for factory in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        assert len(decoder_layers(factory.from_config(config))) == 3
    with pytest.raises(ValueError, match=r"Linear has no list of layers to shard; set trainer.workers: 1"):
        decoder_layers(nn.Linear(2, 2, device=CPU))
