"""Vocabularies on disk: `qwen.tiktoken`, `tokenizer.json`, `vocab.json` + `merges.txt`, and GGUF metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_rt.errors import TokenizerError
from qwen_rt.texts import Texts
from qwen_rt.tokenizer.tokenizer import Tokenizer
from qwen_rt.tokenizer.vocab import (
    GPT2_PATTERN,
    QWEN_PATTERN,
    Vocab,
    check_id,
    check_ranks,
    merge_ranks,
    parse_tiktoken,
)

MAX_FILE_BYTES = 1 << 28
QWEN1_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
QWEN2_CONTROL = QWEN1_CONTROL[:3]

# tokenizer.ggml.pre -> (split pattern, NFC); files older than that key are Qwen's own
_GGUF_PRE = {"qwen2": (QWEN_PATTERN, True), "deepseek-r1-qwen": (QWEN_PATTERN, True), "gpt-2": (GPT2_PATTERN, False)}
_GGUF_NORMAL, _GGUF_CONTROL, _GGUF_USER_DEFINED = 1, 3, 4


def load_tokenizer(
    path: str | Path, extra_vocab_file: str | Path | None = None, metadata: Mapping[str, Any] | None = None
) -> Tokenizer:
    """The tokenizer of a model directory or .gguf file; `extra_vocab_file` adds tokens to a Qwen-1 vocabulary.

    `metadata` is that of the .gguf file, where it has been read already.
    Raises TokenizerError naming the files looked for, or what is wrong with the one found.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        from qwen_rt.checkpoint.gguf import read_metadata

        return from_gguf_metadata(metadata or read_metadata(path))
    if path.is_file() and path.suffix == ".tiktoken":
        return _from_tiktoken(path, extra_vocab_file)
    if (path / "qwen.tiktoken").is_file():
        return _from_tiktoken(path / "qwen.tiktoken", extra_vocab_file)
    if (path / "tokenizer.json").is_file():
        return _from_tokenizer_json(path)
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return _from_vocab_and_merges(path)
    raise TokenizerError(
        f"no tokenizer in {path}: expected qwen.tiktoken, tokenizer.json, vocab.json with merges.txt, or a .gguf file"
    )


def _from_tiktoken(path: Path, extra_vocab_file: str | Path | None) -> Tokenizer:
    ranks = check_ranks(parse_tiktoken(_read(path), path.name), path.name)
    first = max(ranks.values()) + 1
    special = {token: first + i for i, token in enumerate(QWEN1_CONTROL)}
    if extra_vocab_file is not None:
        taken = {*ranks.values(), *special.values()}
        extra = parse_tiktoken(_read(Path(extra_vocab_file)), str(extra_vocab_file))
        for token, token_id in extra.items():
            if token not in ranks and token_id not in taken:
                ranks[token] = token_id
                taken.add(token_id)
    stops = _eos_ids(_read_json(path.parent / "generation_config.json"))
    return Tokenizer(Vocab(ranks), special, generation="qwen", eos_id=first, stop_ids=stops)


def _from_tokenizer_json(path: Path) -> Tokenizer:
    source = str(path / "tokenizer.json")
    data = _read_json(path / "tokenizer.json")
    model = _typed(data.get("model"), dict, source, "model")
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or model.get("ignore_merges"):
        raise TokenizerError(f"{source}: model is not a plain byte-level BPE")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise TokenizerError(f"{source}: subword prefixes and suffixes are not supported")
    return _from_hf(
        path,
        source,
        vocab=_typed(model.get("vocab"), dict, source, "model.vocab"),
        merges=_typed(model.get("merges"), list, source, "model.merges"),
        added=_typed(data.get("added_tokens") or [], list, source, "added_tokens"),
        pattern=_split_pattern(data.get("pre_tokenizer"), source),
        nfc=_is_nfc(data.get("normalizer"), source),
    )


