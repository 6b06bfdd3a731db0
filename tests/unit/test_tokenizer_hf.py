"""Qwen-2+ ids against Hugging Face `tokenizers`, on the genuine vocabulary and on random small ones."""

from __future__ import annotations

import argparse
import inspect
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from assets import demo_gguf, qwen1_vocab
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from qwen_rt.checkpoint.gguf import read_metadata
from qwen_rt.errors import TokenizerError
from qwen_rt.native import extension
from qwen_rt.texts import Texts
from qwen_rt.tokenizer import Tokenizer, from_gguf_metadata, load_tokenizer
from qwen_rt.tokenizer import vocab as vocab_module
from qwen_rt.tokenizer.vocab import (
    BYTE_CHARS,
    MAX_ID,
    MAX_TOKEN_BYTES,
    QWEN_PATTERN,
    merge_ranks,
    parse_tiktoken,
    token_text,
)

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>"]
SOFT = ["<tool_call>", "</tool_call>", "<think>", "</think>"]


def merges_of(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """The pair each multi-byte token is made of: BPE over its own bytes, stopped at two parts."""
    merges = []
    for token in sorted((t for t in ranks if len(t) > 1), key=ranks.__getitem__):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda j: ranks.get(parts[j] + parts[j + 1], 1 << 60))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        merges.append((token_text(parts[0]), token_text(parts[1])))
    return merges


def hf_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    hf = tokenizers.Tokenizer(models.BPE(vocab, merges))
    hf.normalizer = normalizers.NFC()
    hf.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    hf.decoder = decoders.ByteLevel()
    hf.add_special_tokens([AddedToken(t, normalized=False) for t in CONTROL])
    hf.add_tokens([AddedToken(t, normalized=False) for t in SOFT])
    return hf


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> tuple[tokenizers.Tokenizer, Path]:
    ranks = parse_tiktoken(qwen1_vocab().read_bytes(), "qwen.tiktoken")
    hf = hf_tokenizer({token_text(t): i for t, i in ranks.items()}, merges_of(ranks))
    folder = tmp_path_factory.mktemp("qwen2")
    hf.save(str(folder / "tokenizer.json"))
    return hf, folder


@pytest.fixture(scope="module")
def ours(genuine: tuple[tokenizers.Tokenizer, Path]) -> Tokenizer:
    return load_tokenizer(genuine[1])


SAMPLES = [
    "中文分词：通义千问，你好！1234567890 个汉字。",
    "def f(x):\n\treturn {'a': x[1:-1]}  # naïve\n\n\n    pass\r\n\r\n\tend\r",
    "👩‍👩‍👧‍👦👍🏽🏳️‍🌈 e\u0301 ö o\u0308 Å Å 각 각 ﬁ ½ Ⅷ ²",
    "   leading, trailing   \n  \n\t \n x",
    "I'll they'RE he'S 'Ve ſ'ſ İ'd ı'LL don’t",
    "Привет мир العربية ١٢٣ हिन्दी ภาษาไทย தமிழ் עברית ქართული አማርኛ 日本語ｶﾅ 한국어",
    "<|im_start|>user\nhi<|im_end|>\n<tool_call>{}</tool_call><|fim_prefix|><|im_end| ><|im_end|>",
    "<think>\n</think>\u0338<<think>><|im_end|>\u0338\n\n<|im_start|>  <|im_start|>",
    "\u00a0\u2003\u3000x\u0085y\u2028z\u200b\ufeff\x00\x1c\x1f\x7f",
    "https://例え.jp/?q=a%20b&c=d#é 3.14e-10 0xFF 1,000,000.00",
    "a\u0316\u0301\u0345 q\u0323\u0307 \u0344 \u1100\u1161\u11a8 \u0958 \u2126 \u212b",
    "∑∫√≠≤≥ ←→ █▓▒ €£¥ ‱ § ¶ “quoted” «guillemets» --- === *** ...",
    " \t \r \n \r\n \v \f ",
]


