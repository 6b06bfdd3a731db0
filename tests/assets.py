"""Real files that tests need, had as users have them: through the hub's catalogue, which verifies the hash.

The Qwen-1 vocabulary (2.5 MB) is downloaded when absent; the demo model (490 MB) only when QWEN_RT_TEST_DOWNLOAD=1, as
`make test` sets it. A test is skipped, with the reason, when its file cannot be had.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import pytest

from qwen_rt.errors import HubError
from qwen_rt.hub import catalog_file


def qwen1_vocab() -> Path:
    """The genuine `qwen.tiktoken`."""
    return _found_or_skip("qwen1-vocab", download=True)


def demo_gguf() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct Q4_K_M as a .gguf file."""
    return _found_or_skip("demo", download=os.environ.get("QWEN_RT_TEST_DOWNLOAD") == "1")


def _found_or_skip(name: str, download: bool) -> Path:
    found = _attempt(name, None if download else "offline")
    if isinstance(found, str):
        pytest.skip(f"test asset cannot be had: {found}")
    return found


@lru_cache
def _attempt(name: str, hub: str | None) -> Path | str:
    try:
        return catalog_file(name, hub=hub)
    except HubError as e:
        return str(e)
