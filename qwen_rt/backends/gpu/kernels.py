"""Kernels by name: each module is built and loaded when the first of its kernels is wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qwen_rt.backends.gpu import driver
from qwen_rt.errors import BackendError, Declined

Grid = tuple[int, int, int]
Recorder = Callable[[Callable[[], None]], None]


@dataclass(frozen=True)
class Loaded:
    """A module on the device, and how it came there ("prebuilt sm_90a (nvcc 13.0)", "nvrtc 13.0, cached")."""

    module: driver.Module
    route: str


class Kernels:
    """The device code of one backend."""

    def __init__(self, load: Callable[[str], Loaded], stream: Callable[[], int], warp: int) -> None:
        """`load(module)` builds and loads one module, BackendError when it cannot; `stream()` is the stream now; `warp`
        is the device's number of lanes."""
        self.warp = warp
        self._load = load
        self._stream = stream
        self._modules: dict[str, Loaded | BackendError] = {}
        self._kernels: dict[str, Kernel] = {}
        self.recorder: Recorder | None = None  # called with a repetition of every launch while one is set

    def __call__(self, module: str, name: str, signature: str) -> Kernel:
        """The kernel `name` of `module`; signature: a character a parameter, P pointer, i int32, l int64, f float32.

        Declined, with the reasons of every route, when the module cannot be had.
        """
        kernel = self._kernels.get(name)
        if kernel is None:
            kernel = self._kernels[name] = Kernel(self, self.module(module).module.kernel(name, signature))
        return kernel

    def module(self, name: str) -> Loaded:
        """A module, loaded at first use; a failure is kept and raised again (Declined)."""
        found = self._modules.get(name)
        if found is None:
            try:
                found = self._load(name)
            except BackendError as e:
                found = e
            self._modules[name] = found
        if isinstance(found, BackendError):
            raise Declined(str(found)) from found
        return found

    def names(self) -> list[str]:
        """The kernels that were asked for so far."""
        return list(self._kernels)

    def routes(self) -> dict[str, str]:
        """Module -> its route, or why it cannot be had; of those that were wanted so far."""
        return {
            name: found.route if isinstance(found, Loaded) else f"none: {found}"
            for name, found in self._modules.items()
        }


class Kernel:
    """A kernel on the backend's current stream."""

    __slots__ = ("_kernels", "_launch")

    def __init__(self, kernels: Kernels, launch: driver.Kernel) -> None:
        self._kernels = kernels
        self._launch = launch

    def __call__(
        self, grid: Grid, block: int | tuple[int, int, int], *args: Tensor | int | float | None, shared: int = 0
    ) -> None:
        """Launch on `grid` blocks of `block` threads with `shared` bytes of dynamic shared memory."""
        stream = self._kernels._stream()
        self._launch(grid, block, *args, shared=shared, stream=stream)
        if self._kernels.recorder is not None:
            self._kernels.recorder(lambda: self._launch(grid, block, *args, shared=shared, stream=stream))
