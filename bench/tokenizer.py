"""Time of encoding one megabyte of text, against tiktoken's own Encoding.encode on the same vocabulary.

    python bench/tokenizer.py DIR_OR_GGUF_OR_TIKTOKEN [--repeat 7]

Both are measured in turn, on one thread; medians and their ratio are printed, and the ids are compared.
We normalise (NFC) and tiktoken does not, which the last row shows; its ids are compared on the normalised text.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import statistics
import time
import unicodedata
from collections.abc import Callable

import tiktoken

from qwen_rt.tokenizer import Tokenizer, load_tokenizer


def texts(size: int) -> dict[str, str]:
    """About `size` UTF-8 bytes of each kind of text, drawn with a fixed seed."""
    rng = random.Random(0)
    code = "".join(inspect.getsource(m) for m in (argparse, json.decoder, json.encoder, random, statistics, inspect))
    han = "".join(
        chr(rng.randint(0x4E00, 0x7FFF)) + ("，。！ "[rng.randrange(4)] if i % 9 == 8 else "") for i in range(5000)
    )
    words = [w for w in code.split() if w.isalpha()]
    english = " ".join(rng.choices(words, k=5000)) + ".\n"
    emoji = "".join(rng.choices(["😀", "👩‍👩‍👧", " ok ", "中文", "é", "123 ", "\r\n\t"], k=5000))
    chat = "<|im_start|>user\n你好, hello<|im_end|>\n"
    kinds = {"code": code, "english": english, "chinese": han, "emoji": emoji, "chat": chat}
    kinds["mixed"] = "".join(k[i : i + 400] for i in range(0, 5000, 400) for k in kinds.values())
    kinds["not NFC"] = unicodedata.normalize("NFD", "Ünïcödé " + english + han + "각")
    return {name: (kind * (size // len(kind.encode()) + 1)) for name, kind in kinds.items()}


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def plain_tiktoken(tokenizer: Tokenizer) -> tiktoken.Encoding:
    """tiktoken alone, with the same ranks and control tokens."""
    bpe = tokenizer._bpe
    return tiktoken.Encoding(
        "plain",
        pat_str=bpe._pat_str,
        mergeable_ranks=bpe._mergeable_ranks,
        special_tokens=tokenizer.special_tokens,
    )


def main() -> None:
    """Print a table: kind of text, our median, tiktoken's, ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--repeat", type=int, default=7)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.path)
    peer = plain_tiktoken(tokenizer)
    print(f"{'text':10}{'MB':>6}{'ours ms':>10}{'tiktoken ms':>13}{'ratio':>8}{'ids':>9}")
    for name, text in texts(1_000_000).items():
        ours, theirs = [], []
        for _ in range(args.repeat):
            ours.append(seconds(lambda t=text: tokenizer.encode(t)))
            theirs.append(seconds(lambda t=text: peer.encode(t, allowed_special="all")))
        a, b = statistics.median(ours), statistics.median(theirs)
        same = tokenizer.encode(text) == peer.encode(unicodedata.normalize("NFC", text), allowed_special="all")
        megabytes = len(text.encode()) / 1e6
        print(f"{name:10}{megabytes:6.2f}{a * 1e3:10.1f}{b * 1e3:13.1f}{a / b:8.2f}{'equal' if same else 'DIFFER':>9}")


if __name__ == "__main__":
    main()
