"""What a GPU does beside what it could: kernels, whole models, transformers on the same card, and loading.

    python bench/gpu.py                                 everything, on the first CUDA card
    python bench/gpu.py --backend dcu:0                 a DCU
    python bench/gpu.py --only card,linear             parts: card linear attention models batch transformers load
    python bench/gpu.py --models 7B,72B --formats int4  fewer models
    python bench/gpu.py --backend cuda-emulated --tiny  that the script runs, at sizes where no figure means anything

Weights are random at the published shapes. Each part runs in a process of its own, so that memory figures are its own
and a failure is one line of the table. Kernels are timed inside a CUDA/HIP graph over as many copies of their weights
as keep the L2 cache cold; medians. Writes bench/results/<date>-<card>.json and prints the figures beside the goals,
which are for an H200. The A100 figures are those of the original project's README.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

RESULTS = Path(__file__).parent / "results"
PARTS = ("card", "linear", "attention", "models", "batch", "transformers", "load")
SIZES = ("1.8B", "7B", "14B", "72B")
FORMATS = ("int4", "int8", "bf16")
PREFILL, SHORT, DECODE = 2048, 128, 256  # tokens: of the long prompt, of the short one, decoded
BATCH = 64

# The README of the original: tokens per second generating 2048 tokens, GB of memory (72B bf16 and Int8: two cards).
A100 = {
    "1.8B": {"bf16": (54.09, 4.23), "int8": (55.56, 3.48), "int4": (71.07, 2.91)},
    "7B": {"bf16": (40.93, 16.99), "int8": (37.47, 11.20), "int4": (50.09, 8.21)},
    "14B": {"bf16": (32.22, 30.15), "int8": (29.28, 18.81), "int4": (38.72, 13.01)},
    "72B": {"bf16": (8.48, 144.69), "int8": (9.05, 81.27), "int4": (11.32, 48.86)},
}

GOALS = {  # figure -> (direction, value): on an H200
    "linear 7B int4 1 row, share of copy": (">=", 0.85),
    "linear 72B int4 1 row, share of copy": (">=", 0.85),
    "linear 7B int4 2048 rows, share of bf16 matmul": (">=", 0.65),
    "linear 72B int4 2048 rows, share of bf16 matmul": (">=", 0.65),
    **{
        f"attention {heads} {cache} 32 x 4096, share of copy": (">=", 0.80)
        for heads in ("GQA", "MHA")
        for cache in ("16-bit", "int8")
    },
    "72B int4 decode, tok/s": (">=", 80.0),
    "7B int4 decode, tok/s": (">=", 450.0),
    "1.8B int4 decode, tok/s": (">=", 900.0),
    "72B int4 memory at 2048 tokens, GB": ("<=", 44.0),
    "72B int4 batch 64, tok/s": (">=", 2500.0),
    "load 72B int4, GB/s": (">=", 5.0),
}

Figures = dict[str, Any]


# -- a device and its clock ------------------------------------------------------------------------------------------
class Clock:
    """Times calls on a backend's device: by events around a replayed graph on a card, by the wall on the emulator."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        """`seconds`: measuring time of one figure."""
        self.device, self.budget = device, seconds
        self.real = device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.real:
            torch.cuda.synchronize(self.device)

    def per_call(self, calls: Sequence[Callable[[], object]]) -> float:
        """Median seconds of one call, the calls taken in turn."""
        if not self.real:
            return statistics.median(self._wall(call) for call in [*calls, *calls])
        rounds = max(1, math.ceil(24 / len(calls)))  # enough work in a replay to hide its launch

        def once() -> None:
            for _ in range(rounds):
                for call in calls:
                    call()

        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for call in calls:  # builds kernels, fills the allocator
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
        times = self._events(graph.replay)
        return statistics.median(times) / (rounds * len(calls))

    def _events(self, run: Callable[[], object]) -> list[float]:
        """Seconds of each run, at least 5, for the measuring time."""
        for _ in range(3):
            run()
        self.wait()
        times: list[float] = []
        stop = time.perf_counter() + self.budget
        while len(times) < 5 or time.perf_counter() < stop:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            run()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last) / 1e3)
        return times

    def _wall(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start


def cache_bytes(device: torch.device) -> int:
    """Bytes of the card's last-level cache (the emulator: none)."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))


def copies(packed: Any, nbytes: int, device: torch.device) -> list[Any]:
    """`packed` and clones of it, together four times the last-level cache and at least two."""
    count = max(2, math.ceil(4 * cache_bytes(device) / nbytes)) if device.type == "cuda" else 1
    return [packed, *(copy.deepcopy(packed) for _ in range(count - 1))]


# -- parts: the card and its kernels ---------------------------------------------------------------------------------
def part_card(args: argparse.Namespace) -> Figures:
    """Copy bandwidth (bytes read plus written) and the rate of 16-bit matmuls on random data."""
    backend = open_backend(args)
    clock = Clock(backend.device, args.seconds)
    size = (1 << 20) if args.tiny else (2 << 30)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=backend.device)
    target = torch.empty_like(source)
    copy_rate = 2 * size / clock.per_call([lambda: target.copy_(source)])
    n = 64 if args.tiny else 8192
    dtype = "bfloat16" if "bfloat16" in backend.caps.compute_dtypes else "float16"
    a, b = (backend.cast(torch.randn(n, n, device=backend.device), dtype) for _ in range(2))
    out = torch.empty_like(a)
    matmul_rate = 2 * n**3 / clock.per_call([lambda: torch.mm(a, b, out=out)])
    return {
        "copy, bytes/s": copy_rate,
        "bf16 matmul, FLOP/s": matmul_rate,
        "matmul dtype": dtype,
        "card": describe(backend),
        "kernels": backend.kernels(),
    }


def describe(backend: Any) -> dict[str, str]:
    """Name, memory, driver and software of the device."""
    found = type(backend).probe()
    info = next(d for d in found.devices if d.index == backend.index)
    told = {"name": info.name, "memory": f"{info.total_memory / 2**30:.1f} GiB", "detail": info.detail}
    told |= {"torch": torch.__version__, "rung": found.rung}
    query = "nvidia-smi --query-gpu=driver_version,power.limit,clocks.max.sm,clocks.max.mem --format=csv,noheader"
    if backend.device.type == "cuda":
        try:
            run = subprocess.run(shlex.split(query), capture_output=True, text=True, timeout=30)
            told["driver, power, clocks"] = run.stdout.strip().splitlines()[0] if run.stdout.strip() else "unknown"
        except (OSError, subprocess.TimeoutExpired):
            told["driver, power, clocks"] = "unknown (no nvidia-smi)"
    return told


def part_linear(args: argparse.Namespace) -> Figures:
    """Grouped-integer matmuls of one layer at 1 and at 2048 rows: bytes and operations over their seconds."""
    from qwen_rt.checkpoint.random import RandomCheckpoint
    from qwen_rt.config import QuantConfig
    from qwen_rt.quant.formats import concat_rows

    backend = open_backend(args)
    clock = Clock(backend.device, args.seconds)
    out: Figures = {}
    rows_list = (1, 16) if args.tiny else (1, 2048)
    for size in ("7B",) if args.tiny else ("7B", "72B"):
        for bits in (4, 8):
            checkpoint = RandomCheckpoint(config_of(size, args), QuantConfig("gptq", bits, 128, True, False))
            parts = {"qkv": ["q_proj", "k_proj", "v_proj"], "o": ["o_proj"]}
            names = {k: [f"model.layers.0.self_attn.{x}" for x in v] for k, v in parts.items()}
            names |= {"gate_up": [f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up")]}
            names |= {"down": ["model.layers.0.mlp.down_proj"]}
            total: dict[int, list[float]] = {rows: [0.0, 0.0, 0.0] for rows in rows_list}  # bytes, operations, seconds
            each: Figures = {}
            for name, members in names.items():
                raw = concat_rows([checkpoint.linear(m) for m in members], name)
                assert raw is not None
                packed = backend.pack_linear(raw)
                weights = copies(packed, packed.nbytes, backend.device)
                n, k = raw.shape
                for rows in rows_list:
                    x = torch.randn(rows, k, device=backend.device).to(backend.dtype)
                    used = weights if rows < 64 else weights[:1]
                    seconds = clock.per_call([lambda w=w, x=x: backend.linear(x, w) for w in used])
                    moved = packed.nbytes + 2 * rows * (n + k)
                    figure = {"N": n, "K": k, "rows": rows, "us": seconds * 1e6}
                    figure |= {"bytes/s": moved / seconds, "FLOP/s": 2 * rows * n * k / seconds}
                    each[f"{name} {rows}"] = figure
                    for i, v in enumerate((moved, 2 * rows * n * k, seconds)):
                        total[rows][i] += v
                del weights, packed
            for rows, (moved, operations, seconds) in total.items():
                out[f"{size} int{bits} {rows}"] = {
                    "bytes/s": moved / seconds,
                    "FLOP/s": operations / seconds,
                    "us": seconds * 1e6,
                    "matrices": {k: v for k, v in each.items() if v["rows"] == rows},
                }
    return out


def part_attention(args: argparse.Namespace) -> Figures:
    """Decode attention over full caches: 32 sequences of 4096 tokens; bytes of keys and values over seconds."""
    from qwen_rt.backends.base import BatchMeta, KVSpec

    backend = open_backend(args)
    clock = Clock(backend.device, args.seconds)
    sequences, tokens, size = (2, 48, 64) if args.tiny else (32, 4096, 128)
    shapes = {"GQA": (64, 8), "MHA": (32, 32)} if not args.tiny else {"GQA": (4, 2), "MHA": (2, 2)}
    block, out = backend.caps.kv_block, {}
    blocks = math.ceil(tokens / block)
    order = list(range(sequences * blocks))
    random.Random(0).shuffle(order)
    tables = [order[s * blocks : (s + 1) * blocks] for s in range(sequences)]
    for heads, (num_heads, kv_heads) in shapes.items():
        for cache in (backend.caps.kv_dtypes[0], "int8"):
            spec = KVSpec(1, kv_heads, size, block, cache)
            kv = backend.alloc_kv(spec, len(order))
            for table in tables:
                slots = [table[p // block] * block + p % block for p in range(tokens)]
                plan = backend.plan(BatchMeta([tokens], [tokens], [table], slots))
                k, v = (torch.randn(tokens, kv_heads, size, device=backend.device) for _ in "kv")
                backend.store_kv(kv, 0, k.to(backend.dtype), v.to(backend.dtype), plan)
            last = [t[(tokens - 1) // block] * block + (tokens - 1) % block for t in tables]
            plan = backend.plan(BatchMeta([1] * sequences, [tokens] * sequences, tables, last))
            q = torch.randn(sequences, num_heads, size, device=backend.device).to(backend.dtype)
            seconds = clock.per_call([lambda kv=kv, plan=plan, q=q: backend.attention(q, kv, 0, plan, size**-0.5)])
            moved = sequences * tokens * spec.block_bytes() // block + 2 * q.numel() * q.element_size()
            kind = "int8" if cache == "int8" else "16-bit"
            out[f"{heads} {kind}"] = {"bytes/s": moved / seconds, "us": seconds * 1e6, "cache": cache, "bytes": moved}
            del kv
    return out


# -- parts: whole models -----------------------------------------------------------------------------------------------
def prompt(tokens: int, seed: int, vocab: int) -> list[int]:
    """Random ordinary ids: another prompt for each seed, so that no cached prefix helps."""
    draw = random.Random(seed)
    return [draw.randrange(min(vocab, 100_000)) for _ in range(tokens)]


def load_random(args: argparse.Namespace, max_model_len: int, max_batch: int) -> tuple[Any, float]:
    """(model, seconds) of qwen_rt.load with random weights in the size and format asked for."""
    import qwen_rt

    if args.tiny:  # the same path through load(), with a shape the emulator can bear
        from qwen_rt import llm
        from qwen_rt.errors import HubError

        def no_files(*_: object, **__: object) -> Any:
            raise HubError("a made-up shape")

        llm.resolve = no_files
        llm.known_config = lambda name: config_of(args.size, args, quantised="Int" in name)  # type: ignore[assignment]
    suffix = {"int4": "-Int4", "int8": "-Int8", "bf16": ""}[args.format]
    name = f"Qwen-{args.size.replace('.', '_')}-Chat{suffix}"
    start = time.perf_counter()
    dtype = args.dtype or ("bfloat16" if args.format == "bf16" else None)
    model = qwen_rt.load(
        name,
        args.backend,
        weights="random",
        dtype=dtype,
        kv_cache=args.kv_cache,
        max_model_len=max_model_len,
        max_batch=max_batch,
    )
    return model, time.perf_counter() - start


def part_models(args: argparse.Namespace) -> Figures:
    """One model: prefill and decode rates of one sequence, and memory with 2048 tokens."""
    long, short, new, runs = (24, 8, 6, 1) if args.tiny else (PREFILL, SHORT, DECODE, 3)
    model, load_seconds = load_random(args, long + new + 1, 1)
    vocab, (kind, _, index) = model.config.vocab_size, model.device.partition(":")
    real = kind in ("cuda", "dcu")
    options: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}

    def run(tokens: int, count: int, seed: int) -> Any:
        done = model.generate(prompt(tokens, seed, vocab), max_new_tokens=count, **options)
        assert len(done.ids) == count and done.cached_tokens == 0
        return done

    run(short, new + 1, 0), run(long, 2, 1)  # kernels, graphs
    if real:
        torch.cuda.reset_peak_memory_stats()
    at_short = [run(short, new + 1, 10 + i).decode_rate for i in range(runs)]
    at_long = [run(long, new + 1, 20 + i) for i in range(runs)]
    report = model.report().to_dict()
    # A token reads every weight once, but of the embedding table one row (a tied table is the head as well).
    table_bytes = 0 if model.config.tied_head else 2 * vocab * model.config.hidden_size
    out: Figures = {
        "bytes a token": sum(g["nbytes"] for g in report["weights"]) - table_bytes,
        "prefill, tok/s": statistics.median(d.prefill_rate for d in at_long),
        "decode, tok/s": statistics.median(at_short),
        "decode at 2048, tok/s": statistics.median(d.decode_rate for d in at_long),
        "load random, s": load_seconds,
        "report": report,
    }
    if real:  # the first figure is how the original measured; the second counts what the driver and torch hold back
        free, total = torch.cuda.mem_get_info(int(index))
        out |= {"memory, GB": torch.cuda.max_memory_allocated() / 1e9, "device memory in use, GB": (total - free) / 1e9}
    model.close()
    return out


def part_batch(args: argparse.Namespace) -> Figures:
    """One model at batch 64: decode tokens per second of all sequences, from the difference of two lengths."""
    rows, short, few, many = (3, 8, 2, 5) if args.tiny else (BATCH, SHORT, 16, 144)
    model, _ = load_random(args, short + many + 1, rows)
    vocab = model.config.vocab_size

    def seconds(count: int, seed: int) -> float:
        prompts = [prompt(short, seed * 1000 + i, vocab) for i in range(rows)]
        start = time.perf_counter()
        done = model.generate(prompts, max_new_tokens=count, temperature=0.0, repetition_penalty=1.0, ignore_eos=True)
        assert all(len(d.ids) == count for d in done)
        return time.perf_counter() - start

    seconds(many, 0)
    rates = []
    for i in range(1 if args.tiny else 3):
        difference = seconds(many, 2 * i + 1) - seconds(few, 2 * i + 2)
        rates.append(rows * (many - few) / difference)
    model.close()
    return {"batch": rows, "decode, tok/s": statistics.median(rates), "runs": rates}


def part_transformers(args: argparse.Namespace) -> Figures:
    """transformers in bfloat16 with torch's SDPA at the same shapes (as a Qwen2, whose graph is the same)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from qwen_rt.convert import hf_config

    device = open_backend(args).device
    config = replace(config_of(args.size, args), arch="qwen2", qkv_bias=True, quant=None, dynamic_ntk=False, logn=False)
    long, new, runs = (24, 4, 1) if args.tiny else (PREFILL, 64, 3)
    peer = AutoConfig.for_model(**{"model_type": "qwen2", **hf_config(config)})
    with device:
        net = AutoModelForCausalLM.from_config(peer, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    clock = Clock(device, 0)

    @torch.inference_mode()
    def run(seed: int) -> tuple[float, float]:
        ids = torch.tensor([prompt(long, seed, config.vocab_size)], device=device)
        clock.wait()
        start = time.perf_counter()
        done = net(ids, use_cache=True, logits_to_keep=1)
        token = done.logits[:, -1:].argmax(-1)
        clock.wait()
        middle = time.perf_counter()
        for _ in range(new):
            done = net(token, past_key_values=done.past_key_values, use_cache=True, logits_to_keep=1)
            token = done.logits[:, -1:].argmax(-1)
        clock.wait()
        return long / (middle - start), new / (time.perf_counter() - middle)

    run(0)
    rates = [run(i + 1) for i in range(runs)]
    import transformers

    return {
        "prefill, tok/s": statistics.median(r[0] for r in rates),
        "decode at 2048, tok/s": statistics.median(r[1] for r in rates),
        "transformers": transformers.__version__,
        "memory, GB": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
    }


# -- parts: loading --------------------------------------------------------------------------------------------------
def part_load(args: argparse.Namespace) -> Figures:
    """An AutoGPTQ directory of the size asked for: written once, read once to warm the page cache, then timed."""
    from qwen_rt.checkpoint import open_checkpoint
    from qwen_rt.checkpoint.save import save_json, save_weights
    from qwen_rt.config import QuantConfig
    from qwen_rt.convert import hf_config
    from qwen_rt.model import build

    backend = open_backend(args)
    config = replace(config_of(args.size, args), arch="qwen2", qkv_bias=True, dynamic_ntk=False, logn=False)
    config = replace(config, quant=QuantConfig("gptq", 4, 128, True, False), dtype="float16", windows=())
    with tempfile.TemporaryDirectory(prefix="qwen-rt-bench-", dir=args.scratch) as folder:
        path = Path(folder)
        save_json(path / "config.json", hf_config(config))
        start = time.perf_counter()
        save_weights(path, list(random_gptq(config)))
        wrote = time.perf_counter() - start
        rates = []
        for _ in range(2):  # the first fills the page cache where writing did not
            checkpoint = open_checkpoint(path)
            nbytes = sum(f.stat().st_size for f in path.glob("*.safetensors"))
            start = time.perf_counter()
            model = build(checkpoint, backend)
            Clock(backend.device, 0).wait()
            rates.append(nbytes / (time.perf_counter() - start) / 1e9)
            checkpoint.close()
            del model
    return {"bytes": nbytes, "GB/s": rates[-1], "first, GB/s": rates[0], "written, GB/s": nbytes / wrote / 1e9}


def random_gptq(config: Any) -> Iterator[Any]:
    """The tensors of an AutoGPTQ checkpoint of `config` with random codes, as save_weights takes them."""
    from qwen_rt.checkpoint.names import in_layer, model_names
    from qwen_rt.checkpoint.save import Item

    quant = config.quant
    words = np.random.default_rng().integers(-(1 << 31), (1 << 31) - 1, 1 << 22, dtype=np.int32)
    linears, tensors = model_names(config)

    def drawn(count: int) -> Iterator[NDArray[Any]]:
        for start in range(0, count, len(words)):
            yield words[: min(len(words), count - start)]

    def grouped(name: str, n: int, k: int) -> Item:
        groups, packed = -(-k // quant.group_size), quant.bits
        specs = (
            (f"{name}.qweight", "int32", (k * packed // 32, n)),
            (f"{name}.qzeros", "int32", (groups, n * packed // 32)),
            (f"{name}.scales", "float16", (groups, n)),
            (f"{name}.g_idx", "int32", (k,)),
            (f"{name}.bias", "float16", (n,)),
        )

        def chunks() -> Iterator[NDArray[Any]]:
            yield from drawn(n * k * packed // 32)
            yield np.full(groups * n * packed // 32, 0x77777777, np.int32)
            yield np.full(groups * n, 0.1 / math.sqrt(k), np.float16)
            yield np.arange(k, dtype=np.int32) // quant.group_size
            yield np.zeros(n, np.float16)

        return Item(specs, chunks)

    def dense(name: str, shape: tuple[int, ...]) -> Item:
        count = math.prod(shape)
        value = 1.0 if len(shape) == 1 else 0.02

        def chunks() -> Iterator[NDArray[Any]]:
            for start in range(0, count, 1 << 22):
                yield np.full(min(1 << 22, count - start), value, np.float16)

        return Item(((name, "float16", shape),), chunks)

    for name, shape in linears.items():
        yield grouped(name, *shape) if in_layer(name) else dense(f"{name}.weight", shape)
    for name, size in tensors.items():
        yield dense(name, size)


# -- running the parts -----------------------------------------------------------------------------------------------
def open_backend(args: argparse.Namespace) -> Any:
    """The backend named on the command line, computing in --dtype."""
    from qwen_rt.backends.select import open_backend as select

    return select(args.backend, dtype=args.dtype)[0]


def config_of(size: str, args: argparse.Namespace, quantised: bool = False) -> Any:
    """The shape of a Qwen-1 by size; with --tiny, a small one."""
    from qwen_rt.config import QuantConfig
    from qwen_rt.hub import known_config

    if not args.tiny:
        config = known_config(f"Qwen-{size.replace('.', '_')}-Chat")
        assert config is not None
        return config
    from qwen_rt.config import ModelConfig

    fields = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 256}
    fields |= {"num_key_value_heads": 2, "vocab_size": 384, "max_position_embeddings": 256}
    config = ModelConfig.from_hf({"model_type": "qwen2", "torch_dtype": "float16", **fields})
    bits = {"int4": 4, "int8": 8}.get(args.format or "")
    return replace(config, quant=QuantConfig("gptq", bits, 128, True, False)) if quantised and bits else config


def in_process(args: argparse.Namespace, part: str, size: str = "", fmt: str = "") -> Figures:
    """Run one part in a process of its own; its figures, or {"failed": why}."""
    command = [sys.executable, __file__, "--part", part, "--backend", args.backend, "--seconds", str(args.seconds)]
    command += ["--tiny"] if args.tiny else []
    command += ["--size", size] if size else []
    command += ["--format", fmt] if fmt else []
    command += ["--dtype", args.dtype] if args.dtype else []
    command += ["--kv-cache", args.kv_cache]
    command += ["--scratch", str(args.scratch)] if args.scratch else []
    print(f"... {part} {size} {fmt}".rstrip(), file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    line = next((x for x in reversed(done.stdout.splitlines()) if x.startswith("{")), "")
    if done.returncode or not line:
        lines = [x for x in done.stderr.splitlines() if x.strip()] or [f"status {done.returncode}, no message"]
        return {"failed": lines[-1][:500]}
    return dict(json.loads(line))


def measure(args: argparse.Namespace) -> Figures:
    """Every part asked for."""
    sizes, formats = args.models.split(","), args.formats.split(",")
    out: Figures = {}
    for part in ("card", "linear", "attention"):
        if part in args.only:
            out[part] = in_process(args, part)
    for size in sizes:
        for fmt in formats:
            if "models" in args.only:
                out[f"model {size} {fmt}"] = in_process(args, "models", size, fmt)
            if "batch" in args.only and fmt == "int4":
                out[f"batch {size} {fmt}"] = in_process(args, "batch", size, fmt)
        if "transformers" in args.only:
            out[f"transformers {size}"] = in_process(args, "transformers", size)
    if "load" in args.only:
        out[f"load {sizes[-1]}"] = in_process(args, "load", sizes[-1], "int4")
    return out


# -- the table -------------------------------------------------------------------------------------------------------
def figures(measured: Figures) -> dict[str, float]:
    """Flat: name -> value, the names of GOALS among them."""
    out: dict[str, float] = {}
    card = measured.get("card", {})
    copy_rate, matmul_rate = card.get("copy, bytes/s"), card.get("bf16 matmul, FLOP/s")
    if copy_rate:
        out |= {"copy, TB/s": copy_rate / 1e12, "bf16 matmul, TFLOP/s": matmul_rate / 1e12}
    for name, f in measured.get("linear", {}).items():
        if copy_rate and isinstance(f, dict):
            size, fmt, rows = name.split()
            if int(rows) < 64:
                out[f"linear {size} {fmt} {rows} row, share of copy"] = f["bytes/s"] / copy_rate
            else:
                out[f"linear {size} {fmt} {rows} rows, share of bf16 matmul"] = f["FLOP/s"] / matmul_rate
    for name, f in measured.get("attention", {}).items():
        if copy_rate and isinstance(f, dict):
            out[f"attention {name} 32 x 4096, share of copy"] = f["bytes/s"] / copy_rate
    for name, f in measured.items():
        kind, _, what = name.partition(" ")
        if "failed" in f:
            continue
        if kind == "model":
            for part in ("prefill", "decode", "decode at 2048"):
                out[f"{what} {part}, tok/s"] = f[f"{part}, tok/s"]
            if "memory, GB" in f:
                out[f"{what} memory at 2048 tokens, GB"] = f["memory, GB"]
            if copy_rate:
                out[f"{what} decode, share of copy"] = f["decode, tok/s"] * f["bytes a token"] / copy_rate
        elif kind == "batch":
            out[f"{what} batch {f['batch']}, tok/s"] = f["decode, tok/s"]
        elif kind == "transformers":
            out[f"{what} transformers bf16 prefill, tok/s"] = f["prefill, tok/s"]
            out[f"{what} transformers bf16 decode at 2048, tok/s"] = f["decode at 2048, tok/s"]
        elif kind == "load":
            out[f"load {what} int4, GB/s"] = f["GB/s"]
    return out


def table(flat: dict[str, float], measured: Figures, tiny: bool) -> str:
    """Figure, value, goal and whether it is met, and the original's figure on an A100; tiny: the values alone."""
    lines = [f"{'figure':<58}{'here':>10}{'goal':>12}  {'':<5}{'A100, original':>15}"]
    for name, value in flat.items():
        goal = None if tiny else GOALS.get(name)
        met = "" if goal is None else "met" if (value >= goal[1]) == (goal[0] == ">=") or value == goal[1] else "MISS"
        old = re.fullmatch(r"(\S+) (int4|int8|bf16) (decode|memory at 2048 tokens), (tok/s|GB)", name)
        before = ""
        if old and old[1] in A100 and not tiny:
            before = f"{A100[old[1]][old[2]][0 if old[3] == 'decode' else 1]:g}"
        number = f"{value:.3f}" if value < 10 else f"{value:,.1f}"
        lines.append(f"{name:<58}{number:>10}{f'{goal[0]} {goal[1]:g}' if goal else '':>12}  {met:<5}{before:>15}")
    lines += [f"{name}: failed: {f['failed']}" for name, f in measured.items() if "failed" in f]
    unmeasured = [] if tiny else [g for g in GOALS if g not in flat]
    return "\n".join([*lines, *([f"not measured: {'; '.join(unmeasured)}"] if unmeasured else [])])


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cuda", help="cuda, dcu, NAME:INDEX; cuda-emulated with --tiny")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by commas")
    parser.add_argument("--models", default=",".join(SIZES))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), help="compute in (default: the backend's own)")
    parser.add_argument("--kv-cache", default="auto", help="of the models: auto, int8 ...")
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time of a kernel's figure")
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoint that is loaded (72B-Int4: 42 GB)")
    parser.add_argument("--tiny", action="store_true", help="sizes at which no figure means anything")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: bench/results/<date>-<card>.json)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--size", default="", help=argparse.SUPPRESS)
    parser.add_argument("--format", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        torch.set_num_threads(1 if args.tiny else torch.get_num_threads())
        print(json.dumps(globals()[f"part_{args.part}"](args), default=str), flush=True)
        return 0
    if unknown := set(args.only.split(",")) - set(PARTS):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if "emulated" in args.backend and not args.tiny:
        parser.error("an emulated backend needs --tiny")
    args.only = args.only.split(",")
    measured = measure(args)
    flat = figures(measured)
    card = measured.get("card", {}).get("card", {})
    name = card.get("name", args.backend)
    header = {
        "date": str(date.today()),
        "card": card,
        "command": shlex.join(["python", "bench/gpu.py", *sys.argv[1:]]),
        "tiny": args.tiny,
    }
    print(f"{header['date']}  {', '.join(card.values()) or args.backend}\n{header['command']}")
    if args.tiny:
        print("TINY SIZES: this shows that the script runs; no figure below means anything")
    print(table(flat, measured, args.tiny))
    out = args.out
    if out is None and not args.tiny:
        out = RESULTS / f"{date.today()}-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower()}.json"
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**header, "figures": flat, "goals": GOALS, "measured": measured}, indent=1) + "\n")
        print(f"written: {out}")
    return 1 if any("failed" in f for f in measured.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
