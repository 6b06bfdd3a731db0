"""What a DCU needs, step by step: driver, DTK, its runtime and the cards it lists, a DTK build of torch, the launcher.

torch is imported only where the runtime lists a card.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import ModuleType
from typing import Any

from qwen_rt import config
from qwen_rt.backends.base import DeviceInfo, Probe
from qwen_rt.backends.gpu.installation import import_torch, launcher_missing
from qwen_rt.backends.probing import gib, load_library

_ROOT = Path("/")  # tests put a made-up machine here
_RUNTIME = "libgalaxyhip.so.5"
_NO_DEVICE = 100  # hipErrorNoDevice
_CARDS = {"gfx906": "Z100", "gfx926": "K100", "gfx928": "K100_AI", "gfx936": "BW1000"}
_INVISIBLE = (
    "no DCU is visible; check `hy-smi`, HIP_VISIBLE_DEVICES and the rights of /dev/kfd and /dev/dri "
    "(groups video and render)"
)
_TORCH = "the torch wheel of your DTK release"


def probe() -> Probe:
    """The first thing missing on the way to a usable DCU, or which cards were found. Never raises."""
    if missing := _dtk_missing():
        return Probe(reason=missing)
    torch, why = import_torch(_TORCH)
    if torch is None:
        return Probe(reason=f"DTK found, but {why} (the one from PyPI knows no DCU)")
    if getattr(torch.version, "hip", None) is None:
        return Probe(
            reason=f"DTK found, but torch {torch.__version__} is not a DTK build (torch.version.hip is missing); "
            f"install {_TORCH} (a torch from PyPI silently replaces it)"
        )
    try:
        devices = _devices(torch)
    except (RuntimeError, AssertionError, AttributeError) as e:
        return Probe(reason=f"torch is a DTK build, but its device query failed: {e}; check with `hy-smi`")
    if not devices:
        return Probe(reason=f"driver, DTK and torch are there, but {_INVISIBLE}")
    if missing := launcher_missing():
        cards = "; ".join(f"{d.name}, {gib(d.total_memory)}, {d.detail}" for d in devices)
        return Probe(reason=f"found {cards}; but {missing}")
    return Probe(tuple(devices), rung="emulated")


def _dtk_missing() -> str:
    """What keeps this machine from using a DCU, one step after the other, before torch; "" when nothing does."""
    if not (_ROOT / "dev/kfd").exists():
        return (
            "no DCU: /dev/kfd not found; with a card, install Hygon's driver "
            "(in a container: --device=/dev/kfd --device=/dev/dri)"
        )
    rocm = config.Settings.from_env().rocm_path
    if not ("dtk" in rocm and Path(rocm).exists()) and not (_ROOT / "opt/dtk").exists():
        return (
            "a GPU driver is there (/dev/kfd), but no DTK: ROCM_PATH names none and /opt/dtk is missing; "
            "install Hygon's DTK, or use its container image"
        )
    if not (_ROOT / "opt/hyhal").exists():
        return "DTK found, but /opt/hyhal is missing (0 devices without it); mount it: -v /opt/hyhal:/opt/hyhal"
    runtime, why = load_library(_RUNTIME)
    if runtime is None:
        return f"DTK found, but {why}; run `source /opt/dtk/env.sh` in this shell first"
    count = ctypes.c_int()
    try:
        status = runtime.hipGetDeviceCount(ctypes.byref(count))
    except AttributeError as e:
        return f"DTK found, but {_RUNTIME} is not its runtime: {e}; run `source /opt/dtk/env.sh` in this shell first"
    if status not in (0, _NO_DEVICE):
        return f"DTK found, but hipGetDeviceCount failed with error {status}; check with `hy-smi`"
    return "" if count.value else f"driver and DTK are there, but {_INVISIBLE}"


def arch_of(properties: Any) -> str:
    """Of torch's properties of a card: "gfx928" of "gfx928:sramecc+:xnack-"."""
    return properties.gcnArchName.split(":")[0]


def _devices(torch: ModuleType) -> list[DeviceInfo]:
    out = []
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        arch = arch_of(card)
        name = f"{card.name} ({_CARDS.get(arch, 'not a known DCU')})"
        out.append(
            DeviceInfo(i, name, card.total_memory, f"{arch}, torch {torch.__version__}, HIP {torch.version.hip}")
        )
    return out
