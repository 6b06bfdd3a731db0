"""Tests of the GPU sources: the emulator at both warp sizes, and whatever device compilers this machine has.

QWEN_RT_REQUIRE_COMPILERS=nvrtc,hipcc makes a missing compiler a failure (as .ci/run does); otherwise its tests are
skipped and the end of the run names it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from qwen_rt.backends.gpu import toolchain
from qwen_rt.errors import BackendError

WARPS = (32, 64)
ORDERS = ("forward", "reverse", "random")

torch.set_num_threads(1)

_missing: dict[str, str] = {}


def need_compiler(name: str, found: object, why: str) -> None:
    """Skip the test when `name` was not found, or fail it when QWEN_RT_REQUIRE_COMPILERS names it."""
    if found:
        return
    if name in os.environ.get("QWEN_RT_REQUIRE_COMPILERS", "").split(","):
        pytest.fail(f"{name} is required here and missing: {why}")
    _missing[name] = why
    pytest.skip(f"{name}: {why}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the compilers whose tests were skipped."""
    for name, why in sorted(_missing.items()):
        terminalreporter.write_line(f"GPU sources not compiled by {name}: {why}")


@pytest.fixture(scope="session", params=WARPS, ids="warp{}".format)
def emu_library(request: pytest.FixtureRequest) -> Path:
    """The emulator's library, at warp 32 and at warp 64."""
    try:
        return toolchain.emu_library(request.param)
    except BackendError as e:
        if "needs a C++17 compiler" in str(e):
            need_compiler("g++", None, str(e))
        raise
