"""An environment of its own with the unmodified torch_npu wheel, and the software NPU under it.

Both live in qwen_rt's cache and are made when first needed: the environment holds torch_npu (and torch, where the
ordinary one has another release) and takes all else from the ordinary one, which never sees the wheel; the software
NPU is built from cann_sim for exactly these sources and this torch. Where that cannot be, `Unavailable` says why: tests
skip with it, or fail when QWEN_RT_REQUIRE_ASCEND=1.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from qwen_rt.config import Settings

ROOT = Path(__file__).parents[2]
SIMULATOR = Path(__file__).parent / "cann_sim"
RELEASE = "2.13.0"  # of torch and torch_npu: what `qwen-rt[ascend]` pins
PYTHONS = ((3, 10), (3, 11), (3, 12), (3, 13))  # for which the wheel exists


class Unavailable(Exception):
    """Why there is no such environment here."""


def run(
    *args: str, soc: str = "Ascend910B3", check: bool = True, timeout: int = 900, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the environment's Python on the software NPU; check: fail with the output when it exits otherwise than 0."""
    python, libraries = need()
    done = subprocess.run(
        [str(python), *args],
        env={**npu_environ(libraries), "CANNSIM_SOC": soc, **env},
        cwd=ROOT, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert not check or done.returncode == 0, f"{' '.join(args)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def npu_environ(libraries: Path) -> dict[str, str]:
    """The environment variables under which the wheel finds the software NPU."""
    ours = {
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, (str(libraries), os.environ.get("LD_LIBRARY_PATH")))),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # only the backend imports the wheel
        "CANNSIM_CANN_VERSION": "9.1.0",
        "CANNSIM_ON_ERROR": "abort",  # a refused call ends the process: the task queue would drop what follows
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "QWEN_BACKEND": "",
        "QWEN_RT_INSIDE_NPU": "1",
    }
    return {**os.environ, **ours}


def need() -> tuple[Path, Path]:
    """(the environment's python, the folder of the software NPU's libraries), or the test is skipped, or fails."""
    found = _attempt()
    if isinstance(found, str):
        if os.environ.get("QWEN_RT_REQUIRE_ASCEND") == "1":
            pytest.fail(f"QWEN_RT_REQUIRE_ASCEND=1, and {found}")
        pytest.skip(found)
    return found


@lru_cache
def _attempt() -> tuple[Path, Path] | str:
    try:
        python = environment()
        return python, simulator(python)
    except (Unavailable, OSError) as e:
        return str(e)


def environment() -> Path:
    """The python of an environment with torch_npu. Raises Unavailable."""
    if sys.version_info[:2] not in PYTHONS or platform.machine() != "x86_64" or sys.platform != "linux":
        raise Unavailable(
            f"torch_npu {RELEASE} has no wheel for Python {sys.version_info[0]}.{sys.version_info[1]} on "
            f"{sys.platform} {platform.machine()}"
        )
    home = Settings.from_env().cache / "ascend" / f"env-{RELEASE}-{_digest(sys.prefix, sys.version)}"
    python = home / "bin" / "python"
    home.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{home}.lock"):
        if (home / "ready").exists():
            return python
        _call(sys.executable, "-m", "venv", "--clear", str(home))
        pip = (str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check")
        if torch.__version__.split("+")[0] == RELEASE and torch.version.cuda is None:
            _call(*pip, "--no-deps", f"torch-npu=={RELEASE}", "pyyaml")
        else:
            _call(*pip, f"torch=={RELEASE}", f"torch-npu=={RELEASE}")
        # Everything else, this project included, comes from the ordinary environment, after the environment's own.
        ordinary = sysconfig.get_paths()["purelib"]
        own = Path(_call(str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
        (own / "ordinary.pth").write_text(f"import site; site.addsitedir({ordinary!r})\n")
        _call(str(python), "-c", "import torch, yaml, pytest, qwen_rt")
        (home / "ready").touch()
    return python


def simulator(python: Path) -> Path:
    """The folder of the software NPU's libraries, built if need be. Raises Unavailable."""
    sources = sorted(p for p in SIMULATOR.rglob("*") if p.suffix in (".cpp", ".h") or p.name == "Makefile")
    if not sources:
        raise Unavailable(f"{SIMULATOR} holds no software NPU")
    name = f"sim-{RELEASE}-{_digest(str(python), *(p.read_bytes() for p in sources))}"
    out = Settings.from_env().cache / "ascend" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock"):
        if not (out / "ready").exists():
            _call("make", "-s", "-j2", "-C", str(SIMULATOR), f"PYTHON={python}", f"OUT={out}")
            (out / "ready").touch()
    return out


def _call(*args: str) -> str:
    try:
        env = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # else `import torch` imports the wheel by itself
        done = subprocess.run(args, env=env, capture_output=True, text=True, timeout=1200)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise Unavailable(f"`{' '.join(args)}` does not run: {e}") from e
    if done.returncode:
        raise Unavailable(f"`{' '.join(args)}` failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
    return digest.hexdigest()[:16]
