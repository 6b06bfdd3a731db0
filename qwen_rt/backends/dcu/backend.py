"""DcuBackend: the kernels of csrc/gpu through the HIP runtime, a DTK build of torch for memory and dense products."""

from __future__ import annotations

import torch

from qwen_rt.backends.base import Probe
from qwen_rt.backends.dcu.probe import arch_of, probe
from qwen_rt.backends.gpu import toolchain
from qwen_rt.backends.gpu.card import Card
from qwen_rt.backends.gpu.driver import Driver
from qwen_rt.backends.gpu.kernels import Loaded
from qwen_rt.dtypes import DType

_NO_BF16 = ("gfx906",)


class DcuBackend(Card):
    """DCU devices by HIP index."""

    name = "dcu"
    warp = 64
    capture_rows = 16  # capture of larger batches failed on a K100_AI (docs/hardware.md)

    @classmethod
    def probe(cls) -> Probe:
        """The first thing missing on the way to a usable DCU, or which cards were found."""
        return probe()

    def _open(self, index: int) -> None:
        """The card and its architecture."""
        super()._open(index)
        self.arch = arch_of(torch.cuda.get_device_properties(index))
        self.driver = Driver.open_hip(index)

    def _compute_dtypes(self) -> tuple[DType, ...]:
        dtypes = type(self).caps.compute_dtypes
        return tuple(d for d in dtypes if d != "bfloat16") if self.arch in _NO_BF16 else dtypes

    def _load(self, module: str) -> Loaded:
        image = toolchain.image(module, self.arch)
        return Loaded(self.driver.load(image.data), image.route)
