"""The GPU backend without a card: step metadata, recordings and their limits, what may not happen inside a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_config
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_rt.backends import select
from qwen_rt.backends.accelerator import padding
from qwen_rt.backends.base import BatchMeta, KVSpec, Replay
from qwen_rt.backends.gpu import capture, driver, emulated, kernels, plan
from qwen_rt.backends.gpu.backend import GpuBackend
from qwen_rt.backends.reference import ReferenceBackend
from qwen_rt.checkpoint.random import RandomCheckpoint
from qwen_rt.dtypes import DType
from qwen_rt.engine import Engine, Request, SamplingParams
from qwen_rt.engine.runner import FIRST_BLOCKS, buckets
from qwen_rt.errors import BackendError, Declined, OutOfMemory
from qwen_rt.model import QwenModel, build

CPU = torch.device("cpu")
BLOCK = 16
META = BatchMeta([3, 1], [3, 18], [[5], [2, 9, 7]], [80, 81, 82, 9 * 16 + 1])
TINY = replace(tiny_config.TINY, max_position=4096, train_length=4096)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def open_emulated(name: str = "cuda-emulated", dtype: DType = "float16") -> GpuBackend:
    found = select.probe(name)
    if not found.usable:
        pytest.skip(f"{name}: {found.reason}")
    backend = select.backend_class(name)(0, dtype)
    assert isinstance(backend, GpuBackend)
    return backend


@pytest.fixture(scope="module")
def gpu() -> GpuBackend:
    return open_emulated()


# -- step metadata -------------------------------------------------------------------------------------------------
def test_plan_arrays() -> None:
    p = plan.make_plan(META, BLOCK, CPU)
    assert p.slots.tolist() == list(META.slots) and p.slots.dtype == torch.int64
    assert p.q_start.tolist() == [0, 3, 4] and p.kv_lens.tolist() == [3, 18] and p.row_seq.tolist() == [0, 0, 0, 1]
    assert p.block_table.tolist() == [[5, 0], [2, 9]]  # the third block of the second sequence holds no key yet
    assert (p.rows, p.seqs, p.num_blocks, p.reach) == (4, 2, 10, 18)
    arrays = (p.slots, p.q_start, p.kv_lens, p.row_seq, p.block_table)
    storage = {x.untyped_storage().data_ptr() for x in arrays}
    assert storage == {p.buffer.untyped_storage().data_ptr()}, "one buffer, so that one copy brings it over"
    assert all((x.data_ptr() - p.buffer.data_ptr()) % 16 == 0 for x in arrays)


def test_plan_is_rewritten_in_place_with_padding() -> None:
    p = plan.make_plan(padding(4, 30, BLOCK), BLOCK, CPU, max_blocks=3)
    p.num_blocks = 30
    assert p.kv_lens.tolist() == [1] * 4 and p.block_table[:, 0].tolist() == [30] * 4 and p.reach == 48
    where = p.buffer.data_ptr()
    p.update(BatchMeta([1, 1], [17, 40], [[4, 6], [1, 2, 3]], [96, 3 * 16 + 7]), 30)
    assert p.buffer.data_ptr() == where
    assert p.kv_lens.tolist() == [17, 40, 1, 1] and p.q_start.tolist() == [0, 1, 2, 3, 4]
    assert p.block_table.tolist() == [[4, 6, 0], [1, 2, 3], [30, 0, 0], [30, 0, 0]]
    assert p.slots.tolist() == [96, 55, 480, 480]
    with pytest.raises(ValueError, match="the plan holds 4 of 48"):
        p.update(BatchMeta([1], [49], [[1, 2, 3, 4]], [4 * 16]), 30)
    with pytest.raises(ValueError, match="5 sequences"):
        p.update(padding(5, 1, BLOCK), 30)


def test_buckets_hold_what_they_serve() -> None:
    for rows in range(1, 200):
        for blocks in (1, FIRST_BLOCKS, FIRST_BLOCKS + 1, 2000):
            size = buckets(rows, blocks)
            assert size[0] >= rows and size[1] >= blocks and size[0] < 2 * rows
            assert buckets(*size) == size
    assert [buckets(n, 1)[0] for n in (1, 3, 9, 16, 17, 33)] == [1, 4, 16, 16, 32, 48]


# -- recordings ----------------------------------------------------------------------------------------------------
def record(gpu: GpuBackend, step: Callable[[Sequence[Tensor], Any], Tensor], rows: int = 2, max_blocks: int = 4) -> Any:
    spec = KVSpec(1, 2, 16, gpu.caps.kv_block, "float16")
    return gpu.capture(step, [torch.ones(rows, 3)], gpu.alloc_kv(spec, 8), max_blocks)


def test_replay_computes_from_new_inputs_and_metadata(gpu: GpuBackend) -> None:
    def step(inputs: Sequence[Tensor], p: plan.GpuPlan) -> Tensor:
        (x,) = inputs
        y = torch.cat((x * 2, x.new_zeros(2, 1)), 1)
        y[:, 3] += p.kv_lens
        return gpu.silu_mul(torch.cat((y, y), 1).half()).float() + p.slots.view(-1, 1)

    def eager(x: Tensor, kv_len: int, slot: int) -> Tensor:
        y = torch.cat((x * 2, torch.tensor([float(kv_len)]))).half().float()
        return (y * torch.sigmoid(y) * y).half().float() + slot

    replay = record(gpu, step)
    assert isinstance(replay, Replay) and (replay.rows, replay.max_blocks) == (2, 4)
    for kv_len, x in ((5, torch.tensor([1.0, -1, 0.5])), (9, torch.tensor([0.25, 3, 2]))):
        out = replay([x[None].numpy()], BatchMeta([1], [kv_len], [[3]], [3 * 16 + kv_len - 1]))
        assert out.shape == (1, 4)
        assert torch.allclose(out[0], eager(x, kv_len, 3 * 16 + kv_len - 1), rtol=2e-3)


@pytest.mark.parametrize(
    ("meta", "rows", "says"),
    [
        (BatchMeta([2], [2], [[0]], [0, 1]), 1, "one row a sequence"),
        (BatchMeta([1, 1, 1], [1, 1, 1], [[0], [1], [2]], [0, 16, 32]), 3, "the plan holds 2"),
        (BatchMeta([1], [80], [[0, 1, 2, 3, 4]], [79]), 1, "the plan holds 2 of 64"),
        (BatchMeta([1], [1], [[8]], [8 * 16]), 1, "block 8 of a cache of 8"),
        (BatchMeta([1], [1], [[0]], [5]), 1, "not where its block table puts"),
        (BatchMeta([1], [1], [[0]], [0]), 2, "inputs of"),
    ],
)
def test_replay_refuses_what_was_not_recorded(gpu: GpuBackend, meta: BatchMeta, rows: int, says: str) -> None:
    replay = record(gpu, lambda inputs, p: inputs[0] + 1)
    with pytest.raises(ValueError, match=says):
        replay([np.ones((rows, 3), np.float32)], meta)


@pytest.mark.parametrize(
    ("name", "crossing"),
    [
        ("item", lambda x: x * float(x.sum())),
        ("nonzero", lambda x: x.nonzero().float()),
        ("comparison", lambda x: x if x.sum() > 0 else -x),
        ("host data", lambda x: x + torch.tensor([1.0, 2.0, 3.0])),
    ],
)
def test_what_a_graph_cannot_record_runs_eagerly_and_says_why(name: str, crossing: Callable[[Tensor], Tensor]) -> None:
    gpu = open_emulated()
    assert record(gpu, lambda inputs, p: crossing(inputs[0])) is None
    told = gpu.kernels()["capture"]
    assert "eager: 2x4: could not be recorded: " in told and "inside a recorded step" in told
    assert gpu.device_kernels.recorder is None


def test_a_mistake_in_the_step_is_not_taken_for_a_failed_recording(gpu: GpuBackend) -> None:
    def step(inputs: Sequence[Tensor], p: plan.GpuPlan) -> Tensor:
        raise Declined("no kernel")

    with pytest.raises(Declined):
        record(gpu, step)


def test_limit_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_RT_GRAPH_ROWS", "1")
    gpu = open_emulated()
    assert record(gpu, lambda inputs, p: inputs[0] + 1, rows=2) is None
    assert record(gpu, lambda inputs, p: inputs[0] + 1, rows=1) is not None
    told = gpu.kernels()["capture"]
    assert "recorded (rows x blocks) 1x4" in told and "eager: 2x4: beyond 1 rows (QWEN_RT_GRAPH_ROWS)" in told


# -- the runner ----------------------------------------------------------------------------------------------------
class Asked(ReferenceBackend):
    """The reference, with a capture that only notes what it was asked for, or plays the step with plan() each time."""

    caps = replace(ReferenceBackend.caps, capture=True)
    plays = True

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, int]] = []
        self.replayed: list[int] = []

    def capture(self, step: Any, inputs: Sequence[Tensor], kv: Any, max_blocks: int) -> Replay | None:
        backend = self

        class Played(Replay):
            rows = inputs[0].shape[0]

            def __init__(self) -> None:
                self.max_blocks = max_blocks

            def __call__(self, arrays: Sequence[NDArray[Any]], meta: BatchMeta) -> Tensor:
                given = [backend.tensor(x) for x in arrays]
                assert [x.dtype for x in given] == [x.dtype for x in inputs] and set(meta.q_lens) == {1}
                assert max(len(t) for t in meta.block_table) <= max_blocks and len(meta.q_lens) <= self.rows
                backend.replayed.append(len(meta.q_lens))
                return step(given, backend.plan(meta))

        self.asked.append((inputs[0].shape[0], max_blocks))
        return Played() if self.plays else None


def answers(model: QwenModel, logprobs: int | None = None) -> list[list[int]]:
    c = model.config
    kv = model.backend.alloc_kv(KVSpec(c.num_layers, c.num_kv_heads, c.head_size, 16, "float32"), 120)
    engine = Engine(model, kv, max_model_len=1100)
    # One prompt ends just below the reach of the first recording, so that its answer needs the second.
    prompts = [[3, 4], [5] * (16 * FIRST_BLOCKS - 3), [7, 8, 9]]
    found = {}
    for prompt, n in zip(prompts, (4, 6, 8), strict=True):
        found[engine.add(Request(prompt, SamplingParams(max_new_tokens=n, logprobs=logprobs)))] = []
    while engine.has_unfinished:
        for out in engine.step():
            found[out.request_id].append(out.token)
    return list(found.values())


@pytest.mark.parametrize("plays", [True, False], ids=["recorded", "declined"])
def test_runner_replays_what_only_decodes(plays: bool) -> None:
    want = answers(build(RandomCheckpoint(TINY), ReferenceBackend()))
    model = build(RandomCheckpoint(TINY), backend := Asked())
    backend.plays = plays
    assert answers(model, logprobs=2 if plays else None) == want
    assert len(set(backend.asked)) == len(backend.asked), "each size is asked for once"
    assert {blocks for _, blocks in backend.asked} == {FIRST_BLOCKS, 4 * FIRST_BLOCKS}
    assert bool(backend.replayed) == plays


# -- inside a step -------------------------------------------------------------------------------------------------
class Crossings(TorchDispatchMode):
    """Fails where a step reads a value on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[-1].split(".")[0]
        assert name not in ("item", "_local_scalar_dense", "nonzero", "equal"), f"{name}: a value crosses to the host"
        return func(*args, **(kwargs or {}))


