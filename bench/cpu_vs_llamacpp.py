"""Prefill and decode against llama.cpp: same weights, same run, interleaved, medians of ratios.

    python bench/cpu_vs_llamacpp.py [--formats q4_0,q4_k_m] [--threads 1,2] [--runs 5] [--json FILE]

The peer is llama-cpp-python from PyPI, built from source for this machine (so with every instruction set it has) in
an environment of its own under the qwen_rt cache. The weights are the demo model's GGUF; other formats are made from it
by llama.cpp's own quantiser, and both sides read the same file. Each run: prefill of a 512-token prompt, then decode of
128 tokens after a 16-token prompt, greedy. The two sides take turns, each in a process that lives for one setting.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

PREFILL, DECODE, SHORT = 512, 128, 16
FTYPES = {"q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0", "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0"}


def prompt_ids(count: int, run: int) -> list[int]:
    """Ordinary token ids, the same on both sides; another prompt each run, so that no prefix cache helps."""
    return [(i * 7919 + run) % 90000 + 100 for i in range(count)]


# -- workers: one process a side, a line in (prefill | decode | quit), a line of JSON out ----------------------------
def serve(prefill: Any, decode: Any) -> None:
    """Answer requests on standard input with seconds taken."""
    print(json.dumps({"ready": True}), flush=True)
    for run, line in enumerate(sys.stdin):
        command = line.strip()
        if command == "quit":
            return
        seconds = prefill(run) if command == "prefill" else decode(run)
        print(json.dumps({"seconds": seconds}), flush=True)


def worker_peer(path: str, threads: int) -> None:
    """llama.cpp through its C API: batches of tokens, logits of the last."""
    import llama_cpp as lc
    import numpy as np

    lc.llama_backend_init()
    mp = lc.llama_model_default_params()
    mp.n_gpu_layers = 0
    model = lc.llama_model_load_from_file(path.encode(), mp)
    cp = lc.llama_context_default_params()
    cp.n_ctx, cp.n_batch, cp.n_ubatch = 1024, 512, 512
    cp.n_threads = cp.n_threads_batch = threads
    ctx = lc.llama_init_from_model(model, cp)
    vocab = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))

    def run(ids: list[int]) -> int:
        tokens = (lc.llama_token * len(ids))(*ids)
        if lc.llama_decode(ctx, lc.llama_batch_get_one(tokens, len(ids))) != 0:
            raise RuntimeError("llama_decode failed")
        return int(np.ctypeslib.as_array(lc.llama_get_logits_ith(ctx, -1), (vocab,)).argmax())

    def clear() -> None:
        lc.llama_memory_clear(lc.llama_get_memory(ctx), True)

    def prefill(at: int) -> float:
        clear()
        ids = prompt_ids(PREFILL, at)
        start = time.perf_counter()
        run(ids)
        return time.perf_counter() - start

    def decode(at: int) -> float:
        clear()
        token = run(prompt_ids(SHORT, at))
        start = time.perf_counter()
        for _ in range(DECODE):
            token = run([token])
        return time.perf_counter() - start

    serve(prefill, decode)


def worker_ours(path: str, threads: int) -> None:
    """qwen_rt through its public API."""
    os.environ["QWEN_RT_THREADS"] = str(threads)
    import qwen_rt

    model = qwen_rt.load(path, device="cpu", max_model_len=1024)

    def timed(ids: list[int], count: int) -> tuple[float, float]:
        done = model.generate(ids, max_new_tokens=count, temperature=0, repetition_penalty=1.0, ignore_eos=True)
        assert len(done.ids) == count
        return done.prefill_seconds, done.decode_seconds

    def prefill(at: int) -> float:
        return timed(prompt_ids(PREFILL, at), 1)[0]

    def decode(at: int) -> float:  # the first of the tokens comes out of the prefill
        return timed(prompt_ids(SHORT, at), DECODE + 1)[1]

    serve(prefill, decode)


class Side:
    """A worker process and its measurements."""

    def __init__(self, python: str, role: str, path: Path, threads: int) -> None:
        self.process = subprocess.Popen(
            [python, __file__, "--worker", role, "--model", str(path), "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if role == "peer" else None,  # it logs thousands of lines
            text=True,
        )
        self.read()

    def read(self) -> dict[str, Any]:
        """The next line of the worker."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"worker died with code {self.process.wait()}")
        return json.loads(line)

    def measure(self, what: str) -> float:
        """Seconds of one prefill or decode."""
        assert self.process.stdin
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return float(self.read()["seconds"])

    def close(self) -> None:
        """End the worker."""
        assert self.process.stdin
        self.process.stdin.write("quit\n")
        self.process.stdin.flush()
        self.process.wait()


