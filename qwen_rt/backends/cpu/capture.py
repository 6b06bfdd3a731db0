"""A recorded decode step: native calls (csrc/cpu/program.h), with torch operations where it has any."""

from __future__ import annotations

import math
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_rt.backends.base import BatchMeta, Plan, Replay

if TYPE_CHECKING:
    from numpy.typing import NDArray


class CpuReplay(Replay):
    """The step over static buffers: inputs, metadata and result stay where the recording saw them.

    A batch of fewer rows than were recorded costs no more than its own: nothing is padded.
    """

    max_blocks = sys.maxsize  # the metadata is read afresh at each run, whatever its size

    def __init__(
        self,
        native: ModuleType,
        step: Callable[[Sequence[Tensor], Plan], Tensor],
        inputs: Sequence[Tensor],
        block: int,
    ) -> None:
        """Record `step`; nothing native is computed, so no page is written."""
        self.rows = rows = len(inputs[0])
        self._step = step  # keeps the weights alive
        self._inputs = [x.clone() for x in inputs]
        self._host = [x.numpy() for x in self._inputs]
        self._plan = native.Step([1] * rows, [1] * rows, [[0]] * rows, [0] * rows, block)
        self._program = native.Program(rows)
        self._program.begin()
        try:
            with _Recorder(self._program):
                self._out = step(self._inputs, self._plan)
        finally:
            self._program.end()
        self._first = [self._out[:n] for n in range(rows + 1)]

    def __call__(self, inputs: Sequence[NDArray[Any]], meta: BatchMeta) -> Tensor:
        """Check, copy inputs and metadata in place, run."""
        rows = len(meta.slots)
        if rows > self.rows or rows != len(meta.q_lens) or len(inputs) != len(self._inputs):
            raise ValueError(
                f"a recording of {self.rows} sequences, one row each, was given {len(meta.q_lens)} with {rows} rows"
            )
        self._plan.assign(meta.q_lens, meta.kv_lens, meta.block_table, meta.slots)
        for static, x in zip(self._host, inputs, strict=True):
            static[:rows] = x
        self._program.run(rows)
        return self._first[rows]


class _Recorder(TorchDispatchMode):
    """Gives a step its memory, and adds to the program what torch itself computes (joining unfused weights, logn).

    The program runs in the order of the recording, so memory whose last tensor the step has let go of serves again: a
    step needs that of one layer rather than of all, and finds it in the cache.
    """

    def __init__(self, program: Any) -> None:
        super().__init__()
        self._program = program
        self._memory: dict[int, Tensor] = {}  # by address
        self._users: dict[int, int] = {}  # living tensors that look at a piece of memory, by its address
        self._free: dict[int, list[int]] = defaultdict(list)  # addresses without users, by bytes

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch would import its compiler (about a second) to keep it out of a mode that never meets it."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it; what computes contents is done again, into the same memory, at each replay."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format:
            return self._empty(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        out = func(*args, **kwargs)
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        if aliases and not any(a.is_write for a in aliases):
            for view in out if isinstance(out, list | tuple) else (out,):
                self._watch(view)
        elif "empty" not in func._schema.name:
            if not isinstance(out, Tensor):
                raise TypeError(f"a step that is recorded may not use {func}")
            self._program.add_python(partial(_again, out, func, args, kwargs))
        return out

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        if not nbytes:
            return torch.empty(shape, dtype=dtype)
        if self._free[nbytes]:
            memory = self._memory[self._free[nbytes].pop()]
        else:
            memory = torch.empty(nbytes, dtype=torch.uint8)
            self._memory[memory.data_ptr()] = memory
        out = memory.view(dtype).view(shape)
        self._watch(out)
        return out

    def _watch(self, tensor: Tensor) -> None:
        """Count a tensor as a user of its memory, if that is one of ours, for as long as it lives."""
        at = tensor.untyped_storage().data_ptr()
        if at in self._memory:
            self._users[at] = self._users.get(at, 0) + 1
            weakref.finalize(tensor, self._drop, at).atexit = False

    def _drop(self, at: int) -> None:
        self._users[at] -= 1
        if not self._users[at]:
            self._free[self._memory[at].nbytes].append(at)


def _again(out: Tensor, func: Any, args: Any, kwargs: Any) -> None:
    with torch.inference_mode():
        out.copy_(func(*args, **kwargs))
