"""Perplexity of our arithmetic against float32 of the very same weights, and against llama.cpp on the same file.

    python bench/perplexity.py [--formats q4_0,q4_k_m,q8_0,int4,int8] [--step 512] [--cache int8]

English, Chinese and code (bench/texts.py), cut into windows of 512 tokens; every token but a window's first is scored,
given all before it in its window, at the same positions on every side. What a format means: bench/models.py.

    float32    the weights that qwen_rt is given, dequantised, in float32 with a float32 cache: our kernels for dense
               weights, checked on the first 256 tokens against the reference backend over the quantised weights
    qwen_rt    as users run it, with the default cache or `--cache`; `--step` tokens are computed at a time: 512 takes
               the path of prefill, 1 that of decode (slow)
    llama.cpp  on the same GGUF file; beside an Int4 on its Q4_0, beside an Int8 on its Q8_0; always 512 at a time

`loss` is qwen_rt's perplexity over float32's, minus one, with the standard error of that over the tokens. What float32
and llama.cpp said is kept in the qwen_rt cache, by digests of the weights and the tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from models import Weights, cache_folder, peer_python, peer_version, processor, weights
from sides import Settings, Worker
from texts import WINDOWS, texts, windows

from qwen_rt.backends.base import Backend, KVDtype, KVSpec, Packed
from qwen_rt.backends.cpu import CpuBackend
from qwen_rt.backends.reference import ReferenceBackend
from qwen_rt.checkpoint import open_checkpoint
from qwen_rt.engine import Engine, Request
from qwen_rt.engine.scheduler import Chunk
from qwen_rt.engine.sequence import Sequence
from qwen_rt.hub import resolve
from qwen_rt.model import QwenModel, build
from qwen_rt.quant.formats import Array, LinearRows, RawLinear, dense_format
from qwen_rt.tokenizer import load_tokenizer

LENGTH = 512
CHECKED = 256  # tokens that the reference backend computes too
AGREE = 2e-3  # largest difference of a log-probability between two float32 computations of 24 layers
GOAL = 0.003

Scores = dict[str, list[float]]  # log-probabilities by domain, window after window


class DenseBackend(CpuBackend):
    """The CPU with every weight dequantised to float32; `digest` names the weights it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.digest = hashlib.sha256()

    def pack_linear(self, raw: RawLinear) -> Packed:
        """The same matrix as float32 values."""

        def rows(start: int, stop: int) -> LinearRows:
            values = raw.dequantize(start, stop)
            self.digest.update(values.tobytes())
            return LinearRows(values=values)

        self.digest.update(repr((raw.name, raw.shape)).encode())
        if raw.bias is not None:
            self.digest.update(raw.bias.tobytes())
        # Dequantised columns are in the order of the inputs already.
        return super().pack_linear(replace(raw, format=dense_format("float32"), rows=rows, perm=None))


