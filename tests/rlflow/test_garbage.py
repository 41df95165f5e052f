"""The collector is off while things are made that stay, and as it was afterwards."""

from __future__ import annotations

import gc

import pytest

from rlflow.garbage import without_collection


@without_collection()
def is_collecting() -> bool:
    return gc.isenabled()


def test_the_collector_rests_within_and_works_afterwards_whatever_was_raised():
    assert gc.isenabled() and not is_collecting() and gc.isenabled()
    with pytest.raises(KeyError), without_collection():
        raise KeyError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        assert not is_collecting() and not gc.isenabled()
    finally:
        gc.enable()
