"""`qwen-rt devices`: what was probed, what was chosen, and the reason for each no."""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import asdict
from typing import Any

from qwen_rt.backends import select
from qwen_rt.backends.base import Backend, Rung
from qwen_rt.errors import QwenRTError

RUNGS: dict[Rung, str] = {
    "compiled": "compiled, never run",
    "emulated": "emulated on the host",
    "simulated": "run through the vendor's package over simulated hardware",
    "device": "run on the real device",
}


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("devices", help="what was probed, what was chosen, and the reason for each no")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the devices; status 1 when none is usable."""
    probes = select.probe_all()
    backends = {name: _open(name) for name, found in probes.items() if found.usable}
    try:
        chosen, notes = select.open_backend("auto")
        auto, why = f"{chosen.name}:{chosen.index}", notes
    except QwenRTError as e:
        auto, why = None, [str(e)]
    if args.json:
        told = {name: {**asdict(found), "usable": found.usable} for name, found in probes.items()}
        for name, backend in backends.items():
            told[name]["kernels"] = backend.kernels() if isinstance(backend, Backend) else {}
        print(json.dumps({"auto": auto, "notes": why, "devices": told}, indent=2, ensure_ascii=False))
        return 0 if auto else 1

    for name, found in probes.items():
        if not found.usable:
            _say(name, f"no   {found.reason}")
            continue
        for device in found.devices:
            about = f": {device.detail}" if device.detail else ""
            _say(f"{name}:{device.index}", f"yes  {device.name}, {device.total_memory / 2**30:.1f} GiB{about}")
        _say("", f"evidence: {RUNGS[found.rung]}")
        backend = backends[name]
        if isinstance(backend, Backend):
            caps = backend.caps
            weights = [*caps.dense_dtypes, *(f"int{b}" for b in caps.weight_bits)]
            _say("", f"memory free: {backend.memory()[0] / 2**30:.1f} GiB")
            _say("", f"weights: {', '.join(weights)}; cache: {', '.join(caps.kv_dtypes)}")
            ops: dict[str, list[str]] = {}
            for op, kernel in backend.kernels().items():
                ops.setdefault(kernel, []).append(op)
            _say("", "kernels: " + "; ".join(f"{kernel}: {', '.join(served)}" for kernel, served in ops.items()))
        else:
            _say("", f"does not open: {backend}")
        for note in found.notes:
            _say("", f"note: {note}")
    if auto is None:
        _say("auto", f"no   {why[0]}")
        return 1
    named = [n for n in why if "QWEN_BACKEND" in n]
    _say("auto", f"-> {auto}" + (f"; {named[0]}" if named else ""))
    return 0


def _open(name: str) -> Backend | QwenRTError:
    try:
        return select.open_backend(name)[0]
    except QwenRTError as e:
        return e


def _say(head: str, text: str) -> None:
    """One entry, wrapped and indented under its name."""
    lead = " " * 13 + (" " * 5 if not head else "")
    print(textwrap.fill(text, 110, initial_indent=lead if not head else f"{head:<13}", subsequent_indent=" " * 18))
