"""`qwen-rt bench MODEL`: prefill and decode tokens per second, medians over fresh prompts."""

from __future__ import annotations

import argparse
import json
import random
import statistics
from typing import Any

from qwen_rt.cli.loading import add_load_options, load_model
from qwen_rt.errors import ConfigError


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("bench", help="prefill and decode tokens per second")
    add_load_options(parser)
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="measured runs after one to warm up")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the rates of one sequence at a time."""
    if args.prompt_tokens < 1 or args.new_tokens < 2 or args.repeat < 1:
        raise ConfigError("bench needs --prompt-tokens and --repeat of at least 1, and --new-tokens of at least 2")
    length = args.prompt_tokens + args.new_tokens
    args.max_model_len = args.max_model_len or length
    with load_model(args, max_batch=1) as model:
        draw = random.Random(0)  # fresh ids each run: a cached prefix would not be computed again
        top = min(model.config.vocab_size, 100_000)
        runs = []
        for _ in range(args.repeat + 1):
            ids = [draw.randrange(top) for _ in range(args.prompt_tokens)]
            done = model.generate(ids, max_new_tokens=args.new_tokens, temperature=0.0, ignore_eos=True)
            runs.append((done.prefill_rate, done.decode_rate))
        report = model.report()
    rates = {name: [r[i] for r in runs[1:]] for i, name in enumerate(("prefill", "decode"))}
    if args.json:
        tokens = {"prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens}
        print(json.dumps({**tokens, "tokens_per_second": rates, "report": report.to_dict()}, ensure_ascii=False))
        return 0
    for (name, values), tokens_each in zip(rates.items(), (args.prompt_tokens, args.new_tokens), strict=True):
        spread = f"{min(values):.1f} to {max(values):.1f} in {len(values)} runs"
        print(f"{name:<8} {tokens_each:>5} tokens  {statistics.median(values):8.1f} tok/s  ({spread})")
    print(f"\n{report}")
    return 0
