"""Compile into the disk cache what the compile gate will ask for: `python fill_cache.py forwards|backwards`.

One process goes each way, so that they meet. What fails to compile is the gate's own tests to tell.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from qwen_rt.backends.gpu import compilers, toolchain

HIPRTC_ARCH, HIPRTC_MODULES = "gfx906", ("norm", "elementwise", "mma_check")
"""HIPRTC is hipcc's compiler and takes as long: small modules only."""
NVCC_ARCH = "sm_80"


def jobs() -> Iterator[tuple[compilers.Compiler, str, str]]:
    """(compiler, module, architecture) of every image."""
    modules = toolchain.modules()
    for nvrtc in compilers.find_nvrtc()[:1]:
        known = nvrtc.architectures()
        archs = [a for a in compilers.CUDA_ARCHS if compilers.arch_number(a) in known]
        yield from ((nvrtc, m, a) for a in archs for m in modules)
    if nvcc := compilers.find_nvcc():
        yield from ((nvcc, m, NVCC_ARCH) for m in modules)
    if hiprtc := compilers.find_hiprtc():
        yield from ((hiprtc, m, HIPRTC_ARCH) for m in HIPRTC_MODULES)
    if hipcc := compilers.find_hipcc():
        yield from ((hipcc, m, a) for a in compilers.HIP_ARCHS for m in modules)


if __name__ == "__main__":
    for compiler, module, arch in list(jobs())[:: -1 if sys.argv[1] == "backwards" else 1]:
        with contextlib.suppress(compilers.CompileFailed):
            toolchain.compiled(compiler, module, arch)
