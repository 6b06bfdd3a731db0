"""Qwen-1's tokenizer on its genuine vocabulary, decoding, streaming, ChatML, and malformed vocabularies."""

from __future__ import annotations

import base64
import json
import threading
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
from assets import qwen1_vocab
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_rt.errors import TokenizerError
from qwen_rt.tokenizer import Tokenizer, from_gguf_metadata, get_stop_words_ids, load_tokenizer, make_context
from qwen_rt.tokenizer.tokenizer import to_nfc
from qwen_rt.tokenizer.vocab import BYTE_CHARS, QWEN_PATTERN, parse_tiktoken

END, IM_START, IM_END = 151643, 151644, 151645
EXTRAS = {f"<|extra_{i}|>": 151646 + i for i in range(205)}
slow_is_fine = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return load_tokenizer(qwen1_vocab().parent)


@pytest.fixture(scope="module")
def plain() -> tiktoken.Encoding:
    """tiktoken with the control tokens of the original, set up as the original does."""
    ranks = parse_tiktoken(qwen1_vocab().read_bytes(), "qwen.tiktoken")
    special = {"<|endoftext|>": END, "<|im_start|>": IM_START, "<|im_end|>": IM_END, **EXTRAS}
    return tiktoken.Encoding("Qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=special)


# -- encoding ------------------------------------------------------------------------------------------------------
def test_control_tokens(tok: Tokenizer) -> None:
    assert tok.special_tokens == {"<|endoftext|>": END, "<|im_start|>": IM_START, "<|im_end|>": IM_END, **EXTRAS}
    assert EXTRAS["<|extra_204|>"] == 151850
    assert (tok.vocab_size, len(tok), tok.num_tokens) == (151851, 151851, 151851)
    assert (tok.eod_id, tok.eos_id, tok.im_start_id, tok.im_end_id, tok.pad_id) == (END, END, IM_START, IM_END, END)
    assert tok.generation == "qwen" and set(tok.stop_ids) == {END, IM_START, IM_END}
    assert tok.unused_ids(151936) == list(range(151851, 151936))


def test_allowed_and_disallowed(tok: Tokenizer) -> None:
    text = 'print("<|endoftext|>")'
    assert tok.encode(text, allowed_special=set()) == [1350, 9639, 91, 8691, 723, 427, 91, 82598]
    assert tok.encode(text) == [1350, 445, END, 899]
    assert tok.encode("<|extra_20|><|im_end|>", allowed_special={"<|extra_20|>"})[0] == EXTRAS["<|extra_20|>"]
    assert IM_END not in tok.encode("<|extra_20|><|im_end|>", allowed_special={"<|extra_20|>"})
    with pytest.raises(TokenizerError, match=r"<\|endoftext\|>"):
        tok.encode(text, allowed_special=set(), disallowed_special="all")
    with pytest.raises(TokenizerError, match=r"<\|im_end\|>"):
        tok.encode("a<|im_end|>", disallowed_special=("<|im_end|>",))
    assert tok.encode(text, disallowed_special="all") == tok.encode(text)  # "all" is what is not allowed
    with pytest.raises(TokenizerError, match="sets of tokens"):
        tok.encode(text, allowed_special="<|im_end|>")  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match="bytes"):
        tok.encode(b"bytes")  # type: ignore[arg-type]


@given(text=st.lists(st.one_of(st.text(), st.sampled_from(["<|im_end|>", "<|extra_1|>", "<|extra_10|>"]))).map("".join))
@slow_is_fine
def test_as_the_original(tok: Tokenizer, plain: tiktoken.Encoding, text: str) -> None:
    """NFC of the whole text, then tiktoken with the control tokens."""
    nfc = unicodedata.normalize("NFC", text)
    assert tok.encode(text) == plain.encode(nfc, allowed_special="all")
    assert tok.encode(text, allowed_special=set()) == plain.encode(nfc, disallowed_special=())
    assert tok.decode(tok.encode(text)) == nfc


def test_normalisation(tok: Tokenizer) -> None:
    assert tok.encode("e\u0301") == tok.encode("é")
    assert IM_END not in tok.encode("<|im_end|>\u0338")  # '>' and the mark compose before the token is looked for
    assert tok.decode(tok.encode("a\ud800b")) == "a\ufffdb"
    assert tok.decode(tok.encode("\ud83d\ude00")) == "😀"


