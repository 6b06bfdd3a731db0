"""What an NVIDIA GPU needs, step by step: driver, cards, torch for its CUDA release, the launcher.

torch is imported only where the driver lists a card that the kernels serve.
"""

from __future__ import annotations

import ctypes

from qwen_rt.backends.base import DeviceInfo, Probe
from qwen_rt.backends.gpu.installation import import_torch, launcher_missing
from qwen_rt.backends.probing import gib, load_library

_DRIVER = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR / _MINOR
_NO_DEVICE, _NO_PERMISSION, _STUB = 100, 800, 34  # CUresult codes a user can act on
_OLDEST = (7, 5)  # the oldest card that today's CUDA compilers build for
_TORCH = "pytorch.org/get-started"


def probe() -> Probe:
    """The first thing missing on the way to a usable NVIDIA GPU, or the cards. Never raises."""
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
        cuda, devices = _devices(driver)
    except (OSError, AttributeError) as e:
        return Probe(reason=f"CUDA driver found and initialised, but {e}; see `nvidia-smi` and the kernel log")
    if not devices:
        return Probe(reason="CUDA driver found, but it lists no device; see CUDA_VISIBLE_DEVICES and nvidia-smi")
    able = {info.index: info for info, capability in devices if capability >= _OLDEST}
    cards = "; ".join(f"{d.name}, {gib(d.total_memory)}, {d.detail}" for d, _ in devices)
    if not able:
        return Probe(
            reason=f"found {cards}; the kernels need compute capability {_OLDEST[0]}.{_OLDEST[1]} or later "
            "(CUDA compilers of today build for no older card); use another card, or device='cpu'"
        )
    if missing := _torch_missing(cuda) or launcher_missing():
        return Probe(reason=f"found {cards}; but {missing}")
    old = [f"{d.name} is left out: {d.detail}, too old" for d, _ in devices if d.index not in able]
    return Probe(tuple(able.values()), rung="emulated", notes=tuple(old))


def _torch_missing(driver: tuple[int, int]) -> str:
    """Why torch cannot hold tensors on the cards of a driver that serves CUDA `driver`; "" when it can."""
    release = f"CUDA {driver[0]}.{driver[1]} or older"
    torch, why = import_torch(f"a build of it for CUDA, of a release the driver serves ({release}): see {_TORCH}")
    if torch is None:
        return why
    built = getattr(torch.version, "cuda", None)
    if built is None:
        kind = "a ROCm build" if getattr(torch.version, "hip", None) else "a CPU build"
        return (
            f"torch {torch.__version__} is {kind}; install one for CUDA, of a release the driver serves "
            f"({release}): see {_TORCH}"
        )
    if int(built.split(".")[0]) > driver[0]:
        return (
            f"torch {torch.__version__} is built for CUDA {built}, and the driver serves CUDA {driver[0]}.{driver[1]}; "
            f"update the NVIDIA driver, or install a torch build for CUDA {driver[0]}"
        )
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} (CUDA {built}) finds no usable device; run `python -m torch.utils.collect_env`"
        )
    return ""


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


def driver_release() -> tuple[int, int] | None:
    """The newest CUDA release that this machine's driver serves; None without a driver."""
    driver, _ = load_library(_DRIVER)
    return _version(driver) if driver else None


def _version(driver: ctypes.CDLL) -> tuple[int, int]:
    """The newest CUDA release that the driver serves."""
    version = ctypes.c_int()
    _call(driver, "cuDriverGetVersion", ctypes.byref(version))
    return version.value // 1000, version.value % 1000 // 10


def _call(driver: ctypes.CDLL, function: str, *args: object) -> None:
    if status := getattr(driver, function)(*args):
        raise OSError(f"{function} failed with error {_describe(driver, status)}")


def _devices(driver: ctypes.CDLL) -> tuple[tuple[int, int], list[tuple[DeviceInfo, tuple[int, int]]]]:
    """(CUDA release, every visible card and its compute capability); OSError names the driver call that failed."""
    cuda, count = _version(driver), ctypes.c_int()
    _call(driver, "cuDeviceGetCount", ctypes.byref(count))
    out = []
    for i in range(count.value):
        handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name, total = ctypes.create_string_buffer(256), ctypes.c_size_t()
        _call(driver, "cuDeviceGet", ctypes.byref(handle), i)
        _call(driver, "cuDeviceGetName", name, len(name), handle)
        _call(driver, "cuDeviceTotalMem_v2", ctypes.byref(total), handle)
        _call(driver, "cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, handle)
        _call(driver, "cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, handle)
        detail = f"compute capability {major.value}.{minor.value}, driver for CUDA {cuda[0]}.{cuda[1]}"
        info = DeviceInfo(i, name.value.decode(errors="replace"), total.value, detail)
        out.append((info, (major.value, minor.value)))
    return cuda, out
