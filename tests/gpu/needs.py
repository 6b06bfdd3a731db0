"""Device compilers as tests need them: QWEN_RT_REQUIRE_COMPILERS=nvrtc,hipcc makes a missing one a failure."""

from __future__ import annotations

import os

import pytest

missing: dict[str, str] = {}
"""Compilers whose tests were skipped, and why; the end of the run names them."""


def need_compiler(name: str, found: object, why: str) -> None:
    """Skip the test when `name` was not found, or fail it when QWEN_RT_REQUIRE_COMPILERS names it."""
    if found:
        return
    if name in os.environ.get("QWEN_RT_REQUIRE_COMPILERS", "").split(","):
        pytest.fail(f"{name} is required here and missing: {why}")
    missing[name] = why
    pytest.skip(f"{name}: {why}")