@given(
    st.text(st.sampled_from("aé\u0301\u0316\u0323\u0f71\u0f73\u0f75\u0f81\u0f80\u0344\u1161\u11a8\u1100"), max_size=300)
)
@slow_is_fine
def test_nfc_equals_unicodedata(text: str) -> None:
    assert to_nfc(text) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("text", ["\u0301\u0316" * 150_000, "\u0f73" * 100_000, " " * 1_200_000 + "x", "a" * 400_000])
def test_hostile_runs_take_linear_time(tok: Tokenizer, text: str) -> None:
    start = time.perf_counter()
    ids = tok.encode(text)
    assert time.perf_counter() - start < 10  # quadratic: minutes; tiktoken's own regex overflows on the spaces
    assert len(tok.decode(ids)) >= len(text)


def test_speed(tok: Tokenizer, plain: tiktoken.Encoding) -> None:
    """One megabyte in at most 1.5 times tiktoken's own time (the best of five; bench/tokenizer.py: medians)."""
    text = "def f(x): return x[1:-1]  # 中文注释，你好！ naïve 😀\n\tHello, world 12345. <|im_end|>\n" * 12_000
    assert len(text.encode()) > 1_000_000
    ours, theirs = [], []
    for _ in range(5):
        start = time.perf_counter()
        ids = tok.encode(text)
        middle = time.perf_counter()
        expected = plain.encode(text, allowed_special="all")
        ours.append(middle - start)
        theirs.append(time.perf_counter() - middle)
    assert ids == expected and min(ours) < 1.5 * min(theirs)


def test_long_spaces_in_the_middle(tok: Tokenizer) -> None:
    text = "x.\n\n" + " " * 600_000 + "\n" + "\t" * 600_000 + "y 中<|im_end|> "
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    # where the pattern splits: newlines belong to the full stop before them, the last tab to the word after it
    head, tail = tok.encode("x.\n\n"), tok.encode("\ty 中<|im_end|> ")
    assert ids[: len(head)] == head and ids[-len(tail) :] == tail
    short, long = " " * 1000 + "z\r\n a", " " * 600_000 + "z"
    assert tok._encode_pieces(short) == tok.encode(short) and tok.encode(long) == tok._encode_pieces(long)


# -- decoding ------------------------------------------------------------------------------------------------------
def test_decode(tok: Tokenizer) -> None:
    ids = tok.encode("<|im_start|>你好<|im_end|>")
    assert tok.decode(ids) == "<|im_start|>你好<|im_end|>"
    assert tok.decode([*ids, 151900], skip_special_tokens=True) == "你好"  # every id from 151643 up goes
    assert tok.decode(torch.tensor(ids), skip_special_tokens=True) == "你好" and tok.decode(ids[1]) == "你好"
    half = tok.convert_tokens_to_ids(b"\xf0")
    assert tok.decode([half]) == "\ufffd" and tok.decode([half], errors="ignore") == ""
    with pytest.raises(UnicodeDecodeError):
        tok.decode([half], errors="strict")
    assert tok.decode_bytes(tok.encode("中")) == "中".encode() and tok.decode([]) == ""


@pytest.mark.parametrize("bad", [151851, 152063, -1, 1 << 40])
def test_unknown_ids(tok: Tokenizer, bad: int) -> None:
    for use in (tok.decode_bytes, tok.decode, tok.convert_ids_to_tokens):
        with pytest.raises(TokenizerError, match=str(bad)):
            use([1, bad])
    with pytest.raises(TokenizerError, match=str(bad)):
        tok.stream_decoder().push(bad)


def test_bytes_tokens(tok: Tokenizer) -> None:
    ids = tok.encode("中文<|extra_3|> a")
    tokens = tok.convert_ids_to_tokens(ids)
    assert tokens[-2:] == ["<|extra_3|>", b" a"] and all(isinstance(t, bytes) for t in tokens[:-2])
    assert tok.convert_tokens_to_ids(tokens) == ids
    assert tok.convert_tokens_to_ids(b"<|extra_3|>") is None and tok.convert_tokens_to_ids("<|im_end|>") == IM_END
    assert tok.convert_ids_to_tokens(IM_END) == "<|im_end|>"


@given(st.lists(st.one_of(st.integers(0, 151850), st.integers(94, 255))))
@slow_is_fine
def test_stream_joins_to_the_whole(tok: Tokenizer, ids: list[int]) -> None:
    for skip in (True, False):
        stream = tok.stream_decoder(skip_special_tokens=skip)
        whole = tok.decode(ids, skip_special_tokens=skip)
        assert "".join(map(stream.push, ids)) + stream.flush() == whole
        assert "".join(map(stream.push, ids)) + stream.flush() == whole  # flush starts anew


