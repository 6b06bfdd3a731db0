"""The native extension, for what is defined in Python and only faster there."""

from __future__ import annotations

from functools import cache
from types import ModuleType


@cache
def extension() -> ModuleType | None:
    """qwen_rt._cpu, or None where it was not built: then the definitions in Python serve."""
    try:
        from qwen_rt import _cpu
    except ImportError:
        return None
    return _cpu
