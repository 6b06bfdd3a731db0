"""The CPU's recorded decode steps: the text of eager ones, fresh checks at each run, nothing shared between threads."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import write_model

import qwen_rt
from qwen_rt.backends.base import BatchMeta
from qwen_rt.backends.select import open_backend, probe
from qwen_rt.quant.formats import LinearFormat, LinearRows, RawLinear

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


def linear(n: int, k: int, seed: int) -> RawLinear:
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    fmt = LinearFormat(bits=32, dtype=torch.float32)
    return RawLinear("w", (n, k), fmt, lambda start, stop: LinearRows(values=values[start:stop]))


def test_torch_operations_between_native_calls_are_repeated() -> None:
    backend, _ = open_backend("cpu")
    parts = [backend.pack_linear(linear(n, 8, n)) for n in (3, 5)]

    def step(inputs, plan):
        (x,) = inputs
        joined = torch.cat([backend.linear(x, p) for p in parts], -1)
        return backend.silu_mul((joined * 2).view(1, -1))

    replay = backend.capture(step, [torch.ones(1, 8)], None, 4)
    assert replay is not None
    for seed in range(3):
        x = torch.randn(1, 8, generator=torch.Generator().manual_seed(seed))
        got = replay([x.numpy()], BatchMeta([1], [5], [[0]], [4])).clone()
        assert torch.equal(got, step([x], None))


def test_what_changes_is_checked_at_each_run() -> None:
    backend, _ = open_backend("cpu")
    table = backend.pack_linear(linear(4, 8, 0))
    replay = backend.capture(lambda inputs, plan: backend.embedding(inputs[0], table), [torch.tensor([0])], None, 4)
    assert replay is not None and replay.rows == 1
    one = BatchMeta([1], [1], [[0]], [0])
    assert torch.equal(replay([np.array([3])], one), table_row(backend, table, 3))
    with pytest.raises(ValueError, match="id out of range"):
        replay([np.array([4])], one)
    with pytest.raises(ValueError, match="not where its block table puts"):
        replay([np.array([1])], BatchMeta([1], [1], [[0]], [7]))
    with pytest.raises(ValueError, match="recording of 1 sequences"):
        replay([np.array([1])], BatchMeta([1, 1], [1, 1], [[0], [1]], [0, 32]))
    assert torch.equal(replay([np.array([1])], one), table_row(backend, table, 1))
    assert backend.capture(lambda inputs, plan: inputs[0], [torch.zeros(17, 1)], None, 4) is None


def test_fewer_rows_than_recorded_compute_only_theirs() -> None:
    backend, _ = open_backend("cpu")
    table, square = backend.pack_linear(linear(9, 8, 0)), backend.pack_linear(linear(8, 8, 1))

    def step(inputs, plan):
        return backend.linear(backend.embedding(inputs[0], table), square)

    replay = backend.capture(step, [torch.zeros(4, dtype=torch.int64)], None, 4)
    assert replay is not None and replay.rows == 4
    four, two = torch.tensor([0, 1, 2, 3]), torch.tensor([5, 6])
    assert torch.equal(replay([four.numpy()], steps(4)), step([four], None))
    assert torch.equal(replay([two.numpy()], steps(2)), step([two], None))
    assert torch.equal(replay._out[2:], step([four], None)[2:])  # the rows left out were not touched


def steps(rows: int) -> BatchMeta:
    """Rows of one sequence each, at the start of a block of their own."""
    return BatchMeta([1] * rows, [1] * rows, [[i] for i in range(rows)], [32 * i for i in range(rows)])


def test_memory_a_step_let_go_of_serves_again() -> None:
    backend, _ = open_backend("cpu")
    squares = [backend.pack_linear(linear(8, 8, seed)) for seed in range(20)]
    seen: list[int] = []

    def step(inputs, plan):
        x = first = inputs[0]
        for weight in squares:
            head = x.view(-1, 2, 4)[:, 0]  # a view keeps the memory of a tensor that is gone
            x = backend.linear(x, weight)
            seen.append(x.data_ptr())
            if weight is squares[3]:  # what torch computes is computed again: its operands stay
                x = torch.cat([head, x.add_(1.0)[:, 4:]], -1)
        return x + first

    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    wanted = step([x], None)
    seen.clear()
    replay = backend.capture(step, [torch.zeros(3, 8)], None, 4)
    assert replay is not None and len(set(seen)) < 8 and len(seen) == 20
    for _ in range(2):
        assert torch.equal(replay([x.numpy()], steps(3)), wanted)


def table_row(backend, table, index: int) -> torch.Tensor:
    return backend.embedding(torch.tensor([index]), table)


def test_another_thread_computes_while_one_records() -> None:
    backend, _ = open_backend("cpu")
    table = backend.pack_linear(linear(4, 8, 0))
    seen: list[torch.Tensor] = []

    def step(inputs, plan):
        other = threading.Thread(target=lambda: seen.append(table_row(backend, table, 2)))
        other.start()
        other.join()
        return backend.embedding(inputs[0], table)

    replay = backend.capture(step, [torch.tensor([0])], None, 4)
    assert replay is not None and torch.equal(seen[0], linear(4, 8, 0).rows(2, 3).values)


def test_a_step_that_fails_leaves_no_recording_open() -> None:
    backend, _ = open_backend("cpu")
    table = backend.pack_linear(linear(4, 8, 0))
    with pytest.raises(ZeroDivisionError):
        backend.capture(lambda inputs, plan: 1 / 0, [torch.tensor([0])], None, 4)
    assert torch.equal(table_row(backend, table, 1), linear(4, 8, 0).rows(1, 2).values)