def test_stream_never_shows_half_a_character(tok: Tokenizer) -> None:
    text = "a中😀é👩‍👩‍👧🏽ก"
    stream = tok.stream_decoder()
    single = [tok.convert_tokens_to_ids(bytes([b])) for b in text.encode()]
    pieces = [stream.push(i) for i in single]
    assert [p for p in pieces if p] == list(text) and stream.flush() == ""
    invalid = [tok.convert_tokens_to_ids(bytes([b])) for b in b"\xe4\xb8A\xff\xf0\x9f"]
    assert [stream.push(i) for i in invalid] == ["", "", "\ufffdA", "\ufffd", "", ""] and stream.flush() == "\ufffd"


# -- vocabularies --------------------------------------------------------------------------------------------------
def tiktoken_file(path: Path, tokens: dict[bytes, int]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for t, i in tokens.items()))
    return path


BYTES = {bytes([b]): b for b in range(256)}


def test_extra_vocab_file(tmp_path: Path) -> None:
    main = tiktoken_file(tmp_path / "qwen.tiktoken", {**BYTES, b"ab": 256})
    first = 257 + 208
    entries = {b"ab": first + 5, b"xy": 300, b"cd": 256, b"zz": first + 1, b"zzz": first + 9}
    got = load_tokenizer(main, tiktoken_file(tmp_path / "extra.tiktoken", entries))
    assert got.encode("ab") == [256]  # exists already
    assert got.encode("xy cd") == list(b"xy cd")  # their ids are taken
    assert got.encode("zzz") == [first + 9] and got.decode([first + 9, first + 1]) == "zzzzz"
    assert got.special_tokens["<|endoftext|>"] == 257
    assert got.unused_ids(first + 10) == [first, *range(first + 2, first + 9)]


