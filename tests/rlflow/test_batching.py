from __future__ import annotations

import pickle

import numpy as np
import pytest

from rlflow.batching import deal, pack, unpack
from rlflow.types import Sample


def sample(length: int, value: int = 0) -> Sample:
    return Sample(
        token_ids=np.full(length, value, dtype=np.int32),
        loss_mask=np.arange(length) > 0,
        loss_weights=np.ones(length, dtype=np.float32),
        advantages=np.full(length, value, dtype=np.float32),
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_sample_lands_in_exactly_one_micro_batch_within_the_bound(num_ranks):
    lengths = np.random.default_rng(0).integers(2, 60, size=97)
    batches = pack([sample(n, i) for i, n in enumerate(lengths)], max_tokens=128, num_ranks=num_ranks)
    assert len(batches) == num_ranks
    assert len({len(rank) for rank in batches}) == 1
    flat = [batch for rank in batches for batch in rank]
    assert all(len(batch.token_ids) <= 128 for batch in flat)
    placed = sorted(int(i) for batch in flat for i in batch.sample_indices if i >= 0)
    assert placed == list(range(97))
    assert sum(rank.num_real_tokens for rank in batches) == lengths.sum()


def test_fields_positions_and_boundaries_stay_aligned():
    [[batch]] = pack([sample(3, 1), sample(2, 2)], max_tokens=100, num_ranks=1)
    assert batch.token_ids.tolist() == [1, 1, 1, 2, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.loss_mask.tolist() == [False, True, True, False, True]
    assert batch.advantages is not None and batch.advantages.tolist() == [1, 1, 1, 2, 2]
    assert batch.ref_logprobs is None


def test_a_ranks_micro_batches_are_views_of_one_array_a_field_also_on_the_other_side():
    samples = [sample(n, i) for i, n in enumerate([3, 2, 4, 2])]
    (rank,) = pack(samples, max_tokens=6, num_ranks=1)
    back = pickle.loads(pickle.dumps(rank))
    for batches in (rank, back):
        assert [batch.sample_indices.tolist() for batch in batches] == [[2, 3], [0, 1]]
        assert [batch.cu_seqlens.tolist() for batch in batches] == [[0, 4, 6], [0, 3, 5]]
        assert [batch.position_ids.tolist() for batch in batches] == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1]]
        assert all(np.shares_memory(batch.token_ids, batches.packed.token_ids) for batch in batches)
    assert [batch.token_ids.dtype for batch in rank[:1]] == [np.int32]
    assert rank[-1].loss_mask.tolist() == [False, True, True, False, True]
    with pytest.raises(IndexError):
        rank[2]


def test_a_sequence_longer_than_the_bound_is_alone():
    batches = pack([sample(5), sample(300), sample(5)], max_tokens=100, num_ranks=1)[0]
    assert sorted(len(batch.token_ids) for batch in batches) == [10, 300]


def test_units_stay_together_and_in_order():
    batches = pack([sample(10 + i) for i in range(12)], max_tokens=50, num_ranks=2, unit_size=2)
    for batch in (b for rank in batches for b in rank):
        pairs = batch.sample_indices.reshape(-1, 2)
        assert (pairs[:, 0] % 2 == 0).all()
        assert (pairs[:, 1] == pairs[:, 0] + 1).all()


def test_a_rank_without_work_gets_filler_that_has_no_loss():
    batches = pack([sample(5)], max_tokens=100, num_ranks=3)
    filler = batches[2][0]
    assert filler.sample_indices.tolist() == [-1]
    assert not filler.loss_mask.any()
    assert filler.advantages is not None


def test_results_find_their_way_back_to_their_samples():
    samples = [sample(n, i) for i, n in enumerate([7, 3, 12, 5, 9])]
    ranks = pack(samples, max_tokens=14, num_ranks=2)
    values = unpack(samples, ranks, [np.concatenate([batch.token_ids for batch in rank]) for rank in ranks])
    for i, (one, value) in enumerate(zip(samples, values, strict=True)):
        assert value.tolist() == [i] * len(one.token_ids)


