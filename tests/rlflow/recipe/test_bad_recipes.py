"""Recipes that cannot run: each problem names file, line and key, and says what to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from rlflow.recipe import RecipeError, load_recipe
from rlflow.recipe.problems import nearest

GOOD = """\
algorithm: {name: grpo, group_size: 4}
model: {path: org/model}
data:
  train: {path: org/data}
  prompts_per_step: 8
rewards:
  - {name: exact_match}
rollout: {max_new_tokens: 16}
trainer: {learning_rate: 1e-6}
run: {steps: 10}
"""


@dataclass(frozen=True)
class Bad:
    """The good recipe with line ``line`` replaced."""

    line: int
    text: str
    key: str
    says: str
    at: int | None = None
    """Where the problem is reported, when it is not ``line``."""


BAD = {
    "misspelt key": Bad(
        1, "algorithm: {name: grpo, group_sise: 4}", "algorithm.group_sise", "did you mean group_size?"
    ),
    "misspelt block": Bad(9, "trianer: {learning_rate: 1e-6}", "trianer", "did you mean trainer?"),
    "key of another block": Bad(
        10, "run: {steps: 10, learning_rate: 1e-6}", "run.learning_rate", "learning_rate belongs to `trainer`"
    ),
    "key of a block at the top": Bad(9, "max_new_tokens: 3", "max_new_tokens", "belongs to `rollout`"),
    "block inside a block": Bad(9, "trainer: {rollout: {}}", "trainer.rollout", "belongs to the top level"),
    "another framework's name": Bad(
        8, "rollout: {max_completion_length: 9}", "rollout.max_completion_length", "did you mean max_new_tokens?"
    ),
    "another framework's name, another block": Bad(
        9, "trainer: {num_generations: 8}", "trainer.num_generations", "did you mean algorithm.group_size?"
    ),
    "misspelt key of another block": Bad(
        10, "run: {steps: 1, gradient_checkpoint: true}", "run.gradient_checkpoint", "trainer.gradient_checkpointing?"
    ),
    "key like no other": Bad(10, "run: {steps: 1, zzz: 1}", "run.zzz", "keys here are steps, epochs, stop_at_score"),
    "misspelt key in a list": Bad(7, "  - {name: exact_match, wieght: 1}", "rewards.0.wieght", "did you mean weight?"),
    "misspelt key in a nested block": Bad(
        1, "algorithm: {name: grpo, kl: {coeff: 0.1}}", "algorithm.kl.coeff", "did you mean coef?"
    ),
    "misspelt key in one of several sources": Bad(
        4, "  train: [{path: a/b}, {pth: c/d}]", "data.train.1.pth", "did you mean path?"
    ),
    "unknown algorithm": Bad(1, "algorithm: {name: gprpo}", "algorithm.name", "did you mean grpo?"),
    "unknown choice": Bad(8, "rollout: {engine: vlm}", "rollout.engine", "did you mean vllm?"),
    "unknown choice like no other": Bad(
        9, "trainer: {schedule: step}", "trainer.schedule", "must be one of constant, linear, cosine; is step"
    ),
    "unknown tracker": Bad(9, "tracking: [console, wandd]", "tracking.1", "did you mean wandb?"),
    "text for a number": Bad(9, "trainer: {learning_rate: fast}", "trainer.learning_rate", "a number, is fast"),
    "quoted number": Bad(9, "trainer: {learning_rate: '1e-6'}", "trainer.learning_rate", "must be a number"),
    "true for a number": Bad(5, "  prompts_per_step: true", "data.prompts_per_step", "a whole number, is true"),
    "fraction for a count": Bad(5, "  prompts_per_step: 1.5", "data.prompts_per_step", "a whole number, is 1.5"),
    "float for a count": Bad(10, "run: {steps: 1e3}", "run.steps", "write 1000"),
    "number for text": Bad(2, "model: {path: 5}", "model.path", "put it in quotes"),
    "number for true or false": Bad(
        9, "trainer: {gradient_checkpointing: 3}", "trainer.gradient_checkpointing", "true or false, is 3"
    ),
    "negative": Bad(9, "trainer: {learning_rate: -1.0}", "trainer.learning_rate", "must be more than 0, is -1"),
    "zero": Bad(5, "  prompts_per_step: 0", "data.prompts_per_step", "must be more than 0, is 0"),
    "not finite": Bad(9, "trainer: {learning_rate: .inf}", "trainer.learning_rate", "must be a finite number"),
    "beyond one": Bad(8, "rollout: {top_p: 1.5}", "rollout.top_p", "must be at most 1, is 1.5"),
    "too few values": Bad(9, "trainer: {optimizer: {betas: [0.9]}}", "trainer.optimizer.betas.1", "has too few values"),
    "too many values": Bad(
        9, "trainer: {optimizer: {betas: [0.9, 0.9, 0.9]}}", "trainer.optimizer.betas", "has 3 values, at most 2"
    ),
    "block for a value": Bad(9, "trainer: {learning_rate: {a: 1}}", "trainer.learning_rate", "is a block of keys"),
    "value for a block": Bad(9, "trainer: fsdp", "trainer", "must be a block of keys, is fsdp"),
    "list for a block": Bad(9, "trainer: [fsdp]", "trainer", "must be a block of keys, is a list"),
    "block for a list": Bad(9, "tracking: {console: true}", "tracking", "must be a list"),
    "empty block": Bad(9, "trainer:", "trainer", "has no value"),
    "empty value": Bad(9, "trainer: {learning_rate: }", "trainer.learning_rate", "has no value"),
    "missing block": Bad(2, "", "model", "is missing: The policy's starting point.", at=1),
    "missing key": Bad(1, "algorithm: {group_size: 4}", "algorithm.name", "is missing"),
    "missing data": Bad(4, "  shuffle: true", "data.train", "is missing: Where the rows come from", at=3),
    "no steps": Bad(10, "run: {seed: 1}", "run.steps", "give steps or epochs"),
    "steps and epochs": Bad(10, "run: {steps: 1, epochs: 1}", "run.steps", "not both (epochs: null takes it away)"),
    "path and generator": Bad(
        4, "  train: {path: a/b, generator: arithmetic}", "data.train.path", "give path or generator, not both"
    ),
    "no source": Bad(4, "  train: {rows: 5}", "data.train.path", "give path or generator"),
    "no sources": Bad(4, "  train: []", "data.train", "is empty"),
    "arguments of no generator": Bad(4, "  train: {path: a/b, args: {a: 1}}", "data.train.args", "are a generator's"),
    "name and plugin": Bad(7, "  - {name: exact_match, plugin: a.py:f}", "rewards.0.name", "not both"),
    "neither name nor plugin": Bad(7, "  - {weight: 1}", "rewards.0.name", "give name or plugin"),
    "plugin without function": Bad(7, "  - {plugin: a.py}", "rewards.0.plugin", "is not of the form file.py:function"),
    "the same reward twice": Bad(7, "  - {name: a}\n  - {name: a}", "rewards", "give one a `label`", at=6),
    "a label with spaces": Bad(7, "  - {name: a, label: b c}", "rewards.0.label", "'b c' is part of metrics' names"),
    "path and architecture": Bad(
        2, "model: {path: a/b, architecture: {model_type: llama}, characters: ab}", "model.path", "not both"
    ),
    "no model": Bad(2, "model: {dtype: float32}", "model.path", "give path or architecture"),
    "architecture without characters": Bad(
        2, "model: {architecture: {model_type: llama}}", "model.characters", "a new model needs a tokenizer"
    ),
    "architecture without type": Bad(
        2, "model: {architecture: {hidden_size: 8}, characters: ab}", "model.architecture", "needs model_type"
    ),
    "characters of an old model": Bad(2, "model: {path: a/b, characters: ab}", "model.characters", "give architecture"),
    "group of one": Bad(
        1, "algorithm: {name: grpo, group_size: 1}", "algorithm.group_size", "set group_size to 2 or more"
    ),
    "adaptive KL from nothing": Bad(
        1, "algorithm: {name: grpo, kl: {coef: 0, target: 0.1}}", "algorithm.kl.target", "and 0 stays 0: set kl.coef"
    ),
    "updates that do not divide": Bad(
        1,
        "algorithm: {name: grpo, groups: {updates_per_step: 3}}",
        "algorithm.groups.updates_per_step",
        "3 does not divide data.prompts_per_step (8)",
    ),
    "one engine over no GPUs": Bad(
        8, "rollout: {tensor_parallel_size: 2}", "rollout.tensor_parallel_size", "set gpus_per_worker: 2"
    ),
    "options of the other engine": Bad(
        9, "trainer: {deepspeed: {stage: 3}}", "trainer.deepspeed", "set engine: deepspeed, or remove them"
    ),
    "options of the default engine": Bad(
        9,
        "trainer: {engine: deepspeed, fsdp: {offload: true}}",
        "trainer.fsdp",
        "set engine: fsdp, or remove them",
    ),
    "copies that do not divide the ranks": Bad(
        9, "trainer: {workers: 3, fsdp: {replicas: 2}}", "trainer.fsdp.replicas", "2 does not divide workers (3)"
    ),
    "a stage that does not exist": Bad(
        9, "trainer: {engine: deepspeed, deepspeed: {stage: 4}}", "trainer.deepspeed.stage", "must be one of 1, 2, 3"
    ),
    "whole weights on the host": Bad(
        9,
        "trainer: {engine: deepspeed, deepspeed: {offload: all}}",
        "trainer.deepspeed.offload",
        "set stage: 3, or offload: optimizer",
    ),
    "8 bits on a CPU": Bad(
        9, "trainer: {optimizer: {kind: adamw_8bit}}", "trainer.optimizer.kind", "runs on GPUs: set gpus_per_worker"
    ),
    "8 bits on the host": Bad(
        9,
        "trainer: {gpus_per_worker: 1, optimizer: {kind: adamw_8bit}, fsdp: {offload: true}}",
        "trainer.optimizer.kind",
        "offload moves them away: choose one",
    ),
    "whole matrices with ZeRO": Bad(
        9,
        "trainer: {engine: deepspeed, optimizer: {kind: muon}}",
        "trainer.optimizer.kind",
        "set engine: fsdp, or kind: adamw",
    ),
    "layers that are no list": Bad(
        2,
        "model: {path: a/b, adapter: {target_modules: q_proj}}",
        "model.adapter.target_modules",
        "must be all-linear, or a list of names such as [q_proj, v_proj]; is q_proj",
    ),
    "no layers": Bad(
        2, "model: {path: a/b, adapter: {target_modules: []}}", "model.adapter.target_modules", "or write all-linear"
    ),
    "misspelt key of an adapter": Bad(
        2, "model: {path: a/b, adapter: {rnk: 4}}", "model.adapter.rnk", "did you mean rank?"
    ),
    "another framework's name for an adapter's key": Bad(
        2, "model: {path: a/b, lora_alpha: 4}", "model.lora_alpha", "did you mean adapter.alpha?"
    ),
    "keys that an adapter on disk settles": Bad(
        2, "model: {path: a/b, adapter: {path: c/d, rank: 4}}", "model.adapter.rank", "remove one of the two"
    ),
    "an adapter of a new model": Bad(
        2,
        "model: {architecture: {model_type: llama}, characters: ab, adapter: {}}",
        "model.adapter",
        "has nothing to adapt in a new model: remove it",
    ),
    "dropout where logprobs are compared": Bad(
        2,
        "model: {path: a/b, adapter: {dropout: 0.1}}",
        "model.adapter.dropout",
        "with dropout those of a policy differ from its own: set 0",
    ),
    "greedy samples": Bad(
        9, "evaluation: {data: {path: a/b}, samples: 4}", "evaluation.samples", "4 greedy completions are all the same"
    ),
    "a key given twice": Bad(9, "trainer:\n  workers: 1\n  workers: 2", "trainer.workers", "first on line 10", at=11),
    "a block given twice": Bad(9, "run: {seed: 1}", "run", "is given twice, first on line 9", at=10),
    "not YAML": Bad(9, "trainer: {learning_rate: 1", "", "is not YAML", at=10),
    "tabs": Bad(9, "trainer:\n\tworkers: 1", "", "is not YAML", at=10),
    "a Python object": Bad(9, "trainer: !!python/object:os.system {}", "", "is not YAML"),
    "an alias without anchor": Bad(9, "trainer: *shared", "", "is not YAML"),
    "an alias that holds itself": Bad(9, "trainer: &a {b: *a}", "", "an alias that contains itself"),
    "a variable that is not set": Bad(
        10, "run: {steps: 1, output_dir: '${RLFLOW_NO_SUCH}/x'}", "run.output_dir", "no variable RLFLOW_NO_SUCH: set it"
    ),
    "an empty path": Bad(10, "run: {steps: 1, output_dir: ''}", "run.output_dir", "is empty: write a path"),
    "extends a variable that is not set": Bad(9, "extends: $RLFLOW_NO_SUCH", "extends", "no variable RLFLOW_NO_SUCH"),
    "extends nothing": Bad(9, "extends: [a]", "extends", "must name one file"),
    "extends a missing file": Bad(9, "extends: basis.yaml", "extends", "there is no file"),
    "extends itself": Bad(9, "extends: recipe.yaml", "extends", "goes in a circle"),
    "stages that are no list": Bad(9, "stages: {sft: {}}", "stages", "must be a list of stages"),
    "a stage without name": Bad(9, "stages: [{run: {}}]", "stages.0.name", "needs a name"),
    "a stage that leaves the directory": Bad(9, "stages: [{name: ../x}]", "stages.0.name", "use letters"),
    "two stages of one name": Bad(9, "stages: [{name: a}, {name: a}]", "stages.1.name", "two stages called a"),
}


def write(directory: Path, line: int, text: str) -> Path:
    lines = GOOD.splitlines()
    path = directory / "recipe.yaml"
    path.write_text("\n".join([*lines[: line - 1], text, *lines[line:], ""]))
    return path


def refuse(bad: Bad, directory: Path) -> None:
    """Asserts that the recipe is refused with one message, of the right place, key and words."""
    path = write(directory, bad.line, bad.text)
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    problems = raised.value.problems
    assert len(problems) == 1, str(raised.value)
    assert problems[0].file == str(path)
    assert problems[0].line == (bad.at or bad.line)
    assert problems[0].key == bad.key
    assert bad.says in problems[0].message
    assert str(raised.value).startswith(f"{path}:{problems[0].line}: {bad.key}")


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_bad_recipe_is_one_message_with_line_key_and_remedy(bad: Bad, tmp_path: Path):
    refuse(bad, tmp_path)


def test_the_good_recipe_is_good(tmp_path: Path):
    assert load_recipe(write(tmp_path, 10, "run: {steps: 10}"))


def test_all_problems_of_a_file_come_at_once_in_the_order_of_its_lines(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "algorithm: {name: sft}\n"
        "model: {pth: org/model}\n"
        "data: {train: {path: a/b}, prompts_per_step: many}\n"
        "rewards: [{name: exact_match, plugin: a.py:f}]\n"
        "run: {stesp: 4, seed: 1, seed: 2}\n"
    )
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    found = [(problem.line, problem.key) for problem in raised.value.problems]
    assert found == [
        (2, "model.pth"),
        (3, "data.prompts_per_step"),
        (4, "rewards"),
        (4, "rewards.0.name"),
        (5, "run.seed"),
        (5, "run.stesp"),
    ]


def test_a_conflict_that_only_follows_from_a_typo_is_not_reported(tmp_path: Path):
    with pytest.raises(RecipeError) as raised:
        load_recipe(write(tmp_path, 6, "reward:"))
    assert [problem.key for problem in raised.value.problems] == ["reward"]


def test_online_algorithms_need_rewards_and_demonstrations_refuse_them(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    shared = "model: {path: a/b}\ndata: {train: {path: a/b}}\nrun: {steps: 1}\n"
    path.write_text("algorithm: {name: grpo}\n" + shared)
    with pytest.raises(RecipeError, match=r"1: rewards: grpo learns from rewards: give at least one"):
        load_recipe(path)
    path.write_text("algorithm: {name: sft}\nrewards: [{name: exact_match}]\n" + shared)
    with pytest.raises(RecipeError, match=r"2: rewards: sft does not use rewards: remove them"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("override", "trainer", "says"),
    [
        ("model.dtype=bfloat16", "{fsdp: {mixed_precision: true}}", "fsdp.mixed_precision: keeps weights in float32"),
        (
            "algorithm.name=ppo",
            "{workers: 2, fsdp: {replicas: 2}}",
            r"fsdp.replicas: 2 .* algorithm.critic.workers \(1\)",
        ),
        (
            "algorithm.name=ppo",
            "{gpus_per_worker: 1, optimizer: {kind: adamw_8bit}}",
            "optimizer.kind: steps the critic",
        ),
    ],
)
def test_an_engine_that_does_not_fit_the_model_or_critic_says_so(override, trainer, says, tmp_path: Path):
    path = write(tmp_path, 9, f"trainer: {trainer}")
    with pytest.raises(RecipeError, match=f"9: trainer.{says}"):
        load_recipe(path, [override])


def test_kernels_for_gpus_are_refused_without_them(tmp_path: Path):
    path = write(tmp_path, 9, "model: {path: a/b, liger: true}")
    with pytest.raises(RecipeError, match=r"9: model.liger: are kernels for GPUs: set trainer.gpus_per_worker"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("adapter", "other", "says"),
    [
        (
            "{lora_plus_ratio: 4}",
            "trainer.optimizer.kind=muon",
            "model.adapter.lora_plus_ratio: is a ratio of AdamW's learning rates: set trainer.optimizer.kind: adamw",
        ),
        (
            "{quantize: nf4}",
            "rollout={engine: torch, gpus_per_worker: 1}",
            "model.adapter.quantize: is trained with engine fsdp, on GPUs, without offload: set trainer",
        ),
        (
            "{quantize: nf4}",
            "trainer.gpus_per_worker=1",
            "model.adapter.quantize: generates with the base in few bits too: set rollout.engine: torch",
        ),
    ],
)
def test_what_an_adapter_rules_out_in_other_blocks_says_so(adapter: str, other: str, says: str, tmp_path: Path):
    path = write(tmp_path, 2, f"model: {{path: a/b, adapter: {adapter}}}")
    with pytest.raises(RecipeError) as raised:
        load_recipe(path, [other])
    (problem,) = raised.value.problems
    assert f"{problem.key}: {problem.message}".startswith(says)


def test_an_adapter_beside_a_head_begins_anew(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "algorithm: {name: reward_model}\nmodel: {path: a/b, adapter: {path: c/d}}\n"
        "data: {train: {path: a/b}}\nrun: {steps: 1}\n"
    )
    with pytest.raises(RecipeError, match=r"2: model\.adapter\.path: reward_model begins a new adapter: remove path"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"- a\n- b\n", "holds no keys"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"algorithm: \x00\n", "is not YAML"),
    ],
    ids=["empty", "a list", "not UTF-8", "a NUL"],
)
def test_a_file_that_is_no_recipe_is_refused(content: bytes, says: str, tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    assert raised.value.problems[0].file == str(path)
    assert says in str(raised.value)


def test_a_missing_file_names_the_one_that_was_meant(tmp_path: Path):
    (tmp_path / "arithmetic.yaml").write_text(GOOD)
    with pytest.raises(RecipeError, match=r"arithmetik.yaml: there is no such file \(did you mean .*arithmetic.yaml"):
        load_recipe(tmp_path / "arithmetik.yaml")
    with pytest.raises(RecipeError, match="is a directory"):
        load_recipe(tmp_path)


def test_a_word_in_capitals_is_near_the_same_word_in_small_letters():
    assert (nearest("GRPO", ["ppo", "grpo"]), nearest("Lora", ["LoRA", "x"]), nearest("GKD", ["sft"])) == (
        "grpo",
        "LoRA",
        None,
    )
