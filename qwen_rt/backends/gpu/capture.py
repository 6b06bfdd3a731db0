"""Recorded decode steps: what every GPU graph shares, and CUDA/HIP graphs through torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from qwen_rt.backends.base import BatchMeta, Replay
from qwen_rt.backends.checks import check_meta
from qwen_rt.backends.gpu.plan import GpuPlan
from qwen_rt.backends.torch_backend import from_host

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Graph(Protocol):
    """Records what a function does to device memory, and does it again."""

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        """The result of `work`: memory that replay() fills again. Raises RuntimeError when it cannot be recorded."""
        ...

    def replay(self) -> None:
        """Do it again, on the same memory."""
        ...


class TorchGraph:
    """A CUDA or HIP graph; torch.cuda serves both."""

    def __init__(self, device: torch.device, pool: Any) -> None:
        """`pool`: torch.cuda.graph_pool_handle(), shared by graphs that never run at the same time."""
        self._device = device
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        """Run once (modules load, libraries take their workspaces), then capture."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream(self._device)
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                work()
            stream.synchronize()
            with torch.cuda.graph(self._graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                return work()

    def replay(self) -> None:
        """One launch."""
        self._graph.replay()


class GraphReplay(Replay):
    """A recorded step over static buffers: inputs, metadata and result stay where the recording saw them."""

    def __init__(
        self,
        graph: Graph,
        step: Callable[[Sequence[Tensor], GpuPlan], Tensor],
        inputs: Sequence[Tensor],
        plan: GpuPlan,
        dummy_block: int,
    ) -> None:
        """`plan`: of padding alone, as wide as the recording; raises what the graph raises."""
        self.rows = plan.seqs
        self.max_blocks = plan.layout.max_blocks
        self._graph = graph
        self._plan = plan
        self._dummy = plan.num_blocks = dummy_block  # the padding's block is the one after those in use
        self._inputs = [x.to(plan.buffer.device, copy=True) for x in inputs]
        self._out = graph.record(lambda: step(self._inputs, plan))

    @torch.inference_mode()
    def __call__(self, inputs: Sequence[NDArray[Any]], meta: BatchMeta) -> Tensor:
        """Check, copy inputs and metadata in place, replay."""
        check_meta(meta, self._plan.block)
        size = len(meta.q_lens)
        if len(meta.slots) != size:
            raise ValueError(f"{len(meta.slots)} rows of {size} sequences; a recording has one row a sequence")
        if len(inputs) != len(self._inputs) or any(x.shape[0] != size for x in inputs):
            raise ValueError(f"inputs of {[x.shape[0] for x in inputs]} rows; want {len(self._inputs)} of {size}")
        if max(meta.slots) >= self._dummy * self._plan.block:
            raise ValueError(f"the step uses block {max(meta.slots) // self._plan.block} of a cache of {self._dummy}")
        self._plan.update(meta, self._dummy)
        for static, x in zip(self._inputs, inputs, strict=True):
            static[:size].copy_(from_host(x), non_blocking=True)
        self._graph.replay()
        return self._out[:size]
