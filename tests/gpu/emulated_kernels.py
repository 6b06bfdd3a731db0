"""The element-wise and sampling kernels on the emulator, each computation in every thread order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from qwen_rt.backends.gpu import toolchain
from qwen_rt.backends.gpu.driver import Driver
from qwen_rt.backends.gpu.kernels import Kernels, Loaded

MODULES = ("norm", "rope_kv", "elementwise", "sample")
WARPS = (32, 64)
U32 = 2.0**-24
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

Computation = Callable[[Kernels], Tensor | Sequence[Tensor]]


@cache
def open_kernels(warp: int, order: str) -> Kernels:
    """The kernels at a warp size, their threads run forward, in reverse or at random."""
    driver = Driver.open_emu(toolchain.emu_library(warp, only=MODULES), order)  # type: ignore[arg-type]
    return Kernels(lambda module: Loaded(driver.load(module), "emulated"), lambda: 0, warp)


def in_every_order(warp: int, compute: Computation) -> list[Tensor]:
    """What `compute` returns, which has to be the same bits whatever order threads run in (a missing barrier shows)."""
    first: list[Tensor] = []
    for order in ("forward", "reverse", "random"):
        result = compute(open_kernels(warp, order))
        tensors = [result] if isinstance(result, Tensor) else list(result)
        if not first:
            first = tensors
        for a, b in zip(first, tensors, strict=True):
            assert torch.equal(bits(a), bits(b)), f"threads in {order} order give another result"
    return first


def bits(x: Tensor) -> Tensor:
    """x as bytes: NaN equals itself, and zeros differ by sign."""
    return x.contiguous().flatten().view(torch.uint8)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """float64, seeded by its shape too."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def within(got: Tensor, want: Tensor, bound: Tensor) -> bool:
    """Every element of `got` is within its bound of `want`; a NaN is not."""
    return bool(((got.double() - want).abs() <= bound).all())
