"""Options that exclude each other, or that the chosen algorithm has no use for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from rlflow.recipe import RecipeError, load_recipe


def problems_of(tmp_path: Path, *lines: str, model: str = "{path: a/b}", overrides: Sequence[str] = ()) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join([f"model: {model}", "data: {train: {path: a/b}}", *lines]) + "\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("algorithm", "others", "says"),
    [
        ("sft", "run: {steps: 1, stop_at_score: 0.5}", "nothing decides what passes"),
        ("dpo, preference: {loss: orpo, reference_free: false}", "run: {steps: 1}", "must be true, is false"),
        ("dpo, preference: {loss: exo_pair, label_smoothing: 0.0}", "run: {steps: 1}", "must be more than 0"),
        (
            "grpo, correction: {old_policy: engine, mode: mask}",
            "run: {steps: 1}",
            "old_policy: must be trainer, is engine (engine belongs to correction.mode none, not to",
        ),
        ("grpo, correction: {mode: mask, low: 3.0}", "run: {steps: 1}", "3 is not below high (2): no weight is within"),
        ("ppo, kl: {target: 1.0, horizon: 4}", "run: {steps: 1}\nrewards: [{name: exact_match}]", "would jump"),
        (
            "ppo, critic: {workers: 3}",
            "run: {steps: 1}\nrewards: [{name: exact_match}]\ntrainer: {workers: 2, fsdp: {replicas: 2}}",
            "does not divide algorithm.critic.workers (3)",
        ),
        (
            "sft",
            "run: {steps: 1}\ntrainer: {workers: 3, sequence_parallel: 2}",
            "trainer.sequence_parallel: 2 does not divide workers (3), and so many ranks share each micro-batch: set "
            "workers to a multiple of it, or sequence_parallel: 1",
        ),
        (
            "ppo, critic: {workers: 1}",
            "run: {steps: 1}\nrewards: [{name: exact_match}]\ntrainer: {workers: 2, sequence_parallel: 2}",
            "2 does not divide algorithm.critic.workers (1)",
        ),
        (
            "grpo",
            "run: {steps: 1}\nrewards: [{name: cosine}]\n"
            "evaluation: {data: {path: a/b}, reward: {name: cosine, weight: 2.0}}",
            "2 are called cosine",
        ),
    ],
)
def test_options_that_would_do_nothing_or_harm_are_named(tmp_path: Path, algorithm: str, others: str, says: str):
    assert says in problems_of(tmp_path, f"algorithm: {{name: {algorithm}}}", others)


@pytest.mark.parametrize(
    ("loss", "says"),
    [("infonce", "in_batch_negatives: false"), ("online_contrastive", "or set loss: contrastive")],
)
def test_a_step_of_one_row_has_nobody_to_compare_it_with(tmp_path: Path, loss: str, says: str):
    lines = (f"algorithm: {{name: embedding, embedding: {{loss: {loss}}}}}", "run: {steps: 1}")
    said = problems_of(tmp_path, *lines, overrides=["data.prompts_per_step=1"])
    assert "data.prompts_per_step: is 1" in said and says in said


def test_losses_on_routers_need_whole_sequences(tmp_path: Path):
    lines = ("algorithm: {name: sft}", "run: {steps: 1}", "trainer: {workers: 2, sequence_parallel: 2}")
    said = problems_of(tmp_path, *lines, model="{path: a/b, router: {z_coef: 0.1}}")
    assert "model.router: weighs whole sequences, and ranks would have slices of them" in said


@pytest.mark.parametrize("trainer", ["{}", "{engine: deepspeed}", "{fsdp: {offload: true}}"])
def test_float16_is_trained_by_no_engine(tmp_path: Path, trainer: str):
    lines = ("algorithm: {name: sft}", "run: {steps: 1}", f"trainer: {trainer}")
    said = problems_of(tmp_path, *lines, model="{path: a/b, dtype: float16}")
    assert "recipe.yaml:1: model.dtype: float16 is not trained here" in said
    assert said.endswith("set bfloat16")


def test_several_ranks_do_not_share_a_gpu(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    lines = ("algorithm: {name: ppo}", "run: {steps: 1}", "rewards: [{name: exact_match}]")
    policy = problems_of(tmp_path, *lines, "trainer: {workers: 2, gpus_per_worker: 0.5}")
    assert "trainer.gpus_per_worker: 2 ranks with 0.5 of a GPU would share one" in policy
    assert policy.endswith("set gpus_per_worker: 1, or workers: 1")
    critic = problems_of(tmp_path, "algorithm: {name: ppo, critic: {workers: 2, gpus_per_worker: 0.25}}", *lines[1:])
    assert critic.endswith("set algorithm.critic.gpus_per_worker: 1, or algorithm.critic.workers: 1")
    # One rank may share its GPU with another role, and ranks on CPUs have none to share.
    problems_of(tmp_path, *lines, "trainer: {workers: 2, gpus_per_worker: 0.5}")
    assert load_recipe(path, ["trainer.workers=1"])
    assert load_recipe(path, ["trainer.gpus_per_worker=0"])


ONLINE = ("run: {steps: 1}", "rewards: [{name: exact_match}]")


CUTS = [
    "rollout: {top_p: 0.9}",
    "rollout: {top_k: 20}",
    "sampling: {min_p: 0.1}",
    "sampling: {repetition_penalty: 1.1}",
]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    ("correction", "key", "remedy"),
    [
        ("mode: truncate", "mode", "set mode: none, or remove "),
        ("mode: mask", "mode", "set mode: none"),
        ("mode: weighted_mask", "mode", "set mode: none"),
        ("level: sequence", "mode", "set mode: none"),
        ("high: 3.0", "mode", "set mode: none"),
        ("old_policy: engine", "old_policy", "set old_policy: trainer"),
        ("old_policy: engine, mode: none", "old_policy", "set old_policy: trainer"),
    ],
)
def test_cut_sampling_and_a_use_of_the_engines_logprobs_exclude_each_other(tmp_path, cut, correction, key, remedy):
    algorithm = f"algorithm: {{name: grpo, correction: {{{correction}}}}}"
    said = problems_of(tmp_path, algorithm, *ONLINE, cut)
    line = 3 if f"{key}:" in correction else 6
    assert f"recipe.yaml:{line}: algorithm.correction.{key}: {cut.replace(': {', '.').partition(':')[0]} " in said
    assert remedy in said


@pytest.mark.parametrize(
    ("algorithm", "rollout", "mode"),
    [
        ("grpo", "", "truncate"),
        ("grpo", "top_p: 1.0, top_k: 0", "truncate"),
        ("grpo", "top_p: 0.9", "none"),
        ("grpo", "top_k: 20", "none"),
        ("grpo", "}\nsampling: {min_p: 0.0, repetition_penalty: 1.0, stop: [x]", "truncate"),
        ("grpo", "}\nsampling: {min_p: 0.1", "none"),
        ("grpo", "}\nsampling: {repetition_penalty: 0.9", "none"),
        # The KL in the reward, and the one that is to have a target, are the trainer's then.
        ("ppo, kl: {target: 1.0}", "top_p: 0.9", "none"),
        ("grpo, correction: {mode: none}", "top_p: 0.9", "none"),
        ("grpo, correction: {old_policy: engine}", "", "none"),
        ("grpo, correction: {low: 0.5}", "", "truncate"),
    ],
)
def test_engine_and_trainer_are_corrected_between_where_that_can_be(tmp_path, algorithm, rollout, mode):
    path = tmp_path / "recipe.yaml"
    lines = (f"algorithm: {{name: {algorithm}}}", *ONLINE, f"rollout: {{{rollout}}}")
    path.write_text("\n".join(["model: {path: a/b}", "data: {train: {path: a/b}}", *lines]))
    (recipe,) = load_recipe(path)
    assert recipe.algorithm.correction.mode == mode


def test_sets_of_one_name_are_refused_with_the_line_of_the_last(tmp_path):
    sets = ["evaluation:", "- {data: {path: a/b}}", "- {name: other, data: {path: a/b}}", "- {data: {path: c/d}}"]
    said = problems_of(tmp_path, "algorithm: {name: grpo}", *ONLINE, *sets)
    assert said.count("recipe.yaml:") == 1 and ":9: evaluation.2.name: 2 are called heldout: " in said


def test_what_is_wrong_with_one_set_of_several_is_said_with_its_line(tmp_path):
    sets = ["evaluation:", "- {data: {path: a/b}}", "- {name: other, data: {path: a/b}, samples: 3}"]
    said = problems_of(tmp_path, "algorithm: {name: grpo}", *ONLINE, *sets)
    assert said.count("recipe.yaml:") == 1 and ":8: evaluation.1.samples: 3 greedy completions" in said
    said = problems_of(tmp_path, "algorithm: {name: grpo}", *ONLINE, *sets[:2], "- {nam: other, data: {path: a/b}}")
    assert ":8: evaluation.1.nam: unknown key here (did you mean name?)" in said
    assert "evaluation: is empty: give at least one set" in problems_of(
        tmp_path, "algorithm: {name: grpo}", *ONLINE, "evaluation: []"
    )


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ('sampling: {stop: "###"}', "sampling.stop: must be a list"),
        ('sampling: {stop: [""]}', "sampling.stop: has an empty text"),
        ("sampling: {min_p: 1.0}", "sampling.min_p: must be less than 1"),
        ("sampling: {repetition_penalty: 0.0}", "sampling.repetition_penalty: must be more than 0"),
        ("rollout: {min_p: 0.1}", "rollout.min_p: unknown key here (min_p belongs to `sampling`"),
        ("rollout: {stop: [a]}", "rollout.stop: unknown key here (stop belongs to `sampling`"),
    ],
)
def test_sampling_that_is_none_is_refused_and_keys_in_the_rollout_block_are_shown_their_place(tmp_path, block, says):
    assert says in problems_of(tmp_path, "algorithm: {name: grpo}", *ONLINE, block)
