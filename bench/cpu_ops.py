"""Time the native attention against torch's scaled_dot_product_attention, and sampling, in one interleaved run.

    python bench/cpu_ops.py [--threads N] [--seconds 0.5] [--isa avx2]

torch gets contiguous float32 keys and values with grouped heads already repeated: the ratio includes what paging,
16-bit and int8 caches cost or save. Medians; GFLOP/s counts the causal half only. Decode goes through 64 MiB of caches,
one a call, so that it reads keys and values from memory.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from qwen_rt import _cpu
from qwen_rt.backends.base import SampleRow
from qwen_rt.backends.torch_backend import from_host
from qwen_rt.dtypes import host_dtype
from qwen_rt.quant.formats import Array

BLOCK = 32
CACHE_BYTES = 64 << 20
DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16", "int8": "uint8"}  # cache -> its numbers
SHAPES = {"Qwen2.5-0.5B": (14, 2, 64), "Qwen-7B": (32, 32, 128), "Qwen2.5-7B": (28, 4, 128)}


def in_turns(calls: list[Callable[[], object]], seconds: float) -> list[list[float]]:
    """Seconds of each call, round by round, for `seconds` per call (at least 5 rounds)."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    stop = time.perf_counter() + seconds * len(calls)
    while len(times[0]) < 5 or time.perf_counter() < stop:
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return times


def medians(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """Median seconds of each call, as in_turns() takes them."""
    return [statistics.median(t) for t in in_turns(calls, seconds)]


def native(q: Array, k: Array, v: Array, dtype: str) -> Callable[[], object]:
    """The native attention of q [n, Hq, D] over caches that hold k, v [kv_len, Hkv, D] in shuffled pages."""
    kv_len, heads, size = k.shape
    blocks = -(-kv_len // BLOCK)
    table = np.random.default_rng(0).permutation(blocks).tolist()
    slots = [table[p // BLOCK] * BLOCK + p % BLOCK for p in range(kv_len)]
    layers, held = [], host_dtype(DTYPES[dtype])
    for _ in range(1 + CACHE_BYTES // (2 * k.size * held.itemsize) if q.shape[0] == 1 else 1):
        pages = [np.zeros((blocks, heads, BLOCK, size), held) for _ in "kv"]
        affine = [np.zeros((blocks, heads, BLOCK), np.float32) for _ in range(4 if dtype == "int8" else 0)]
        layers.append(_cpu.KvLayer(*pages, *affine))
        _cpu.store_kv(layers[-1], k, v, _cpu.Step([kv_len], [kv_len], [table], slots, BLOCK))
    step = _cpu.Step([q.shape[0]], [kv_len], [table], slots[kv_len - q.shape[0] :], BLOCK)
    out, turn = np.empty_like(q), itertools.cycle(layers)
    return lambda: _cpu.attention(q, next(turn), step, size**-0.5, 0, out)


def peer(q: Array, k: Array, v: Array) -> Callable[[], object]:
    """torch's attention on the same values."""
    group = q.shape[1] // k.shape[1]
    queries = from_host(q.swapaxes(0, 1))[None]
    keys, values = (from_host(x.repeat(group, 1).swapaxes(0, 1))[None] for x in (k, v))
    return lambda: scaled_dot_product_attention(queries, keys, values, is_causal=len(q) > 1)


def main() -> None:
    """Print a table of medians."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--threads", type=int, default=torch.get_num_threads())
    args.add_argument("--seconds", type=float, default=0.5, help="measuring time of each figure")
    args.add_argument("--isa", default=_cpu.active_isa(), help="instruction set of the native kernels")
    opt = args.parse_args()
    _cpu.set_isa(opt.isa)
    _cpu.set_num_threads(opt.threads)
    torch.set_num_threads(opt.threads)
    print(f"{opt.threads} threads, {_cpu.active_isa()}, torch {torch.__version__}; us are medians, x = torch / native")
    header = " ".join(f"{d + ' us':>12}{'x':>6}{'GF/s':>6}" for d in DTYPES)
    print(f"{'attention':<28}{'torch us':>10} {header}")
    draw = np.random.default_rng(1)
    for model, (heads, kv_heads, size) in SHAPES.items():
        for n, kv_len in ((512, 512), (2048, 2048), (64, 2048), (1, 512), (1, 8192)):
            shapes = (n, heads, size), (kv_len, kv_heads, size), (kv_len, kv_heads, size)
            q, k, v = (draw.standard_normal(shape, np.float32) for shape in shapes)
            theirs, *ours = medians(
                [peer(q, k, v) if n in (1, kv_len) else lambda: None] + [native(q, k, v, d) for d in DTYPES],
                opt.seconds,
            )
            flops = 4 * heads * size * sum(range(kv_len - n + 1, kv_len + 1))
            compared = n in (1, kv_len)
            cells = " ".join(
                f"{t * 1e6:>12.0f}{theirs / t if compared else float('nan'):>6.2f}{flops / t / 1e9:>6.0f}" for t in ours
            )
            print(f"{model:<14}{n:>5} of {kv_len:<6}{theirs * 1e6 if compared else float('nan'):>10.0f} {cells}")
    logits = 3 * draw.standard_normal((1, 151936), np.float32)
    rows = {
        "greedy": SampleRow(),
        "temperature 1": SampleRow(temperature=1.0, uniform=0.7),
        "top-p 0.8": SampleRow(temperature=0.7, top_p=0.8, uniform=0.7),
        "top-k 20, top-p 0.8": SampleRow(temperature=0.7, top_k=20, top_p=0.8, uniform=0.7),
    }
    times = medians([lambda row=row: _cpu.sample(logits, [row]) for row in rows.values()], opt.seconds)  # type: ignore[misc]
    print("sampling of 151936: " + ", ".join(f"{name} {t * 1e6:.0f} us" for name, t in zip(rows, times, strict=True)))


if __name__ == "__main__":
    main()
