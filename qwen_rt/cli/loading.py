"""What `chat` and `bench` share: the options of qwen_rt.load, and loading with progress and warnings on stderr."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_rt.llm import Qwen


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """The model, and how to load it."""
    parser.add_argument("model", help="published name, local directory or .gguf file; `demo` is a small one")
    parser.add_argument("--device", default="auto", help="auto, NAME or NAME:INDEX (see `qwen-rt devices`)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of dense weights")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="round dense weights while loading")
    parser.add_argument("--kv-cache", choices=("auto", "float32", "float16", "bfloat16", "int8"), default="auto")
    parser.add_argument("--max-model-len", type=int, metavar="TOKENS", help="longest prompt plus answer")
    parser.add_argument("--weights", choices=("checkpoint", "random"), default="checkpoint")


def load_model(args: argparse.Namespace, **options: Any) -> Qwen:
    """qwen_rt.load with the options of add_load_options; shows progress when stderr is a terminal."""
    from qwen_rt import load

    loaded = 0

    def progress(name: str, num_bytes: int) -> None:
        nonlocal loaded
        loaded += num_bytes
        if sys.stderr.isatty():
            print(f"\r\x1b[Kloading {args.model}: {loaded / 1e6:.0f} MB  {name}"[:110], end="", file=sys.stderr)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        try:
            model = load(
                args.model,
                args.device,
                dtype=args.dtype,
                quantize=args.quantize,
                kv_cache=args.kv_cache,
                max_model_len=args.max_model_len,
                weights=args.weights,
                progress=progress,
                **options,
            )
        finally:
            if sys.stderr.isatty():
                print("\r\x1b[K", end="", file=sys.stderr)
    for warning in caught:
        if issubclass(warning.category, RuntimeWarning):
            print(f"warning: {warning.message}", file=sys.stderr)
    return model
