"""What a recipe will do and need, checked by hand for one tiny architecture."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from rlflow.actor_memory import PROCESS_BYTES, REWARD_PROCESS_BYTES, VLLM_PROCESS_BYTES
from rlflow.machine import Machine
from rlflow.memory import UnknownShape, count_stored, read_shape, shape_of
from rlflow.plan_text import render
from rlflow.planning import GIB, Plan, make_plans
from rlflow.recipe import ModelBlock, load_recipe
from rlflow.remedies import remedies, shown

LAPTOP = Machine(cpus=8, memory=16 * GIB, gpus=0)
ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
# Attention 8x8 + 2 (8x4) + 8x8 = 192, MLP 3 (8x16) = 384, norms 16: 592 a layer. Vocabulary a b c d, pad, eos.
PARAMETERS = 2 * 592 + 6 * 8 + 8
TINY = """\
algorithm: {name: grpo, group_size: 2}
model:
  architecture: {model_type: llama, hidden_size: 8, intermediate_size: 16, num_hidden_layers: 2,
    num_attention_heads: 2, num_key_value_heads: 1}
  characters: abcd
data: {train: {generator: arithmetic}, prompts_per_step: 4, max_prompt_tokens: 10, max_tokens: 20}
rewards: [{name: exact_match}]
rollout: {max_new_tokens: 6}
trainer: {workers: 2, tokens_per_micro_batch: 32}
run: {steps: 10, output_dir: out}
"""


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def plan_of(path: Path, *overrides: str, machine: Machine = LAPTOP) -> Plan:
    (plan,) = make_plans(load_recipe(path, overrides), machine)
    return plan


def test_memory_of_a_tiny_model_is_what_one_counts_by_hand(recipe_file: Path):
    plan = plan_of(recipe_file)
    parts = {planned.role.name: dict(planned.parts or {}) for planned in plan.roles}
    # Half of the parameters on each of two ranks, 4 bytes each. Micro-batches of 32 tokens, two an update: gradients of
    # the first wait. The peak is the last layer's backward pass, which makes 40 numbers of a token; the gradient of the
    # tied head waits. A layer keeps of a token 6x8 + 3x8 + 2x4 + 4x16 = 144 elements, 2 numbers of attention (a head
    # each) and 2 of norms. Whole are the embeddings and two layers.
    assert parts["trainer"] == {
        "weights": PARAMETERS // 2 * 4,
        "gradients": PARAMETERS // 2 * 4,
        "optimizer": PARAMETERS * 4,
        "gathered": (6 * 8 + 2 * ((PARAMETERS - 6 * 8) // 2)) * 4,
        "activations": 32 * (2 * (144 + 2 + 2) + 40) * 4,
        "logits": 6 * 8 * 4,
        "process": PROCESS_BYTES,
    }
    # 8 sequences of 16 tokens, each with 2 (keys, values) x 2 layers x 1 head of 4; sampling six arrays of 8 x 6.
    # A layer's new keys and its repeated keys and values take more than sampling does.
    assert parts["rollout"] == {
        "weights": PARAMETERS * 4,
        "KV cache": 8 * 16 * 16 * 4,
        "activations": (8 * 16 * (4 + 16) - 6 * 8 * 6) * 4,
        "logits": 6 * 8 * 6 * 4,
        "process": PROCESS_BYTES,
    }
    # Attention: embeddings, input and norm of 8, six times queries of 8 and keys of 4.
    assert parts["reference"] == {
        "weights": PARAMETERS * 4,
        "activations": 32 * (3 * 8 + 6 * 8 + 6 * 4) * 4,
        "process": PROCESS_BYTES,
    }
    each = {planned.role.name: planned.bytes_each for planned in plan.roles}
    snapshot = PARAMETERS * 4
    actors = 2 * each["trainer"] + each["rollout"] + each["rewards"] + each["reference"]
    assert plan.host_bytes == actors + PROCESS_BYTES + snapshot


def test_children_that_hold_a_reward_model_count_with_all_they_may_allocate(recipe_file: Path):
    def processes(reward: str) -> int:
        overrides = [f"rewards=[{reward}]", "reward_server={children: 2, memory_gib: 3.0}"]
        parts = {planned.role.name: dict(planned.parts or {}) for planned in plan_of(recipe_file, *overrides).roles}
        return parts["rewards"]["processes"]

    assert processes("{name: exact_match}") == 3 * REWARD_PROCESS_BYTES
    assert processes("{name: reward_model, args: {path: org/model}}") == REWARD_PROCESS_BYTES + 2 * 3 * GIB


def test_memory_of_a_rank_follows_the_stage_and_what_it_offloads(recipe_file: Path):
    def state(*overrides: str) -> dict[str, int]:
        parts = plan_of(recipe_file, *overrides).roles[0].parts or {}
        kept = ("weights", "gradients", "optimizer", "offloaded")
        return {name: parts[name] // (PARAMETERS // 2) for name in kept if name in parts}

    # Bytes for each of the parameters of one rank's half.
    assert state() == {"weights": 4, "gradients": 4, "optimizer": 8}
    assert state("trainer.fsdp.replicas=2") == {"weights": 8, "gradients": 8, "optimizer": 16}
    zero = ("trainer.engine=deepspeed",)
    assert state(*zero, "trainer.deepspeed.stage=1") == {"weights": 8, "gradients": 8, "optimizer": 12}
    assert state(*zero) == {"weights": 8, "gradients": 4, "optimizer": 12}
    assert state(*zero, "trainer.deepspeed.stage=3") == {"weights": 4, "gradients": 4, "optimizer": 12}
    gpus = "trainer.gpus_per_worker=1"
    assert state(*zero, gpus, "trainer.deepspeed.offload=optimizer") == {"weights": 8, "offloaded": 16}
    assert state(gpus, "trainer.fsdp.offload=true") == {"offloaded": 16}
    assert state(gpus, "trainer.optimizer.kind=adamw_8bit") == {"weights": 4, "gradients": 4, "optimizer": 2}
    offloaded = plan_of(recipe_file, gpus, "trainer.fsdp.offload=true")
    assert offloaded.host_bytes - plan_of(recipe_file, gpus).host_bytes == 2 * 16 * (PARAMETERS // 2)


@pytest.mark.parametrize("half", ["model.dtype=bfloat16", "trainer.fsdp.mixed_precision=true"])
def test_what_computes_in_bfloat16_is_trained_in_float32(recipe_file: Path, half: str):
    (trainer, *_) = plan_of(recipe_file, half, "trainer.workers=1").roles
    # Of a token a layer keeps 144 numbers and 8 of each norm in 2 bytes, the norms' inputs and 2 x 1 numbers of theirs
    # and 2 of attention in 4; behind the layers are 8 + 1 in 4, then 8 and the 2 x 8 that are scored in 2.
    # On one rank too, embeddings and two layers are copied into bfloat16. Logits are there in both, and the head's
    # gradient.
    layer = 2 * (144 - 2 * 8) + 4 * (2 * 8 + 2 + 2)
    assert dict(trainer.parts or {}) == {
        "weights": PARAMETERS * 4,
        "gradients": PARAMETERS * 4,
        "optimizer": PARAMETERS * 8,
        "gathered": (6 * 8 + 2 * ((PARAMETERS - 6 * 8) // 2)) * 2,
        "activations": 32 * (2 * layer + 4 * 9 + 2 * 3 * 8),
        "logits": 32 * 6 * (2 + 4) + 6 * 8 * 2,
        "process": PROCESS_BYTES,
    }


def test_a_frozen_base_in_bfloat16_stays_so(recipe_file: Path):
    overrides = ("model.dtype=bfloat16", "trainer.workers=1", "model.adapter={rank: 2}")
    plan = plan_of(recipe_file, "model={path: base, architecture: null, characters: null}", *overrides)
    assert isinstance(plan.shape, str)
    (recipe_file.parent / "base").mkdir()
    (recipe_file.parent / "base/config.json").write_text(json.dumps({**ARCHITECTURE, "vocab_size": 6}))
    parts = plan_of(recipe_file, "model={path: base, architecture: null, characters: null}", *overrides).roles[0].parts
    # Rank 2 on q, k, v, o (16 + 12 + 12 + 16) and three of the MLP (24 each), in both layers.
    adapter = 2 * 2 * (56 + 72)
    untied = PARAMETERS + 6 * 8
    assert (parts or {})["weights"] == 2 * untied + 4 * adapter
    assert (parts or {})["optimizer"] == 8 * adapter
    assert "gathered" not in (parts or {})


def test_layers_that_wait_whole_for_their_backward_pass_are_all_counted(recipe_file: Path):
    def gathered(*overrides: str) -> int:
        parts = plan_of(recipe_file, "model.architecture.num_hidden_layers=6", *overrides).roles[0].parts or {}
        return parts["gathered"]

    kept = "trainer.fsdp.reshard_after_forward=false"
    # The last norm is counted with the layers.
    assert gathered() == 4 * (6 * 8 + 2 * (592 + 1))
    assert gathered(kept) == 4 * (6 * 8 + 6 * (592 + 1))
    assert gathered(kept, "trainer.fsdp.mixed_precision=true") == 2 * (6 * 8 + 6 * (592 + 1))


@pytest.mark.parametrize(
    ("stage", "dtype", "size", "most"),
    [(1, "float32", 4, 10**8), (1, "bfloat16", 4, 5 * 10**8), (2, "bfloat16", 6, 10**8), (3, "bfloat16", 4, 10**8)],
)
def test_zero_has_a_bucket_of_gradients(recipe_file: Path, stage: int, dtype: str, size: int, most: int):
    overrides = ("trainer.engine=deepspeed", f"trainer.deepspeed.stage={stage}", f"model.dtype={dtype}")
    assert (plan_of(recipe_file, *overrides).roles[0].parts or {})["bucket"] == size * PARAMETERS
    large = ("model.architecture.hidden_size=4096", "model.architecture.intermediate_size=32768")
    assert (plan_of(recipe_file, *overrides, *large).roles[0].parts or {})["bucket"] == size * most
    assert "bucket" not in (plan_of(recipe_file).roles[0].parts or {})


def test_a_step_has_prompts_times_group_size_samples_of_the_longest_length(recipe_file: Path):
    plan = plan_of(recipe_file)
    assert (plan.sequences, plan.max_tokens) == (8, 8 * 16)
    assert "4 prompts x 2 completions = 8 samples, at most 128 tokens (10 prompt + 6 new)" in render(plan)
    one = plan_of(recipe_file, "data.prompts_per_step=1", "run.steps=null", "run.epochs=1")
    assert "1 prompt x 2 completions = 2 samples" in render(one) and "length     1 epoch, " in render(one)


def test_offline_training_counts_examples_and_both_answers_of_a_pair(recipe_file: Path):
    sft = plan_of(recipe_file, "algorithm.name=sft", "rewards=[]")
    assert (sft.sequences, sft.max_tokens) == (4, 80)
    assert [planned.role.name for planned in sft.roles] == ["trainer"]
    dpo = plan_of(recipe_file, "algorithm={name: dpo}", "rewards=[]")
    assert dpo.sequences == 8


def test_gradient_checkpointing_keeps_one_layer_and_the_inputs_of_the_others(recipe_file: Path):
    (trainer, *_) = plan_of(recipe_file, "trainer.gradient_checkpointing=true").roles
    # The input of the layer that is computed again is one of the two that were kept.
    assert dict(trainer.parts or {})["activations"] == 32 * (2 * 8 + (148 - 8) + 40) * 4


def test_a_micro_batch_is_bounded_by_what_there_is_and_holds_the_longest_sequence(recipe_file: Path):
    def activations(budget: int) -> int:
        (trainer, *_) = plan_of(recipe_file, f"trainer.tokens_per_micro_batch={budget}").roles
        return dict(trainer.parts or {})["activations"] // ((2 * 148 + 40) * 4)

    assert (activations(1_000_000), activations(8)) == (4 * 16, 16)


def test_vllm_on_cpu_takes_the_cache_it_is_given(recipe_file: Path):
    plan = plan_of(recipe_file, "rollout.engine=vllm", "rollout.kv_cache_gib=0.25")
    parts = dict(plan.roles[1].parts or {})
    assert (parts["KV cache"], parts["process"]) == (GIB // 4, VLLM_PROCESS_BYTES)


def test_vllm_on_a_gpu_needs_what_the_longest_completions_fill(recipe_file: Path):
    on_gpu = ("rollout.engine=vllm", "rollout.gpus_per_worker=1")
    short, long = (plan_of(recipe_file, *on_gpu, f"rollout.max_new_tokens={n}").roles[1].parts or {} for n in (64, 128))
    shape = plan_of(recipe_file).shape
    assert not isinstance(shape, str)
    recipe = plan_of(recipe_file, *on_gpu).recipe
    sequences = min(recipe.rollout.max_num_seqs, recipe.data.prompts_per_step * recipe.algorithm.group_size)
    assert long["KV cache"] - short["KV cache"] == sequences * 64 * shape.cache_per_token * 4


def test_the_settings_say_which_values_are_the_rows_and_which_the_recipes(recipe_file: Path):
    plan = plan_of(recipe_file, "algorithm.kl.coef=0", "algorithm.loss.clip_high=0.28")
    sources = {setting.key: (setting.value, setting.source) for setting in plan.settings}
    assert sources["advantage.scale"] == ("group_std", "grpo")
    assert sources["kl.coef"] == (0.0, "recipe (grpo: 0.04)")
    assert sources["loss.clip_high"] == (0.28, "recipe (grpo: 0.2)")
    assert "loss.clip_low" not in sources


def test_a_later_stage_has_the_shape_of_the_model_that_the_first_will_write(recipe_file: Path):
    stages = "stages: [{name: sft, algorithm: {name: sft}, rewards: []}, {name: grpo}]\n"
    recipe_file.write_text(TINY + stages)
    plans = make_plans(load_recipe(recipe_file), LAPTOP)
    assert [plan.shape for plan in plans] == [plans[0].shape] * 2
    assert f"{PARAMETERS:,} parameters" in render(plans[1])


def test_what_does_not_fit_is_said_with_the_remedy(recipe_file: Path):
    assert plan_of(recipe_file).warnings == []
    assert plan_of(recipe_file, machine=replace(LAPTOP, cpus=2)).warnings == [
        "actors reserve 4 CPUs and this machine has 2: they will take turns"
    ]
    assert plan_of(recipe_file, "trainer.gpus_per_worker=1").warnings == [
        "actors reserve 2 GPUs and this machine has 0: the run needs a cluster"
    ]


def test_what_does_not_fit_comes_with_the_changes_that_save_most(recipe_file: Path):
    workers = ("trainer.workers=8", "reward_server.children=3")
    small = replace(LAPTOP, cpus=16, memory=int(4.01 * GIB))
    # Eleven processes of half a GiB, one of them the driver's, and four of an eighth.
    assert plan_of(recipe_file, *workers, machine=small).warnings == [
        "6.00 GiB do not fit into 4.01 GiB of memory",
        "  trainer.workers=4 saves 2.00 GiB",
        "  reward_server.children=1 saves 0.25 GiB",
        "  enough: trainer.workers=4",
    ]
    smaller = plan_of(recipe_file, *workers, machine=replace(small, memory=4 * GIB - GIB // 8)).warnings
    assert smaller[-1] == "  enough: trainer.workers=4 reward_server.children=1"
    least = plan_of(recipe_file, *workers, machine=replace(small, memory=GIB)).warnings
    assert least[-1] == "  not enough, even together: choose a smaller model, or run on more or larger ones"


def test_every_change_that_is_said_saves_what_is_said_in_this_order(recipe_file: Path):
    large = ("model.architecture.hidden_size=2048", "model.architecture.intermediate_size=8192", "data.max_tokens=2048")
    sizes = ("rollout.max_new_tokens=1024", "trainer.tokens_per_micro_batch=8192", "trainer.workers=1")
    before = plan_of(recipe_file, *large, *sizes)
    found = remedies(before.recipe, lambda recipe: make_plans([recipe], LAPTOP)[0].host_bytes)
    assert {"model.dtype", "trainer.fsdp.mixed_precision", "trainer.gradient_checkpointing"} < {
        one.key for one in found
    }
    assert sorted(found, key=lambda remedy: -remedy.saves) == found
    for remedy in found:
        after = plan_of(recipe_file, *large, *sizes, f"{remedy.key}={shown(remedy.value)}")
        assert before.host_bytes - after.host_bytes == remedy.saves


def test_bfloat16_is_not_said_to_save_what_is_trained_in_float32_all_the_same(recipe_file: Path):
    large = ("model.architecture.hidden_size=2048", "model.architecture.intermediate_size=8192")
    sft = ("rewards=[]", "algorithm={name: sft}", "trainer.workers=1", "data.max_tokens=1024")

    def found(*overrides: str) -> dict[str, int]:
        recipe = plan_of(recipe_file, *large, *sft, *overrides).recipe
        return {one.key: one.saves for one in remedies(recipe, lambda it: make_plans([it], LAPTOP)[0].host_bytes)}

    saved = found("trainer.tokens_per_micro_batch=8192")
    assert saved["model.dtype"] == saved["trainer.fsdp.mixed_precision"] > 0
    # Of 16 tokens there are hardly any activations.
    assert not {"model.dtype", "trainer.fsdp.mixed_precision"} & found("data.max_tokens=4").keys()


def test_layers_need_not_wait_whole(recipe_file: Path):
    layers = ("model.architecture.hidden_size=1024", "model.architecture.num_hidden_layers=24")
    recipe = plan_of(recipe_file, *layers, "trainer.fsdp.reshard_after_forward=false").recipe
    found = remedies(recipe, lambda it: make_plans([it], LAPTOP)[0].host_bytes)
    assert ("trainer.fsdp.reshard_after_forward", True) in [(one.key, one.value) for one in found]


def test_what_is_probably_not_meant_is_said(recipe_file: Path):
    (one,) = plan_of(recipe_file, "algorithm.groups.updates_per_step=4").warnings
    assert one.startswith("one prompt an update")
    (peak,) = plan_of(recipe_file, "trainer.warmup_steps=10").warnings
    assert peak == "the learning rate never reaches its peak: 10 warm-up steps of 10"
    updates = "algorithm.groups.updates_per_step=2"
    assert plan_of(recipe_file, "trainer.warmup_steps=10", updates).warnings == [peak]
    (cut,) = plan_of(recipe_file, "rollout.top_p=0.9", "run.max_staleness=1").warnings
    assert cut.startswith("rollout.top_p cuts sampling, so the engine's logprobs are of another distribution")
    assert "nothing corrects for their difference or for older weights (run.max_staleness)" in cut
    (unknown,) = plan_of(recipe_file, "model={path: org/model, architecture: null, characters: null}").warnings
    assert unknown.startswith("memory is not estimated: cannot read config.json of org/model: it is not in the cache")


def test_rollouts_beyond_what_a_rotary_embedding_turns_alike_are_named(recipe_file: Path):
    rope = "model.architecture.rope_parameters={rope_type: dynamic, rope_theta: 10000.0, factor: 2.0}"
    lengths = (
        "data.max_prompt_tokens=40",
        "rollout.max_new_tokens=24",
        "model.architecture.max_position_embeddings=64",
    )
    assert plan_of(recipe_file, rope, *lengths).warnings == []
    (said,) = plan_of(recipe_file, rope, *lengths, "rollout.max_new_tokens=25").warnings
    assert "in sequences of more than 64 tokens, and these may have 65" in said and "keep them within 64" in said
    assert plan_of(recipe_file, *lengths, "rollout.max_new_tokens=25").warnings == []


def test_a_critic_that_learns_alone_for_too_long_is_named(recipe_file: Path):
    ppo = ("algorithm={name: ppo}", "data.prompts_per_step=8")
    never = "the policy is never trained: algorithm.critic.warmup_steps is 10 of 10 steps"
    assert plan_of(recipe_file, *ppo, "algorithm.critic.warmup_steps=10").warnings == [never]
    short = plan_of(recipe_file, *ppo, "algorithm.critic.warmup_steps=4", "trainer.warmup_steps=6").warnings
    assert short == ["the learning rate never reaches its peak: 6 warm-up steps of 6"]
    assert plan_of(recipe_file, *ppo, "algorithm.critic.warmup_steps=4", "trainer.warmup_steps=5").warnings == []


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({}, PARAMETERS),
        ({"tie_word_embeddings": False}, PARAMETERS + 6 * 8),
        ({"head_dim": 8}, PARAMETERS + 2 * 192),
        ({"model_type": "qwen2"}, PARAMETERS + 2 * (8 + 4 + 4)),
        ({"model_type": "qwen3"}, PARAMETERS + 2 * (4 + 4)),
        ({"attention_bias": True, "mlp_bias": True}, PARAMETERS + 2 * (8 + 4 + 4 + 8) + 2 * (16 + 16 + 8)),
        ({"num_local_experts": 3, "model_type": "mixtral"}, PARAMETERS + 2 * (2 * 384 + 3 * 8)),
    ],
    ids=["llama", "untied", "wide heads", "qwen2", "qwen3", "biases", "mixtral"],
)
def test_parameters_are_counted_from_the_config(fields: dict, parameters: int):
    config = {**ARCHITECTURE, "vocab_size": 6, "tie_word_embeddings": True, **fields}
    assert shape_of(config).parameters == parameters


def test_parameters_on_disk_are_counted_from_the_headers_alone(tmp_path: Path):
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [60, 64]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    (tmp_path / "config.json").write_text(json.dumps({**ARCHITECTURE, "vocab_size": 6}))
    assert count_stored(tmp_path) == 16
    assert read_shape(ModelBlock(path=str(tmp_path))).parameters == 16
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(b"no")
    with pytest.raises(UnknownShape, match="is no safetensors file"):
        count_stored(tmp_path)


def test_a_config_without_the_common_fields_is_no_shape():
    with pytest.raises(UnknownShape, match="its config has no hidden_size"):
        shape_of({"model_type": "mamba"})


def test_ranks_that_share_tokens_hold_that_share_of_the_activations(recipe_file: Path):
    alone, shared = (plan_of(recipe_file, f"trainer.sequence_parallel={n}").roles[0].parts or {} for n in (1, 2))
    assert shared["activations"] * 2 == alone["activations"]


def test_a_plan_shows_what_the_chat_template_reads(recipe_file: Path):
    assert "\ntemplate" not in render(plan_of(recipe_file))
    plan = plan_of(recipe_file, "model.chat_template_kwargs={enable_thinking: false, effort: low}")
    assert "template   reads enable_thinking: false\n           reads effort: low\n" in render(plan)


@pytest.mark.parametrize("kind", ["llama", "lfm2", "bert"])
def test_the_plan_says_how_sequences_go_through_the_model(recipe_file: Path, kind: str):
    recipe_file.write_text(TINY.replace("model_type: llama", f"model_type: {kind}"))
    says = {"llama": "its sequences packed", "lfm2": "not packed: its layers carry a state", "bert": "refused as soon"}
    assert says[kind] in render(make_plans(load_recipe(recipe_file), LAPTOP)[0])
