"""Every kernel once under AddressSanitizer and UBSan, in a process of its own (sanitized_kernels.py says what runs)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from needs import need_compiler

from qwen_rt.backends.gpu import compilers, toolchain

pytest.importorskip("qwen_rt._gpu", reason="the GPU launcher is not built (make build)")

SCRIPT = Path(__file__).with_name("sanitized_kernels.py")
NOT_RUN: dict[str, str] = {}
"""Kernels that do not run here, and why: none."""


@pytest.fixture(scope="module")
def runtime() -> str:
    """libasan, which has to be in a process before anything else; the library is built where nothing slows it down."""
    gxx = compilers.find_gxx()
    need_compiler("g++", gxx, "no C++ compiler on PATH")
    assert gxx is not None
    told = subprocess.run([str(gxx.path), "-print-file-name=libasan.so"], capture_output=True, text=True)
    if not Path(told.stdout.strip()).is_absolute():
        pytest.skip(f"{gxx.name} has no libasan.so")
    toolchain.emu_library(32, sanitize=True)
    return told.stdout.strip()


def run(runtime: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


def test_every_kernel_runs_clean_and_right(runtime: str) -> None:
    """At small shapes with odd tails, within the other tests' bounds; every kernel of every module was launched."""
    done = run(runtime)
    assert done.returncode == 0 and "runtime error" not in done.stderr, done.stderr[-8000:]
    told = json.loads(done.stdout)
    assert {m for m in toolchain.modules() if not any(k.startswith(PREFIX[m]) for k in told["there"])} == set()
    assert set(told["there"]) - set(told["launched"]) == set(NOT_RUN)


PREFIX = {
    "attention_decode": ("attention_decode", "attention_merge"),
    "attention_prefill": ("attention_prefill",),
    "elementwise": ("silu_mul", "embedding"),
    "linear_gemm": ("linear_tile", "linear_dequantize"),
    "linear_gemv": ("linear_rows",),
    "mma_check": ("mma_check",),
    "norm": ("rms_norm",),
    "rope_kv": ("rope",),
    "sample": ("sample",),
}
"""How the kernels of each module are called: a new module has to be entered, and so to run."""


def test_a_planted_read_beyond_a_tensor_is_found(runtime: str) -> None:
    """The same process setup, one kernel told of a row one element longer than it is."""
    done = run(runtime, "planted")
    assert done.returncode != 0 and done.stdout == "rows of 37\n", done.stdout + done.stderr[-4000:]
    assert "heap-buffer-overflow" in done.stderr and "in silu_mul_f16" in done.stderr, done.stderr[-4000:]