def test_bins_are_close_to_the_bound_and_loads_are_balanced():
    lengths = np.clip(np.random.default_rng(1).lognormal(5, 0.8, size=2000), 2, 4000).astype(int)
    batches = pack([sample(n) for n in lengths], max_tokens=8192, num_ranks=4)
    loads = [sum(len(batch.token_ids) for batch in rank) for rank in batches]
    assert max(loads) / min(loads) < 1.01
    assert sum(len(rank) for rank in batches) <= 1.1 * lengths.sum() / 8192 + 4


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
@pytest.mark.parametrize("attention_cost", [0.0, 1 / 7780], ids=["tokens", "costs"])
@pytest.mark.parametrize(
    ("mean", "spread", "least", "most"), [(5.2, 0.35, 60, 500), (5.0, 0.8, 2, 4000)], ids=["like GSM8K", "lognormal"]
)
@pytest.mark.parametrize("number", [64, 256, 2048])
def test_at_most_a_hundredth_of_what_is_trained_is_no_real_token(
    number, mean, spread, least, most, attention_cost, num_ranks
):
    """Lengths as in benchmarks/packing.py: what ranks get, filler included, over the tokens of the samples."""
    lengths = np.clip(np.random.default_rng(3).lognormal(mean, spread, size=number), least, most).astype(int)
    batches = pack([sample(n) for n in lengths], max_tokens=8192, num_ranks=num_ranks, attention_cost=attention_cost)
    trained = sum(len(batch.token_ids) for of_rank in batches for batch in of_rank)
    assert lengths.sum() <= trained <= 1.01 * lengths.sum()


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_ranks_get_equal_costs_where_attention_makes_long_sequences_slow(num_ranks):
    lengths = np.clip(np.random.default_rng(2).lognormal(5, 0.8, size=256), 2, 4000).astype(int)
    samples = [sample(n) for n in lengths]

    def waiting(attention_cost: float) -> float:
        """Time of the slowest rank in each round of micro-batches, over the mean of all."""
        batches = pack(samples, max_tokens=8192, num_ranks=num_ranks, attention_cost=attention_cost)
        assert sum(len(of_rank) for of_rank in batches) == 8
        assert all(len(batch.token_ids) <= 8192 for of_rank in batches for batch in of_rank)
        parts = [[np.diff(batch.cu_seqlens) for batch in of_rank] for of_rank in batches]
        costs = np.array([[(n * (1 + 1e-3 * n)).sum() for n in of_rank] for of_rank in parts])
        return costs.max(axis=0).sum() / costs.mean(axis=0).sum()

    assert waiting(1e-3) < 1.01 < 1.015 < waiting(0.0)


def test_where_equal_costs_do_not_fit_the_bound_it_is_tokens_that_are_equal():
    # One costs as much as eight do, which have more tokens than fit.
    lengths, costs = np.array([40, *[10] * 8]), np.array([80.0, *[10.0] * 8])
    assert deal(lengths, costs, max_tokens=100, num_ranks=2) == [[[0]], [[1, 2, 3, 4, 5, 6, 7, 8]]]
    dealt = deal(lengths, costs, max_tokens=70, num_ranks=2)
    assert [lengths[units].sum() for (units,) in dealt] == [60, 60]


def test_the_costliest_micro_batch_comes_first_and_totals_are_balanced():
    lengths = np.array([50, 40, 30, 20])
    dealt = deal(lengths, lengths.astype(float), max_tokens=50, num_ranks=2)
    assert dealt == [[[0], [3]], [[1], [2]]]


@pytest.mark.slow
def test_30_000_lengths_of_which_no_two_fit_together_get_a_bin_each():
    batches = pack([sample(6)] * 30_000, max_tokens=10, num_ranks=8)
    assert sum((batch.sample_indices >= 0).sum() for rank in batches for batch in rank) == 30_000
    assert {len(batch.token_ids) for rank in batches for batch in rank} == {6}
