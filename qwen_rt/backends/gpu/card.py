"""Card: a GPU backend whose device torch.cuda drives, NVIDIA's in a CUDA build of torch, a DCU in a HIP build."""

from __future__ import annotations

from typing import Any

import torch

from qwen_rt.backends.gpu.backend import GpuBackend
from qwen_rt.backends.gpu.capture import Graph, TorchGraph
from qwen_rt.errors import BackendError


class Card(GpuBackend):
    """Memory, streams and graphs are torch's; a subclass adds the driver and how a module gets there."""

    def _open(self, index: int) -> None:
        """The device's primary context, which is torch's own."""
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise BackendError(
                f"{self.name}:{index}: torch {torch.__version__} sees {torch.cuda.device_count()} devices"
            )
        self.device = torch.device("cuda", index)
        torch.cuda.init()
        # Dense products keep float32 sums: torch's default lets cuBLAS and hipBLAS join partial sums in 16 bits.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self._pool: Any = None

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes; what torch holds and does not use counts as free."""
        free, total = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device), total

    def _graph(self) -> Graph:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        return TorchGraph(self.device, self._pool)
