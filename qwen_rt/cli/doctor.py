"""`qwen-rt doctor NAME`: every operation of a backend, computed and compared with float64."""

from __future__ import annotations

import argparse
import time
from typing import Any

from qwen_rt.backends import select
from qwen_rt.dtypes import FLOATS
from qwen_rt.errors import BackendError

try:
    import torch
except ModuleNotFoundError as e:
    raise BackendError(select.torch_missing("doctor")) from e

from qwen_rt.backends import contract


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("doctor", help="check every operation of a backend against float64")
    parser.add_argument("device", nargs="?", default="auto", help="NAME or NAME:INDEX (default: what auto means)")
    parser.add_argument("--dtype", choices=FLOATS, help="compute dtype (default: its own)")
    parser.add_argument("--op", action="append", choices=tuple(contract.OPS), help="only this operation (repeatable)")
    parser.add_argument("--verbose", action="store_true", help="print every case")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the largest error of each operation beside its bound; status 1 when one is beyond it."""
    backend, notes = select.open_backend(args.device, dtype=args.dtype)
    print(f"{backend.name}:{backend.index}, computing in {backend.compute_dtype}")
    for note in notes:
        print(f"note: {note}")
    torch.set_num_threads(1)  # the oracle's OpenMP threads would fight with a native backend's own for the cores
    kernels, failed, start = backend.kernels(), 0, time.perf_counter()
    print(f"\n{'operation':<12}{'cases':>6}{'error':>11}{'bound':>11}{'of bound':>10}  verdict  kernel")
    for op in args.op or contract.OPS:
        results = list(contract.run(backend, [op]))
        wrong = [r for r in results if not r.ok]
        declined = [r for r in results if r.declined]
        worst = max(results, key=lambda r: r.error / r.bound if r.bound else r.error)
        share = f"{worst.error / worst.bound:.0%}" if worst.bound else "exact"
        right = not wrong and len(declined) < len(results)
        verdict = "ok" if right else "WRONG" if wrong else "DECLINED"
        row = f"{op:<12}{len(results):>6}{worst.error:>11.2e}{worst.bound:>11.2e}{share:>10}"
        print(f"{row}  {verdict:<8} {kernels.get(op, '')}", flush=True)
        for r in results if args.verbose else wrong[:10]:
            print(f"    {r.case}: {f'declined: {r.declined}' if r.declined else f'{r.error:.2e} of {r.bound:.2e}'}")
        if not args.verbose:
            for reason in sorted({r.declined for r in declined}):
                print(f"    declined {sum(r.declined == reason for r in declined)}: {reason}")
        failed += not right
    print(
        f"\n{'all right' if not failed else f'{failed} operations are not right'}, {time.perf_counter() - start:.1f} s"
    )
    return 1 if failed else 0
