"""The CPU's recorded decode steps: the text of eager ones, fresh checks at each run, nothing shared between threads."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_model

import qwen_rt
from qwen_rt.backends.base import BatchMeta, KVSpec
from qwen_rt.backends.select import open_backend, probe
from qwen_rt.quant.formats import LinearRows, RawLinear, dense_format

pytestmark = pytest.mark.skipif(not probe("cpu").usable, reason=f"cpu: {probe('cpu').reason}")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("capture") / "model")


def answers(path: Path, capture: bool, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Ids of single, long (beyond the training length, so with logn factors) and batched prompts."""
    cls = type(open_backend("cpu")[0])
    with monkeypatch.context() as patch:
        patch.setattr(cls, "caps", replace(cls.caps, capture=capture))
        with qwen_rt.load(path, device="cpu", max_model_len=400) as model:
            done = [model.generate(p, max_new_tokens=40, ignore_eos=True) for p in ("hello", "x" * 60, "y" * 150)]
            done += model.generate(["a", "bc", "def"], max_new_tokens=9, ignore_eos=True)
            for lengths in ((7, 12, 3, 9, 5), (30, 90, 2)):  # batches that shrink as their answers end
                asked = [model.request([i + 1] * i, max_new_tokens=i, ignore_eos=True) for i in lengths]
                done += model._complete(asked)
            recorded = [r for r in model.loop.engine.runner.replays.values() if r is not None]
            assert bool(recorded) == capture
        return [c.ids for c in done]


