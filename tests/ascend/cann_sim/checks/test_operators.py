"""Operators through the unmodified torch_npu: results, and every documented restriction refused by name."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor

D = "npu:0"
H, B, F = torch.float16, torch.bfloat16, torch.float32
A910 = torch.npu.get_device_name(0) == "Ascend910A"
only_910b = pytest.mark.skipif(A910, reason="an operator of the 910B")


def npu(*shape: int, dtype: torch.dtype = H) -> Tensor:
    """Random values on the device."""
    return torch.randn(*shape).to(dtype).to(D)


def ints(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Random integers on the device."""
    return torch.randint(low, high, shape, dtype=dtype).to(D)


def refused(capfd: pytest.CaptureFixture[str], call: Callable[[], Any]) -> str:
    """What the simulator said when it refused the call."""
    capfd.readouterr()
    with pytest.raises(RuntimeError):
        call()
        torch.npu.synchronize()
    said = re.findall(r"\[cannsim\] ERROR (.*)", capfd.readouterr().err)
    assert said, "refused, but not by the simulator"
    return str(said[0])


def near(got: Tensor, want: Tensor, bound: float = 2e-3) -> None:
    """Within bound of the largest value."""
    difference = (got.cpu().double() - want.cpu().double()).abs().max().item()
    assert difference <= bound * max(1.0, want.abs().max().item()), difference


# --- memory, as torch_npu uses it


def test_an_empty_tensor_is_poison() -> None:
    torch.npu.empty_cache()
    for dtype in (H, B, F) if not A910 else (H, F):
        assert torch.empty(1000, dtype=dtype, device=D).cpu().isnan().all()


# --- restrictions: (name, call, what the simulator says)


def int4_weight(k: int, n: int) -> Tensor:
    return torch_npu.npu_convert_weight_to_int4pack(ints(-8, 8, k, n))


