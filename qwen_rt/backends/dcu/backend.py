"""DcuBackend: the kernels of csrc/gpu through the HIP runtime, a DTK build of torch for memory and dense products."""

from __future__ import annotations

from typing import Any

import torch

from qwen_rt.backends.base import Probe
from qwen_rt.backends.cuda.backend import device_memory, sum_in_float32
from qwen_rt.backends.dcu.probe import arch_of, probe
from qwen_rt.backends.gpu import toolchain
from qwen_rt.backends.gpu.backend import GpuBackend
from qwen_rt.backends.gpu.capture import Graph, TorchGraph
from qwen_rt.backends.gpu.driver import Driver
from qwen_rt.backends.gpu.kernels import Loaded
from qwen_rt.dtypes import DType
from qwen_rt.errors import BackendError

_NO_BF16 = ("gfx906",)


class DcuBackend(GpuBackend):
    """DCU devices by HIP index."""

    name = "dcu"
    warp = 64
    capture_rows = 16  # capture of larger batches failed on a K100_AI (docs/hardware.md)

    @classmethod
    def probe(cls) -> Probe:
        """The first thing missing on the way to a usable DCU, or which cards were found."""
        return probe()

    def _open(self, index: int) -> None:
        """The device's primary context, which is torch's own."""
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise BackendError(f"dcu:{index}: torch {torch.__version__} sees {torch.cuda.device_count()} devices")
        self.device = torch.device("cuda", index)
        torch.cuda.init()
        sum_in_float32()
        self.arch = arch_of(torch.cuda.get_device_properties(index))
        self.driver = Driver.open_hip(index)
        self._pool: Any = None

    def _compute_dtypes(self) -> tuple[DType, ...]:
        dtypes = type(self).caps.compute_dtypes
        return tuple(d for d in dtypes if d != "bfloat16") if self.arch in _NO_BF16 else dtypes

    def _load(self, module: str) -> Loaded:
        image = toolchain.image(module, self.arch)
        return Loaded(self.driver.load(image.data), image.route)

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes; what torch holds and does not use counts as free."""
        return device_memory(self.device)

    def _graph(self) -> Graph:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        return TorchGraph(self.device, self._pool)
