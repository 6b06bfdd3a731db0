"""CudaBackend: the kernels of csrc/gpu through the driver, torch for memory, streams and dense products."""

from __future__ import annotations

from typing import Any

import torch

from qwen_rt.backends.base import Probe
from qwen_rt.backends.cuda.probe import driver_release, probe
from qwen_rt.backends.gpu import toolchain
from qwen_rt.backends.gpu.backend import GpuBackend
from qwen_rt.backends.gpu.capture import Graph, TorchGraph
from qwen_rt.backends.gpu.driver import Driver
from qwen_rt.backends.gpu.kernels import Loaded
from qwen_rt.dtypes import DType
from qwen_rt.errors import BackendError

_BF16 = (8, 0)  # bfloat16 arithmetic


class CudaBackend(GpuBackend):
    """CUDA devices by driver index (CUDA_VISIBLE_DEVICES applies)."""

    name = "cuda"
    warp = 32

    @classmethod
    def probe(cls) -> Probe:
        """The first thing missing on the way to a usable NVIDIA GPU, or the cards."""
        return probe()

    def _open(self, index: int) -> None:
        """The device's primary context, which is torch's own."""
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise BackendError(f"cuda:{index}: torch {torch.__version__} sees {torch.cuda.device_count()} devices")
        self.device = torch.device("cuda", index)
        torch.cuda.init()
        sum_in_float32()
        self.capability = torch.cuda.get_device_capability(index)
        self.arch = toolchain.cuda_arch(*self.capability)
        self.driver = Driver.open_cuda(index)
        self._driver_cuda = driver_release()
        self._pool: Any = None

    def _compute_dtypes(self) -> tuple[DType, ...]:
        dtypes = type(self).caps.compute_dtypes
        return dtypes if self.capability >= _BF16 else tuple(d for d in dtypes if d != "bfloat16")

    def _load(self, module: str) -> Loaded:
        image = toolchain.image(module, self.arch, driver_cuda=self._driver_cuda)
        return Loaded(self.driver.load(image.data), image.route)

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes; what torch holds and does not use counts as free."""
        return device_memory(self.device)

    def _graph(self) -> Graph:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        return TorchGraph(self.device, self._pool)


def sum_in_float32() -> None:
    """Dense products keep float32 sums (torch's default lets cuBLAS and hipBLAS join partial sums in 16 bits)."""
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def device_memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of a CUDA or HIP device; torch's unused reserve counts as free."""
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
