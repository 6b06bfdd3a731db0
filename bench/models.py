"""What the CPU benchmarks compare: a format's name -> the weights each side loads, and the peer's environment.

All formats are made from one file, the demo model's Q4_K_M. `q4_0`, `q4_k_m` and `q8_0` are one GGUF file on both
sides (others than the demo's own are written by llama.cpp's quantiser). `int4` and `int8` are qwen_rt's, rounded from
the same weights at load (matrices that have as few bits already stay as they are); `int4-g32`, `int4-g64-asym`,
`int4-g128-gptq` ... are directories that `qwen-rt quantize` writes, the last with `--head` and with `--calibrate` on
parts of bench/texts.py that bench/perplexity.py does not score (some minutes, once). Beside an Int4 stands the peer's
fastest format, Q4_0; beside an Int8 its Q8_0.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from texts import WINDOWS, texts, windows

from qwen_rt import calibrate, convert
from qwen_rt.checkpoint import open_checkpoint
from qwen_rt.config import Settings
from qwen_rt.hub import resolve
from qwen_rt.quant import gptq, packing, rtn
from qwen_rt.tokenizer import load_tokenizer

FTYPES = {"q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0", "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0"}
OWN = re.compile(r"int([48])(?:-g([0-9]+)(-asym|-gptq)?)?")
PEER_PACKAGE = "llama-cpp-python"
PEER_ISA = {"avx2": ("SSE42=ON", "AVX=ON", "AVX2=ON", "FMA=ON", "F16C=ON", "BMI2=ON")}  # its build's options


@dataclass(frozen=True)
class Weights:
    """One format on both sides."""

    name: str
    ours: Path
    quantize: Literal["int4", "int8"] | None  # what load() is told
    peer: Path
    peer_name: str


def cache_folder() -> Path:
    """The qwen_rt cache."""
    return Path(Settings.from_env().cache)


def weights(name: str, python: str) -> Weights:
    """The files of a format, made at the first use; ValueError for an unknown one. `python`: see peer_python()."""
    if name == "q4_k_m" or name in FTYPES:
        path = gguf(name, python)
        return Weights(name, path, None, path, name)
    found = OWN.fullmatch(name)
    if not found:
        raise ValueError(
            f"unknown format {name!r}: q4_k_m, {', '.join(FTYPES)}, int4, int8, int4-g32, int4-g64-asym, int4-g128-gptq"
        )
    bits, group, how = found.groups()
    quantize = cast(Literal["int4", "int8"], f"int{bits}")
    peer_name = f"q{bits}_0"
    source = resolve("demo").path
    ours = own_directory(name, source, int(bits), int(group), how) if group else source
    return Weights(name, ours, quantize, gguf(peer_name, python), peer_name)


def gguf(name: str, python: str) -> Path:
    """The demo's GGUF, or what llama.cpp's quantiser makes of it."""
    source = resolve("demo").path
    if name == "q4_k_m":
        return source
    target = cache_folder() / "models" / f"bench-{name}.gguf"
    if not target.exists():
        code = (
            "import ctypes, sys, llama_cpp as l\n"
            "p = l.llama_model_quantize_default_params(); p.allow_requantize = True\n"
            f"p.ftype = l.{FTYPES[name]}\n"
            "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p)))\n"
        )
        partial = target.with_suffix(".part")
        run = [python, "-c", code, str(source), str(partial)]
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        partial.rename(target)
    return target


def own_directory(name: str, source: Path, bits: int, group: int, how: str | None) -> Path:
    """What `qwen-rt quantize` makes of the demo's weights; made again when the quantiser's code has changed."""
    code = b"".join(Path(str(module.__file__)).read_bytes() for module in (convert, calibrate, gptq, rtn, packing))
    target = cache_folder() / "models" / f"bench-{name}"
    stamp = target / "made-by"
    digest = hashlib.sha256(code).hexdigest()
    if not stamp.exists() or stamp.read_text() != digest:
        shutil.rmtree(target, ignore_errors=True)
        checkpoint = open_checkpoint(source)
        try:
            calibration = None
            if how == "-gptq":
                print(f"calibrating {name} (once, some minutes) ...", file=sys.stderr)
                calibration = calibration_windows(source)
            symmetric = how != "-asym"
            wanted, head = cast(Literal[4, 8], bits), how == "-gptq"
            convert.to_gptq(checkpoint, target, wanted, group, symmetric, calibration=calibration, head=head)
        finally:
            checkpoint.close()
        stamp.write_text(digest)
    return target


def calibration_windows(source: Path) -> list[list[int]]:
    """Token ids of text between the windows that bench/perplexity.py scores."""
    tokenizer = load_tokenizer(source)
    found = texts(cache_folder() / "perplexity").values()
    ids = (tokenizer.encode(text, allowed_special=set()) for text in found)
    return [window for one in ids for window in windows(one, WINDOWS, calibrate.WINDOW, between=True)]


def peer_python(isa: str | None = None) -> str:
    """The interpreter of the peer's environment, made and built at the first use (some minutes).

    `isa`: None for every instruction set of this machine, or a name of PEER_ISA.
    """
    env = cache_folder() / ("bench-peer" if isa is None else f"bench-peer-{isa}")
    python = env / "bin/python"
    if not (env / "ok").exists():
        print(f"building {PEER_PACKAGE} (once, some minutes) ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
        options = os.environ.copy()
        build = ["install", "-q", "--no-binary", PEER_PACKAGE]
        if isa is not None:
            options["CMAKE_ARGS"] = " ".join(f"-DGGML_{name}" for name in ("NATIVE=OFF", *PEER_ISA[isa]))
            build.append("--no-cache-dir")  # a wheel of another build has the same name
        subprocess.run([str(python), "-m", "pip", *build, PEER_PACKAGE], check=True, env=options)
        (env / "ok").touch()
    return str(python)


def peer_version(python: str) -> str:
    """Version of the peer's package."""
    code = "import importlib.metadata as m; print(m.version('llama-cpp-python'))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def processor() -> str:
    """Model name and the instruction sets that matter here."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((x.split(":", 1)[1].strip() for x in info.splitlines() if x.startswith("model name")), "")
    flags = next((x.split(":", 1)[1].split() for x in info.splitlines() if x.startswith("flags")), [])
    sets = [f for f in ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if f in flags]
    return f"{name or platform.processor()} ({os.cpu_count()} cpus; {' '.join(sets)})"
