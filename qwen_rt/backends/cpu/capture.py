"""A recorded decode step of one sequence: native calls (csrc/cpu/program.h), with torch operations where it has any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_rt.backends.base import BatchMeta, Plan, Replay


class CpuReplay(Replay):
    """The step over static buffers: inputs, metadata and result stay where the recording saw them."""

    rows = 1

    def __init__(
        self,
        native: ModuleType,
        step: Callable[[Sequence[Tensor], Plan], Tensor],
        inputs: Sequence[Tensor],
        block: int,
        max_blocks: int,
    ) -> None:
        """Record `step`; nothing native is computed, so no page is written."""
        self.max_blocks = max_blocks
        self._native = native
        self._block = block
        self._step = step  # keeps the weights alive
        self._inputs = [x.clone() for x in inputs]
        self._plan = native.Step([1], [1], [[0]], [0], block)
        self._program = native.Program()
        self._program.begin()
        try:
            with _TorchOperations(self._program):
                self._out = step(self._inputs, self._plan)
        finally:
            self._program.end()

    def __call__(self, inputs: Sequence[Tensor], meta: BatchMeta) -> Tensor:
        """Check, copy inputs and metadata in place, run."""
        plan = self._native.Step(meta.q_lens, meta.kv_lens, meta.block_table, meta.slots, self._block)
        if len(meta.q_lens) != 1 or plan.num_rows != 1 or len(inputs) != len(self._inputs):
            raise ValueError(f"a recording of one sequence and row was given {len(meta.q_lens)} with {plan.num_rows}")
        self._plan.assign(plan)
        for static, x in zip(self._inputs, inputs, strict=True):
            static.copy_(x)
        self._program.run()
        return self._out


class _TorchOperations(TorchDispatchMode):
    """Adds to a program what torch itself computes in a step (joining the outputs of unfused weights, logn factors)."""

    def __init__(self, program: Any) -> None:
        super().__init__()
        self._program = program

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it; a result that is new memory with contents is computed again, into that memory, at each replay."""
        out = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None for r in func._schema.returns)
        if not is_view and "empty" not in func._schema.name:
            if not isinstance(out, Tensor):
                raise TypeError(f"a step that is recorded may not use {func}")
            self._program.add_python(partial(_again, out, func, args, kwargs or {}))
        return out


def _again(out: Tensor, func: Any, args: Any, kwargs: Any) -> None:
    with torch.inference_mode():
        out.copy_(func(*args, **kwargs))
