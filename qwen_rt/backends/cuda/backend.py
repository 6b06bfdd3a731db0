"""CudaBackend: the kernels of csrc/gpu through the driver, torch for memory, streams and dense products."""

from __future__ import annotations

import torch

from qwen_rt.backends.base import Probe
from qwen_rt.backends.cuda.probe import driver_release, probe
from qwen_rt.backends.gpu import toolchain
from qwen_rt.backends.gpu.card import Card
from qwen_rt.backends.gpu.driver import Driver
from qwen_rt.backends.gpu.kernels import Loaded
from qwen_rt.dtypes import DType

_BF16 = (8, 0)  # bfloat16 arithmetic


class CudaBackend(Card):
    """CUDA devices by driver index (CUDA_VISIBLE_DEVICES applies)."""

    name = "cuda"
    warp = 32

    @classmethod
    def probe(cls) -> Probe:
        """The first thing missing on the way to a usable NVIDIA GPU, or the cards."""
        return probe()

    def _open(self, index: int) -> None:
        """The card, and the newest CUDA release that its driver serves."""
        super()._open(index)
        self.capability = torch.cuda.get_device_capability(index)
        self.arch = toolchain.cuda_arch(*self.capability)
        self.driver = Driver.open_cuda(index)
        self._driver_cuda = driver_release()

    def _compute_dtypes(self) -> tuple[DType, ...]:
        dtypes = type(self).caps.compute_dtypes
        return dtypes if self.capability >= _BF16 else tuple(d for d in dtypes if d != "bfloat16")

    def _load(self, module: str) -> Loaded:
        image = toolchain.image(module, self.arch, driver_cuda=self._driver_cuda)
        return Loaded(self.driver.load(image.data), image.route)
