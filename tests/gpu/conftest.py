"""Tests of the GPU sources: the emulator at both warp sizes, and whatever device compilers this machine has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from needs import missing, need_compiler

from qwen_rt.backends.gpu import toolchain
from qwen_rt.errors import BackendError

WARPS = (32, 64)
ORDERS = ("forward", "reverse", "random")

torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the compilers whose tests were skipped."""
    for name, why in sorted(missing.items()):
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
