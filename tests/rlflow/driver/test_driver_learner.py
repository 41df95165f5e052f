"""How micro-batches are dealt to ranks, and results counted, when ranks share tokens: by actors that only count."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from counting_ranks import Ranks, learner_of, recipe_of

from rlflow.actors.trainer import Measured
from rlflow.driver.learner import Learner
from rlflow.metrics import Metric
from rlflow.types import MicroBatch, Sample


def counted(batches: list[MicroBatch]) -> dict[str, Metric]:
    lengths = [int(batch.loss_mask.sum()) for batch in batches]
    return {"loss/tokens": Metric(float(sum(lengths))), "longest": Metric(float(max(lengths)), "max", "max")}


def measured(batches: list[MicroBatch]) -> Measured:
    metrics = counted(batches)
    return Measured(2 * metrics["loss/tokens"].value, metrics)


def numbered(batches: list[MicroBatch]) -> np.ndarray:
    return np.concatenate([batch.token_ids.astype(np.float32) for batch in batches])


ANSWERS = {"forward_backward": counted, "evaluate": measured, "logprobs": numbered, "values": numbered}


def samples(count: int, group_size: int = 1) -> list[Sample]:
    """Of unlike lengths; sample i has tokens of 100 i and more."""
    found = []
    for i in range(count):
        tokens = (100 * (i + 1) + np.arange(3 + i % 4)).astype(np.int32)
        weights = np.zeros(len(tokens), dtype=np.float32)
        found.append(Sample(tokens, np.arange(len(tokens)) > 0, weights, group=i // group_size, label=(-1.0) ** i))
    return found


def make(name: str, share: int, num_steps: int = 1, critic_steps: int = 0, **sizes: int) -> tuple[Learner, dict]:
    """A learner and its ranks by name; ``sizes`` says how many each model has."""
    recipe = recipe_of(
        name,
        algorithm={"critic": {"workers": sizes["critic"], "warmup_steps": critic_steps}} if "critic" in sizes else {},
        trainer={
            "workers": sizes["trainer"],
            "sequence_parallel": share,
            "tokens_per_micro_batch": 8,
            "learning_rate": 0.1,
        },
    )
    ranks = {model: Ranks(size, ANSWERS) for model, size in sizes.items()}
    if recipe.places_reference and "reference" not in ranks:
        ranks["reference"] = Ranks(1, ANSWERS)
    return learner_of(recipe, num_steps, **ranks), ranks


@pytest.mark.parametrize(("workers", "share"), [(2, 1), (2, 2), (4, 2), (6, 3)])
def test_ranks_that_share_tokens_get_the_same_and_count_once(monkeypatch, workers, share):
    # Each look at the clock is a second later than the one before: an update takes one.
    monkeypatch.setattr(time, "perf_counter", itertools.count(0.0, 1.0).__next__)
    learner, of = make("grpo", share, trainer=workers)
    batch, ranks = samples(9), of["trainer"]
    metrics = learner.update(batch, 0)
    for rank in range(workers):
        assert ranks.samples(rank) == ranks.samples(rank // share * share)
    assert sorted(i for rank in range(0, workers, share) for i in ranks.samples(rank)) == list(range(9))
    assert metrics["loss/tokens"] == sum(sample.loss_mask.sum() for sample in batch)
    assert metrics["longest"] == max(int(b.loss_mask.sum()) for rank in ranks.given for b in rank)
    assert metrics["perf/trained_tokens_per_s"] == sum(len(sample.token_ids) for sample in batch)
    held_out = learner.evaluate(batch)
    assert held_out.metrics["loss/tokens"].value == held_out.loss / 2 == metrics["loss/tokens"]


def test_results_of_tokens_come_back_once_in_the_order_of_the_samples():
    learner, _ = make("grpo", 2, trainer=4)
    batch = samples(7)
    for sample, values in zip(batch, learner.logprobs(batch), strict=True):
        assert values.tolist() == sample.token_ids.tolist()


def test_pairs_stay_together():
    learner, ranks = make("dpo", 2, trainer=4)
    learner.update(samples(6, group_size=2), 0)
    for rank in range(4):
        assert all(i ^ 1 in ranks["trainer"].samples(rank) for i in ranks["trainer"].samples(rank))


def test_the_critic_shares_tokens_over_its_own_ranks():
    learner, ranks = make("ppo", 2, trainer=4, critic=2)
    batch = samples(7)
    assert learner.update(batch, 0)["loss/tokens"] == sum(sample.loss_mask.sum() for sample in batch)
    assert ranks["critic"].samples(0) == ranks["critic"].samples(1) == list(range(7))
    with_values = learner.score(batch)
    assert [s.old_values.tolist() for s in with_values if s.old_values is not None] == [
        s.token_ids.tolist() for s in batch
    ]


def test_reference_actors_do_not_share_tokens():
    learner, ranks = make("dpo", 2, trainer=2, reference=2)
    learner.score(samples(6))
    reference = ranks["reference"]
    assert sorted(reference.samples(0) + reference.samples(1)) == list(range(6))
    assert reference.samples(0) and reference.samples(1)


def test_a_field_that_the_samples_have_is_not_computed_again():
    learner, ranks = make("dpo", 1, trainer=1, reference=1)
    scored = learner.score(samples(4))
    assert learner.score(scored) == scored
    assert [method for method, _ in ranks["reference"].calls] == ["logprobs"]


@pytest.mark.parametrize("critic_only", [False, True])
def test_the_critic_has_a_learning_rate_of_its_own(critic_only):
    learner, ranks = make("ppo", 1, num_steps=2, critic_steps=int(critic_only), trainer=2, critic=1)
    metrics = learner.update(samples(4), 0)
    assert ranks["critic"].rates == [learner.algorithm.critic.learning_rate] != [0.1]
    assert metrics["critic/learning_rate"] == learner.algorithm.critic.learning_rate
    assert ranks["trainer"].rates == ([] if critic_only else [0.1])
    assert ("trainer/learning_rate" in metrics) is not critic_only


def test_every_update_gets_as_many_groups_however_large_they_are():
    recipe = recipe_of("dapo", algorithm={"groups": {"updates_per_step": 2}}, data={"prompts_per_step": 4})
    trainer = Ranks(1, ANSWERS)
    groups = [0, 0, 0, 1, 2, 3, 3]
    batch = [replace(sample, group=group) for sample, group in zip(samples(7), groups, strict=True)]
    learner_of(recipe, trainer=trainer).update(batch, 0)
    trained = [given for method, given in trainer.calls if method == "forward_backward"]
    assert [sum(len(b.sample_indices) for b in of_rank) for (of_rank,) in trained] == [4, 3]


def test_a_checkpoint_has_the_critic_beside_the_policy_and_what_the_learner_counted(tmp_path: Path):
    learner, ranks = make("ppo", 1, trainer=1, critic=1)
    learner.save(tmp_path)
    assert ranks["trainer"].places == [("save", tmp_path)]
    assert ranks["critic"].places == [("save", tmp_path / "critic")] and (tmp_path / "critic").is_dir()
    assert learner.state() == {"kl_coef": None, "has_trained": False}
    learner.load(tmp_path, {"kl_coef": 0.5, "has_trained": False})
    assert ranks["trainer"].places[-1] == ("load", tmp_path)
    assert ranks["critic"].places[-1] == ("load", tmp_path / "critic")
    assert learner.algorithm.kl.coef == 0.5 and learner.state() == {"kl_coef": 0.5, "has_trained": False}


def test_a_checkpoint_that_does_not_say_whether_anything_was_trained_is_of_a_run_that_has(tmp_path: Path):
    learner, _ = make("sft", 1, trainer=1)
    learner.load(tmp_path, {"kl_coef": None})
    assert learner.has_trained
