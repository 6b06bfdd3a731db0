"""The example plugin, installed as a package of its own, is found through its entry point and passes the contract."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_rt.backends import contract

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the plugin installed."""
    where = tmp_path_factory.mktemp("plugin")
    shutil.copytree(ROOT / "examples" / "qwen-rt-toy-backend", where / "source")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", where / "site", where / "source"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = os.pathsep.join([str(where / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "QWEN_BACKEND": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def python(env: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], env=env, cwd=ROOT, capture_output=True, text=True)


def test_contract(env: dict[str, str]) -> None:
    done = python(
        {**env, "QWEN_RT_CONTRACT_BACKEND": "numpy"},
        "-m", "pytest", "-o", "addopts=-q", "-p", "no:cacheprovider", "tests/contract/test_waist.py",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout and f"{len(contract.OPS) + 1} passed" in done.stdout


def test_listed_and_preferred_to_cpu(env: dict[str, str]) -> None:
    told = json.loads(python(env, "-m", "qwen_rt.cli.main", "devices", "--json").stdout)
    assert told["devices"]["numpy"]["usable"] and told["devices"]["numpy"]["kernels"]["linear"] == "numpy"
    names = list(told["devices"])
    assert names.index("ascend") < names.index("numpy") < names.index("cpu")


def test_at_most_150_lines() -> None:
    for path in (ROOT / "examples" / "qwen-rt-toy-backend").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 150
