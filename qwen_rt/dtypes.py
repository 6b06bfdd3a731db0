"""Number formats by name, as files, options and capabilities call them, and as numpy holds them on the host.

numpy has no bfloat16 of its own; ml_dtypes brings it, and is imported only where one is met.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

DType = Literal["float64", "float32", "float16", "bfloat16"]
"""What weights are stored in and backends compute in."""

FLOATS: tuple[DType, ...] = ("float32", "float16", "bfloat16")
"""Of weights."""


def host_dtype(name: str) -> np.dtype[Any]:
    """numpy's dtype of that name ("bfloat16", "float8_e4m3fn", "int32" ...); its `.name` leads back."""
    if name == "bfloat16" or name.startswith("float8"):
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name)


def is_float(dtype: np.dtype[Any]) -> bool:
    """True of every floating-point format, numpy's own or not."""
    return dtype.kind == "f" or dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")


def wider(dtype: DType) -> DType:
    """What sums of numbers of `dtype` are kept in: float32, or float64 where those are."""
    return "float64" if dtype == "float64" else "float32"
