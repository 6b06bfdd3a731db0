"""qwen-rt plan NAME: bytes of weights and KV cache, and what fits where, before anything is loaded."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen_rt.config import ModelConfig
from qwen_rt.errors import HubError


def add_parser(subparsers: Any) -> None:
    """Add the `plan` command."""
    p = subparsers.add_parser("plan", help="memory a model needs and where it fits; no weights are needed")
    p.add_argument("name", help="published name, local directory or .gguf file")
    p.add_argument("--quantize", choices=["int8", "int4"], help="as if quantised while loading")
    p.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="as if converted while loading")
    p.add_argument("--kv-cache", choices=["float32", "float16", "bfloat16", "int8"], default="float16")
    p.add_argument("--max-model-len", type=int, metavar="TOKENS", help="longest sequence (default: the model's own)")
    p.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once (default: 1)")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan of `args.name`; 0. Raises a QwenRTError when the model or an option cannot be used."""
    from qwen_rt.plan import CARDS, plan_memory

    config, checkpoint, source = find(args.name)
    plan = plan_memory(
        config,
        quantize=args.quantize,
        dtype=args.dtype,
        kv_dtype=args.kv_cache,
        max_model_len=args.max_model_len,
        batch=args.batch,
        checkpoint=checkpoint,
    )
    if checkpoint is not None:
        checkpoint.close()
    here, failures = devices()
    lengths = sorted({n for n in (2048, 8192, plan.max_model_len) if n <= plan.max_model_len})
    places = [*((name, memory, "this machine") for name, memory in here), *((c, m, "") for c, m in CARDS.items())]
    if args.json:
        fits = [{"device": d, "memory": m, "here": bool(w), "tokens": plan.longest(m)} for d, m, w in places]
        kv = {str(n): plan.kv_bytes(n) for n in lengths}
        print(json.dumps({"name": args.name, "source": source, **asdict(plan), "kv": kv, "weights": plan.weights}
                         | {"total": plan.total, "fits": fits, "unusable": failures}))  # fmt: skip
        return 0
    print("\n".join(lines(args.name, config, source, plan, lengths, places, failures)))
    return 0


def lines(
    name: str,
    config: ModelConfig,
    source: str,
    plan: Any,
    lengths: list[int],
    places: list[tuple[str, int, str]],
    failures: dict[str, str],
) -> list[str]:
    """The plan as text for people."""
    from qwen_rt.engine.capacity import size
    from qwen_rt.plan import USABLE

    heads = f"{config.num_heads} heads" + (
        f" over {config.num_kv_heads}" if config.num_kv_heads != config.num_heads else ""
    )
    each = f" x {plan.batch} sequences" if plan.batch > 1 else ""
    out = [
        f"{name} ({source})",
        f"  {config.arch}: {config.num_layers} layers, hidden size {config.hidden_size}, {heads} of "
        f"{config.head_size}, vocabulary {config.vocab_size}, up to {config.max_position} tokens",
        "",
        f"{'weights':<30}{size(plan.weights):>10}",
        *(f"  {p.name:<28}{size(p.nbytes):>10}  {', '.join(p.formats)}" for p in plan.parts),
        f"{'KV cache, a token':<30}{size(plan.kv_token_bytes):>10}  {plan.kv_dtype}",
        *(f"  {f'{n} tokens{each}':<28}{size(plan.kv_bytes(n)):>10}" for n in lengths),
        f"{'scratch':<30}{size(plan.scratch):>10}",
        f"{'total':<30}{size(plan.total):>10}  with {plan.max_model_len} tokens{each}",
        "",
        f"Where it fits ({USABLE:.0%} of a device's memory is counted on):",
    ]
    for device, memory, where in places:
        tokens = plan.longest(memory)
        if tokens == plan.max_model_len:
            verdict = "fits"
        elif tokens:
            verdict = f"fits, up to {tokens} tokens{each}"
        else:
            short = plan.weights + plan.scratch - int(memory * USABLE)
            verdict = f"does not fit (short of {size(max(short, plan.kv_token_bytes))})"
        out.append(f"  {device:<28}{size(memory):>10}  {verdict}{f' [{where}]' if where else ''}")
    out += [f"  {backend:<28}{'-':>10}  not usable here: {reason}" for backend, reason in failures.items()]
    return out


def find(name: str) -> tuple[ModelConfig, Any, str]:
    """(configuration, checkpoint or None, where it is from): files at hand, else the catalogue, else a config.json."""
    from qwen_rt.checkpoint import open_checkpoint
    from qwen_rt.hub import known_config, resolve
    from qwen_rt.hub.local import read_json

    try:
        files = resolve(name, hub="offline")
        checkpoint = open_checkpoint(files.path)
        return checkpoint.config, checkpoint, f"from the headers of {files.path}"
    except HubError:
        if not Path(name).exists() and (config := known_config(name)):
            return config, None, "published shape; no files here"
    files = resolve(name, weights=False)
    return ModelConfig.from_hf(read_json(files.path / "config.json")), None, f"from {files.path}/config.json"


def devices() -> tuple[list[tuple[str, int]], dict[str, str]]:
    """([(device, bytes)], {backend: why not}) of this machine."""
    from qwen_rt.backends.select import probe_all

    found: list[tuple[str, int]] = []
    failures: dict[str, str] = {}
    for name, probe in probe_all().items():
        if probe.usable and name not in ("reference", "null"):
            found += [(f"{name}:{d.index}" if len(probe.devices) > 1 else name, d.total_memory) for d in probe.devices]
        elif not probe.usable:
            failures[name] = probe.reason
    return found, failures
