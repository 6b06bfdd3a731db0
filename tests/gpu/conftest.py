"""Tests of the GPU sources: the emulator at both warp sizes, and whatever device compilers this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from needs import missing

torch.set_num_threads(1)

_fillers: list[subprocess.Popen[bytes]] = []


def _fill_cache(direction: str) -> None:
    script = Path(__file__).with_name("fill_cache.py")
    _fillers.append(subprocess.Popen([sys.executable, str(script), direction]))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile the gate's images on the side, while the emulator's tests keep one core busy."""
    gate = any("compiled_ahead" in getattr(item, "fixturenames", ()) for item in session.items)
    first = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"  # one of the processes that share the work
    if gate and first and not session.config.option.collectonly:
        _fill_cache("forwards")


def pytest_sessionfinish() -> None:
    """Leave nothing running."""
    for process in _fillers:
        process.kill()


@pytest.fixture(scope="session")
def compiled_ahead() -> None:
    """Every image that the compile gate asks for is in the cache, or does not compile."""
    _fill_cache("backwards")
    for process in _fillers:
        process.wait(500)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the compilers whose tests were skipped."""
    for name, why in sorted(missing.items()):
        terminalreporter.write_line(f"GPU sources not compiled by {name}: {why}")