def _from_vocab_and_merges(path: Path) -> Tokenizer:
    text = _text(path / "merges.txt")
    if any(mark in text for mark in ("\r", "\n ", "\n\t")):  # other line ends, or lines of spaces
        text = "\n".join(line.rstrip("\r") if line.strip() else "" for line in text.split("\n"))
    merges = Texts.lines(text + "\n")
    kept = merges.lengths > 0
    kept[:1] &= not merges[0].startswith("#version")
    merges = merges.where(kept)
    vocab = _read_json(path / "vocab.json")
    return _from_hf(path, str(path / "vocab.json"), vocab, merges, [], QWEN_PATTERN, True)


def _from_hf(
    path: Path, source: str, vocab: dict[str, Any], merges: Sequence[Any], added: list[Any], pattern: str, nfc: bool
) -> Tokenizer:
    """A tokenizer from HF's pieces and the configuration files beside them."""
    config = _read_json(path / "tokenizer_config.json")
    decoder = _typed(config.get("added_tokens_decoder") or {}, dict, source, "added_tokens_decoder")
    special: dict[str, int] = {}
    control: set[int] = set()
    for entry in [*added, *({"id": key, **_as_dict(value)} for key, value in decoder.items())]:
        entry = _as_dict(entry)
        token, token_id = entry.get("content"), entry.get("id")
        token_id = int(token_id) if isinstance(token_id, str) and token_id.isdecimal() else token_id
        if not isinstance(token, str) or not token:
            raise TokenizerError(f"{source}: added token {str(entry)[:100]} has no content")
        if any(entry.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            raise TokenizerError(f"{source}: added token {token!r} uses lstrip, rstrip or single_word: not supported")
        if special.setdefault(token, check_id(token_id, token)) != token_id:
            raise TokenizerError(f"{source}: added token {token!r} has two ids, {special[token]} and {token_id}")
        if entry.get("special"):
            control.add(token_id)
    if not special:
        first = max((i for i in vocab.values() if isinstance(i, int)), default=-1) + 1
        special = {token: vocab.get(token, first + i) for i, token in enumerate(QWEN2_CONTROL)}
        control = set(special.values())
    regular = dict(vocab)
    for token in special:
        regular.pop(token, None)

    def named(key: str) -> int | None:
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        return special.get(token) if isinstance(token, str) else None

    eos = _eos_ids(_read_json(path / "generation_config.json"))
    model_type = _read_json(path / "config.json").get("model_type")
    return Tokenizer(
        merge_ranks(list(regular), list(regular.values()), merges, source),
        special,
        generation=model_type if isinstance(model_type, str) else "qwen2",
        control_ids=control,
        pattern=pattern,
        nfc=nfc,
        eos_id=named("eos_token"),
        pad_id=named("pad_token"),
        bos_id=named("bos_token"),
        stop_ids=eos,
        chat_template=_chat_template(path, config),
    )


def from_gguf_metadata(meta: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer inside a GGUF file's metadata. Raises TokenizerError."""
    source = "GGUF metadata"
    if meta.get("tokenizer.ggml.model") != "gpt2":
        raise TokenizerError(f"{source}: tokenizer.ggml.model is {meta.get('tokenizer.ggml.model')!r}, expected 'gpt2'")
    pre = meta.get("tokenizer.ggml.pre", "qwen2")
    if pre not in _GGUF_PRE:
        raise TokenizerError(f"{source}: tokenizer.ggml.pre is {pre!r}; known are {', '.join(_GGUF_PRE)}")
    tokens, merges = (_texts(meta.get(key), source, key) for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"))
    types = meta.get("tokenizer.ggml.token_type")
    kinds = np.full(len(tokens), _GGUF_NORMAL) if types is None else np.asarray(types)
    if kinds.dtype.kind not in "iu" or kinds.shape != (len(tokens),):
        raise TokenizerError(f"{source}: {len(tokens)} tokens but {kinds.size} token types, or these are no integers")
    if not tokens.lengths.all():
        raise TokenizerError(f"{source}: token {int(tokens.lengths.argmin())} is empty, expected text")
    normal = kinds == _GGUF_NORMAL
    others = np.flatnonzero((kinds == _GGUF_CONTROL) | (kinds == _GGUF_USER_DEFINED)).tolist()
    special: dict[str, int] = {}
    for token, i in zip(map(tokens.__getitem__, others), others, strict=True):
        if token.startswith("[PAD"):  # fills the table up to the model's vocabulary size
            continue
        if special.setdefault(token, i) != i:
            raise TokenizerError(f"{source}: token {token!r} is listed twice, as {special[token]} and {i}")
    control = {i for i in special.values() if kinds[i] == _GGUF_CONTROL}

    def named(key: str) -> int | None:
        token_id = meta.get(f"tokenizer.ggml.{key}_token_id")
        return None if token_id is None else check_id(token_id, key)

    pattern, nfc = _GGUF_PRE[pre]
    return Tokenizer(
        merge_ranks(tokens.where(normal), np.flatnonzero(normal), merges, source),
        special,
        generation=str(meta.get("general.architecture", "qwen2")),
        control_ids=control,
        pattern=pattern,
        nfc=nfc,
        eos_id=named("eos"),
        pad_id=named("padding"),
        bos_id=named("bos"),
        chat_template=meta.get("tokenizer.chat_template"),
    )


def _texts(value: Any, source: str, what: str) -> Texts:
    """A list of strings."""
    if isinstance(value, Texts):
        return value
    try:
        return Texts.of(_typed(value.tolist() if hasattr(value, "tolist") else value, list, source, what))
    except (TypeError, UnicodeEncodeError) as e:
        raise TokenizerError(f"{source}: {what} is no list of text: {e}") from None


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise TokenizerError(f"{path} is larger than {MAX_FILE_BYTES} bytes: not a tokenizer file")
        return path.read_bytes()
    except OSError as e:
        raise TokenizerError(f"cannot read {path}: {e.strerror}") from None


def _text(path: Path) -> str:
    try:
        return _read(path).decode("utf-8")
    except UnicodeDecodeError as e:
        raise TokenizerError(f"{path} is not UTF-8 text: {e}") from None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} when the file is absent."""
    if not path.is_file():
        return {}
    try:
        return _typed(json.loads(_text(path)), dict, str(path), "the file")
    except (ValueError, RecursionError) as e:
        raise e if isinstance(e, TokenizerError) else TokenizerError(f"{path} is not valid JSON: {e}") from None


def _typed(value: Any, kind: type, source: str, what: str) -> Any:
    if not isinstance(value, kind):
        raise TokenizerError(f"{source}: {what} is a {type(value).__name__}, expected a {kind.__name__}")
    return value


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _eos_ids(generation_config: dict[str, Any]) -> list[int]:
    eos = generation_config.get("eos_token_id")
    return [check_id(i, "eos_token_id") for i in (eos if isinstance(eos, list) else [eos]) if i is not None]


def _split_pattern(pre_tokenizer: Any, source: str) -> str:
    """The regular expression of a byte-level pre-tokenizer: Split + ByteLevel, or ByteLevel alone (GPT-2's)."""
    top = _as_dict(pre_tokenizer)
    parts = top.get("pretokenizers") if top.get("type") == "Sequence" else [top]
    steps = [_as_dict(p) for p in parts] if isinstance(parts, list) else []
    last = steps[-1] if steps else {}
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(steps) == 1 and last.get("use_regex", True):
            return GPT2_PATTERN
        pattern = _as_dict(steps[0].get("pattern")).get("Regex")
        plain = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        if len(steps) == 2 and isinstance(pattern, str) and plain and not last.get("use_regex", True):
            return pattern
    raise TokenizerError(f"{source}: pre_tokenizer is not a regular expression followed by ByteLevel")


def _is_nfc(normalizer: Any, source: str) -> bool:
    top = _as_dict(normalizer)
    steps = top.get("normalizers") if top.get("type") == "Sequence" else [normalizer] if normalizer else []
    if not isinstance(steps, list) or any(_as_dict(s).get("type") != "NFC" for s in steps):
        raise TokenizerError(f"{source}: normalizer is {str(normalizer)[:100]}; only NFC is supported")
    return bool(steps)


def _chat_template(path: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    if (path / "chat_template.jinja").is_file():
        return _text(path / "chat_template.jinja")
    template = config.get("chat_template")
    if isinstance(template, list):
        return {str(_as_dict(t).get("name")): _as_dict(t).get("template", "") for t in template}
    return template
