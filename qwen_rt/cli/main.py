"""`qwen-rt`: one module a subcommand, imported only when it is the one asked for."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from qwen_rt.errors import QwenRTError

COMMANDS = {
    "chat": ("qwen_rt.cli.chat", "chat with a model in the terminal"),
    "devices": ("qwen_rt.cli.devices", "what was probed, what was chosen, and the reason for each no"),
    "doctor": ("qwen_rt.cli.doctor", "check every operation of a backend against float64"),
    "plan": ("qwen_rt.cli.plan", "bytes of weights and cache, and what fits where, before anything is loaded"),
    "bench": ("qwen_rt.cli.bench", "prefill and decode tokens per second"),
    "convert": ("qwen_rt.cli.convert", "rewrite a checkpoint in another layout"),
    "quantize": ("qwen_rt.cli.convert", "rewrite a checkpoint with int4 or int8 weights"),
}
"""Subcommand -> (module whose add_parser(subparsers) sets func=run(args) -> exit status, one line of help)."""


def make_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for `argv`; only the module of the subcommand in it is imported."""
    parser = argparse.ArgumentParser("qwen-rt", description="One runtime for the Qwen family.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((a for a in argv if not a.startswith("-")), None)
    module = COMMANDS[wanted][0] if wanted in COMMANDS else None
    if module:
        importlib.import_module(module).add_parser(subparsers)
    for name, (owner, text) in COMMANDS.items():
        if owner != module:
            subparsers.add_parser(name, help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status. An error a user can act on is one line on stderr and status 1."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]  # wherever it stands
    try:
        args = make_parser(argv).parse_args(argv)
        status = args.func(args)
        sys.stdout.flush()
        return status
    except QwenRTError as e:
        if debug:
            raise
        print(f"qwen-rt: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, e.g. `qwen-rt devices | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
