"""The order of rows: a permutation an epoch, the same after any resume."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rlflow.data.errors import DataError
from rlflow.data.sampler import Sampler, permutation


def test_every_epoch_is_a_permutation_and_they_differ():
    taken = Sampler(50, seed=3).take(150)
    epochs = [[index for number, index in taken if number == epoch] for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_without_shuffle_the_order_is_that_of_the_file():
    assert Sampler(3, seed=3, shuffle=False).take(7) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]


def test_the_size_of_the_draws_does_not_change_the_order():
    whole = Sampler(7, seed=1).take(30)
    sampler = Sampler(7, seed=1)
    assert [row for size in (1, 13, 0, 9, 7) for row in sampler.take(size)] == whole


def test_a_draw_larger_than_the_data_crosses_several_epochs():
    assert [epoch for epoch, _ in Sampler(2, seed=0).take(5)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("stop", [0, 1, 6, 7, 8, 20])
def test_a_restored_sampler_goes_on_as_if_it_had_never_stopped(stop):
    whole = Sampler(7, seed=1).take(30)
    stopped = Sampler(7, seed=1)
    stopped.take(stop)
    resumed = Sampler(7, seed=1)
    resumed.restore(json.loads(json.dumps(stopped.state())))
    assert resumed.take(30 - stop) == whole[stop:]


def test_a_sampler_can_be_put_back():
    sampler = Sampler(7, seed=1)
    state = sampler.state()
    first = sampler.take(9)
    sampler.restore(state)
    assert sampler.take(9) == first


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (Sampler(8, seed=1), "num_rows was 7, is 8"),
        (Sampler(7, seed=2), "seed was 1, is 2"),
        (Sampler(7, seed=1, shuffle=False), "shuffle was True, is False"),
    ],
)
def test_a_state_of_other_data_or_another_seed_is_refused(other, says):
    with pytest.raises(DataError, match=says):
        other.restore(Sampler(7, seed=1).state())


def test_the_order_of_a_seed_and_an_epoch_never_changes():
    assert permutation(8, seed=0, stream="epoch 0").tolist() == [7, 6, 0, 2, 3, 1, 5, 4]


def test_a_permutation_has_no_preferred_place():
    firsts = [permutation(4, seed, "epoch 0")[0] for seed in range(4000)]
    assert np.bincount(firsts) == pytest.approx([1000] * 4, abs=120)


def test_seeds_of_any_size_are_taken():
    assert sorted(permutation(5, seed=2**100, stream="s")) == list(range(5))


def test_no_rows_is_an_error():
    with pytest.raises(DataError, match="no rows"):
        Sampler(0, seed=0)
