"""Tokenizer: text <-> ids for every Qwen generation, on tiktoken's BPE."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache
from typing import Any, Literal, overload

from qwen_rt.errors import TokenizerError
from qwen_rt.tokenizer import chat
from qwen_rt.tokenizer.template import ChatTemplate
from qwen_rt.tokenizer.vocab import QWEN_PATTERN, Vocab, check_id, token_bytes, token_text

_LONG_SPACE = 500_000  # tiktoken's regex engine overflows its stack on about twice this many spaces in a row
_MARKS_RUN = 64
# not marks themselves, but made of marks
_DOUBLE_MARKS = {"\u0f73": "\u0f71\u0f72", "\u0f75": "\u0f71\u0f74", "\u0f81": "\u0f71\u0f80"}


class Tokenizer:
    """A byte-level BPE vocabulary with its control tokens and its way of writing a chat.

    `vocab_size` is the highest id + 1; a model's embedding usually has more rows (`unused_ids`).
    """

    def __init__(
        self,
        vocab: Vocab,
        special_tokens: dict[str, int],
        *,
        generation: str,
        control_ids: Collection[int] | None = None,  # dropped by skip_special_tokens; None: all special tokens
        pattern: str = QWEN_PATTERN,
        nfc: bool = True,
        eos_id: int | None = None,
        pad_id: int | None = None,
        bos_id: int | None = None,
        stop_ids: Iterable[int] = (),  # further ids that end an answer
        chat_template: str | dict[str, str] | None = None,
    ) -> None:
        self.generation = generation
        self.special_tokens = special_tokens
        self._bytes = vocab.by_id()
        for token, token_id in special_tokens.items():
            if not token.isascii() and re.search("[\ud800-\udfff]", token):
                raise TokenizerError(f"control token {token!r} is not valid text")
            if self._bytes.setdefault(check_id(token_id, token), token.encode()) != token.encode():
                raise TokenizerError(f"control token {token!r} and {self._bytes[token_id]!r} share the id {token_id}")
        if len(set(special_tokens.values())) != len(special_tokens):
            raise TokenizerError("two control tokens share an id")
        self._all_special = frozenset(special_tokens)
        self._special_text = {token_id: token for token, token_id in special_tokens.items()}
        self._first_control = min(special_tokens.values(), default=len(self._bytes))
        self._control_ids = frozenset(self._special_text if control_ids is None else control_ids)
        self._ids: dict[bytes, int] = {}  # bytes -> id, made when first asked for
        self.vocab_size = max(self._bytes) + 1
        self.num_tokens = len(self._bytes)
        self._rank_ids = vocab.rank_ids
        self._nfc = nfc
        self._pattern = pattern
        own_ids = vocab.rank_ids is None and not any(a in b for a in special_tokens for b in special_tokens if a != b)
        self._bpe_special = special_tokens if own_ids else {}  # which control tokens tiktoken finds as we do
        import tiktoken  # here, where load() reads vocabularies: in a thread of its own

        try:
            self._bpe = tiktoken.Encoding(
                generation, pat_str=pattern, mergeable_ranks=vocab.ranks, special_tokens=self._bpe_special
            )
        except BaseException as e:
            raise _from_rust(e, "the vocabulary cannot be used") from None

        self.eod_id = special_tokens.get("<|endoftext|>")
        self.im_start_id = special_tokens.get("<|im_start|>")
        self.im_end_id = special_tokens.get("<|im_end|>")
        self.bos_id = bos_id
        end = next((i for i in (eos_id, self.im_end_id, self.eod_id) if i is not None), None)
        if end is None:
            raise TokenizerError(
                "no end-of-sequence token: neither eos_token nor <|im_end|> nor <|endoftext|> is there"
            )
        self.eos_id = end
        self.pad_id = next(i for i in (pad_id, self.eod_id, end) if i is not None)
        start = self.im_start_id if generation == "qwen" else None
        stops = [self.im_end_id, start, self.eod_id, self.eos_id, *stop_ids]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in stops if i is not None))
        names = {"eos_token": end, "pad_token": self.pad_id, "bos_token": bos_id}
        self.template = (
            None
            if generation == "qwen"
            else ChatTemplate(
                chat_template,
                special_tokens,
                soft=[t for t, i in special_tokens.items() if i not in self._control_ids],
                names={k: self._bytes[i].decode() for k, i in names.items() if i in self._special_text},
            )
        )

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer({self.generation}, {self.num_tokens} tokens, {len(self.special_tokens)} of them control)"

    # -- text -> ids -----------------------------------------------------------------------------------------
    def encode(
        self,
        text: str,
        allowed_special: Literal["all"] | Collection[str] = "all",
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Token ids of `text`. Control tokens in `allowed_special` stand for themselves, others are ordinary text.

        `disallowed_special` ("all" = every control token not allowed) must not occur: TokenizerError names the first.
        """
        if not isinstance(text, str):
            raise TokenizerError(f"encode() takes a str, not {type(text).__name__}")
        for given in (allowed_special, disallowed_special):
            if isinstance(given, str) and given != "all":
                raise TokenizerError(
                    f"allowed_special and disallowed_special are 'all' or sets of tokens, not {given!r}"
                )
        if self.generation == "qwen":  # the original normalises before it looks for control tokens, HF after
            text = to_nfc(text)
        known = self._all_special
        allowed = known if allowed_special == "all" else known & frozenset(allowed_special)
        banned = known - allowed if disallowed_special == "all" else frozenset(disallowed_special)
        if banned and (found := _any_of(banned).search(text)):
            raise TokenizerError(
                f"the text contains the control token {found.group()!r}, which disallowed_special forbids; "
                "pass it in allowed_special to use it, or disallowed_special=() to encode it as ordinary text"
            )
        return self._encode(text, allowed)

    def _encode(self, text: str, allowed: frozenset[str], marker: str = "") -> list[int]:
        """Ids of `text` with `marker` removed from what is not a control token."""
        if not allowed or not _any_of(allowed).search(text):
            return self._encode_ordinary(text, marker)
        if self._bpe_special and not marker and self._is_normal(text) and not _has_long_space(text):
            return self._rust(self._bpe.encode, text, allowed_special=allowed, disallowed_special=())
        ids: list[int] = []
        done = 0
        for found in _any_of(allowed).finditer(text):
            ids += self._encode_ordinary(text[done : found.start()], marker)
            ids.append(self.special_tokens[found.group()])
            done = found.end()
        return ids + self._encode_ordinary(text[done:], marker)

    def _encode_ordinary(self, text: str, marker: str = "") -> list[int]:
        if marker:
            text = text.replace(marker, "")
        if not text:
            return []
        if self._nfc:
            text = to_nfc(text)
        encode = self._encode_pieces if _has_long_space(text) else self._bpe.encode_ordinary
        ranks = self._rust(encode, text)
        return ranks if self._rank_ids is None else [self._rank_ids[r] for r in ranks]

    def _is_normal(self, text: str) -> bool:
        """True when normalising the parts between control tokens would change nothing."""
        return not self._nfc or to_nfc(text) == text

    def _rust(self, encode: Callable[..., list[int]], text: str, **kwargs: Any) -> list[int]:
        try:
            return encode(text, **kwargs)
        except BaseException as e:
            raise _from_rust(e, "the text cannot be tokenized") from None

    def _encode_pieces(self, text: str) -> list[int]:
        """What encode_ordinary gives, split by a regex engine that does not recurse; several times slower."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        encode_piece = self._bpe._core_bpe.encode_single_piece
        import regex

        return [rank for m in regex.finditer(self._pattern, text) for rank in encode_piece(m.group().encode())]

    # -- ids -> text -----------------------------------------------------------------------------------------
    def decode_bytes(self, ids: Any) -> bytes:
        """The bytes of `ids` (an id, a sequence, a tensor). Raises TokenizerError for an id without a token."""
        return b"".join(map(self.token_bytes, _id_list(ids)))

    def decode(self, ids: Any, skip_special_tokens: bool = False, errors: str = "replace") -> str:
        """The text of `ids`. Invalid UTF-8 goes by `errors`, as in bytes.decode.

        Skipping drops control tokens; with Qwen-1 every id from <|endoftext|> up. TokenizerError: id without a token.
        """
        wanted = _id_list(ids)
        if skip_special_tokens:
            wanted = [i for i in wanted if not self.is_control(i)]
        return self.decode_bytes(wanted).decode("utf-8", errors)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token. Raises TokenizerError for an id without a token."""
        try:
            return self._bytes[token_id]
        except (KeyError, TypeError):
            raise TokenizerError(
                f"id {token_id!r} has no token: the vocabulary has {self.num_tokens} tokens, the highest id is "
                f"{self.vocab_size - 1} (a model may have more rows than tokens: see unused_ids)"
            ) from None

    def is_control(self, token_id: int) -> bool:
        """True for ids that skip_special_tokens drops."""
        return token_id >= self._first_control if self.generation == "qwen" else token_id in self._control_ids

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder that takes ids one by one."""
        return StreamDecoder(self, skip_special_tokens)

    def unused_ids(self, vocab_size: int) -> list[int]:
        """Ids below `vocab_size` (rows of a model's head) that have no token and must not be generated."""
        return [i for i in range(vocab_size) if i not in self._bytes]

    # -- tokens <-> ids --------------------------------------------------------------------------------------
    @overload
    def convert_ids_to_tokens(self, ids: int) -> str | bytes: ...
    @overload
    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str | bytes]: ...
    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> str | bytes | list[str | bytes]:
        """Tokens of ids: control tokens as str; others as bytes (Qwen-1) or byte-level str (later generations)."""

        def token(token_id: int) -> str | bytes:
            raw = self.token_bytes(token_id)
            if token_id in self._special_text:
                return self._special_text[token_id]
            return raw if self.generation == "qwen" else token_text(raw)

        return token(ids) if isinstance(ids, int) else [token(i) for i in _id_list(ids)]

    @overload
    def convert_tokens_to_ids(self, tokens: str | bytes) -> int | None: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str | bytes]) -> list[int | None]: ...
    def convert_tokens_to_ids(self, tokens: str | bytes | list[str | bytes]) -> int | list[int | None] | None:
        """Ids of tokens, spelt as convert_ids_to_tokens gives them or as bytes; None where there is no such token."""
        if not isinstance(tokens, str | bytes):
            return [self.convert_tokens_to_ids(t) for t in tokens]
        if isinstance(tokens, str) and (found := self.special_tokens.get(tokens)) is not None:
            return found
        if not self._ids:
            self._ids = {raw: i for i, raw in self._bytes.items() if i not in self._special_text}
        if isinstance(tokens, bytes):
            return self._ids.get(tokens)
        try:
            return self._ids.get(tokens.encode() if self.generation == "qwen" else token_bytes(tokens))
        except (TokenizerError, UnicodeEncodeError):
            return None

    # -- chat ------------------------------------------------------------------------------------------------
    def chat_prompt(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> list[int]:
        """Ids of a conversation, `messages` being [{"role": ..., "content": ...}, ...].

        Nothing in the messages or tools becomes a control token, whatever it says; only in the content of assistant
        messages do the non-control added tokens (<think>, <tool_call>) stand for themselves, as the model wrote them.
        Qwen-1 uses ChatML, later generations their Jinja template. Raises TokenizerError.
        """
        if self.template is None:
            if tools:
                raise TokenizerError("Qwen-1 has no chat template with tools; describe them in a message")
            return chat.chatml(self, messages, add_generation_prompt)[1]
        text, marker = self.template.render(messages, tools, add_generation_prompt, template_kwargs)
        return self._encode(text, self._all_special, marker)

    def chat_text(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> str:
        """The conversation as text, for reading; encoding it would let messages forge control tokens."""
        if self.template is None:
            return chat.chatml(self, messages, add_generation_prompt)[0]
        text, marker = self.template.render(messages, tools, add_generation_prompt, template_kwargs)
        return text.replace(marker, "")


class StreamDecoder:
    """Ids to text, one by one: holds back an incomplete UTF-8 character, so that the pieces join to decode(all)."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, possibly "". Raises TokenizerError for an id without a token."""
        raw = self._tokenizer.token_bytes(token_id)
        return "" if self._skip and self._tokenizer.is_control(token_id) else self._utf8.decode(raw)

    def flush(self) -> str:
        """What is still held back, incomplete characters as U+FFFD; the decoder starts anew."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def to_nfc(text: str) -> str:
    """`text` in normal form C, in time that stays linear for hostile runs of combining marks."""
    if text.isascii():
        return text
    sample = text[::8]
    if _marks_run(sample, _MARKS_RUN // 8).search(sample) or any(c in text for c in _DOUBLE_MARKS):
        for char, marks in _DOUBLE_MARKS.items():
            text = text.replace(char, marks)
        # normalize() sorts marks by insertion, which is quadratic; a stable sort by class gives the same order
        run = _marks_run(text, _MARKS_RUN)
        text = run.sub(lambda m: "".join(sorted(m.group(), key=unicodedata.combining)), text)
    return unicodedata.normalize("NFC", text)


def _marks_run(text: str, length: int) -> re.Pattern[str]:
    """Matches `length` or more of the combining marks in `text`, one after the other."""
    marks = "".join(c for c in set(text) if unicodedata.combining(c))
    return re.compile(f"[{marks}]{{{length},}}" if marks else "(?!)")


def _has_long_space(text: str) -> bool:
    """True when _LONG_SPACE or more white-space characters follow one another."""
    n = _LONG_SPACE
    for k in range(0, len(text), n) if len(text) >= n else ():  # such a run covers a multiple of n
        before, after = text[max(0, k - n) : k], text[k : k + n]
        if len(before) - len(before.rstrip()) + len(after) - len(after.lstrip()) >= n:
            return True
    return False


@lru_cache(64)
def _any_of(tokens: frozenset[str]) -> re.Pattern[str]:
    """Matches any of `tokens`, the longest that fits."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def _id_list(ids: Any) -> list[int]:
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    return [ids] if isinstance(ids, int) else list(ids)


def _from_rust(error: BaseException, what: str) -> BaseException:
    """TokenizerError for an exception of tiktoken; its panics derive from BaseException. Others stay as they are."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return TokenizerError(f"{what}: {str(error)[:300]}")
    return error
