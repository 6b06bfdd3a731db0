"""The reference backend itself: what the contract tests trust must be right on its own."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_rt.backends.base import BatchMeta, KVSpec, SampleRow
from qwen_rt.backends.checks import host_memory
from qwen_rt.backends.reference import ReferenceBackend, quantize_heads
from qwen_rt.backends.torch_backend import from_host, to_host
from qwen_rt.errors import BackendError, CheckpointError, OutOfMemory
from qwen_rt.quant.formats import LinearFormat, LinearRows, RawLinear, dense_format

F64 = ReferenceBackend(compute_dtype="float64")
META = BatchMeta(q_lens=[3, 1], kv_lens=[18, 5], block_table=[[4, 2], [0]], slots=[4 * 16 + 15, 32, 33, 4])


def grouped(n=5, k=64, group=16, bits=4, zeros=False, mins=False, perm=False) -> RawLinear:
    g = torch.Generator().manual_seed(0)
    top = 1 << bits
    parts = LinearRows(
        codes=to_host(torch.randint(0, top, (n, k), generator=g, dtype=torch.uint8)),
        scales=to_host(torch.rand(n, k // group, generator=g).half()),
        zeros=to_host(torch.randint(0, top, (n, k // group), generator=g, dtype=torch.uint8)) if zeros else None,
        mins=to_host(torch.randn(n, k // group, generator=g).half()) if mins else None,
    )
    return RawLinear(
        "w",
        (n, k),
        LinearFormat(bits, group, has_zeros=zeros, has_mins=mins),
        lambda a, b: LinearRows(**{key: None if t is None else t[a:b] for key, t in vars(parts).items()}),
        to_host(torch.randn(n, generator=g)),
        to_host(torch.randperm(k, generator=g).int()) if perm else None,
    )


def dense(values: np.ndarray, bias: np.ndarray | None = None) -> RawLinear:
    return RawLinear(
        "w", values.shape, dense_format(values.dtype.name), lambda a, b: LinearRows(values=values[a:b]), bias
    )


@pytest.mark.parametrize("options", [{}, {"zeros": True}, {"mins": True}, {"bits": 8}, {"perm": True, "zeros": True}])
def test_linear_and_embedding_are_the_dequantised_matrix(options, monkeypatch):
    monkeypatch.setattr("qwen_rt.backends.reference.CHUNK_ELEMENTS", 128)  # two rows a chunk
    raw = grouped(**options)
    w = F64.pack_linear(raw)
    full = from_host(raw.dequantize()).double()
    x = torch.randn(3, 64, dtype=torch.float64)
    torch.testing.assert_close(F64.linear(x, w), x @ full.T + from_host(raw.bias).double(), rtol=0, atol=1e-12)
    ids = torch.tensor([4, 0, 4])
    assert torch.equal(F64.embedding(ids, w), full[ids])
    assert torch.equal(F64.embedding(ids.numpy(), w), full[ids])
    assert w.shape == (5, 64) and w.nbytes > 5 * 64


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dense_weights_are_what_they_were(dtype):
    values = torch.randn(5, 8).to(getattr(torch, dtype))
    w = F64.pack_linear(dense(to_host(values)))
    assert str(w.format) == dtype and w.nbytes == values.nbytes
    assert torch.equal(F64.embedding(np.arange(5), w), values.double())
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(F64.linear(x, w), x @ values.double().T, rtol=0, atol=1e-12)


def test_bad_weights_and_ids_are_refused():
    bad = np.ones((4, 8), np.float32)
    bad[2, 3] = np.inf
    with pytest.raises(CheckpointError, match="w: values of rows 0 to 4 hold NaN"):
        F64.pack_linear(dense(bad))
    with pytest.raises(CheckpointError, match="w: bias values hold NaN"):
        F64.pack_linear(dense(np.ones((1, 8), np.float32), np.array([np.nan], np.float32)))
    table = F64.pack_linear(dense(np.ones((4, 8), np.float32)))
    for ids in ([4], [-1]):
        for given_ids in (np.array(ids), torch.tensor(ids)):
            with pytest.raises(ValueError, match="token ids"):
                F64.embedding(given_ids, table)
    with pytest.raises(ValueError, match="8 inputs given 7"):
        F64.linear(torch.ones(1, 7), table)


def test_opening():
    assert ReferenceBackend().compute_dtype == "float32" and ReferenceBackend().dtype == torch.float32
    with pytest.raises(BackendError, match="choose one of float32, float64"):
        ReferenceBackend(compute_dtype="float16")
    with pytest.raises(BackendError, match="index 0"):
        ReferenceBackend(1)
    probe = ReferenceBackend.probe()
    assert probe.usable and "slow" in probe.notes[0]
    free, total = host_memory()
    assert 0 < free <= total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_lens": [18]}, "per sequence"),
        ({"q_lens": [], "kv_lens": [], "block_table": [], "slots": []}, "per sequence"),
        ({"slots": [79, 32, 33]}, "3 slots for 4 rows"),
        ({"slots": [79, 32, 32, 4]}, "share a slot"),
        ({"slots": [79, 32, 34, 4]}, "position 17"),
        ({"slots": [79, 32, 33, 5]}, "position 4"),
        ({"q_lens": [0, 4]}, "q_len 0"),
        ({"kv_lens": [18, 0]}, "q_len 1 must be within"),
        ({"kv_lens": [18, 17]}, "1 blocks of 16 cannot hold 17 keys"),
        ({"block_table": [[4, 4], [0]]}, "distinct"),
        ({"block_table": [[4, -2], [0]]}, "not negative"),
    ],
)
def test_plan_checks_the_step(change, message):
    F64.plan(META)
    with pytest.raises(ValueError, match=message):
        F64.plan(dataclasses.replace(META, **change))


def test_cache_limits():
    spec = KVSpec(1, 2, 8, 16, "float32")
    with pytest.raises(OutOfMemory, match=r"needs \d+ bytes and \d+ are free"):
        F64.alloc_kv(spec, 1 << 40)
    with pytest.raises(BackendError, match="blocks of 16"):
        F64.alloc_kv(dataclasses.replace(spec, block_size=32), 1)
    kv, x = F64.alloc_kv(spec, 4), torch.ones(4, 2, 8, dtype=torch.float64)
    plan = F64.plan(META)  # uses block 4
    with pytest.raises(ValueError, match="block 4 of a cache of 4"):
        F64.store_kv(kv, 0, x, x, plan)
    with pytest.raises(ValueError, match="do not fit"):
        F64.attention(torch.ones(4, 3, 8), F64.alloc_kv(spec, 5), 0, plan, 1.0)


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_attention_over_scattered_pages(window, dtype):
    """Two sequences, several steps, against one plain softmax per query on what the cache format makes of k and v."""
    hq, hkv, d, layers = 6, 2, 8, 2
    kv = F64.alloc_kv(KVSpec(layers, hkv, d, 16, dtype), 7)
    tables, done = [[5, 1, 3], [0, 6]], [0, 0]
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 40, hkv, d, dtype=torch.float64)
    held = [stored(x, dtype) for x in (keys, values)]
    for q_lens in ([20, 1], [1, 9], [17, 3]):
        done = [n + q for n, q in zip(done, q_lens, strict=True)]
        spans = [range(n - q, n) for n, q in zip(done, q_lens, strict=True)]
        slots = [tables[b][p // 16] * 16 + p % 16 for b, span in enumerate(spans) for p in span]
        plan = F64.plan(BatchMeta(q_lens, done, tables, slots))
        rows = [(b, p) for b, span in enumerate(spans) for p in span]
        new = [torch.stack([x[b, p] for b, p in rows]) for x in (keys, values)]
        F64.store_kv(kv, 1, *new, plan)
        q = torch.randn(len(rows), hq, d, dtype=torch.float64)
        got = F64.attention(q, kv, 1, plan, 0.3, window)
        for i, (b, p) in enumerate(rows):
            first = 0 if window is None else max(0, p - window + 1)
            for h in range(hq):
                k, v = (x[b, first : p + 1, h // 3] for x in held)
                expected = torch.softmax(0.3 * k @ q[i, h], 0) @ v
                torch.testing.assert_close(got[i, h], expected, rtol=0, atol=1e-12)
    assert not any(t.any() for t in (kv.k[0], kv.v[0])), "layer 0 was never written"


def stored(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """What a cache of `dtype` gives back, worked out element by element for int8."""
    if dtype != "int8":
        return x.to(getattr(torch, dtype)).double()
    x = x.float()
    low, high = x.min(-1, keepdim=True).values, x.max(-1, keepdim=True).values
    scale = (high - low) / 255
    return torch.round((x - low) / scale).double() * scale.double() + low.double()


def test_int8_cache_keeps_constants_exactly():
    codes, affine = quantize_heads(torch.full((2, 3, 8), 1.7))
    assert not codes.any() and torch.equal(affine[..., 0], torch.zeros(2, 3))
    assert torch.equal(affine[..., 1], torch.full((2, 3), 1.7))


def test_rms_norm_order_and_residual():
    x, residual, weight = torch.randn(2, 8).double(), torch.randn(2, 8).double(), torch.randn(8).double()
    normed, summed = F64.rms_norm(x, weight, 1e-5, residual)
    total = x + residual
    expected = torch.stack([row / math.sqrt(sum(v * v for v in row) / 8 + 1e-5) for row in total]) * weight
    assert torch.equal(summed, total)
    torch.testing.assert_close(normed, expected, rtol=0, atol=1e-12)
    assert F64.rms_norm(x, weight, 1e-5)[1] is x


def test_rope_rotates_pairs_of_the_first_dims():
    angle = torch.tensor([[0.1, 2.0], [1.5, -0.4]])
    q = torch.randn(2, 3, 6).double()
    got, _ = F64.rope(q, q[:, :1], angle.cos(), angle.sin())
    z = torch.complex(q[..., :2], q[..., 2:4]) * torch.polar(torch.ones(2, 2), angle).to(torch.complex128).unsqueeze(1)
    torch.testing.assert_close(got, torch.cat((z.real, z.imag, q[..., 4:]), -1), rtol=0, atol=1e-6)


def test_silu_mul_takes_the_gate_first():
    gate, up = torch.randn(2, 3, 5).double()
    got = F64.silu_mul(torch.cat((gate, up), -1))
    torch.testing.assert_close(got, torch.nn.functional.silu(gate) * up, rtol=0, atol=1e-12)


# -- sampling --------------------------------------------------------------------------------------------------


def naive_sample(logits: list[float], row: SampleRow) -> int:
    """The definition once more, in plain Python."""
    x = list(logits)
    for t, b in row.logit_bias.items():
        x[t] += b
    for t in set(row.prompt_ids) | set(row.output_ids):
        x[t] = x[t] / row.repetition_penalty if x[t] > 0 else x[t] * row.repetition_penalty
    for t in set(row.output_ids):
        x[t] -= row.presence_penalty + row.frequency_penalty * list(row.output_ids).count(t)
    for t in row.banned:
        x[t] = -math.inf
    order = sorted(range(len(x)), key=lambda t: (-x[t], t))
    if row.temperature == 0:
        return order[0]
    order = order[: row.top_k] if row.top_k else order
    weight = {t: math.exp((x[t] - x[order[0]]) / row.temperature) for t in order}
    total, mass, kept = sum(weight.values()), 0.0, []
    for t in order:
        if kept and row.top_p < 1 and mass >= row.top_p:
            break
        kept.append(t)
        mass += weight[t] / total
    kept = [t for t in kept if weight[t] >= row.min_p * weight[order[0]]]
    total, mass = sum(weight[t] for t in kept), 0.0
    for t in kept:
        mass += weight[t] / total
        if mass > row.uniform:
            return t
    return next(t for t in reversed(kept) if weight[t] > 0)


rows = st.builds(
    SampleRow,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.integers(0, 6),
    top_p=st.sampled_from([0.05, 0.5, 0.83, 1.0]),
    min_p=st.sampled_from([0.0, 0.07, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.4]),
    logit_bias=st.dictionaries(st.integers(0, 9), st.sampled_from([-3.0, 1.0]), max_size=3),
    banned=st.frozensets(st.integers(0, 9), max_size=4),
    uniform=st.integers(0, 996).map(lambda i: (i + 0.5) / 997),
    prompt_ids=st.lists(st.integers(0, 9), max_size=3),
    output_ids=st.lists(st.integers(0, 9), max_size=5),
)


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(rows, min_size=1, max_size=3), seed=st.integers(0, 10**6))
def test_sample_follows_its_definition(rows, seed):
    """Logits with many ties, every option at once."""
    rng = random.Random(seed)
    logits = [[rng.choice((-1.25, 0.0, 0.5, 0.5, 2.0)) for _ in range(10)] for _ in rows]
    got = F64.sample(torch.tensor(logits), rows)
    assert got == [naive_sample(x, row) for x, row in zip(logits, rows, strict=True)]


def test_sample_frequencies_are_the_softmax():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    n = 400
    row = [SampleRow(temperature=1.0, uniform=(i + 0.5) / n) for i in range(n)]
    got = torch.tensor(F64.sample(logits.expand(n, 4), row)).bincount(minlength=4) / n
    torch.testing.assert_close(got, logits[0].softmax(-1), rtol=0, atol=1.5 / n)


def test_sample_edges():
    assert F64.sample(torch.tensor([[1.0, 3.0, 3.0]]), [SampleRow()]) == [1]
    last = SampleRow(temperature=1.0, uniform=math.nextafter(1.0, 0.0))
    assert F64.sample(torch.tensor([[1.0, 3.0, -torch.inf]]), [last]) == [0]
    tiny = SampleRow(temperature=1e-300, uniform=0.9)
    assert F64.sample(torch.tensor([[1.0, 3.0, 2.0]]), [tiny]) == [1]
    for bad in (torch.nan, torch.inf):
        with pytest.raises(BackendError, match="NaN or infinity"):
            F64.sample(torch.tensor([[1.0, bad]]), [SampleRow(temperature=1.0)])
    with pytest.raises(BackendError, match="every token is banned"):
        F64.sample(torch.tensor([[1.0, 2.0]]), [SampleRow(banned=frozenset({0, 1}))])
    with pytest.raises(ValueError, match="2 sampling rows"):
        F64.sample(torch.zeros(1, 4), [SampleRow(), SampleRow()])
