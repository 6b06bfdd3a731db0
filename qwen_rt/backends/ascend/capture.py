"""Recorded decode steps: an NPUGraph whose attention calls get each step's host lengths by task update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen_rt.backends.ascend.plan import AscendPlan
from qwen_rt.backends.base import BatchMeta, Replay
from qwen_rt.backends.checks import check_meta
from qwen_rt.backends.torch_backend import from_host

if TYPE_CHECKING:
    from numpy.typing import NDArray


class NpuReplay(Replay):
    """A recorded step over static buffers. Lengths of keys are arguments of attention, on the host: they are rewritten
    in the graph for every replay, and the graph's attention waits for that."""

    def __init__(
        self,
        runtime: Any,
        step: Callable[[Sequence[Tensor], AscendPlan], Tensor],
        inputs: Sequence[Tensor],
        plan: AscendPlan,
        dummy_block: int,
        pool: Any,
    ) -> None:
        """`runtime`: torch_npu.npu. `plan`: of padding alone, marked as recorded. Raises what the step or the capture
        raises."""
        device = plan.buffer.device
        self._runtime = runtime
        self.rows = len(plan.q_lens)
        self.max_blocks = plan.width
        self._plan = plan
        self._dummy = dummy_block
        self._inputs = [x.to(device, copy=True) for x in inputs]
        self._graph = runtime.NPUGraph()
        self._done = runtime.Event()
        with runtime.device(device):
            step(self._inputs, plan)  # operators build and take their workspaces now
            plan.cache.clear()  # what was made outside the graph would not be made again by it
            runtime.synchronize(device)
            with runtime.graph(self._graph, pool=pool, auto_dispatch_capture=True):
                self._out = step(self._inputs, plan)
            plan.cache.clear()
            self._done.record()

    @torch.inference_mode()
    def __call__(self, inputs: Sequence[NDArray[Any]], meta: BatchMeta) -> Tensor:
        """Check, copy inputs and metadata in place, replay, and update the lengths."""
        plan, size = self._plan, len(meta.q_lens)
        check_meta(meta, plan.block)
        if len(meta.slots) != size:
            raise ValueError(f"{len(meta.slots)} rows of {size} sequences; a recording has one row a sequence")
        if len(inputs) != len(self._inputs) or any(x.shape[0] != size for x in inputs):
            raise ValueError(f"inputs of {[x.shape[0] for x in inputs]} rows; want {len(self._inputs)} of {size}")
        if max(meta.slots) >= self._dummy * plan.block:
            raise ValueError(f"the step uses block {max(meta.slots) // plan.block} of a cache of {self._dummy}")
        with self._runtime.device(plan.buffer.device):
            self._done.synchronize()  # a task must not be rewritten under a replay that has not come to it
            plan.update(meta, self._dummy)
            for static, x in zip(self._inputs, inputs, strict=True):
                static[:size].copy_(from_host(x), non_blocking=True)
            self._graph.replay()
            self._graph.update(cpu_update_input=[{"actual_seq_lengths_kv": list(plan.kv_lens)}])
            self._done.record()
        return self._out[:size]
