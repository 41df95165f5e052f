"""What a recipe needs of GPUs, against what they have; and models whose config is on the hub."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import rlflow.machine
from rlflow.actor_memory import PROCESS_BYTES
from rlflow.cli.main import main
from rlflow.machine import Machine, this_machine
from rlflow.planning import GIB, Plan, make_plans
from rlflow.recipe import load_recipe
from tests.rlflow.cli.hub_servers import TOKEN, HubServer, HuggingFaceHandler, Repo, serving

NODE = Machine(cpus=64, memory=512 * GIB, gpus=8, gpu_memory=80 * GIB)
# Llama-like: 32 layers of 4096 with 32 heads, 8 of keys and values; 8.0 billion parameters.
LARGE = """\
algorithm: {name: grpo, group_size: 2}
model:
  path: org/large
  dtype: bfloat16
data: {train: {generator: arithmetic}, prompts_per_step: 64, max_prompt_tokens: 512}
rewards: [{name: exact_match}]
rollout: {engine: vllm, max_new_tokens: 1024, gpus_per_worker: 1}
trainer: {workers: 1, gpus_per_worker: 1, gradient_checkpointing: true}
run: {steps: 10, output_dir: out}
"""
CONFIG = b"""{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": false}"""
PARAMETERS = 8_030_261_248
"""Of Llama 3 8B, as its card says."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with serving(HuggingFaceHandler) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        server.repos["org/large"] = Repo(False, {"main": {"config.json": CONFIG}})
        yield server


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "large.yaml"
    path.write_text(LARGE)
    return path


def plan_of(path: Path, *overrides: str, machine: Machine = NODE) -> Plan:
    (plan,) = make_plans(load_recipe(path, overrides), machine)
    return plan


def test_the_config_of_a_model_on_the_hub_gives_its_shape(recipe_file: Path, hub: HubServer):
    shape = plan_of(recipe_file).shape
    assert not isinstance(shape, str)
    assert shape.parameters == PARAMETERS


def test_a_config_in_the_cache_is_not_asked_for(recipe_file: Path, tmp_path: Path, hub: HubServer):
    revision = "1" * 40
    cached = tmp_path / "cache/models--org--cached"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text(revision)
    (cached / "snapshots" / revision).mkdir(parents=True)
    (cached / "snapshots" / revision / "config.json").write_bytes(CONFIG)
    shape = plan_of(recipe_file, "model.path=org/cached").shape
    assert not isinstance(shape, str)
    assert shape.parameters == PARAMETERS


def test_a_model_that_the_hub_has_not_is_said(recipe_file: Path, hub: HubServer):
    (said,) = [line for line in plan_of(recipe_file, "model.path=org/other").warnings if "memory" in line]
    assert said.startswith(f"memory is not estimated: cannot read config.json of org/other: {hub.url} says 404")
    assert "Repository Not Found" in said


def test_what_does_not_fit_a_gpu_comes_with_the_changes_that_save_most(recipe_file: Path, hub: HubServer):
    large = replace(NODE, gpu_memory=160 * GIB)
    assert not [line for line in plan_of(recipe_file, machine=large).warnings if line.startswith("trainer")]
    small = replace(NODE, gpu_memory=24 * GIB)
    first, *changes = plan_of(recipe_file, "rollout.gpu_memory_fraction=1", machine=small).warnings
    assert first.startswith("trainer: 129 GiB do not fit into 24 GiB of a GPU's 24 GiB")
    # Weights, gradients and two moments of 30 GiB each: ranks share them, offloading leaves embeddings and two layers.
    assert [change.split("=")[0].strip(" '") for change in changes[:3]] == [
        "trainer.fsdp.offload",
        "model.adapter",
        "trainer.workers",
    ]
    assert "  enough: trainer.fsdp.offload=true" in changes
    after = plan_of(recipe_file, "trainer.fsdp.offload=true", machine=small).warnings
    assert not [line for line in after if line.startswith("trainer")]


def test_actors_that_share_a_gpu_have_their_share_of_it(recipe_file: Path, hub: HubServer):
    (half, *_) = plan_of(recipe_file, "trainer.gpus_per_worker=0.5").warnings
    assert half.startswith("trainer: 129 GiB do not fit into 40 GiB of a GPU's 80 GiB")


def test_vllm_needs_room_for_one_sequence_and_others_wait(recipe_file: Path, hub: HubServer):
    def said(*overrides: str, machine: Machine = NODE) -> str:
        warnings = plan_of(recipe_file, *overrides, machine=machine).warnings
        return "\n".join(line for line in warnings if line.startswith("rollout"))

    # 128 sequences of 1,536 tokens, each 2 x 32 layers x 1,024 x 2 bytes: 24 GiB beside weights of 15.
    assert "is 40 GiB, all sequences at once need 40 GiB: some will wait" in said()
    assert said("rollout.gpu_memory_fraction=0.9") == ""
    small = replace(NODE, gpu_memory=24 * GIB)
    assert "is 12 GiB, one sequence needs 16 GiB: raise it" in said(machine=small)
    split = ("rollout.tensor_parallel_size=2", "rollout.gpus_per_worker=2", "rollout.gpu_memory_fraction=0.9")
    assert said(*split, machine=small) == ""


def test_muon_keeps_one_moment_of_the_layers_matrices(recipe_file: Path, hub: HubServer):
    def moments(*overrides: str) -> int:
        return (plan_of(recipe_file, *overrides).roles[0].parts or {})["optimizer"]

    in_layers = PARAMETERS - 2 * 128256 * 4096
    assert moments() - moments("trainer.optimizer.kind=muon") == 4 * in_layers


def test_memory_beside_a_gpu_is_the_hosts(recipe_file: Path, hub: HubServer):
    def trainer(*overrides: str):
        return plan_of(recipe_file, *overrides).roles[0]

    whole, offloaded = trainer(), trainer("trainer.fsdp.offload=true")
    assert whole.gpu_bytes_each == whole.bytes_each
    assert offloaded.host_bytes_each == PROCESS_BYTES + 16 * PARAMETERS
    # On the GPU stay the embeddings, the head and two layers, gathered, and what the passes themselves need.
    heads, of_layers = 2 * 128256 * 4096, PARAMETERS - 2 * 128256 * 4096
    gathered = 2 * (heads + 2 * (of_layers // 32))
    parts = dict(offloaded.parts or {})
    assert parts["gathered"] == gathered
    assert offloaded.gpu_bytes_each == gathered + parts["activations"] + parts["logits"] + PROCESS_BYTES
    assert 9 * GIB < offloaded.gpu_bytes_each < 10 * GIB


def test_ranks_with_two_gpus_use_one(recipe_file: Path, hub: HubServer):
    one, two = (plan_of(recipe_file, f"trainer.gpus_per_worker={n}").roles[0].gpu_bytes_each for n in (1, 2))
    assert one == two


def test_changes_that_are_said_go_together(recipe_file: Path, hub: HubServer):
    small = replace(NODE, gpu_memory=19 * GIB // 2)
    sft = ("rewards=[]", "algorithm={name: sft}", "trainer.workers=2")
    warnings = plan_of(recipe_file, *sft, machine=small).warnings
    said = [line.strip().rpartition(" saves ")[0] for line in warnings if " saves " in line]
    # They exclude each other.
    assert {"trainer.fsdp.offload=true", "trainer.optimizer.kind=adamw_8bit"} <= set(said)
    (together,) = (line.removeprefix("  enough: ") for line in warnings if line.startswith("  enough: "))
    after = plan_of(recipe_file, *sft, *shlex.split(together), machine=small)
    assert after.roles[0].gpu_bytes_each <= small.gpu_memory
    assert not [line for line in after.warnings if line.startswith("trainer")]


@pytest.mark.skipif(Path("/proc/driver/nvidia/gpus").exists(), reason="about machines whose GPUs only nvidia-smi knows")
def test_this_machines_smallest_gpu_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\nprintf '81920\\n40960\\n'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert rlflow.machine._gpu_memories() == [80 * GIB, 40 * GIB]
    assert (this_machine().gpus, this_machine().gpu_memory) == (2, 40 * GIB)
    command.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2; exit 9\n")
    assert rlflow.machine._gpu_memories() == []
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert rlflow.machine._gpu_memories() == []
    assert this_machine().cpus > 0


def test_the_command_takes_the_size_of_the_gpus(recipe_file: Path, hub: HubServer, capsys: pytest.CaptureFixture):
    assert main(["plan", str(recipe_file), "--no-data", "--gpu-memory", "24"]) == 0
    printed = capsys.readouterr().out
    assert "24 GiB on a GPU" in printed
    assert "of a GPU's 24 GiB" in printed
    with pytest.raises(SystemExit):
        main(["plan", str(recipe_file), "--gpu-memory", "much"])
    assert "much is no number of GiB" in capsys.readouterr().err
