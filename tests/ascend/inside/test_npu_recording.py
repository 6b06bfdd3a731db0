"""Recorded steps: lengths, slots and inputs of each replay count, padding harms nobody, and what cannot be recorded
says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from decoding import opened
from numpy.typing import NDArray
from torch import Tensor

from qwen_rt.backends.ascend.cache import BLOCK, AscendKV
from qwen_rt.backends.base import Backend, BatchMeta, KVSpec, Plan

HEADS, KV_HEADS, SIZE = 4, 2, 64


@pytest.fixture(scope="module")
def backend() -> Backend:
    return opened("float16")


def rows(n: int, seed: int) -> NDArray[np.float16]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, (HEADS + 2 * KV_HEADS) * SIZE, generator=g).half().numpy()


def step_over(backend: Backend, kv: AscendKV, window: int | None = None) -> Callable[..., Tensor]:
    """A layer's cache write and attention as a step: inputs [fused rows] -> [B, Hq, D]."""

    def step(inputs: Sequence[Tensor], plan: Plan) -> Tensor:
        q, k, v = inputs[0].view(-1, HEADS + 2 * KV_HEADS, SIZE).split([HEADS, KV_HEADS, KV_HEADS], 1)
        backend.store_kv(kv, 0, k, v, plan)
        return backend.attention(q, kv, 0, plan, SIZE**-0.5, window).clone()

    return step


def meta_of(tables: list[list[int]], lens: list[int]) -> BatchMeta:
    slots = [t[(n - 1) // BLOCK] * BLOCK + (n - 1) % BLOCK for t, n in zip(tables, lens, strict=True)]
    return BatchMeta([1] * len(lens), lens, tables, slots)


def test_what_gathers_is_not_recorded(backend: Backend) -> None:
    """Windows over int8 pages: as many keys as there are, which no task update can change."""
    kv = backend.alloc_kv(KVSpec(1, KV_HEADS, SIZE, BLOCK, "int8"), 4)
    assert backend.capture(step_over(backend, kv, 3), [backend.tensor(rows(2, 0))], kv, 2) is None
    assert "2x2: attention gathers its keys" in backend.kernels()["capture"]


@pytest.mark.parametrize(("kv_dtype", "window"), [("float16", None), ("float16", 3), ("int8", None)])
def test_replays_follow_lengths_and_batches(backend: Backend, kv_dtype: str, window: int | None) -> None:
    spec = KVSpec(1, KV_HEADS, SIZE, BLOCK, kv_dtype)  # type: ignore[arg-type]
    eager_kv, kv = backend.alloc_kv(spec, 9), backend.alloc_kv(spec, 9)
    eager, step = step_over(backend, eager_kv, window), step_over(backend, kv, window)
    replay = backend.capture(step, [backend.tensor(rows(4, 0))], kv, 3)
    assert replay is not None and (replay.rows, replay.max_blocks) == (4, 3)
    tables = [[5, 2, 7], [0, 8, 1], [3], [6]]
    lens = [126, 1, 4, 120]
    for turn in range(6):
        size = 4 if turn < 3 else 2  # the rest becomes padding
        meta = meta_of(tables[:size], lens[:size])
        x = rows(size, 100 + turn)
        want = eager([backend.tensor(x)], backend.plan(meta)).cpu()
        got = replay([x], meta).cpu()
        assert torch.equal(got, want), f"turn {turn}"
        lens = [n + 1 for n in lens]
        if turn == 3:
            lens[0] = 127  # shorter than before, too
    for mine, theirs in ((kv.k, eager_kv.k), (kv.v, eager_kv.v)):
        assert torch.equal(mine[0][:9].cpu(), theirs[0][:9].cpu())  # padding wrote only beyond the sequences' pages


def test_a_replay_without_its_update_is_wrong(backend: Backend) -> None:
    """What the task update does is needed: with the lengths of the recording, the result is another."""
    kv = backend.alloc_kv(KVSpec(1, KV_HEADS, SIZE, BLOCK, "float16"), 2)
    step = step_over(backend, kv)
    replay = backend.capture(step, [backend.tensor(rows(1, 0))], kv, 1)
    assert replay is not None
    for n in range(1, 5):
        x = rows(1, n)
        right = replay([x], meta_of([[1]], [n])).cpu().clone()
    frozen = [1]
    plan = backend.plan(meta_of([[1]], [4]))
    stale = step([backend.tensor(x)], replace(plan, kv_lens=frozen)).cpu()
    assert not torch.equal(right, stale)


def test_a_replay_checks_what_it_is_given(backend: Backend) -> None:
    kv = backend.alloc_kv(KVSpec(1, KV_HEADS, SIZE, BLOCK, "float16"), 3)
    replay = backend.capture(step_over(backend, kv), [backend.tensor(rows(2, 0))], kv, 1)
    assert replay is not None
    one = rows(1, 1)
    with pytest.raises(ValueError, match="the plan holds 2 of 128"):
        replay([one], meta_of([[0, 1]], [129]))
    with pytest.raises(ValueError, match="block 3 of a cache of 3"):
        replay([one], meta_of([[3]], [1]))
    with pytest.raises(ValueError, match="inputs of"):
        replay([rows(2, 1)], meta_of([[0]], [1]))
    with pytest.raises(ValueError, match="one row a sequence"):
        replay([one], BatchMeta([2], [2], [[0]], [0, 1]))
    assert replay([one], meta_of([[0]], [1])).shape == (1, HEADS, SIZE)


def test_rows_beyond_the_limit_run_eagerly() -> None:
    backend = opened("float16", rows=2)
    kv = backend.alloc_kv(KVSpec(1, KV_HEADS, SIZE, BLOCK, "float16"), 4)
    assert backend.capture(step_over(backend, kv), [backend.tensor(rows(3, 0))], kv, 1) is None
    assert "3x1: beyond 2 rows (QWEN_RT_GRAPH_ROWS)" in backend.kernels()["capture"]