def quant(m: int, k: int, n: int, group: int, **change: Any) -> Callable[[], Any]:
    """A W4A16 product, some of its arguments changed."""

    def call() -> Tensor:
        groups = -(-k // group) if group else 1
        args = {
            "x": npu(m, k), "weight": int4_weight(k, n), "antiquant_scale": npu(groups, n),
            "antiquant_offset": npu(groups, n), "antiquant_group_size": group,
        }  # fmt: skip
        return torch_npu.npu_weight_quant_batchmatmul(**{**args, **change})

    return call


MASK = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def attention(**change: Any) -> Callable[[], Any]:
    """Paged decode, [B, 1, H] queries over two sequences of 130 and 7 keys, some arguments changed."""

    def call() -> Tensor:
        args = {
            "query": npu(2, 1, 4 * 64), "key": npu(5, 128, 2 * 64), "value": npu(5, 128, 2 * 64),
            "num_heads": 4, "num_key_value_heads": 2, "input_layout": "BSH", "scale": 0.125, "block_size": 128,
            "block_table": torch.tensor([[3, 1], [4, 0]], dtype=torch.int32).to(D), "actual_seq_lengths_kv": [130, 7],
        }  # fmt: skip
        return torch_npu.npu_fused_infer_attention_score(**{**args, **change})[0]

    return call


def tnd(**change: Any) -> Callable[[], Any]:
    """Paged prefill of two sequences, 3 and 5 queries, some arguments changed."""
    return attention(
        **{
            "query": npu(8, 4, 64),
            "input_layout": "TND",
            "actual_seq_lengths": [3, 8],
            "sparse_mode": 3,
            "atten_mask": MASK.to(D),
            **change,
        }
    )


def int8_cache(**change: Any) -> Callable[[], Any]:
    """Paged decode over an INT8 cache with a scale for every token and head."""
    scales = {f"{x}_antiquant_{y}": npu(5, 2, 128, dtype=F) for x in ("key", "value") for y in ("scale", "offset")}
    codes = {x: ints(-128, 128, 5, 128, 128, dtype=torch.int8) for x in ("key", "value")}
    return attention(**{**codes, **scales, "key_antiquant_mode": 5, "value_antiquant_mode": 5, **change})


def store(**change: Any) -> Callable[[], Any]:
    def call() -> None:
        args = {
            "key": npu(3, 2, 64), "value": npu(3, 2, 64),
            "key_cache": npu(4, 16, 2, 64), "value_cache": npu(4, 16, 2, 64),
            "slot_mapping": torch.tensor([5, 17, 63], dtype=torch.int32).to(D), "cache_mode": "Norm",
        }  # fmt: skip
        torch_npu.npu_scatter_pa_kv_cache(**{**args, **change})

    return call


RESTRICTIONS: dict[str, tuple[Callable[[], Callable[[], Any]], str]] = {
    "rms_norm types": (
        lambda: lambda: torch_npu.npu_rms_norm(npu(2, 64), npu(64, dtype=B)),
        "gamma must have x's type",
    ),
    "rms_norm float x": (
        lambda: lambda: torch_npu.npu_rms_norm(npu(2, 64, dtype=F), npu(64)),
        "gamma must have x's type",
    ),
    "add_rms_norm types": (
        lambda: lambda: torch_npu.npu_add_rms_norm(npu(2, 64), npu(2, 64), npu(64, dtype=F)),
        "x1 and gamma must have one",
    ),
    "add_rms_norm shapes": (
        lambda: lambda: torch_npu.npu_add_rms_norm(npu(2, 64), npu(1, 64), npu(64)),
        "x1 and x2 must have one shape",
    ),
    "swiglu odd": (lambda: lambda: torch_npu.npu_swiglu(npu(2, 63)), "x must be even in dimension dim"),
    "rope size": (
        lambda: lambda: torch_npu.npu_rotary_mul(npu(1, 2, 3, 1024), npu(1, 2, 1, 1024), npu(1, 2, 1, 1024)),
        "D must be even and below 896",
    ),
    "rope shape": (
        lambda: lambda: torch_npu.npu_rotary_mul(npu(1, 5, 3, 64), npu(1, 2, 1, 64), npu(1, 2, 1, 64)),
        "does not fit x",
    ),
    "apply_rope size": (
        lambda: (
            lambda: torch_npu.npu_apply_rotary_pos_emb(
                npu(1, 2, 4, 64), npu(1, 2, 2, 64), npu(1, 2, 1, 64), npu(1, 2, 1, 64)
            )
        ),
        "last dimension must be 128",
    ),
    "scale type": (
        lambda: quant(2, 128, 64, 32, antiquant_scale=npu(4, 64, dtype=B)),
        "x and antiquantScale must have one",
    ),
    "scale shape": (lambda: quant(2, 128, 64, 32, antiquant_scale=npu(3, 64)), "must be (ceil(K/group), N)"),
    "offset shape": (lambda: quant(2, 128, 64, 32, antiquant_offset=npu(2, 64)), "antiquantScale and antiquantOffset"),
    "bias type": (lambda: quant(2, 128, 64, 32, bias=npu(64, dtype=F)), "bias must be FLOAT16 for a FLOAT16 x"),
    "wide N": (
        lambda: (
            lambda: torch_npu.npu_weight_quant_batchmatmul(
                npu(1, 32), ints(-9, 9, 32, 65536, dtype=torch.int8), npu(1, 65536)
            )
        ),
        "K and N must be within [1, 65535]",
    ),
    "store type": (
        lambda: store(
            key=npu(3, 2, 64, dtype=F),
            value=npu(3, 2, 64, dtype=F),
            key_cache=npu(4, 16, 2, 64, dtype=F),
            value_cache=npu(4, 16, 2, 64, dtype=F),
        ),
        "key must be FLOAT16, BFLOAT16 or INT8",
    ),
    "store shape": (lambda: store(key_cache=npu(4, 16, 2, 32)), "key's cache"),
    "store slots": (
        lambda: store(slot_mapping=torch.tensor([1, 2]).to(D)),
        "slotMapping must have a slot for every token",
    ),
    "store slot": (
        lambda: store(slot_mapping=torch.tensor([1, 2, 64], dtype=torch.int32).to(D)),
        "slot 64 of token 2 is beyond",
    ),
    "block of 24": (
        lambda: attention(block_size=24, key=npu(5, 24, 128), value=npu(5, 24, 128)),
        "blockSize must be a multiple of 16",
    ),
    "block of 528": (
        lambda: attention(block_size=528, key=npu(5, 528, 128), value=npu(5, 528, 128)),
        "blockSize must be a multiple of 16 up to 512",
    ),
    "several queries, block of 64": (
        lambda: attention(
            query=npu(2, 3, 256),
            block_size=64,
            key=npu(5, 64, 128),
            value=npu(5, 64, 128),
            block_table=ints(0, 5, 2, 3),
        ),
        "blockSize must be 128, 256, 384 or 512",
    ),
    "TND, block of 256": (
        lambda: tnd(block_size=256, key=npu(5, 256, 128), value=npu(5, 256, 128)),
        "a multiple of 16 up to 128 in layout TND",
    ),
    "no key lengths": (
        lambda: attention(actual_seq_lengths_kv=None),
        "actualSeqLengthsKv must be given with a block table",
    ),
    "table of int64": (lambda: attention(block_table=ints(0, 5, 2, 2, dtype=torch.int64)), "blockTable must be INT32"),
    "table rows": (lambda: attention(block_table=ints(0, 5, 3, 2)), "blockTable has 3 rows for a batch of 2"),
    "table too short": (lambda: attention(block_table=ints(0, 5, 2, 1)), "1 pages hold less than 130 keys"),
    "page beyond the cache": (lambda: attention(block_table=ints(7, 8, 2, 2)), "blockTable names page 7 of 5"),
    "head size": (
        lambda: tnd(query=npu(8, 4, 24), key=npu(5, 128, 48), value=npu(5, 128, 48)),
        "D must be a multiple of 16 up to 512, not 24",
    ),
    "heads": (lambda: attention(num_key_value_heads=3), "numHeads must be a multiple of numKeyValueHeads"),
    "query type": (
        lambda: attention(
            **{
                n: npu(*s, dtype=F)
                for n, s in (("query", (2, 1, 256)), ("key", (5, 128, 128)), ("value", (5, 128, 128)))
            }
        ),
        "query must be FLOAT16 or BFLOAT16",
    ),
    "cache by heads in BSH": (
        lambda: attention(key=npu(5, 2, 128, 64), value=npu(5, 2, 128, 64)),
        "layout BSH takes a cache [pages, blockSize, N*D] only",
    ),
    "small mask": (
        lambda: tnd(atten_mask=MASK[:512, :512].contiguous().to(D)),
        "attenMask must be 2048 x 2048 in sparse mode 3",
    ),
    "no mask": (lambda: tnd(atten_mask=None), "attenMask must be given in sparse mode 3"),
    "wrong triangle": (lambda: tnd(atten_mask=MASK.T.contiguous().to(D)), "attenMask is not the upper triangle"),
    "float mask": (lambda: tnd(atten_mask=MASK.to(H).to(D)), "attenMask must be BOOL, INT8 or UINT8"),
    "sparse mode 2 in TND": (lambda: tnd(sparse_mode=2), "layout TND takes sparse mode 0 without attenMask, or 3 or 4"),
    "sparse mode 5": (lambda: tnd(sparse_mode=5), "sparseMode must be 0 to 4"),
    "TND without lengths": (lambda: tnd(actual_seq_lengths=None), "actualSeqLengths must be given in layout TND"),
    "TND lengths of another batch": (lambda: tnd(actual_seq_lengths=[3, 7]), "actualSeqLengths ends at 7"),
    "TND decreasing lengths": (lambda: tnd(actual_seq_lengths=[9, 8]), "must not decrease in layout TND"),
    "TND inner_precise": (lambda: tnd(inner_precise=1), "innerPrecise must be 0 in layout TND"),
    "int8 scale type": (
        lambda: int8_cache(
            **{f"{x}_antiquant_{y}": npu(5, 2, 128) for x in ("key", "value") for y in ("scale", "offset")}
        ),
        "AntiquantScale must be FLOAT in mode 5",
    ),
    "int8 scale shape": (
        lambda: int8_cache(
            **{f"{x}_antiquant_{y}": npu(5, 128, 2, dtype=F) for x in ("key", "value") for y in ("scale", "offset")}
        ),
        "must be (pages, N, blockSize) in mode 5",
    ),
    "int8 modes differ": (
        lambda: int8_cache(value_antiquant_mode=4),
        "keyAntiquantMode and valueAntiquantMode must agree",
    ),
    "int8 without scales": (
        lambda: int8_cache(
            key_antiquant_scale=None, value_antiquant_scale=None, key_antiquant_offset=None, value_antiquant_offset=None
        ),
        "INT8 keys and values need both antiquant scales",
    ),
    "int8 with several queries": (
        lambda: int8_cache(query=npu(2, 3, 256)),
        "antiquant mode 5 needs one query a sequence",
    ),
    "int8 block of 16": (
        lambda: int8_cache(
            block_size=16,
            key=ints(0, 9, 5, 16, 128, dtype=torch.int8),
            value=ints(0, 9, 5, 16, 128, dtype=torch.int8),
            block_table=ints(0, 5, 2, 9),
        ),
        "blockSize must be a multiple of 32",
    ),
    "index beyond": (lambda: lambda: npu(5, 4).index_select(0, torch.tensor([7]).to(D)), "aclnnIndexSelect"),
    "embedding beyond": (
        lambda: lambda: torch.nn.functional.embedding(torch.tensor([9]).to(D), npu(5, 4)),
        "aclnnEmbedding",
    ),
}


@only_910b
@pytest.mark.parametrize("name", RESTRICTIONS)
def test_a_restriction_is_refused_by_name(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, says = RESTRICTIONS[name]
    call = make()
    torch.npu.synchronize()
    assert says in refused(capfd, call)


# What op-plugin itself refuses is asked of the simulator directly.

OPS = ctypes.CDLL("libopapi.so")
OPS.aclCreateTensor.restype = ctypes.c_void_p
ACL = {F: 0, H: 1, torch.int8: 2, torch.int32: 3, B: 27}


def described(*shape: int, dtype: torch.dtype = H) -> ctypes.c_void_p:
    """An aclTensor without memory: enough for a call that is checked and not launched."""
    dims = (ctypes.c_int64 * len(shape))(*shape)
    steps = (ctypes.c_int64 * len(shape))(*(math.prod(shape[i + 1 :]) for i in range(len(shape))))
    n = ctypes.c_uint64(len(shape))
    return ctypes.c_void_p(OPS.aclCreateTensor(dims, n, ACL[dtype], steps, ctypes.c_int64(0), 2, dims, n, None))


def workspace(name: str, *args: Any) -> int:
    """The status of aclnn<name>GetWorkspaceSize."""
    out = ctypes.c_uint64(), ctypes.c_void_p()
    return int(getattr(OPS, f"aclnn{name}GetWorkspaceSize")(*args, *(ctypes.byref(o) for o in out)))


@only_910b
@pytest.mark.parametrize(
    ("k", "group", "says"),
    [
        (128, 32, None),
        (129, 128, None),
        (128, 16, "antiquantGroupSize must be 0, or a multiple of 32 within [32, K-1], not 16"),
        (192, 48, "antiquantGroupSize must be 0, or a multiple of 32 within [32, K-1], not 48"),
        (128, 128, "antiquantGroupSize must be 0, or a multiple of 32 within [32, K-1], not 128"),
    ],
)
def test_group_sizes(k: int, group: int, says: str | None, capfd: pytest.CaptureFixture[str]) -> None:
    groups = -(-k // group)
    args = described(2, k), described(k, 64, dtype=torch.int8), described(groups, 64)
    status = workspace("WeightQuantBatchMatmulV2", *args, None, None, None, None, group, described(2, 64))
    assert status == (161002 if says else 0)
    assert (says or "") in capfd.readouterr().err


@only_910b
def test_rope_types(capfd: pytest.CaptureFixture[str]) -> None:
    cos = [described(1, 2, 1, 64, dtype=F) for _ in "cs"]
    x = described(1, 2, 3, 64)
    assert workspace("RotaryPositionEmbedding", x, *cos, ctypes.c_int64(0), described(1, 2, 3, 64)) == 161002
    assert "x and cos must have one data type, not FLOAT16 and FLOAT" in capfd.readouterr().err


@only_910b
@pytest.mark.parametrize("make", [lambda: quant(2, 128, 64, 32), attention, tnd, int8_cache, store])
def test_the_unchanged_calls_are_served(make: Callable[[], Callable[[], Any]]) -> None:
    make()()
    torch.npu.synchronize()


def test_an_unknown_operator_is_refused_by_name(capfd: pytest.CaptureFixture[str]) -> None:
    assert "is not simulated" in refused(capfd, lambda: torch.randn(5, device=D))
    with pytest.raises(RuntimeError, match=r"aclnnDynamicQuant.* not in libopapi.so"):
        torch_npu.npu_dynamic_quant(npu(2, 64))


@pytest.mark.skipif(not A910, reason="what the first 910 lacks")
@pytest.mark.parametrize(
    "call",
    [
        lambda: torch_npu.npu_rms_norm(npu(2, 64), npu(64)),
        lambda: torch_npu.npu_add_rms_norm(npu(2, 64), npu(2, 64), npu(64)),
        lambda: torch_npu.npu_swiglu(npu(2, 64)),
        lambda: torch_npu.npu_apply_rotary_pos_emb(*(npu(1, 2, 1, 128) for _ in range(4))),
        lambda: torch_npu.npu_weight_quant_batchmatmul(npu(1, 32), ints(-9, 9, 32, 64, dtype=torch.int8), npu(1, 64)),
        attention(),
        store(),
        lambda: npu(2, 3).gather(0, ints(0, 2, 2, 3, dtype=torch.int64)),
    ],
)
def test_the_first_910_refuses_by_name(call: Callable[[], Any], capfd: pytest.CaptureFixture[str]) -> None:
    assert "not supported on Ascend910A" in refused(capfd, call)


@pytest.mark.skipif(not A910, reason="what the first 910 lacks")
def test_the_first_910_has_no_bfloat16(capfd: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(2, 64).bfloat16().to(D)
    assert "BFLOAT16 is not supported on Ascend910A" in refused(capfd, lambda: x + x)


# --- results, against float64 formulas written here


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Causal attention to the last key: q [n, H, D], k, v [m, G, D] -> [n, H, D]."""
    n, heads, _ = q.shape
    m = k.shape[0]
    k, v = (t.double().repeat_interleave(heads // t.shape[1], 1).transpose(0, 1) for t in (k, v))
    scores = q.double().transpose(0, 1) @ k.transpose(1, 2) * scale
    i, j = torch.arange(m - n, m)[:, None], torch.arange(m)[None]
    seen = (j <= i) if window is None else (j <= i) & (j > i - window)
    return (scores.masked_fill(~seen, -math.inf).softmax(-1) @ v).transpose(0, 1)


@only_910b
@pytest.mark.parametrize("window", [None, 5])
def test_paged_attention(window: int | None) -> None:
    torch.manual_seed(1)
    k, v, table = torch.randn(4, 16, 2, 64).half(), torch.randn(4, 16, 2, 64).half(), [[2, 0], [3, 1]]
    q, lens, starts = torch.randn(7, 4, 64).half(), (20, 9), (0, 3)
    band = {"sparse_mode": 3} if window is None else {"sparse_mode": 4, "pre_tokens": window - 1, "next_tokens": 0}
    got = torch_npu.npu_fused_infer_attention_score(
        q.to(D), k.reshape(4, 16, 128).to(D), v.reshape(4, 16, 128).to(D), num_heads=4, num_key_value_heads=2,
        input_layout="TND", scale=0.125, block_size=16, block_table=torch.tensor(table, dtype=torch.int32).to(D),
        actual_seq_lengths=[3, 7], actual_seq_lengths_kv=list(lens), atten_mask=MASK.to(D), **band,
    )[0].cpu()  # fmt: skip
    for b, (start, n) in enumerate(zip(starts, (3, 4), strict=True)):
        keys, values = (torch.cat([t[p] for p in table[b]])[: lens[b]] for t in (k, v))
        near(got[start : start + n], dense(q[start : start + n], keys, values, 0.125, window))


@only_910b
def test_int8_cache_attention() -> None:
    torch.manual_seed(2)
    codes = [torch.randint(-128, 128, (4, 32, 2, 64), dtype=torch.int8) for _ in "kv"]
    scales, offsets = ([torch.rand(4, 2, 32) / 64 + 0.001 for _ in "kv"] for _ in range(2))
    table, lens, q = [[2, 0], [3, 1]], (40, 9), torch.randn(2, 1, 4, 64).half()
    kw = {}
    for name, s, o in zip(("key", "value"), scales, offsets, strict=True):
        kw |= {f"{name}_antiquant_scale": s.to(D), f"{name}_antiquant_offset": o.to(D), f"{name}_antiquant_mode": 5}
    got = torch_npu.npu_fused_infer_attention_score(
        q.reshape(2, 1, 256).to(D), *(c.reshape(4, 32, 128).to(D) for c in codes), num_heads=4, num_key_value_heads=2,
        input_layout="BSH", scale=0.125, block_size=32, block_table=torch.tensor(table, dtype=torch.int32).to(D),
        actual_seq_lengths_kv=list(lens), **kw,
    )[0].cpu()  # fmt: skip
    for b in range(2):
        plain = [
            torch.cat([((c[p].double() + o[p].T[..., None]) * s[p].T[..., None]) for p in table[b]])[: lens[b]]
            for c, s, o in zip(codes, scales, offsets, strict=True)
        ]
        near(got[b].view(1, 4, 64), dense(q[b], *plain, 0.125))


@only_910b
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("group", [0, 32])
def test_weight_quant_int4(group: int, transposed: bool) -> None:
    torch.manual_seed(3)
    k, n = 96, 40
    codes, groups = torch.randint(-8, 8, (k, n), dtype=torch.int32), 3 if group else 1
    scale, offset = torch.rand(groups, n).half() / 8, torch.randint(-8, 8, (groups, n)).half()
    x, rows = torch.randn(3, k).half(), group or k
    weight = (codes + offset.double().repeat_interleave(rows, 0)) * scale.double().repeat_interleave(rows, 0)
    pack = torch_npu.npu_convert_weight_to_int4pack
    packed = pack(codes.T.contiguous().to(D)).T if transposed else pack(codes.to(D))
    s, o = ((t.T.contiguous().to(D).T if transposed else t.to(D)) for t in (scale, offset))
    got = torch_npu.npu_weight_quant_batchmatmul(x.to(D), packed, s, o, antiquant_group_size=group)
    near(got, x.double() @ weight)


@only_910b
def test_norm_rope_swiglu() -> None:
    x, g = torch.randn(3, 64).half(), torch.randn(64).half()
    norm = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * g.double()
    near(torch_npu.npu_rms_norm(x.to(D), g.to(D), 1e-6)[0], norm)
    a, b = x.double().chunk(2, -1)
    near(torch_npu.npu_swiglu(x.to(D)), a * a.sigmoid() * b)
    q, cos, sin = torch.randn(1, 5, 2, 64), torch.randn(1, 5, 1, 64), torch.randn(1, 5, 1, 64)
    first, second = q.chunk(2, -1)
    near(torch_npu.npu_rotary_mul(q.to(D), cos.to(D), sin.to(D)), q * cos + torch.cat([-second, first], -1) * sin, 1e-6)


def test_a_product_is_rounded_once() -> None:
    x, w = torch.randn(4, 700).half(), torch.randn(700, 300).half()
    exact = x.double() @ w.double()
    got = (x.to(D) @ w.to(D)).cpu().double()
    assert ((got - exact).abs() <= exact.abs() * 2**-11 + 1e-4).all()