def test_nothing_crosses_to_the_host_in_an_eager_step(gpu: GpuBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill chunk beside a decode row; the ids are given as on a device, where they are not looked at."""
    model = build(RandomCheckpoint(TINY), gpu)
    c = model.config
    kv = gpu.alloc_kv(KVSpec(c.num_layers, c.num_kv_heads, c.head_size, gpu.caps.kv_block, "int8"), 12)
    rope = model.rope_rows(META.positions(), [1.0] * 4)
    monkeypatch.setattr(gpu.device_kernels, "recorder", lambda again: None)  # "inside a recorded step": ids unseen
    with torch.inference_mode(), Crossings():
        hidden = model.forward(torch.tensor([1, 2, 3, 4]), gpu.plan(META), rope, kv)
        assert model.logits(hidden).shape == (4, c.vocab_size)


def test_an_id_outside_the_table_reads_nothing_beyond_it(gpu: GpuBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    table = build(RandomCheckpoint(TINY), gpu).table
    for wrong in (np.array([97]), np.array([3, -1]), torch.tensor([97])):
        with pytest.raises(ValueError, match=r"0\.\.96"):
            gpu.embedding(wrong, table)
    with pytest.raises(TypeError, match=r"ids are torch.int32 of shape \(1,\); want int64"):
        gpu.embedding(np.array([3], np.int32), table)
    assert torch.equal(gpu.embedding(np.array([96, 0]), table), gpu.embedding(torch.tensor([96, 0]), table))
    assert record(gpu, lambda inputs, p: gpu.embedding(np.array([96, 0]), table), max_blocks=5) is None, "host data"
    monkeypatch.setattr(gpu.device_kernels, "recorder", lambda again: None)
    rows = gpu.embedding(torch.tensor([96, 97, -1]), table)
    assert rows[0].isfinite().all() and rows[1:].isnan().all()


# -- opening -------------------------------------------------------------------------------------------------------
def test_no_image_is_the_reason_the_device_does_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, module: str) -> kernels.Loaded:
        raise BackendError(f"no image of {module!r} for sm_10:\n  nvrtc: not found")

    monkeypatch.setattr(emulated.CudaEmulated, "_load", fail)
    with pytest.raises(BackendError, match=r"has no kernels: no image of 'elementwise' for sm_10:\n  nvrtc"):
        open_emulated()


def test_a_module_that_does_not_build_declines_and_is_not_built_again() -> None:
    tried = []

    def load(module: str) -> kernels.Loaded:
        tried.append(module)
        raise BackendError("nvcc: syntax error")

    table = kernels.Kernels(load, lambda: 0, 32)
    for _ in range(2):
        with pytest.raises(Declined, match="syntax error"):
            table("norm", "rms_norm_f16", "PP")
    assert tried == ["norm"] and table.routes() == {"norm": "none: nvcc: syntax error"}


def test_launches_go_to_the_stream_of_now() -> None:
    launched = []

    class Fake:
        def kernel(self, name: str, signature: str) -> Any:
            return lambda grid, block, *args, shared, stream: launched.append((name, grid, block, args, shared, stream))

    streams = iter((11, 22))
    table = kernels.Kernels(lambda module: kernels.Loaded(driver.Module(Fake()), "made up"), lambda: next(streams), 32)
    for value in (1, 2):
        table("norm", "k", "i")((1, 2, 3), 64, value, shared=8)
    assert launched == [("k", (1, 2, 3), 64, (1,), 8, 11), ("k", (1, 2, 3), 64, (2,), 8, 22)]


def test_emulated_devices_say_what_they_are() -> None:
    for name, warp in (("cuda-emulated", 32), ("dcu-emulated", 64), ("dcu-simt-emulated", 64)):
        found = select.probe(name)
        assert found.usable and found.rung == "emulated" and name not in select.probe_all()
        gpu = open_emulated(name)
        assert gpu.warp == gpu.driver.facts.warp == warp
        assert f"emulated, warp {warp}" in gpu.kernels()["silu_mul"]
        assert gpu.traits.mma == gpu.mma == ("no matrix units" not in gpu.kernels()["silu_mul"])
        with pytest.raises(BackendError, match="no such device"):
            select.open_backend(f"{name}:1")


def test_cache_kept_in_the_compute_type() -> None:
    gpu = open_emulated(dtype="bfloat16")
    assert gpu.caps.kv_dtypes == ("bfloat16", "float16", "int8") and gpu.compute_dtype == "bfloat16"
    assert gpu.dtype == torch.bfloat16
    with pytest.raises(BackendError, match="in blocks of 16; asked for float32"):
        gpu.alloc_kv(KVSpec(1, 1, 8, 16, "float32"), 4)
    with pytest.raises(BackendError, match="heads of up to 256"):
        gpu.alloc_kv(KVSpec(1, 1, 512, 16, "int8"), 4)
    with pytest.raises(OutOfMemory, match=r"needs \d+ bytes"):
        gpu.alloc_kv(KVSpec(1, 1, 8, 16, "int8"), 1 << 40)
    kv = gpu.alloc_kv(KVSpec(1, 1, 8, 16, "int8"), 4)
    assert kv.num_blocks == 4 and kv.k[0].shape[0] == 5, "one page more than sequences may have"


def test_dense_weights_are_reported_as_they_are_held() -> None:
    table = build(RandomCheckpoint(TINY), open_emulated(dtype="bfloat16")).table
    assert str(table.format) == "bfloat16" and table.nbytes == 97 * 32 * 2


def test_torch_graph_needs_a_device() -> None:
    """Without a card the CUDA graph class fails as such: nothing pretends to have recorded."""
    if torch.cuda.is_available():
        pytest.skip("a card is here: tests of real graphs run with it")
    with pytest.raises((RuntimeError, AssertionError)):
        capture.TorchGraph(CPU, None).record(lambda: torch.ones(1))
