"""The native kernels on random shapes under AddressSanitizer and UBSan: tests/native, built and run without Python.

`make test-native` runs more cases; here it is few, and that planted mistakes do not pass.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def run(*command: str | Path, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """The finished process, output as text."""
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program; skips where g++ cannot build with the sanitizers or what it builds does not start."""
    for tool in ("g++", "make"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "empty.cpp").write_text("int main() {}\n")
    built = run("g++", *SANITIZE, folder / "empty.cpp", "-o", folder / "empty")
    if built.returncode:
        pytest.skip(f"g++ lacks the sanitizers: {built.stderr.strip()[-200:]}")
    if (started := run(folder / "empty")).returncode:
        pytest.skip(f"programs with the sanitizers do not run here: {started.stderr.strip()[-200:]}")
    build = ROOT / "build/native"  # kept: only what changed is compiled again
    build.mkdir(parents=True, exist_ok=True)
    with FileLock(build / ".lock"):
        made = run("make", "-C", ROOT / "tests/native", f"-j{min(4, os.cpu_count() or 1)}", f"BUILD={build}")
    assert made.returncode == 0, made.stderr[-4000:]
    return build / "check"


def test_random_shapes(check: Path) -> None:
    done = run(check, "--seed", "1", "--cases", "60")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-6000:]}"
    assert "on scalar" in done.stdout
    assert done.stdout.endswith("passed\n")


@pytest.mark.parametrize(
    ("mistake", "report"),
    [
        ("read", "ERROR: AddressSanitizer"),
        ("guard", "ERROR: AddressSanitizer: SEGV"),
        ("scratch", "ERROR: AddressSanitizer"),
        ("overflow", "runtime error: signed integer overflow"),
        ("value", "y at 0, 5"),
    ],
)
def test_planted_mistakes_are_reported(check: Path, mistake: str, report: str) -> None:
    done = run(check, "--plant", mistake)
    assert done.returncode not in (0, 2), done.stdout
    assert report in done.stderr


def test_unknown_operations_are_an_error(check: Path) -> None:
    assert run(check, "--only", "nothing").returncode == 2
