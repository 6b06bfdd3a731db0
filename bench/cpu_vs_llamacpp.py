"""Speed, start and memory on a CPU against llama.cpp: same weights, same run, interleaved, medians of ratios.

    python bench/cpu_vs_llamacpp.py [--formats q4_0,q4_k_m,q8_0,int4] [--threads 1,2] [--what prefill,decode] [--runs 5]

The peer is llama-cpp-python from PyPI, built from source for this machine (so with every instruction set it has) in an
environment of its own under the qwen_rt cache; `--isa avx2` builds and compares both sides as a machine without
AVX-512 runs them. Which files a format means: bench/models.py. For q4_0, q4_k_m and q8_0
both sides read the same file; our own int4 stands beside the peer's fastest, Q4_0, and bench/perplexity.py prints the
perplexity of each.

    prefill      a prompt of 512 tokens            decode      128 tokens after a prompt of 16, greedy
    prefill2048  one of 2048                       batch8      the same for 8 sequences at once, tokens of all together
    context8k    32 tokens after a prompt of 8192, with a 16-bit and an 8-bit cache on both sides
    load         a new process until its first token after a prompt of 16 (files in the page cache), and its peak memory

The two sides take turns, each in a process that lives for one row (for one measurement, in `load`). `ratio` is ours
over theirs: of rates, more is better; of seconds and bytes, less is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from models import PEER_ISA, Weights, peer_python, peer_version, processor, weights
from sides import SHORT, Settings, Worker

CONTEXT, CONTEXT_DECODE = 8192, 32
CACHES = ("float16", "int8")


@dataclass(frozen=True)
class Rate:
    """A row that is measured in tokens per second."""

    method: str
    arguments: dict[str, int]
    tokens: int  # a measurement makes or reads
    context: int  # a sequence has room for
    sequences: int = 1
    caches: tuple[str, ...] = ("float16",)
    fresh: bool = True  # each run has a prompt of its own

    def settings(self, path: Path, threads: int, cache: str, quantize: str | None = None) -> Settings:
        """How a side is opened for it."""
        return Settings(str(path), threads, self.context, self.sequences, cache, quantize)


RATES = {
    "prefill": Rate("prefill", {"tokens": 512}, 512, 1024, caches=CACHES),
    "prefill2048": Rate("prefill", {"tokens": 2048}, 2048, 2560, caches=CACHES),
    "decode": Rate("decode", {"tokens": 128}, 128, 1024),
    "batch8": Rate("decode_batch", {"tokens": 128}, 8 * 128, 256, sequences=8),
    "context8k": Rate(
        "decode_at",
        {"context": CONTEXT, "tokens": CONTEXT_DECODE},
        CONTEXT_DECODE,
        CONTEXT + 256,
        caches=CACHES,
        fresh=False,
    ),
}
WHAT = (*RATES, "load")
FLASH = {"auto": -1, "off": 0, "on": 1}
GOALS = {  # ratio ours / theirs; for `load` at most, else at least
    ("decode", "int4"): 1.6,
    ("decode", "q4_k_m"): 1.7,
    ("decode", "q8_0"): 1.4,
    "prefill": 3.0,
    "prefill2048": 3.0,
    "batch8": 2.5,
    "context8k": 4.0,
    "load": 1.3,
}


def goal(what: str, fmt: str) -> float | None:
    """The goal of a row, where there is one."""
    return GOALS.get((what, fmt.split("-")[0])) or GOALS.get(what)


def take_turns(workers: dict[str, Worker], rate: Rate, runs: int) -> list[dict[str, float]]:
    """Seconds of each side, run by run, after one that warms up."""
    found = []
    for run in range(runs + 1):
        arguments = {**rate.arguments, **({"run": run} if rate.fresh else {})}
        found.append({name: worker.ask(rate.method, **arguments) for name, worker in workers.items()})
    return found[1:]


def measure_rate(
    what: str, files: Weights, threads: int, python: str, runs: int, flash: int, caches: list[str]
) -> Iterator[dict[str, Any]]:
    """A row for each cache format; llama.cpp computes with an 8-bit cache in flash attention only."""
    rate = RATES[what]
    for cache in [c for c in rate.caches if c in caches] or rate.caches:
        with ExitStack() as stack:
            theirs = rate.settings(files.peer, threads, cache)
            sides = {
                "peer": Worker(python, "peer", replace(theirs, flash=-1 if cache == "int8" else flash)),
                "ours": Worker(sys.executable, "ours", rate.settings(files.ours, threads, cache, files.quantize)),
            }
            for side in sides.values():
                stack.enter_context(side)
            seconds = take_turns(sides, rate, runs)
        speed = {name: [rate.tokens / run[name] for run in seconds] for name in sides}
        yield row(f"{what}{' int8' if cache == 'int8' else ''}", what, "tok/s", speed)


def measure_load(files: Weights, threads: int, python: str, runs: int) -> Iterator[dict[str, Any]]:
    """Rows for the time to the first token and for the peak, and one for each part of our start."""
    rate = RATES["decode"]
    commands = {
        "peer": (python, "peer", rate.settings(files.peer, threads, "float16")),
        "ours": (sys.executable, "ours", rate.settings(files.ours, threads, "float16", files.quantize)),
    }
    found: dict[str, list[Worker]] = {name: [] for name in commands}
    for run in range(runs + 1):
        for name, command in commands.items():
            with Worker(*command) as worker:
                if run:  # the first one warms the page cache up
                    found[name].append(worker)
    yield row("load", "load", "s", {name: [w.started["total"] for w in side] for name, side in found.items()})
    yield row("peak memory", "load", "MB", {name: [w.peak_bytes / 1e6 for w in side] for name, side in found.items()})
    for part in ("interpreter", "imports", "load", "first token"):
        times = {name: [w.started[part] for w in side] for name, side in found.items()}
        yield row(f"  {part}", "", "s", times)


def row(title: str, what: str, unit: str, values: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of both sides and of the ratios run by run; `what` names the goal that applies."""
    ratios = sorted(ours / peer for ours, peer in zip(values["ours"], values["peer"], strict=True))
    return {
        "title": title,
        "what": what,
        "unit": unit,
        **{name: statistics.median(side) for name, side in values.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def show(fmt: str, threads: int, found: dict[str, Any]) -> None:
    """Print one row."""
    wanted = goal(found["what"], fmt)
    unit, lowest, highest = found["unit"], found["ratios"][0], found["ratios"][-1]
    aim = "" if wanted is None else f"  goal {'<=' if unit != 'tok/s' else '>='} {wanted:g}"
    digits = 3 if unit == "s" else 1
    print(
        f"{fmt:10} {threads:7} {found['title']:15} {found['peer']:10.{digits}f} {found['ours']:10.{digits}f} {unit:5} "
        f"{found['ratio']:6.2f}  {f'({lowest:.2f}-{highest:.2f})':13}{aim}",
        flush=True,
    )


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="q4_0,q4_k_m,q8_0,int4")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--what", default=",".join(WHAT))
    parser.add_argument("--caches", nargs="*", default=[], help="where a row has both, only these: float16, int8")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--peer-flash", choices=FLASH, default="auto", help="llama.cpp's flash attention (16-bit cache)"
    )
    parser.add_argument("--isa", choices=PEER_ISA, help="no more of the machine's instruction sets, on both sides")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if unknown := set(args.what.split(",")) - set(WHAT):
        parser.error(f"--what {', '.join(sorted(unknown))}: choose from {', '.join(WHAT)}")
    python = peer_python(args.isa)
    if args.isa:
        os.environ["QWEN_RT_CPU_ISA"] = args.isa  # of our workers
    files = [weights(fmt, python) for fmt in args.formats.split(",")]
    cpu = processor() + (f" restricted to {args.isa}" if args.isa else "")
    about = {"date": str(date.today()), "cpu": cpu, "peer": f"llama-cpp-python {peer_version(python)}"}
    print(f"{'  '.join(about.values())}  decode prompts of {SHORT} tokens")
    print(f"{'format':10} {'threads':>7} {'':15} {'llama.cpp':>10} {'qwen_rt':>10} {'':5} {'ratio':>6}  (min-max)")
    figures = []
    for one in files:
        for threads in map(int, args.threads.split(",")):
            for what in args.what.split(","):
                rows = (
                    measure_load(one, threads, python, args.runs)
                    if what == "load"
                    else measure_rate(what, one, threads, python, args.runs, FLASH[args.peer_flash], args.caches)
                )
                for found in rows:
                    show(one.name, threads, found)
                    figures.append({"format": one.name, "peer_format": one.peer_name, "threads": threads, **found})
    for one in files:
        if one.name != one.peer_name:
            print(f"{one.name}: the peer's file is {one.peer_name}; perplexities: bench/perplexity.py")
    if args.json:
        args.json.write_text(json.dumps({**about, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