# -- set-up --------------------------------------------------------------------------------------------------------
def peer_python(cache: Path) -> str:
    """The interpreter of the peer's environment, made and built at the first use (some minutes)."""
    env = cache / "bench-peer"
    python = env / "bin/python"
    if not (env / "ok").exists():
        print("building llama-cpp-python (once, some minutes) ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "llama-cpp-python"], check=True)
        (env / "ok").touch()
    return str(python)


def weights(fmt: str, cache: Path, python: str) -> Path:
    """The GGUF in format `fmt`, made by llama.cpp's quantiser from the demo model when it is not that itself."""
    from qwen_rt.hub import resolve

    source = resolve("demo").path
    if fmt == "q4_k_m":
        return source
    target = cache / "models" / f"bench-{fmt}.gguf"
    if not target.exists():
        code = (
            "import ctypes, sys, llama_cpp as l\n"
            "p = l.llama_model_quantize_default_params(); p.allow_requantize = True\n"
            f"p.ftype = l.{FTYPES[fmt]}\n"
            "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p)))\n"
        )
        partial = target.with_suffix(".part")
        run = [python, "-c", code, str(source), str(partial)]
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        partial.rename(target)
    return target


def processor() -> str:
    """Model name and the instruction sets that matter here."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((x.split(":", 1)[1].strip() for x in info.splitlines() if x.startswith("model name")), "")
    flags = next((x.split(":", 1)[1].split() for x in info.splitlines() if x.startswith("flags")), [])
    sets = [f for f in ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if f in flags]
    return f"{name or platform.processor()} ({os.cpu_count()} cpus; {' '.join(sets)})"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="q4_0,q4_k_m")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--worker", choices=("peer", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        {"peer": worker_peer, "ours": worker_ours}[args.worker](args.model, int(args.threads))
        return
    from qwen_rt.config import Settings

    cache = Path(Settings.from_env().cache)
    python = peer_python(cache)
    print(f"{date.today()}  {processor()}")
    print(f"{'format':8} {'threads':>7} {'':8} {'llama.cpp tok/s':>16} {'qwen_rt tok/s':>14} {'ratio':>7}  (min-max)")
    figures = []
    for fmt in args.formats.split(","):
        path = weights(fmt, cache, python)
        for threads in map(int, args.threads.split(",")):
            sides = {"peer": Side(python, "peer", path, threads), "ours": Side(sys.executable, "ours", path, threads)}
            for what, tokens in (("prefill", PREFILL), ("decode", DECODE)):
                for side in sides.values():
                    side.measure(what)  # warm up
                runs = [{name: side.measure(what) for name, side in sides.items()} for _ in range(args.runs)]
                ratios = sorted(r["peer"] / r["ours"] for r in runs)
                speed = {name: tokens / statistics.median(r[name] for r in runs) for name in sides}
                ratio = statistics.median(ratios)
                print(
                    f"{fmt:8} {threads:7} {what:8} {speed['peer']:16.1f} {speed['ours']:14.1f} {ratio:7.2f}"
                    f"  ({ratios[0]:.2f}-{ratios[-1]:.2f})",
                    flush=True,
                )
                figures.append({"format": fmt, "threads": threads, "what": what, **speed, "ratio": ratio})
            for side in sides.values():
                side.close()
    if args.json:
        args.json.write_text(json.dumps({"date": str(date.today()), "cpu": processor(), "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