BAD_TIKTOKEN = {
    "bad base64": b"!!!! 5\n",
    "no rank": b"YQ==\n",
    "rank no number": b"YQ== five\n",
    "negative": b"YWI= -1\n",
    "huge id": b"YWI= 99999999999999999999\n",
    "duplicate token": b"YQ== 300\n",
    "duplicate id": b"YWI= 7\n",
    "empty token": b" 7\n",
    "enormous token": base64.b64encode(b"x" * 70_000) + b" 300\n",
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize("tail", BAD_TIKTOKEN.values(), ids=BAD_TIKTOKEN)
def test_malformed_tiktoken(tmp_path: Path, tail: bytes) -> None:
    path = tiktoken_file(tmp_path / "qwen.tiktoken", BYTES)
    load_tokenizer(path)
    path.write_bytes(path.read_bytes() + tail)
    with pytest.raises(TokenizerError, match=r"qwen\.tiktoken"):
        load_tokenizer(tmp_path)


def test_missing_byte(tmp_path: Path) -> None:
    tiktoken_file(tmp_path / "qwen.tiktoken", {t: i for t, i in BYTES.items() if t != b"\x07"})
    with pytest.raises(TokenizerError, match="0x07"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"qwen\.tiktoken, tokenizer\.json"):
        load_tokenizer(tmp_path / "nowhere")


def tokenizer_json() -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return {
        "added_tokens": [{"id": 400, "content": "<|endoftext|>", "special": True}],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "model": {"type": "BPE", "vocab": {**{c: i for i, c in enumerate(BYTE_CHARS)}, "ab": 300}, "merges": ["a b"]},
    }


BAD_JSON: dict[str, tuple[tuple[Any, ...], Any]] = {
    "model type": (("model", "type"), "Unigram"),
    "no model": (("model",), None),
    "vocab a list": (("model", "vocab"), ["a"]),
    "duplicate id": (("model", "vocab", "ab"), 5),
    "id a string": (("model", "vocab", "ab"), "5"),
    "id a float": (("model", "vocab", "ab"), 1.5),
    "negative id": (("model", "vocab", "ab"), -3),
    "enormous token": (("model", "vocab", "a" * 70_000), 301),
    "not byte-level": (("model", "vocab", "中"), 301),
    "raw space": (("model", "vocab", "a b"), 301),
    "merges a dict": (("model", "merges"), {}),
    "merge of unknown": (("model", "merges"), ["a zz"]),
    "product unknown": (("model", "merges"), ["a c"]),
    "merge of three": (("model", "merges"), ["a b c"]),
    "merge a number": (("model", "merges"), [5]),
    "merge of numbers": (("model", "merges"), [[1, 2]]),
    "merge twice": (("model", "merges"), ["a b", "a b"]),
    "byte fallback": (("model", "byte_fallback"), True),
    "suffix": (("model", "end_of_word_suffix"), "</w>"),
    "normalizer": (("normalizer",), {"type": "Lowercase"}),
    "pre-tokenizer": (("pre_tokenizer",), {"type": "Metaspace"}),
    "bad regex": (("pre_tokenizer", "pretokenizers", 0, "pattern"), {"Regex": "(unclosed"}),
    "added a dict": (("added_tokens",), {"content": "x"}),
    "added no id": (("added_tokens", 0, "id"), None),
    "added no content": (("added_tokens", 0, "content"), ""),
    "added a lone surrogate": (("added_tokens", 0, "content"), "<\ud800>"),
    "added id taken": (("added_tokens", 0, "id"), 65),
    "added lstrip": (("added_tokens", 0, "lstrip"), True),
    "no end token": (("added_tokens", 0, "content"), "<other>"),
}


@pytest.mark.parametrize(("where", "value"), BAD_JSON.values(), ids=BAD_JSON)
def test_malformed_tokenizer_json(tmp_path: Path, where: tuple[Any, ...], value: object) -> None:
    data = tokenizer_json()
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert load_tokenizer(tmp_path).encode("abé<|endoftext|>") == [300, *"é".encode(), 400]
    node = data
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(TokenizerError):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"model": {"vocab": 3}}'])
def test_malformed_json_text(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(text)
    with pytest.raises(TokenizerError):
        load_tokenizer(tmp_path)


def test_side_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    assert load_tokenizer(tmp_path).chat_text([{"role": "user"}]) == "config"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(tmp_path).chat_text([{"role": "user"}]) == "plain"
    assert load_tokenizer(tmp_path).chat_text([{"role": "user"}], tools=[{"name": "f"}]) == "tools"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_tokenizer(tmp_path).chat_text([{"role": "user"}]) == "file"
    two_ids = {"added_tokens_decoder": {"401": {"content": "<|endoftext|>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(two_ids))
    with pytest.raises(TokenizerError, match="two ids"):
        load_tokenizer(tmp_path)


def gguf_metadata(**changes: Any) -> dict[str, Any]:
    tokens = [*BYTE_CHARS, "ab", "<|im_end|>", "<tool_call>", "[PAD259]"]
    meta = {
        "general.architecture": "qwen2",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 257 + [3, 4, 5],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 257,
    }
    return meta | {"tokenizer.ggml." + key: value for key, value in changes.items()}


def test_gguf_metadata() -> None:
    for types in (gguf_metadata(), gguf_metadata(token_type=torch.tensor([1] * 257 + [3, 4, 5]).numpy())):
        got = from_gguf_metadata(types)
        assert got.encode("ab<|im_end|><tool_call>") == [256, 257, 258]
        assert got.encode("[PAD259]") == [ord(c) for c in "[PAD259]"] and got.unused_ids(261) == [259, 260]
        assert got.eos_id == 257 and got.decode([256, 257, 258], True) == "ab<tool_call>"


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "llama"},
        {"pre": "who-knows"},
        {"tokens": None},
        {"tokens": "abc"},
        {"tokens": [1, 2]},
        {"tokens": [*BYTE_CHARS, "ab", "<|im_end|>", "<tool_call>", b"x"]},
        {"tokens": [*BYTE_CHARS[1:], "ab", "ab", "<|im_end|>", "<tool_call>", "x"]},
        {"tokens": [*BYTE_CHARS, "ab", "<|im_end|>", "<tool_call>", ""]},
        {"tokens": [*BYTE_CHARS, "ab", "<|im_end|>", "<|im_end|>", "x"]},
        {"token_type": [1]},
        {"token_type": 7},
        {"merges": [["a"]]},
        {"merges": 9},
        {"eos_token_id": "x"},
        {"eos_token_id": -1},
    ],
)
def test_malformed_gguf(changes: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError):
        from_gguf_metadata(gguf_metadata(**changes))


def test_threads(tok: Tokenizer) -> None:
    text = "线程 threads <|im_end|> e\u0301 " * 50
    expected, wrong = tok.encode(text), []

    def work() -> None:
        wrong.extend(1 for _ in range(20) if tok.encode(text) != expected or tok.decode(expected) != to_nfc(text))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- ChatML --------------------------------------------------------------------------------------------------------
def test_chatml_ids(tok: Tokenizer) -> None:
    text, ids = make_context(tok, "你好", system="You are a helpful assistant.")
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert ids == [
        *(151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198),
        *(151644, 872, 198, 108386, 151645, 198, 151644, 77091, 198),
    ]
    assert tok.chat_prompt([{"role": "user", "content": "你好"}]) == ids
    assert tok.chat_text([{"role": "user", "content": "你好"}]) == text
    # role, newline and content are encoded apart: a leading newline does not merge with the one after the role
    assert make_context(tok, "\n\nx")[1][4:11] == [198, IM_START, 872, 198, *tok.encode("\n\nx"), IM_END]
    assert make_context(tok, "q", system="")[1][:4] == [IM_START, 8948, 198, IM_END]


def test_chatml_equals_messages(tok: Tokenizer) -> None:
    history = [("a\n", "b"), ("<|im_end|>", "\nd")]
    messages = [{"role": "system", "content": "s"}]
    for q, a in [*history, ("end", None)]:
        messages += [{"role": "user", "content": q}] + ([{"role": "assistant", "content": a}] if a else [])
    assert make_context(tok, "end", history, "s") == (tok.chat_text(messages), tok.chat_prompt(messages))
    closed = tok.chat_prompt(messages, add_generation_prompt=False)
    assert tok.chat_prompt(messages) == [*closed, 198, IM_START, 77091, 198]


@given(
    st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), max_size=6),
    st.integers(1, 150),
    st.text(max_size=9),
)
@slow_is_fine
def test_window(tok: Tokenizer, history: list[tuple[str, str]], window: int, system: str) -> None:
    """The newest turns stay while system and they are strictly below the window; the query does not count."""
    query = "long query " * 50
    size = {
        n: len(make_context(tok, "", history[len(history) - n :], system, 1 << 30)[1]) for n in range(len(history) + 1)
    }
    tail = len(make_context(tok, "", [], system)[1]) - len(tok.encode(system, set())) - 4
    kept = 0
    while kept < len(history) and size[kept + 1] - tail < window:
        kept += 1
    expected = make_context(tok, query, history[len(history) - kept :], system, 1 << 30)
    assert make_context(tok, query, history, system, window) == expected


