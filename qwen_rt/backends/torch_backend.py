"""TorchBackend: what plugins share whose tensors are torch's: the way between host arrays and the device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen_rt.backends.base import Backend
from qwen_rt.dtypes import DType, host_dtype


def from_host(x: NDArray[Any]) -> Tensor:
    """A host array as a torch tensor over the same memory (read-only memory is copied)."""
    x = np.ascontiguousarray(x)
    if not x.flags.writeable:
        x = x.copy()
    if x.dtype.kind == "V":  # ml_dtypes' formats, which torch has under the same names
        return torch.from_numpy(x.view(f"i{x.itemsize}")).view(getattr(torch, x.dtype.name))
    return torch.from_numpy(x)


def to_host(x: Tensor) -> NDArray[Any]:
    """A torch tensor as a host array; over the same memory where it lies there."""
    x = x.detach().to("cpu")
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).numpy().view(host_dtype("bfloat16"))
    return x.numpy()


class TorchBackend(Backend):
    """A device that torch runs; a subclass sets `device` and `compute_dtype`."""

    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """torch's name of compute_dtype."""
        return getattr(torch, self.compute_dtype)

    def tensor(self, x: NDArray[Any]) -> Tensor:
        """Moved to the device."""
        return from_host(x).to(self.device)

    def array(self, x: Tensor) -> NDArray[Any]:
        """Moved to the host."""
        return to_host(x)

    def cast(self, x: Tensor, dtype: DType) -> Tensor:
        """x.to()."""
        return x.to(getattr(torch, dtype))

    def concat(self, parts: Sequence[Tensor]) -> Tensor:
        """torch.cat along the last axis."""
        return torch.cat(tuple(parts), -1)

    def computing(self) -> AbstractContextManager[Any]:
        """torch.inference_mode(): nothing is recorded for derivatives."""
        return torch.inference_mode()
