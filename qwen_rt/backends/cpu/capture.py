"""A recorded decode step: native calls (csrc/cpu/program.h), with numpy's where it has any."""

from __future__ import annotations

import math
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.backends.base import BatchMeta, Plan, Replay, Tensor


class Recorded(np.ndarray):
    """An array of a step that is being recorded. It can be looked at in other ways; numpy may not compute with it, nor
    copy it, because a replay would not."""

    def __array_finalize__(self, parent: Any) -> None:
        if _root(self) is not _root(parent):
            raise TypeError("a step that is recorded may not copy an array")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        raise _not_replayed(ufunc)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        raise _not_replayed(func)


def _not_replayed(function: Callable[..., Any]) -> TypeError:
    return TypeError(f"a step that is recorded may not use numpy's {function.__name__}, only the backend's operations")


def _root(a: NDArray[Any]) -> NDArray[Any]:
    while isinstance(a.base, np.ndarray):
        a = a.base
    return a


class Recorder:
    """Gives a step its memory, and adds to the program what is not native (joining unfused weights, logn).

    The program runs in the order of the recording, so memory whose last array the step has let go of serves again: a
    step needs that of one layer rather than of all, and finds it in the cache.
    """

    def __init__(self, native: ModuleType, rows: int) -> None:
        self.program = native.Program(rows)
        self._native = native
        self._free: dict[int, list[Any]] = defaultdict(list)  # native.Buffer by bytes

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A float32 array (Recorded) over memory that no living array of the step looks at."""
        nbytes = 4 * math.prod(shape)
        if not nbytes:
            return np.empty(shape, np.float32)
        memory = self._free[nbytes].pop() if self._free[nbytes] else self._native.Buffer(nbytes)
        lease = np.frombuffer(memory, np.float32)  # what every view of it has for its base
        lease[:] = 0.0  # rows that a replay leaves out are read where it is not native
        weakref.finalize(lease, self._free[nbytes].append, memory).atexit = False
        return lease.view(Recorded).reshape(shape)

    def add(self, function: Callable[..., Any], inputs: Sequence[Tensor], out: Tensor) -> None:
        """function(*inputs, out=out) to be called at each replay, in this place."""
        self.program.add_python(partial(function, *(x.view(np.ndarray) for x in inputs), out=out.view(np.ndarray)))


class CpuReplay(Replay):
    """The step over static buffers: inputs, metadata and result stay where the recording saw them.

    A batch of fewer rows than were recorded costs no more than its own: nothing is padded.
    """

    max_blocks = sys.maxsize  # the metadata is read afresh at each run, whatever its size

    def __init__(
        self, step: Callable[[Sequence[Tensor], Plan], Tensor], inputs: Sequence[Tensor], plan: Any, recorder: Recorder
    ) -> None:
        """Record `step`; nothing native is computed, so no page is written."""
        self.rows = rows = len(inputs[0])
        self._step = step  # keeps the weights alive
        self._inputs = [x.copy() for x in inputs]
        self._plan = plan
        self._program = recorder.program
        self._program.begin()
        try:
            out = step([x.view(Recorded) for x in self._inputs], plan).view(np.ndarray)
        finally:
            self._program.end()
        self._first = [out[:n] for n in range(rows + 1)]

    def __call__(self, inputs: Sequence[NDArray[Any]], meta: BatchMeta) -> Tensor:
        """Check, copy inputs and metadata in place, run."""
        rows = len(meta.slots)
        if rows > self.rows or rows != len(meta.q_lens) or len(inputs) != len(self._inputs):
            raise ValueError(
                f"a recording of {self.rows} sequences, one row each, was given {len(meta.q_lens)} with {rows} rows"
            )
        self._plan.assign(meta.q_lens, meta.kv_lens, meta.block_table, meta.slots)
        for static, x in zip(self._inputs, inputs, strict=True):
            static[:rows] = x
        self._program.run(rows)
        return self._first[rows]
