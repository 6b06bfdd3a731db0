"""Tests of the GPU sources: the emulator at both warp sizes, and whatever device compilers this machine has."""

from __future__ import annotations

import pytest
import torch
from needs import missing

torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the compilers whose tests were skipped."""
    for name, why in sorted(missing.items()):
        terminalreporter.write_line(f"GPU sources not compiled by {name}: {why}")