def test_corpus(genuine: tuple[tokenizers.Tokenizer, Path], ours: Tokenizer) -> None:
    rng = random.Random(0)
    texts = [*SAMPLES, *(inspect.getsource(m) for m in (argparse, json.decoder, random))]
    pieces = [s[i : i + rng.randint(1, 9)] for s in SAMPLES for i in range(0, len(s), 5)]
    texts += ["".join(rng.choices(pieces, k=rng.randint(1, 60))) for _ in range(1500)]
    assert sum(map(len, texts)) > 300_000
    for text, expected in zip(texts, genuine[0].encode_batch(texts), strict=True):
        assert ours.encode(text) == expected.ids, text[:200]
        assert ours.decode(expected.ids) == genuine[0].decode(expected.ids, skip_special_tokens=False)
        assert ours.decode(expected.ids, True) == genuine[0].decode(expected.ids, skip_special_tokens=True)


def test_every_character(genuine: tuple[tokenizers.Tokenizer, Path], ours: Tokenizer) -> None:
    assigned = [c for c in map(chr, range(0x30000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co", "Lo")]
    assigned += list(map(chr, range(0x600, 0x1200)))
    texts = [
        " ".join(f"a{c}{c}1 {c}b.{c}\n{c}" for c in assigned[i : i + 500] if unicodedata.category(c) != "Cn")
        for i in range(0, len(assigned), 500)
    ]
    for text, expected in zip(texts, genuine[0].encode_batch(texts), strict=True):
        assert ours.encode(text) == expected.ids


# Characters both Unicode tables know, whatever their versions.
TEXT = st.text(
    st.one_of(
        st.sampled_from(" \n\r\t'<|>_aS1.中é😀\u0301\u0323\u200d\u3000"),
        st.characters(exclude_categories=("Cs", "Cn", "Co")),
    ),
    max_size=40,
)


@given(text=st.lists(st.one_of(TEXT, st.sampled_from([*CONTROL, *SOFT, "'s", "\r\n"]))).map("".join))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_text(genuine: tuple[tokenizers.Tokenizer, Path], ours: Tokenizer, text: str) -> None:
    ids = genuine[0].encode(text).ids
    assert ours.encode(text) == ids
    assert ours.decode(ids) == genuine[0].decode(ids, skip_special_tokens=False)


def test_control_tokens_by_name(ours: Tokenizer) -> None:
    assert ours.special_tokens == {t: 151643 + i for i, t in enumerate(CONTROL + SOFT)}
    assert ours.generation == "qwen2" and ours.stop_ids == (151645, 151643)
    ids = ours.encode("<think><|im_end|>x")
    assert ours.decode(ids, skip_special_tokens=True) == "<think>x"  # <think> is added, but no control token
    assert ours.encode("<think>", allowed_special=()) != ours.encode("<think>")
    assert ours.convert_ids_to_tokens(ours.encode(" 中<think>")) == ["Ġä¸Ń", "<think>"]
    assert ours.convert_tokens_to_ids(["Ġä¸Ń", "<think>", " 中".encode(), "no such token"]) == [
        *ours.encode(" 中<think> 中"),
        None,
    ]


def test_vocab_and_merges_files(genuine: tuple[tokenizers.Tokenizer, Path], ours: Tokenizer, tmp_path: Path) -> None:
    model = json.loads((genuine[1] / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "".join(f"{a} {b}\n" for a, b in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges)
    decoder = {str(151643 + i): {"content": t, "special": t in CONTROL} for i, t in enumerate(CONTROL + SOFT)}
    config = {
        "added_tokens_decoder": decoder,
        "eos_token": {"content": "<|im_end|>"},
        "pad_token": "<|endoftext|>",
        "chat_template": "{% for m in messages %}{{ m.role }}{% endfor %}{{ eos_token }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 7]}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    got = load_tokenizer(tmp_path)
    for text in SAMPLES:
        assert got.encode(text) == ours.encode(text)
    assert (got.generation, got.eos_id, got.pad_id, got.bos_id) == ("qwen3", 151645, 151643, None)
    assert got.stop_ids == (151645, 151643, 7)
    assert got.chat_prompt([{"role": "user", "content": ""}]) == [*got.encode("user"), 151645]


@pytest.mark.parametrize(
    "text",
    [
        "a b\nab c\n",
        "a b\nab c",
        "\na b\nab c",
        "#version: 0.2\n\na b\n\nab c\n\n",
        "#version: 0.2\r\na b\r\n \t\r\n  \nab c\r",
    ],
)
def test_merges_with_any_line_ends(tmp_path: Path, text: str) -> None:
    names = [*BYTE_CHARS, "ab", "abc", *CONTROL]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(names)}))
    (tmp_path / "merges.txt").write_bytes(text.encode())
    assert load_tokenizer(tmp_path).encode("abcab") == [257, 256]
    (tmp_path / "merges.txt").write_bytes(text.replace("ab c", "ab  c").encode())
    with pytest.raises(TokenizerError, match="cannot be used"):
        load_tokenizer(tmp_path)


def test_gguf(genuine: tuple[tokenizers.Tokenizer, Path]) -> None:
    meta = read_metadata(demo_gguf())
    got = from_gguf_metadata(meta)
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    hf = hf_tokenizer({t: i for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind == 1}, merges)
    for text in SAMPLES:
        plain = text.replace("<", "(")  # its control tokens have other ids than ours of the test
        assert got.encode(plain) == hf.encode(plain).ids
    assert (got.generation, got.eos_id, got.pad_id, got.num_tokens) == ("qwen2", 151645, 151643, 151665)
    assert got.encode("<tool_call><|fim_prefix|>") == [151657, 151659]
    assert got.decode([151657, 151659], skip_special_tokens=True) == "<tool_call>"
    assert got.unused_ids(151936) == list(range(151665, 151936))
    with pytest.raises(TokenizerError, match="151700"):
        got.decode([151700])


def listed(vocab: dict[Any, Any]) -> tuple[list[Any], list[Any]]:
    return list(vocab), list(vocab.values())


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_merge_list(data: st.DataObject) -> None:
    """Merges in any order, with dead ones, ids that are not ranks: same tokens as HF, or refused."""
    tokens = ["a", "b", "c"]
    merges: list[tuple[str, str]] = []
    for _ in range(data.draw(st.integers(1, 12))):
        pair = data.draw(st.tuples(st.sampled_from(tokens), st.sampled_from(tokens)))
        assume(pair not in merges)
        merges.append(pair)
        if "".join(pair) not in tokens:
            tokens.append("".join(pair))
    if data.draw(st.booleans()):
        merges = data.draw(st.permutations(merges))
    names = data.draw(st.permutations([*BYTE_CHARS, *tokens[3:]]))
    vocab = {token: i + 5 for i, token in enumerate(names)}
    hf = hf_tokenizer(vocab, merges)
    native = vocab_module._natively(*listed(vocab), merges)
    try:
        defined = vocab_module._by_definition(*listed(vocab), merges, "test")
    except TokenizerError:
        assert native is None
    else:
        assert extension() is None or native == defined
    try:
        got = Tokenizer(merge_ranks(*listed(vocab), merges, "test"), {"<|endoftext|>": 10_000}, generation="qwen2")
    except TokenizerError as e:
        assert "before the merge that makes it" in str(e)
        return
    for text in data.draw(st.lists(st.text("abc", min_size=1, max_size=30), min_size=1, max_size=5)):
        ids = hf.encode(text).ids
        assert got.encode(text) == ids
        assert got.decode(ids) == text


_HOSTILE_MERGES: dict[str, list[Any]] = {
    "no token": ["a zz"],
    "no token made": ["b a"],
    "three": ["a b c"],
    "one": ["ab"],
    "empty": [""],
    "a space": [" "],
    "half": ["a "],
    "twice": ["a b", "a b"],
    "two lines": ["a b\nab c"],
    "a line end": ["a b\n"],
    "early": ["ab c", "a b"],
    "a number": [5],
    "None": [None],
    "numbers": [[1, 2]],
    "one in a list": [["a b"]],
    "three in a list": [["a", "b", "c"]],
    "spaces in a list": [["a b", "c"], ["a", ""]],
    "surrogate": ["a \ud800"],
}


@pytest.mark.parametrize("name", _HOSTILE_MERGES)
def test_merges_that_cannot_be_used_are_left_to_the_definition(name: str) -> None:
    vocab = {token: i for i, token in enumerate([*BYTE_CHARS, "ab", "abc", "cc"])}
    merges = ["c c", *_HOSTILE_MERGES[name]]
    assert vocab_module._natively(*listed(vocab), merges) is None
    with pytest.raises(TokenizerError, match=r"cannot be used|before the merge"):
        merge_ranks(*listed(vocab), merges, "test")


@pytest.mark.skipif(extension() is None, reason="the native extension is not built")
def test_native_merges_of_malformed_text() -> None:
    tokens, ids = Texts.of([*BYTE_CHARS, "ab"]), np.arange(257)

    def native(*merges: str, longest: int = 9, **changes: Any) -> Any:
        m = Texts.of(merges)
        args = {"tokens": tokens.data, "token_ends": tokens.ends, "ids": ids, "merges": m.data, "merge_ends": m.ends}
        return extension().merge_ranks(**args | changes, longest=longest, end_of_ids=300)

    assert native("a b") == ({bytes([i]): i for i in range(256)} | {b"ab": 256}, None, {})
    assert native() == ({bytes([i]): i for i in range(256)}, None, {256: b"ab"})
    ranks, rank_ids, unmerged = native("a b", ids=ids + 2)
    assert (ranks[b"ab"], rank_ids, unmerged) == (256, list(range(2, 259)), {})
    for merges in (["ab"], [""], ["a  b"], ["b a"], ["a b", "a b"], ["a b", "ab c"]):
        assert native(*merges) is None
    for wrong in ({"longest": 1}, {"ids": ids - 1}, {"ids": ids + 44}, {"ids": ids * 0}):
        assert native("a b", **wrong) is None
    for wrong in ({"ids": ids[1:]}, {"ids": ids.astype(np.int32)}, {"token_ends": tokens.ends[::-1].copy()},
                  {"token_ends": tokens.ends + 1}, {"merge_ends": np.array([-1])}):  # fmt: skip
        with pytest.raises(ValueError):
            native("a b", **wrong)
    with pytest.raises(TypeError):
        native("a b", merges="a b")


_HOSTILE_VOCAB: dict[str, dict[Any, Any]] = {
    "no byte-level text": {"a\u4e2d": 300},
    "a control character": {"a\n": 300},
    "a space": {"a b": 300},
    "surrogate": {"\ud800": 300},
    "empty": {"": 300},
    "enormous": {"a" * (MAX_TOKEN_BYTES + 1): 300},
    "a number": {5: 300},
    "an id twice": {"ab": 3},
    "an id below 0": {"ab": -1},
    "an id too high": {"ab": MAX_ID},
    "an id beyond 64 bits": {"ab": 1 << 70},
    "an id that is a truth": {"ab": True},
    "an id that is text": {"ab": "300"},
    "no id": {"ab": None},
}


@pytest.mark.parametrize("name", _HOSTILE_VOCAB)
def test_vocabularies_that_cannot_be_used_are_left_to_the_definition(name: str) -> None:
    vocab = {token: i for i, token in enumerate(BYTE_CHARS)} | _HOSTILE_VOCAB[name]
    assert vocab_module._natively(*listed(vocab), []) is None
    with pytest.raises(TokenizerError):
        merge_ranks(*listed(vocab), [], "test")
    for short in (BYTE_CHARS[1:], [*BYTE_CHARS, "a"]):
        assert vocab_module._natively(short, range(len(short)), []) is None
        with pytest.raises(TokenizerError, match=r"is missing|listed twice"):
            merge_ranks(short, range(len(short)), [], "test")


def test_gpt2_pretokeniser(tmp_path: Path) -> None:
    """A plain ByteLevel pre-tokeniser, no normaliser: the usual shape of small test vocabularies."""
    hf = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(BYTE_CHARS)}, []))
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.add_special_tokens(["<|endoftext|>"])
    hf.save(str(tmp_path / "tokenizer.json"))
    got = load_tokenizer(tmp_path)
    for text in SAMPLES:
        assert got.encode(text) == hf.encode(text).ids
    assert got.decode(got.encode("e\u0301")) == "e\u0301"
