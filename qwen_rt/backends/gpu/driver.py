"""Loading and launching device code: CUDA's driver, a HIP runtime or the host emulator behind one interface.

The work is in the native module `qwen_rt._gpu` (csrc/gpu/launcher), which links neither torch nor a vendor library and
opens the vendor's when a device is. Importing this module opens nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

from qwen_rt.errors import BackendError

DriverKind = Literal["cuda", "hip", "emu"]
Order = Literal["forward", "reverse", "random"]


class Kernel(Protocol):
    """A kernel ready to launch (the native `_gpu.Kernel`; this class states its face)."""

    name: str
    signature: str  # one letter a parameter: P pointer, i int32, l int64, f float32
    max_threads: int  # its launch bound
    registers: int  # a thread; 0 in emulation
    local_bytes: int  # local memory a thread (spills); 0 in emulation
    static_shared: int  # bytes; 0 in emulation

    def __call__(
        self,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        *args: Any,
        shared: int = 0,
        stream: int = 0,
    ) -> None:
        """Launch with one argument a letter of the signature.

        P takes a tensor on the device (host memory in emulation), an address, or None for null; it keeps no
        reference: the caller does, until the stream has run. Blocks are one-dimensional. `shared` is dynamic shared
        memory in bytes; `stream` the address of a stream of the device, see Driver.current_stream. Raises TypeError,
        ValueError or OverflowError for arguments that do not fit, BackendError with the driver's own words.
        """


@dataclass(frozen=True)
class DeviceFacts:
    """What the driver says of a device; 0, "" or (0, 0) where it does not say."""

    index: int
    name: str
    total_memory: int  # bytes
    compute_capability: tuple[int, int]  # CUDA
    multiprocessors: int  # CUDA
    max_dynamic_shared: int  # bytes a block may ask for
    warp: int
    driver_version: int  # CUDA: 1000 major + 10 minor; HIP: as its runtime counts


def _native() -> ModuleType:
    """The extension module; BackendError says how to get it."""
    try:
        from qwen_rt import _gpu
    except ImportError as e:
        raise BackendError(
            f"the native GPU launcher is missing ({e}); install a C++17 compiler and the Python headers "
            "(Debian/Ubuntu: apt install g++ python3-dev), then reinstall qwen-rt"
        ) from e
    return _gpu


def cuda_devices() -> list[DeviceFacts]:
    """Every CUDA device, without making a context on one; BackendError with the true reason there is no driver."""
    return [DeviceFacts(**facts) for facts in _native().cuda_devices()]


def hip_devices() -> list[DeviceFacts]:
    """Every HIP device (AMD or Hygon); BackendError with the true reason there is no runtime."""
    return [DeviceFacts(**facts) for facts in _native().hip_devices()]


class Module:
    """Loaded device code."""

    def __init__(self, native: Any) -> None:
        self._native = native

    def kernel(self, name: str, signature: str) -> Kernel:
        """The kernel `name`; BackendError when it is not there or its parameters are not `signature`.

        The emulator checks the whole signature, CUDA (driver 12.4 and later) count and sizes, HIP nothing.
        """
        return self._native.kernel(name, signature)

    def names(self) -> list[str]:
        """The kernels in it; empty where the driver cannot list them (CUDA, HIP)."""
        return self._native.names()


class Driver:
    """One opened device."""

    def __init__(self, native: Any) -> None:
        """Use open_cuda, open_hip or open_emu."""
        self._native = native
        self.kind: DriverKind = native.kind
        self.facts = DeviceFacts(**native.facts)

    @classmethod
    def open_cuda(cls, index: int = 0) -> Driver:
        """The CUDA device `index` as the driver counts, in torch's own (primary) context."""
        return cls(_native().open_cuda(index))

    @classmethod
    def open_hip(cls, index: int = 0) -> Driver:
        """The HIP device `index`, through the runtime that torch has loaded where it has."""
        return cls(_native().open_hip(index))

    @classmethod
    def open_emu(cls, path: str | Path, order: Order = "forward", seed: int = 1, max_dynamic_shared: int = 0) -> Driver:
        """The host emulator in the library `path` (toolchain.emu_library); tensors are in host memory.

        `order` is the order in which threads of a block run, `seed` that of "random"; `max_dynamic_shared` the
        device's limit in bytes, 0 for 64 KiB.
        """
        return cls(_native().open_emulator(str(path), order, seed, max_dynamic_shared))

    def load(self, image: bytes | str | Path = b"") -> Module:
        """Load a cubin, fatbin, PTX or code object, or the file it is in; the emulator's kernels are there already."""
        if self.kind == "emu":
            return Module(self._native.load(b""))
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        if not data:
            raise BackendError("an empty device image cannot be loaded")
        return Module(self._native.load(data))

    def current_stream(self) -> int:
        """The address of torch's current stream on this device (0 in emulation), for Kernel's `stream`."""
        if self.kind == "emu":
            return 0
        torch = sys.modules["torch"]  # whoever has tensors to pass has it imported
        return torch.cuda.current_stream(self.facts.index).cuda_stream
