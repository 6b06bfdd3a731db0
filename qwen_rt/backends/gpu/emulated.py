"""The GPU backends over the host emulator: the same Python, the same kernels, torch's CPU tensors as device memory.

`cuda-emulated` has warps of 32, `dcu-emulated` of 64, both with matrix units; `dcu-simt-emulated` is a DCU without
(Z100, gfx906). All are opened by name only. They are for checking: slow, and proof of arithmetic and indexing, not of
anything that only a card shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_rt.backends.base import DeviceInfo, Probe
from qwen_rt.backends.checks import host_memory
from qwen_rt.backends.gpu import compilers, linear, toolchain
from qwen_rt.backends.gpu.backend import GpuBackend
from qwen_rt.backends.gpu.capture import Graph
from qwen_rt.backends.gpu.driver import Driver
from qwen_rt.backends.gpu.installation import launcher_missing
from qwen_rt.backends.gpu.kernels import Kernels, Loaded
from qwen_rt.errors import BackendError


class EmulatedBackend(GpuBackend):
    """A GPU of `warp` lanes a warp, on the host."""

    mma: ClassVar[bool] = True  # kernels are compiled for a device with matrix units

    @classmethod
    def probe(cls) -> Probe:
        """Usable where the launcher and a C++ compiler are; nothing is built yet."""
        if missing := launcher_missing():
            return Probe(reason=missing)
        if compilers.find_gxx() is None:
            return Probe(reason="the emulator needs a C++17 compiler: apt install g++ (or clang++)")
        info = DeviceInfo(0, f"emulated GPU, warps of {cls.warp}", host_memory()[1], "kernels compiled for the host")
        return Probe((info,), rung="emulated", notes=("the emulator is slow: it is for checking, not for use",))

    def _open(self, index: int) -> None:
        """Build the emulator library, or find it in the cache."""
        if index != 0:
            raise BackendError(f"{self.name} has one device, index 0; got {index}")
        self.device = torch.device("cpu")
        self.arch = f"emu{self.warp}{'' if self.mma else '-simt'}"
        self.driver = Driver.open_emu(toolchain.emu_library(self.warp, mma=self.mma))

    def _traits(self) -> linear.Traits:
        """Few multiprocessors, so that tiny models' products are not all split."""
        return linear.traits_of(self.arch, 4)

    def _load(self, module: str) -> Loaded:
        units = "" if self.mma else ", no matrix units"
        return Loaded(self.driver.load(module), f"emulated, warp {self.warp}{units}")

    def _stream(self) -> int:
        return 0

    def memory(self) -> tuple[int, int]:
        """(available, total) bytes of the host."""
        return host_memory()

    def _graph(self) -> Graph:
        return EmulatedGraph(self.device_kernels)


class CudaEmulated(EmulatedBackend):
    """Warps of 32, matrix fragments as on sm_80."""

    name = "cuda-emulated"
    warp = 32


class DcuEmulated(EmulatedBackend):
    """Warps of 64."""

    name = "dcu-emulated"
    warp = 64


class DcuSimtEmulated(EmulatedBackend):
    """Warps of 64, no matrix units and, as on gfx906, no bfloat16."""

    name = "dcu-simt-emulated"
    warp = 64
    mma = False
    caps = replace(EmulatedBackend.caps, compute_dtypes=("float16",))


class EmulatedGraph:
    """The list of kernel launches and torch operations of a step, repeated on the same memory.

    What a device graph could not record is refused: reading a tensor's value, and making tensors of host data.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._work: list[Callable[[], None]] = []

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        """Run `work`, and again noting what it does."""
        if self._kernels.recorder is not None:
            raise RuntimeError("a recording within a recording")
        work()  # as a device graph does: what is made once (work lists) is made now
        self._kernels.recorder = self._work.append
        try:
            with _Recorder(self._work):
                return work()
        finally:
            self._kernels.recorder = None

    def replay(self) -> None:
        """Everything again, in order."""
        for do in self._work:
            do()

    def __len__(self) -> int:
        """How many launches and operations there are."""
        return len(self._work)


class _Recorder(TorchDispatchMode):
    """Notes each torch operation as: compute again, and write the result where it was the first time."""

    def __init__(self, work: list[Callable[[], None]]) -> None:
        super().__init__()
        self._list = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().split("::")[-1].split(".")[0]
        if name in ("item", "_local_scalar_dense", "equal", "is_nonzero", "nonzero"):
            raise RuntimeError(f"{name}: a value crosses to the host inside a recorded step")
        if name == "lift_fresh" and args[0].numel() > 1:
            raise RuntimeError("a tensor is made of host data inside a recorded step")
        out = func(*args, **kwargs)
        if func._schema.is_mutable:
            self._list.append(lambda: func(*args, **kwargs))
            return out
        outs = [t for t in (out if isinstance(out, list | tuple) else (out,)) if isinstance(t, Tensor)]
        inputs = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        views = all(t.untyped_storage().data_ptr() in inputs for t in outs)
        if not views and not name.startswith(("empty", "new_empty", "lift_fresh")):
            self._list.append(lambda: _again(func, args, kwargs, outs))
        return out


def _again(func: Any, args: Any, kwargs: Any, outs: list[Tensor]) -> None:
    new = func(*args, **kwargs)
    for old, fresh in zip(outs, new if isinstance(new, list | tuple) else (new,), strict=True):
        old.copy_(fresh)


def _tensors(tree: Any) -> list[Tensor]:
    """Every tensor within nested lists, tuples and dicts."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [t for x in tree for t in _tensors(x)] if isinstance(tree, list | tuple) else []
