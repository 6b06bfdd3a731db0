"""`qwen-rt convert` and `qwen-rt quantize`: write a model in another format."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the two commands."""
    convert = subparsers.add_parser("convert", help="write a model as a dense Hugging Face or a Qwen-1 directory")
    _add_places(convert)
    convert.add_argument("--to", choices=("hf", "qwen1"), default="hf", help="what to write (default: hf)")
    convert.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: the model's own")
    convert.add_argument("--seq-length", type=int, default=8192, help="qwen1: training length (default: 8192)")
    convert.add_argument("--no-dynamic-ntk", action="store_true", help="qwen1: switch dynamic NTK off")
    convert.add_argument("--no-logn", action="store_true", help="qwen1: switch logn attention off")
    convert.set_defaults(func=run_convert)

    quantize = subparsers.add_parser(
        "quantize", help="write a model as AutoGPTQ Int4 or Int8, by GPTQ with --calibrate, else round to nearest"
    )
    _add_places(quantize)
    quantize.add_argument("--bits", type=int, choices=(4, 8), default=4)
    quantize.add_argument("--group-size", type=int, default=128, help="-1: one group per output (default: 128)")
    quantize.add_argument(
        "--calibrate", nargs="?", const="", metavar="FILE",
        help="GPTQ: round against the activations of a UTF-8 text (default: a built-in one; English, Chinese, code)",
    )  # fmt: skip
    quantize.add_argument("--head", action="store_true", help="quantise the output head as well")
    quantize.add_argument("--asymmetric", action="store_true", help="store zero points")
    quantize.add_argument("--act-order", action="store_true", help="group the inputs in a permuted order")
    quantize.add_argument("--gptq-version", type=int, choices=(1, 2), default=1, help="zero point format (default: 1)")
    quantize.add_argument("--seed", type=int, default=0, help="of the order (default: 0)")
    quantize.set_defaults(func=run_quantize)


def run_convert(args: argparse.Namespace) -> int:
    """Run `qwen-rt convert`; returns the exit status."""
    from qwen_rt.convert import to_hf, to_qwen1

    checkpoint = _open(args.model)
    if args.to == "hf":
        out = to_hf(checkpoint, args.out, args.dtype)
    else:
        out = to_qwen1(checkpoint, args.out, args.dtype, args.seq_length, not args.no_dynamic_ntk, not args.no_logn)
    print(f"wrote {out}")
    return 0


def run_quantize(args: argparse.Namespace) -> int:
    """Run `qwen-rt quantize`; returns the exit status."""
    from tqdm import tqdm

    from qwen_rt.convert import to_gptq

    checkpoint = _open(args.model)
    sequences = None if args.calibrate is None else _calibration(checkpoint.source, args.calibrate)
    # No bar where nobody watches (disable=None), nor for rounding alone, which saving shows.
    with tqdm(desc="calibrating", unit=" linears", disable=True if sequences is None else None) as bar:

        def step(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        out = to_gptq(
            checkpoint,
            args.out,
            args.bits,
            args.group_size,
            not args.asymmetric,
            args.act_order,
            args.gptq_version,
            args.seed,
            calibration=sequences,
            head=args.head,
            progress=step,
        )
    print(f"wrote {out}")
    return 0


def _calibration(source: str, file: str) -> list[list[int]]:
    """Token sequences of a text file, or of the built-in texts when `file` is empty."""
    from pathlib import Path

    from qwen_rt.calibrate import windows
    from qwen_rt.errors import ConfigError
    from qwen_rt.quant.calibration import TEXTS
    from qwen_rt.tokenizer import load_tokenizer

    try:
        texts = (Path(file).read_text(encoding="utf-8"),) if file else TEXTS
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{file} cannot be read as UTF-8 text ({e}); give --calibrate a text file, or no file") from e
    tokenizer = load_tokenizer(source)
    return windows([tokenizer.encode(text) for text in texts])


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model name, directory or .gguf file")
    parser.add_argument("out", help="directory to write; must be new or empty")


def _open(name: str) -> Any:
    from qwen_rt.checkpoint import open_checkpoint
    from qwen_rt.hub import resolve

    return open_checkpoint(resolve(name).path)
