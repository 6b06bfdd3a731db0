"""bench/gpu.py runs from end to end, over the emulator at sizes where its figures mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from needs import need_compiler

from qwen_rt.backends.gpu import compilers

SCRIPT = Path(__file__).parents[2] / "bench/gpu.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=500)


def test_every_part_gives_its_figures(tmp_path: Path) -> None:
    need_compiler("g++", compilers.find_gxx(), "no C++ compiler on PATH")
    out = tmp_path / "result.json"
    done = run("--backend", "cuda-emulated", "--tiny", "--models", "7B", "--formats", "int4", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["tiny"] and result["card"]["rung"] == "emulated" and "--tiny" in result["command"]
    assert all(value > 0 for value in result["figures"].values())
    for figure in (
        "copy, TB/s",
        "linear 7B int4 1 row, share of copy",
        "linear 7B int8 16 row, share of copy",
        "attention GQA int8 32 x 4096, share of copy",
        "7B int4 prefill, tok/s",
        "7B int4 decode, share of copy",
        "7B int4 batch 3, tok/s",
        "7B transformers bf16 prefill, tok/s",
        "load 7B int4, GB/s",
    ):
        assert figure in result["figures"]
    assert "TINY SIZES" in done.stdout and "MISS" not in done.stdout


def test_a_part_that_fails_is_a_line_and_not_the_end(tmp_path: Path) -> None:
    done = run("--backend", "no-such-device", "--tiny", "--only", "card,linear", "--out", str(tmp_path / "x.json"))
    assert done.returncode == 1
    for part in ("card", "linear"):
        assert f"{part}: failed: " in done.stdout
    assert "unknown device 'no-such-device'" in done.stdout


def test_an_emulated_backend_at_full_size_is_refused() -> None:
    done = run("--backend", "cuda-emulated")
    assert done.returncode == 2 and "needs --tiny" in done.stderr