def test_recorded_steps_give_the_text_of_eager_ones(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answers(path, True, monkeypatch) == answers(path, False, monkeypatch)


def randn(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def linear(n: int, k: int, seed: int) -> RawLinear:
    values = randn(n, k, seed=seed)
    return RawLinear("w", (n, k), dense_format("float32"), lambda start, stop: LinearRows(values=values[start:stop]))


def test_what_is_not_native_is_repeated() -> None:
    backend, _ = open_backend("cpu")
    parts = [backend.pack_linear(linear(n, 8, n)) for n in (3, 5)]
    kv = backend.alloc_kv(KVSpec(1, 1, 4, backend.caps.kv_block, "float32"), 1)
    turns = np.ones((1, 2), np.float32)

    def step(inputs, plan):
        x, factor = inputs
        joined = backend.concat([backend.linear(x, p) for p in parts])
        heads = joined.reshape(1, 2, 4)
        q = backend.rope_store_kv(heads, heads[:, :1], heads[:, 1:], turns, turns * 0, factor, kv, 0, plan)
        return backend.silu_mul(q.reshape(1, -1))

    replay = backend.capture(step, [np.ones((1, 8), np.float32), np.ones((1, 1, 1), np.float32)], kv, 4)
    assert replay is not None
    for seed in range(3):
        x, factor, one = randn(1, 8, seed=seed), np.full((1, 1, 1), seed + 0.5, np.float32), steps(1)
        got = replay([x, factor], one).copy()
        assert np.array_equal(got, step([x, factor], backend.plan(one))) and got.any()


COMPUTING = {
    "an operator": lambda x: x * 2,
    "a function": lambda x: np.concatenate([x, x], -1),
    "a copy": lambda x: x.copy(),
    "rows by index": lambda x: x[[0]],
    "a reshape that copies": lambda x: x[:, :2].reshape(-1),
    "another type": lambda x: x.astype(np.float64),
}


@pytest.mark.parametrize("what", COMPUTING)
def test_what_no_replay_would_repeat_is_an_error(what: str) -> None:
    backend, _ = open_backend("cpu")
    square = backend.pack_linear(linear(8, 8, 0))
    for rows in (lambda x: x, lambda x: backend.linear(x, square)):  # an input; a result
        with pytest.raises(TypeError, match="a step that is recorded may not"):
            backend.capture(lambda inputs, plan: COMPUTING[what](rows(inputs[0])), [randn(3, 8, seed=0)], None, 4)  # noqa: B023


def test_what_changes_is_checked_at_each_run() -> None:
    backend, _ = open_backend("cpu")
    table = backend.pack_linear(linear(4, 8, 0))
    replay = backend.capture(lambda inputs, plan: backend.embedding(inputs[0], table), [np.array([0])], None, 4)
    assert replay is not None and replay.rows == 1
    one = BatchMeta([1], [1], [[0]], [0])
    assert np.array_equal(replay([np.array([3])], one), table_row(backend, table, 3))
    with pytest.raises(ValueError, match="id out of range"):
        replay([np.array([4])], one)
    with pytest.raises(ValueError, match="not where its block table puts"):
        replay([np.array([1])], BatchMeta([1], [1], [[0]], [7]))
    with pytest.raises(ValueError, match="recording of 1 sequences"):
        replay([np.array([1])], BatchMeta([1, 1], [1, 1], [[0], [1]], [0, 32]))
    assert np.array_equal(replay([np.array([1])], one), table_row(backend, table, 1))
    assert backend.capture(lambda inputs, plan: inputs[0], [np.zeros((17, 1))], None, 4) is None


def test_fewer_rows_than_recorded_compute_only_theirs() -> None:
    backend, _ = open_backend("cpu")
    table, square = backend.pack_linear(linear(9, 8, 0)), backend.pack_linear(linear(8, 8, 1))

    def step(inputs, plan):
        return backend.linear(backend.embedding(inputs[0], table), square)

    replay = backend.capture(step, [np.zeros(4, np.int64)], None, 4)
    assert replay is not None and replay.rows == 4
    four, two = np.array([0, 1, 2, 3]), np.array([5, 6])
    assert np.array_equal(replay([four], steps(4)), step([four], None))
    assert np.array_equal(replay([two], steps(2)), step([two], None))
    assert np.array_equal(replay._first[4][2:], step([four], None)[2:])  # the rows left out were not touched


def steps(rows: int) -> BatchMeta:
    """Rows of one sequence each, at the start of a block of their own."""
    return BatchMeta([1] * rows, [1] * rows, [[i] for i in range(rows)], [32 * i for i in range(rows)])


def test_memory_a_step_let_go_of_serves_again() -> None:
    backend, _ = open_backend("cpu")
    squares = [backend.pack_linear(linear(8, 8, seed)) for seed in range(20)]
    seen: list[int] = []

    def step(inputs, plan):
        x = inputs[0]
        for weight in squares:
            head = x.reshape(-1, 2, 4)[:, 0]  # a view keeps the memory of an array that is gone
            x = backend.linear(x, weight)
            seen.append(x.ctypes.data)
            if weight is squares[3]:  # what numpy computes is computed again: its operands stay
                x = backend.concat([head, x[:, 4:]])
        return x

    x = randn(3, 8, seed=1)
    wanted = step([x], None)
    seen.clear()
    replay = backend.capture(step, [np.zeros((3, 8), np.float32)], None, 4)
    assert replay is not None and len(set(seen)) < 8 and len(seen) == 20
    for _ in range(2):
        assert np.array_equal(replay([x], steps(3)), wanted)


def table_row(backend, table, index: int) -> np.ndarray:
    return backend.embedding(np.array([index]), table)


def test_another_thread_computes_while_one_records() -> None:
    backend, _ = open_backend("cpu")
    table = backend.pack_linear(linear(4, 8, 0))
    seen: list[np.ndarray] = []

    def step(inputs, plan):
        other = threading.Thread(target=lambda: seen.append(table_row(backend, table, 2)))
        other.start()
        other.join()
        return backend.embedding(inputs[0], table)

    replay = backend.capture(step, [np.array([0])], None, 4)
    assert replay is not None and np.array_equal(seen[0], linear(4, 8, 0).rows(2, 3).values)


def test_a_step_that_fails_leaves_no_recording_open() -> None:
    backend, _ = open_backend("cpu")
    table = backend.pack_linear(linear(4, 8, 0))
    with pytest.raises(ZeroDivisionError):
        backend.capture(lambda inputs, plan: 1 / 0, [np.array([0])], None, 4)
    assert np.array_equal(table_row(backend, table, 1), linear(4, 8, 0).rows(1, 2).values)
