"""held_off(): no collection inside, what was made is old afterwards, and the rest as it was."""

from __future__ import annotations

import gc

import pytest

from qwen_rt.collector import held_off


def test_no_collection_inside_nor_of_what_was_made():
    runs: list[str] = []
    gc.callbacks.append(lambda phase, info: runs.append(phase))
    try:
        with held_off():
            made: list[list[int]] = [[] for _ in range(100_000)]
        assert not runs
        assert gc.isenabled()
    finally:
        gc.callbacks.pop()
    assert len(gc.get_objects(generation=0)) < len(made)


def test_errors_pass_and_the_collector_runs_again():
    with pytest.raises(KeyError), held_off():
        raise KeyError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with held_off():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_was_frozen_stays_frozen():
    gc.freeze()
    try:
        with held_off():
            pass
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
