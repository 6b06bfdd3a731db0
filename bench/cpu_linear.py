"""Time the native matrix products: prompts in products a second, decoding in bytes of weights a second.

    python bench/cpu_linear.py [--threads N] [--rows 512,1] [--seconds 0.5] [--isa avx2] [--formats int4-g32,int8-g32]

Random weights of the shapes of a layer of Qwen2.5-0.5B, all formats in turns; medians, and the best in brackets. One to
four rows go through 256 MiB of weights, one matrix a call, so that they read them from memory. Quantising activations
is part of a product.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable

import numpy as np
import torch
from cpu_ops import in_turns

from qwen_rt import _cpu
from qwen_rt.backends.contract import make_linear
from qwen_rt.backends.cpu import CpuBackend
from qwen_rt.quant.formats import LinearFormat, dense_format

SHAPES = {"gate+up": (9728, 896), "down": (896, 4864)}
FORMATS = {
    "int4-g32": LinearFormat(4, 32),
    "int4-g32+min": LinearFormat(4, 32, has_mins=True),
    "int4-g64": LinearFormat(4, 64),
    "int4-g128": LinearFormat(4, 128),
    "int5-g32": LinearFormat(5, 32),
    "int5-g32+min": LinearFormat(5, 32, has_mins=True),
    "int6-g16": LinearFormat(6, 16),
    "int8-g32": LinearFormat(8, 32),
    "float16": dense_format("float16"),
}
MEMORY = 256 << 20


def product(
    backend: CpuBackend, fmt: LinearFormat, shape: tuple[int, int], rows: int
) -> tuple[Callable[[], object], int]:
    """A call of the product, and bytes of the weight."""
    raw = make_linear(fmt, *shape, torch.Generator().manual_seed(1), bias=False, perm=False)
    first = backend.pack_linear(raw)
    copies = 1 + MEMORY // first.nbytes if rows <= backend.caps.exact_rows else 1
    weights = itertools.cycle([first, *(backend.pack_linear(raw) for _ in range(copies - 1))])
    x = np.random.default_rng(2).standard_normal((rows, shape[1]), np.float32)
    y = np.empty((rows, shape[0]), np.float32)
    return lambda: backend.native.linear(x, next(weights).native, y), first.nbytes


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", default="512,1")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--seconds", type=float, default=0.5, help="measuring time of each figure")
    parser.add_argument("--isa", default=_cpu.active_isa(), help="instruction set of the native kernels")
    opt = parser.parse_args()
    backend = CpuBackend()
    _cpu.set_isa(opt.isa)
    _cpu.set_num_threads(opt.threads)
    print(f"{opt.threads} threads, {_cpu.active_isa()}, {_cpu.activation_bits()}-bit activations from 5 rows on")
    for rows in map(int, opt.rows.split(",")):
        many = rows > backend.caps.exact_rows
        print(f"{rows} rows, {'GMAC/s' if many else 'GB/s'}" + "".join(f"{shape:>20}" for shape in SHAPES))
        cases = {
            (name, shape): product(backend, FORMATS[name], size, rows)
            for name in opt.formats.split(",")
            for shape, size in SHAPES.items()
        }
        taken = dict(zip(cases, in_turns([call for call, _ in cases.values()], opt.seconds), strict=True))
        for name in opt.formats.split(","):
            cells = []
            for shape, (n, k) in SHAPES.items():
                work = rows * n * k if many else cases[name, shape][1]
                times = taken[name, shape]
                cells.append(f"{work / statistics.median(times) / 1e9:.1f} ({work / min(times) / 1e9:.1f})")
            print(f"{name:<16}" + "".join(f"{cell:>20}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
