"""Decode on the CPU as a share of the memory's read bandwidth, both measured in the same run, in turns; medians.

    python bench/roofline.py [--formats q4_0,int4] [--threads 1,2] [--contexts 16,8192] [--cache float16] [--runs 5]

Bandwidth is a vectorised read (bench/read_bandwidth.cpp, built here with g++) of a buffer of 1 GiB, or 16 times the
last cache where that is more; the fastest of its access patterns counts. A token has to read every packed weight once -
of an embedding table that is not also the head, one row - and the keys and values of its sequence so far:

    share   bytes per token x tokens per second / bandwidth
    cost    of a longer context: its extra time over what its extra bytes take at 80% of the bandwidth (goal: at most 1)
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from models import peer_python, processor, weights
from sides import Ours, Settings

from qwen_rt.llm import Qwen

LEAST = 1 << 30  # bytes read
GOAL = 0.90
CONTEXT_SHARE = 0.80  # of the bandwidth, for the bytes that a longer context adds


class Memory:
    """The read kernel and its buffer."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as work:
            library = Path(work) / "read_bandwidth.so"
            source = Path(__file__).with_name("read_bandwidth.cpp")
            flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
            subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
            self._native = ctypes.CDLL(str(library))
        self._native.make_buffer.restype = ctypes.c_void_p
        self._native.read_seconds.restype = ctypes.c_double
        self.bytes = max(LEAST, 16 * last_cache()) & ~((1 << 21) - 1)
        self._buffer = ctypes.c_void_p(self._native.make_buffer(ctypes.c_size_t(self.bytes)))
        if not self._buffer:
            raise SystemExit(f"no memory for a buffer of {self.bytes} bytes")
        self._best: dict[int, int] = {}  # threads -> the fastest pattern

    def seconds(self, threads: int, pattern: int) -> float:
        """Time of one read of the whole buffer."""
        size, check = ctypes.c_size_t(self.bytes), ctypes.c_uint64()
        return float(self._native.read_seconds(self._buffer, size, threads, pattern, ctypes.byref(check)))

    def bandwidth(self, threads: int) -> float:
        """Bytes per second of the best of three reads, in the pattern that was the fastest when first asked."""
        if threads not in self._best:
            patterns = range(self._native.num_patterns())
            times = {p: min(self.seconds(threads, p) for _ in range(3)) for p in patterns}
            self._best[threads] = min(times, key=lambda p: times[p])
        return self.bytes / min(self.seconds(threads, self._best[threads]) for _ in range(3))

    def close(self) -> None:
        """Free the buffer."""
        self._native.free_buffer(self._buffer, ctypes.c_size_t(self.bytes))


def last_cache() -> int:
    """Bytes of the largest cache that Linux tells of; 0 where it tells of none."""
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) * units[s[-1]] for s in sizes), default=0)


def weight_bytes(model: Qwen) -> int:
    """Packed bytes that every token reads."""
    graph = model.loop.engine.model
    total = graph.packed_bytes
    if graph.head is not graph.table:
        total -= graph.table.nbytes - graph.table.nbytes // graph.table.shape[0]
    return total


def cache_bytes(model: Qwen, keys: float) -> int:
    """Bytes of the keys and values of a sequence of that many tokens."""
    spec = model.loop.engine.runner.kv.spec
    return round(keys * spec.block_bytes() / spec.block_size)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="q4_0,q4_k_m,q8_0,int4")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument(
        "--contexts", default="16,8192", help="tokens of the prompt; the first is what others cost over"
    )
    parser.add_argument("--cache", default="float16", choices=("float16", "bfloat16", "float32", "int8"))
    parser.add_argument("--tokens", type=int, default=64, help="decoded in a measurement (default: 64)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    contexts = [int(c) for c in args.contexts.split(",")]
    python = peer_python()
    memory = Memory()
    print(
        f"{date.today()}  {processor()}  reads of {memory.bytes >> 20} MiB; {args.cache} cache; goal: share >= {GOAL:g}"
    )
    print(
        f"{'format':10}{'threads':>8}{'context':>8}{'read GB/s':>11}{'tok/s':>8}{'weights MB':>12}{'cache MB':>10}"
        f"{'share':>7}  {'(min-max)':13}  cost"
    )
    figures: list[dict[str, Any]] = []
    for name in args.formats.split(","):
        files = weights(name, python)
        for threads in map(int, args.threads.split(",")):
            room = max(contexts) + args.tokens + 64
            side = Ours(Settings(str(files.ours), threads, room, 1, args.cache, files.quantize))
            empty: tuple[float, int] | None = None
            for context in contexts:
                side.decode_at(context, args.tokens)  # warms up, and fills the prefix cache
                runs = [
                    (memory.bandwidth(threads), side.decode_at(context, args.tokens) / args.tokens)
                    for _ in range(args.runs)
                ]
                # The i-th of the steps reads the prompt's keys, those of the steps before it, and its own.
                held, read = weight_bytes(side.model), cache_bytes(side.model, context + (args.tokens + 1) / 2)
                shares = sorted((held + read) / seconds / bandwidth for bandwidth, seconds in runs)
                bandwidth, seconds = (statistics.median(column) for column in zip(*runs, strict=True))
                cost = None
                if empty is None:
                    empty = seconds, read
                else:
                    extra = (read - empty[1]) / (CONTEXT_SHARE * bandwidth)
                    cost = (seconds - empty[0]) / extra
                print(
                    f"{name:10}{threads:8}{context:8}{bandwidth / 1e9:11.2f}{1 / seconds:8.1f}{held / 1e6:12.1f}"
                    f"{read / 1e6:10.1f}{statistics.median(shares):7.2f}  {f'({shares[0]:.2f}-{shares[-1]:.2f})':13}"
                    + ("" if cost is None else f"  {cost:.2f}"),
                    flush=True,
                )
                figures.append(
                    {"format": name, "threads": threads, "context": context, "bandwidth": bandwidth, "shares": shares}
                    | {"seconds": seconds, "weight_bytes": held, "cache_bytes": read, "cost": cost}
                )
            side.model.close()
            del side  # its weights go before the next ones come
    memory.close()
    if args.json:
        args.json.write_text(json.dumps({"date": str(date.today()), "cpu": processor(), "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
