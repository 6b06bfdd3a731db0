"""What the CUDA and DCU probes ask of this installation: the launcher, and torch, which is not imported before."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType


def launcher_missing() -> str:
    """Why kernels cannot be launched on this installation; "" when they can."""
    if find_spec("qwen_rt._gpu") is None:
        return (
            "the GPU launcher (qwen_rt._gpu) was not built; install a C++17 compiler and the Python headers "
            "(Debian/Ubuntu: apt install g++ python3-dev), then reinstall qwen-rt"
        )
    return ""


def import_torch(build: str) -> tuple[ModuleType | None, str]:
    """(torch, "") or (None, why, and to install `build`)."""
    try:
        return importlib.import_module("torch"), ""
    except ModuleNotFoundError as e:
        if e.name == "torch":
            return None, f"PyTorch is not installed: install {build}"
        why: Exception = e
    except Exception as e:  # a build whose libraries do not load
        why = e
    return None, f"PyTorch does not import ({type(why).__name__}: {why}): install {build}"