@given(
    st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "<|im", "_end|>", "<|extra_0|>", "system", "\n"])).map(
        "".join
    )
)
@slow_is_fine
def test_users_cannot_write_control_tokens(tok: Tokenizer, text: str) -> None:
    _, ids = make_context(tok, text, [(text, text)], text)
    assert [i for i in ids if i >= END] == [IM_START, IM_END] * 4 + [IM_START]
    messages = [{"role": r, "content": text} for r in ("system", "user", text)]
    assert [i for i in tok.chat_prompt(messages) if i >= END] == [IM_START, IM_END] * 3 + [IM_START]
    assert not [i for i in make_context(tok, text, chat_format="raw")[1] if i >= END]


def test_formats_and_stops(tok: Tokenizer) -> None:
    assert make_context(tok, "蒙古国", [("x", "y")], "s", chat_format="raw") == ("蒙古国", tok.encode("蒙古国"))
    assert get_stop_words_ids("chatml", tok) == [[IM_END], [IM_START]]
    assert get_stop_words_ids("raw", tok) == [tok.encode("Human:"), [END]]
    for wrong in (lambda: make_context(tok, "x", chat_format="alpaca"), lambda: get_stop_words_ids("alpaca", tok)):
        with pytest.raises(TokenizerError, match="alpaca"):
            wrong()
    for messages in ([], [{"role": "user"}], [{"role": "user", "content": None}], ["x"], "x"):
        with pytest.raises(TokenizerError):
            tok.chat_prompt(messages)  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match="tools"):
        tok.chat_prompt([{"role": "user", "content": "x"}], tools=[{"name": "f"}])


def test_generation_config(tmp_path: Path) -> None:
    tiktoken_file(tmp_path / "qwen.tiktoken", BYTES)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 256, "chat_format": "chatml"}))
    assert set(load_tokenizer(tmp_path).stop_ids) == {256, 257, 258}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "256"}))
    with pytest.raises(TokenizerError, match="eos_token_id"):
        load_tokenizer(tmp_path)
