"""NVIDIA GPUs. This version probes them, through the driver alone; the backend itself comes later."""

from __future__ import annotations

import ctypes

from qwen_rt.backends.base import Backend, DeviceInfo, Probe
from qwen_rt.backends.probing import gib, load_library

_DRIVER = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR / _MINOR
_NO_DEVICE, _NO_PERMISSION, _STUB = 100, 800, 34  # CUresult codes a user can act on


class CudaBackend(Backend):
    """CUDA devices by driver index (CUDA_VISIBLE_DEVICES applies)."""

    name = "cuda"

    @classmethod
    def probe(cls) -> Probe:
        """The first thing missing on the way to a usable NVIDIA GPU, or which cards were found."""
        driver, why = load_library(_DRIVER)
        if driver is None:
            return Probe(
                reason=f"no CUDA driver: {why}; with an NVIDIA card, install the NVIDIA driver "
                "(in a container: the NVIDIA Container Toolkit and --gpus all)"
            )
        status = driver.cuInit(0)
        if status:
            return Probe(reason=f"CUDA driver found, but cuInit failed with error {_describe(driver, status)}")
        try:
            devices = _devices(driver)
        except (OSError, AttributeError) as e:
            return Probe(reason=f"CUDA driver found and initialised, but {e}; see `nvidia-smi` and the kernel log")
        if not devices:
            return Probe(reason="CUDA driver found, but it lists no device; see CUDA_VISIBLE_DEVICES and nvidia-smi")
        cards = "; ".join(f"{d.name}, {gib(d.total_memory)}, {d.detail}" for d in devices)
        return Probe(
            reason=f"found {cards}; but the CUDA backend is not built yet in this version of qwen_rt: use device='cpu'"
        )


def _describe(driver: ctypes.CDLL, status: int) -> str:
    """ "100 (CUDA_ERROR_NO_DEVICE)" and what to do about it."""
    name = ctypes.c_char_p()
    driver.cuGetErrorName(status, ctypes.byref(name))
    hint = {
        _NO_DEVICE: "no card is visible: see CUDA_VISIBLE_DEVICES and `nvidia-smi -L`",
        _NO_PERMISSION: "no right to use the card: check the rights of /dev/nvidia*",
        _STUB: "this libcuda.so.1 is the toolkit's stub: remove its stubs folder from LD_LIBRARY_PATH",
    }.get(status, "check with `nvidia-smi`; driver and kernel module out of step need a reboot")
    return f"{status} ({(name.value or b'unknown').decode()}): {hint}"


def _devices(driver: ctypes.CDLL) -> list[DeviceInfo]:
    """Every visible card; OSError names the driver call that failed."""

    def call(function: str, *args: object) -> None:
        if status := getattr(driver, function)(*args):
            raise OSError(f"{function} failed with error {_describe(driver, status)}")

    version, count = ctypes.c_int(), ctypes.c_int()
    call("cuDriverGetVersion", ctypes.byref(version))
    call("cuDeviceGetCount", ctypes.byref(count))
    out = []
    for i in range(count.value):
        handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name, total = ctypes.create_string_buffer(256), ctypes.c_size_t()
        call("cuDeviceGet", ctypes.byref(handle), i)
        call("cuDeviceGetName", name, len(name), handle)
        call("cuDeviceTotalMem_v2", ctypes.byref(total), handle)
        call("cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, handle)
        call("cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, handle)
        cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
        detail = f"compute capability {major.value}.{minor.value}, driver for CUDA {cuda}"
        out.append(DeviceInfo(i, name.value.decode(errors="replace"), total.value, detail))
    return out
