"""Which backends the contract runs over: all that are usable here and the emulated devices, or the one that
QWEN_RT_CONTRACT_BACKEND names."""

from __future__ import annotations

import os
import platform

import pytest
import torch

from qwen_rt.backends import select

VARIANTS = {"cpu": ("neon",) if platform.machine() in ("aarch64", "arm64") else ("scalar", "avx2")}
"""Instruction sets of a backend beside its default, each run over the whole contract as well (QWEN_RT_CPU_ISA)."""

EMULATED = ("cuda-emulated", "dcu-emulated", "dcu-simt-emulated")
"""Opened by name only, so select.probe_all() does not list them."""

torch.set_num_threads(1)  # the oracle's OpenMP threads would fight with a native backend's own for the cores


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend_case" not in metafunc.fixturenames:
        return
    only = os.environ.get("QWEN_RT_CONTRACT_BACKEND")
    emulated = {name: select.probe(name) for name in EMULATED}
    probes = {only: select.probe(only)} if only else {**select.probe_all(), **emulated}
    params = []
    for name, found in probes.items():
        if not found.usable:
            if only:
                pytest.exit(f"QWEN_RT_CONTRACT_BACKEND={only}: {found.reason}", 1)
            skip = pytest.mark.skip(reason=f"{name}: {found.reason}")
            params.append(pytest.param((name, None, ""), id=name, marks=skip))
            continue
        for dtype in select.backend_class(name).caps.compute_dtypes:
            if dtype != "float64":  # the oracle itself
                params.append(pytest.param((name, dtype, ""), id=f"{name}-{dtype}"))
                params += [pytest.param((name, dtype, v), id=f"{name}-{dtype}-{v}") for v in VARIANTS.get(name, ())]
    metafunc.parametrize("backend_case", params, scope="module")
