"""The probes of CUDA and DCU import torch only where a card is, and say what to install where torch is not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_rt.backends.base import DeviceInfo
from qwen_rt.backends.cuda import probe as cuda_probe
from qwen_rt.backends.dcu import probe as dcu_probe

PROBES = ("qwen_rt.backends.cuda.probe", "qwen_rt.backends.dcu.probe")


@pytest.mark.parametrize("module", PROBES)
def test_no_card_no_torch(module: str) -> None:
    """In a process of its own; a card that is there is hidden."""
    script = (
        f"import sys, {module} as m\nfound = m.probe()\n"
        "assert not found.usable and found.reason, found\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    hidden = {name: "-1" for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")}
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, **hidden}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Hip:
    """The HIP runtime as ctypes would show it."""

    def __init__(self, count: int, status: int = 0) -> None:
        self.count, self.status = count, status

    def hipGetDeviceCount(self, out: Any) -> int:
        out._obj.value = self.count
        return self.status


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Callable[[], str]]:
    """card(name, hip) puts a made-up card of that kind here: its probe's reason."""

    def install(name: str, hip: object = None) -> Callable[[], str]:
        if name == "cuda":
            found = DeviceInfo(0, "Test 9000", 80 << 30, "compute capability 9.0")
            monkeypatch.setattr(cuda_probe, "load_library", lambda name: (SimpleNamespace(cuInit=lambda flags: 0), ""))
            monkeypatch.setattr(cuda_probe, "_devices", lambda driver: ((13, 1), [(found, (9, 0))]))
            return lambda: cuda_probe.probe().reason
        for folder in ("dev/kfd", "opt/dtk", "opt/hyhal"):
            (tmp_path / folder).mkdir(parents=True)
        monkeypatch.delenv("ROCM_PATH", raising=False)
        monkeypatch.setattr(dcu_probe, "_ROOT", tmp_path)
        monkeypatch.setattr(dcu_probe, "load_library", lambda name: (hip or Hip(1), ""))
        return lambda: dcu_probe.probe().reason

    return install


INSTALL = {
    "cuda": "a build of it for CUDA, of a release the driver serves (CUDA 13.1 or older): see pytorch.org/get-started",
    "dcu": "the torch wheel of your DTK release",
}


@pytest.mark.parametrize("name", INSTALL)
def test_torch_is_not_installed(name: str, card: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    reason = card(name)
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it is a ModuleNotFoundError
    assert f"PyTorch is not installed: install {INSTALL[name]}" in reason()


@pytest.mark.parametrize("name", INSTALL)
@pytest.mark.parametrize("error", [OSError("libcudart.so.13: no such file"), ModuleNotFoundError("x", name="torch._C")])
def test_torch_does_not_import(
    name: str, error: Exception, card: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reason = card(name)
    (tmp_path / "torch.py").write_text(
        f"e = {type(error).__name__}({error.args[0]!r})\ne.name = 'torch._C'\nraise e\n", encoding="utf-8"
    )
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    told = reason()
    assert f"PyTorch does not import ({type(error).__name__}: {error}): install {INSTALL[name]}" in told


@pytest.mark.parametrize(
    ("hip", "says"),
    [
        (Hip(0), "driver and DTK are there, but no DCU is visible; check `hy-smi`, HIP_VISIBLE_DEVICES"),
        (Hip(0, 100), "driver and DTK are there, but no DCU is visible"),
        (Hip(0, 3), "hipGetDeviceCount failed with error 3; check with `hy-smi`"),
        (SimpleNamespace(), "libgalaxyhip.so.5 is not its runtime: "),
    ],
)
def test_dcu_counts_before_torch(
    hip: object, says: str, card: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # were it imported, that would be the reason
    assert says in card("dcu", hip)()