def open_engine(files: Weights, backend: Backend, kv_dtype: KVDtype) -> Engine:
    """A format's weights, rounded as load() would, on a backend."""
    checkpoint = open_checkpoint(files.ours)
    try:
        model = build(checkpoint, backend, quantize=files.quantize, level_keys=kv_dtype == "int8")
    finally:
        checkpoint.close()
    c = model.config
    spec = KVSpec(c.num_layers, c.num_kv_heads, c.head_size, backend.caps.kv_block, kv_dtype)
    kv = backend.alloc_kv(spec, -(-LENGTH // spec.block_size))
    return Engine(model, kv, max_model_len=LENGTH, max_batch=1, prefill_tokens=LENGTH)


def score(engine: Engine, ids: list[int], step: int) -> list[float]:
    """Log-probability of ids[1:], each given all before it; `step` tokens are computed at a time.

    As Engine.logits, without a row of the vocabulary's size for every token at once.
    """
    seq = Sequence(Request(list(ids)), 0, alpha=1.0, max_tokens=1, banned=frozenset(), decoder=None)
    table, backend = engine.blocks.allocate(ids, reuse=False), engine.model.backend
    found: list[float] = []
    try:
        for start in range(0, len(ids), step):
            chunk = Chunk(seq, start, engine.blocks.append(table, ids[start : start + step]), table)
            with backend.computing():
                logits = engine.model.logits(engine.runner.hidden([chunk]))
            found += log_probabilities(backend.array(logits), ids[start + 1 : chunk.stop + 1])
    finally:
        engine.blocks.free(table)
    return found


def log_probabilities(logits: Array, targets: list[int]) -> list[float]:
    """Of each row's target; rows past the last target are left out."""
    found: list[float] = []
    for row, target in zip(logits, targets, strict=False):
        # In float64: at 152 thousand addends float32 would add an error of its own.
        wide = row.astype(np.float64)
        top = wide.max()
        found.append(float(wide[target] - top - np.log(np.exp(wide - top).sum())))
    return found


def norms(model: QwenModel) -> bytes:
    """The norms' weights, which pack_linear does not see."""
    layers = [norm.weight for layer in model.layers for norm in (layer.attention_norm, layer.mlp_norm)]
    return b"".join(model.backend.array(w).astype(np.float32).tobytes() for w in (*layers, model.norm.weight))


class Kept:
    """Results in the qwen_rt cache, by the digest of what they were made from."""

    def __init__(self, text: str) -> None:
        self.folder, self.text = cache_folder() / "perplexity", text

    def get(self, kind: str, made_from: str, make: Callable[[], Any]) -> Any:
        """What was kept under `kind` for these weights and this text, or made now."""
        name = hashlib.sha256(f"{made_from} {self.text}".encode()).hexdigest()[:32]
        path = self.folder / f"{kind}-{name}.json"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(make()))
            partial.replace(path)
        return json.loads(path.read_text())


def say(text: str) -> None:
    """Progress, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def score_all(domains: dict[str, list[list[int]]], one: Callable[[list[int]], list[float]], title: str) -> Scores:
    """Every window of every domain."""
    found: Scores = {}
    for domain, parts in domains.items():
        found[domain] = []
        for i, ids in enumerate(parts):
            say(f"{title}: {domain} {i + 1} of {len(parts)}")
            found[domain] += one(ids)
    say("")
    return found


def float32_scores(files: Weights, domains: dict[str, list[list[int]]], kept: Kept) -> tuple[Scores, float]:
    """Of the dequantised weights; and the largest difference from the reference backend on the first tokens."""
    backend = DenseBackend()
    engine = open_engine(files, backend, "float32")
    backend.digest.update(norms(engine.model))

    def make() -> dict[str, Any]:
        first = next(iter(domains.values()))[0][:CHECKED]
        ours = score(engine, first, LENGTH)
        reference = score(open_engine(files, ReferenceBackend(compute_dtype="float32"), "float32"), first, LENGTH)
        difference = max(abs(a - b) for a, b in zip(ours, reference, strict=True))
        if not difference < AGREE:
            raise SystemExit(
                f"{files.name}: float32 differs from the reference by {difference:.2g}; expected < {AGREE}"
            )
        scores = score_all(domains, lambda ids: score(engine, ids, LENGTH), f"{files.name} float32")
        return {"scores": scores, "difference": difference}

    found = kept.get("float32", backend.digest.hexdigest(), make)
    return found["scores"], found["difference"]


def our_scores(files: Weights, domains: dict[str, list[list[int]]], step: int, cache: KVDtype | None) -> Scores:
    """As users run the format."""
    backend = CpuBackend()
    engine = open_engine(files, backend, cache or backend.caps.kv_dtypes[0])
    return score_all(domains, lambda ids: score(engine, ids, step), f"{files.name} qwen_rt")


def peer_scores(files: Weights, domains: dict[str, list[list[int]]], kept: Kept, python: str, threads: int) -> Scores:
    """llama.cpp's on its file."""

    def make() -> Scores:
        settings = Settings(str(files.peer), threads, context=LENGTH)
        with Worker(python, "peer", settings) as peer:
            one = lambda ids: peer.ask("scores", ids=ids, step=LENGTH)  # noqa: E731
            return score_all(domains, one, f"{files.peer_name} llama.cpp")

    digest = hashlib.sha256()
    with files.peer.open("rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return kept.get("llamacpp", f"{digest.hexdigest()} {peer_version(python)}", make)


def perplexity(scores: list[float]) -> float:
    """exp of minus the mean log-probability."""
    return math.exp(-statistics.fmean(scores))


def loss(ours: list[float], exact: list[float]) -> tuple[float, float]:
    """Ratio of perplexities minus one, and its standard error over the tokens (their differences are paired)."""
    differences = [b - a for a, b in zip(ours, exact, strict=True)]
    ratio = math.exp(statistics.fmean(differences))
    return ratio - 1, ratio * statistics.stdev(differences) / math.sqrt(len(differences))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="q4_0,q4_k_m,q8_0,int4,int8")
    parser.add_argument(
        "--windows", type=int, default=WINDOWS, help="of 512 tokens, of each domain (default: %(default)s)"
    )
    parser.add_argument("--step", type=int, default=LENGTH, help="tokens that qwen_rt computes at a time")
    parser.add_argument("--cache", choices=get_args(KVDtype), help="of qwen_rt (default: what it takes by itself)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-peer", action="store_true", help="without llama.cpp")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if args.windows != WINDOWS and "-gptq" in args.formats:
        parser.error(
            f"--windows {args.windows}: formats ending in -gptq were calibrated between the {WINDOWS} by default"
        )
    os.environ["QWEN_RT_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    python = peer_python()
    tokenizer = load_tokenizer(resolve("demo").path)
    domains = {
        name: windows(tokenizer.encode(text, allowed_special=set()), args.windows, LENGTH)
        for name, text in texts(cache_folder() / "perplexity").items()
    }
    digest = hashlib.sha256(json.dumps(domains).encode()).hexdigest()
    kept = Kept(digest)
    scored = sum(len(parts) for parts in domains.values()) * (LENGTH - 1)
    cache = f" with a cache of {args.cache}" if args.cache else ""
    print(
        f"{date.today()}  {processor()}  llama-cpp-python {peer_version(python)}\n"
        f"{scored} tokens scored, {args.step} at a time by qwen_rt{cache}; sha256 of the windows {digest[:16]} "
        f"(code: the library of Python {platform.python_version()})"
    )
    print(f"{'format':15}{'domain':9}{'tokens':>7}{'float32':>11}{'qwen_rt':>11}{'loss':>17}{'llama.cpp':>12}  of")
    figures = []
    for name in args.formats.split(","):
        files = weights(name, python)
        exact, difference = float32_scores(files, domains, kept)
        ours = our_scores(files, domains, args.step, args.cache)
        peer = {} if args.no_peer else peer_scores(files, domains, kept, python, args.threads)
        for domain in (*domains, "all"):
            pick = lambda s, d=domain: [x for part in s.values() for x in part] if d == "all" else s.get(d, [])  # noqa: E731
            a, b, c = pick(exact), pick(ours), pick(peer)
            change, error = loss(b, a)
            theirs = f"{perplexity(c):12.4f}  {files.peer_name}" if c else ""
            print(
                f"{name:15}{domain:9}{len(b):7}{perplexity(a):11.4f}{perplexity(b):11.4f}"
                f"{f'{change:+.3%} ±{error:.3%}':>17}{theirs}",
                flush=True,
            )
            figures.append(
                {"format": name, "domain": domain, "tokens": len(b), "float32": perplexity(a), "ours": perplexity(b)}
                | {"loss": change, "error": error, "peer": perplexity(c) if c else None, "peer_format": files.peer_name}
            )
        verdict = "met" if change <= GOAL else "NOT met"
        print(
            f"{name}: goal of a loss of at most {GOAL:.1%} {verdict}; float32 within {difference:.1g} of the reference"
        )
    if args.json:
        args.json.write_text(json.dumps({"date": str(date.today()), "text": digest, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
