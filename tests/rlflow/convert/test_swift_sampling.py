"""Commands of `swift sample`."""

from __future__ import annotations

from rlflow.convert import convert
from rlflow.recipe import SampleBlock, SourceBlock

COMMAND = "swift sample --model m --dataset d/e#50 --num_return_sequences 5"


def test_without_a_judge_all_answers_are_kept(converted):
    recipe, _ = converted(f"{COMMAND} --sampler_engine vllm --temperature 0.7 --max_new_tokens 64 --top_k -1")
    algorithm, train = recipe.algorithm, recipe.data.train
    assert isinstance(algorithm, SampleBlock) and isinstance(train, SourceBlock)
    assert (algorithm.group_size, algorithm.keep.form, algorithm.keep.at_most, recipe.rewards) == (
        5,
        "answers",
        None,
        [],
    )
    assert (train.path, train.rows, recipe.run.epochs, recipe.model.dtype) == ("d/e", 50, 1, "bfloat16")
    assert (recipe.rollout.engine, recipe.rollout.temperature, recipe.rollout.top_k) == ("vllm", 0.7, 0)


def test_with_judges_the_best_are_kept_each_with_the_worst(converted):
    recipe, _ = converted(f"{COMMAND} --n_best_to_keep 2 --orm_model math --prm_model r/m --prm_threshold 0.5")
    algorithm = recipe.algorithm
    assert isinstance(algorithm, SampleBlock)
    assert (algorithm.keep.form, algorithm.keep.at_most) == ("pairs", 2)
    assert algorithm.keep.where == "reward/math_accuracy > 0 and reward/reward_model >= 0.5"
    assert [reward.name for reward in recipe.rewards] == ["math_accuracy", "reward_model"]


def test_a_search_has_no_counterpart():
    [conversion] = convert(f"{COMMAND} --sampler_type mcts")
    assert conversion.recipe is None and "no such algorithm" in conversion.notes[0].text
