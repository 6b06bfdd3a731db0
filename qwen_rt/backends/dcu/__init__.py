"""Hygon DCU: the kernels of csrc/gpu through the HIP runtime, a DTK build of torch for memory and dense products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qwen_rt import config
from qwen_rt.backends.base import DeviceInfo, Probe
from qwen_rt.backends.cuda import device_memory, sum_in_float32
from qwen_rt.backends.gpu import toolchain
from qwen_rt.backends.gpu.backend import GpuBackend, launcher_missing
from qwen_rt.backends.gpu.capture import Graph, TorchGraph
from qwen_rt.backends.gpu.driver import Driver
from qwen_rt.backends.gpu.kernels import Loaded
from qwen_rt.backends.probing import gib, load_library
from qwen_rt.errors import BackendError

_ROOT = Path("/")  # tests put a made-up machine here
_RUNTIME = "libgalaxyhip.so.5"
_CARDS = {"gfx906": "Z100", "gfx926": "K100", "gfx928": "K100_AI", "gfx936": "BW1000"}
_NO_BF16 = ("gfx906",)


class DcuBackend(GpuBackend):
    """DCU devices by HIP index."""

    name = "dcu"
    warp = 64
    capture_rows = 16  # capture of larger batches failed on a K100_AI (docs/hardware.md)

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
        if missing := launcher_missing():
            cards = "; ".join(f"{d.name}, {gib(d.total_memory)}, {d.detail}" for d in devices)
            return Probe(reason=f"found {cards}; but {missing}")
        return Probe(tuple(devices), rung="emulated")

    def _open(self, index: int) -> None:
        """The device's primary context, which is torch's own."""
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise BackendError(f"dcu:{index}: torch {torch.__version__} sees {torch.cuda.device_count()} devices")
        self.device = torch.device("cuda", index)
        torch.cuda.init()
        sum_in_float32()
        self.arch = _arch(index)
        self.driver = Driver.open_hip(index)
        self._pool: Any = None

    def _compute_dtypes(self) -> tuple[torch.dtype, ...]:
        dtypes = type(self).caps.compute_dtypes
        return tuple(d for d in dtypes if d != torch.bfloat16) if self.arch in _NO_BF16 else dtypes

    def _load(self, module: str) -> Loaded:
        image = toolchain.image(module, self.arch)
        return Loaded(self.driver.load(image.data), image.route)

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes; what torch holds and does not use counts as free."""
        return device_memory(self.device)

    def _graph(self) -> Graph:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        return TorchGraph(self.device, self._pool)


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


def _arch(index: int) -> str:
    """ "gfx928" of "gfx928:sramecc+:xnack-"."""
    return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]


def _devices() -> list[DeviceInfo]:
    out = []
    for i in range(torch.cuda.device_count()):
        card, arch = torch.cuda.get_device_properties(i), _arch(i)
        name = f"{card.name} ({_CARDS.get(arch, 'not a known DCU')})"
        out.append(
            DeviceInfo(i, name, card.total_memory, f"{arch}, torch {torch.__version__}, HIP {torch.version.hip}")
        )
    return out
