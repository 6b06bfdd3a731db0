"""The native kernels on random shapes under AddressSanitizer and UBSan: tests/native, built and run without Python.

`make test-native` runs more cases, and `make test-native-arm` those for AArch64 under qemu; here it is few, and that
planted mistakes do not pass.
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


def build(folder: Path, *settings: str) -> Path:
    """The program, built in `folder`, which is kept: only what changed is compiled again."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        made = run(
            "make", "-C", ROOT / "tests/native", f"-j{min(4, os.cpu_count() or 1)}", f"BUILD={folder}", *settings
        )
    assert made.returncode == 0, made.stderr[-4000:]
    return folder / "check"


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
    return build(ROOT / "build/native")


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


@pytest.fixture(scope="module")
def check_arm() -> Path:
    """The program for AArch64, under UBSan; skips without the cross compiler and the emulator."""
    for tool, package in (("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu"), ("qemu-aarch64", "qemu-user")):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} (Debian/Ubuntu: apt install {package})")
    if shutil.which("make") is None:
        pytest.skip("no make")
    return build(ROOT / "build/native-aarch64", "CXX=aarch64-linux-gnu-g++")


def test_random_shapes_on_arm(check_arm: Path) -> None:
    for operation, cases in (("linear", 150), ("embedding", 30), ("attention", 15)):
        done = run("qemu-aarch64", check_arm, "--seed", "1", "--cases", str(cases), "--only", operation)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-6000:]}"
        assert "on scalar neon\n" in done.stdout
        assert done.stdout.endswith("passed\n")


def test_arm_processors_without_dot_products_run_the_scalar_kernels(check_arm: Path) -> None:
    done = run("qemu-aarch64", "-cpu", "cortex-a57", check_arm, "--seed", "1", "--cases", "1", "--only", "linear")
    assert done.returncode == 0 and "on scalar\n" in done.stdout, done.stderr[-6000:]


@pytest.mark.parametrize(("mistake", "report"), [("guard", "signal 11"), ("value", "y at 0, 5")])
def test_planted_mistakes_are_reported_on_arm(check_arm: Path, mistake: str, report: str) -> None:
    done = run("sh", "-c", 'ulimit -c 0; exec qemu-aarch64 "$@"', "sh", check_arm, "--plant", mistake)
    assert done.returncode not in (0, 2), done.stdout
    assert report in done.stderr
