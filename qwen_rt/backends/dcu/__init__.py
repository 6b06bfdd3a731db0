"""Hygon DCU. This version probes the way from the kernel driver to a DTK build of torch; the backend comes later."""

from __future__ import annotations

from pathlib import Path

import torch

from qwen_rt import config
from qwen_rt.backends.base import Backend, DeviceInfo, Probe
from qwen_rt.backends.probing import gib, load_library

_ROOT = Path("/")  # tests put a made-up machine here
_RUNTIME = "libgalaxyhip.so.5"
_CARDS = {"gfx906": "Z100", "gfx926": "K100", "gfx928": "K100_AI", "gfx936": "BW1000"}


class DcuBackend(Backend):
    """DCU devices by HIP index."""

    name = "dcu"

    @classmethod
    def probe(cls) -> Probe:
        """The first thing missing on the way to a usable DCU, or which cards were found."""
        missing = _missing()
        if missing:
            return Probe(reason=missing)
        try:
            devices = _devices()
        except (RuntimeError, AssertionError, AttributeError) as e:
            return Probe(reason=f"torch is a DTK build, but its device query failed: {e}; check with `hy-smi`")
        if not devices:
            return Probe(
                reason="driver, DTK and torch are there, but no DCU is visible; check `hy-smi`, HIP_VISIBLE_DEVICES "
                "and the rights of /dev/kfd and /dev/dri (groups video and render)"
            )
        cards = "; ".join(f"{d.name}, {gib(d.total_memory)}, {d.detail}" for d in devices)
        return Probe(
            reason=f"found {cards}; but the DCU backend is not built yet in this version of qwen_rt: use device='cpu'"
        )


def _missing() -> str:
    """What keeps this machine from using a DCU, one step after the other; "" when nothing does."""
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
    if getattr(torch.version, "hip", None) is None:
        return (
            f"DTK found, but torch {torch.__version__} is not a DTK build (torch.version.hip is missing); install "
            "the torch wheel of your DTK release (a torch from PyPI silently replaces it)"
        )
    return ""


def _devices() -> list[DeviceInfo]:
    out = []
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        arch = card.gcnArchName.split(":")[0]
        name = f"{card.name} ({_CARDS.get(arch, 'not a known DCU')})"
        out.append(
            DeviceInfo(i, name, card.total_memory, f"{arch}, torch {torch.__version__}, HIP {torch.version.hip}")
        )
    return out
