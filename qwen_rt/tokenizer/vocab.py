"""Vocabularies as bytes: `qwen.tiktoken` files, and byte-level `vocab` + `merges` turned into tiktoken ranks.

tiktoken merges the adjacent pair whose concatenation has the lowest rank; a merge list fires only for the pairs it
names. Both give the same tokens when every ranked token comes from the one pair that BPE itself would build it from;
`merge_ranks` keeps exactly those and leaves the others decodable but never produced.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.errors import TokenizerError
from qwen_rt.native import extension
from qwen_rt.texts import Texts

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

MAX_TOKEN_BYTES = 1 << 16  # longest token accepted; Qwen's longest has 128
MAX_ID = 1 << 24  # highest id accepted; Qwen's vocabularies end below 2^18


def _byte_level_alphabet() -> list[str]:
    """The 256 characters of byte-level BPE: printable Latin-1 stands for itself, the rest for U+0100 and up."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(b) if b in shown else chr(next(stand_ins)) for b in range(256)]


BYTE_CHARS = _byte_level_alphabet()
# Latin-1 characters outside the alphabet map above U+00FF, so that encoding them to Latin-1 fails.
_TO_LATIN1 = {b: 0x2400 for b in range(256)} | {ord(c): b for b, c in enumerate(BYTE_CHARS)}


def token_bytes(token: str) -> bytes:
    """The bytes a byte-level token string stands for. Raises TokenizerError for characters outside the alphabet."""
    try:
        return token.translate(_TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError:
        raise TokenizerError(f"vocabulary token {token[:60]!r} is not byte-level text") from None


def token_text(token: bytes) -> str:
    """The byte-level string of `token`, as `vocab.json` spells it."""
    return "".join(BYTE_CHARS[b] for b in token)


@dataclass
class Vocab:
    """A byte vocabulary. `ranks` is what tiktoken merges by; a rank is the token's id unless `rank_ids` maps it."""

    ranks: dict[bytes, int]
    rank_ids: list[int] | None = None
    unmerged: dict[int, bytes] = field(default_factory=dict)  # ids that decode but that no text encodes to

    def by_id(self) -> dict[int, bytes]:
        """id -> bytes of every token."""
        ranks: Iterable[int] = self.ranks.values()
        ids = ranks if self.rank_ids is None else map(self.rank_ids.__getitem__, ranks)
        return dict(zip(ids, self.ranks, strict=True)) | self.unmerged


def check_id(token_id: Any, token: object) -> int:
    """`token_id` as an int in range. Raises TokenizerError."""
    is_int = hasattr(token_id, "__index__") and not isinstance(token_id, bool)
    if not is_int or not 0 <= token_id < MAX_ID:
        raise TokenizerError(f"token {str(token)[:60]!r} has id {token_id!r}; ids are integers in 0..{MAX_ID - 1}")
    return int(token_id)


def parse_tiktoken(data: bytes, source: str) -> dict[bytes, int]:
    """A `.tiktoken` file (base64 token, space, rank per line) as bytes -> rank. Raises TokenizerError."""
    ranks: dict[bytes, int] = {}
    line = b""
    try:
        for line in filter(None, data.splitlines()):
            coded, rank = line.split()
            token = base64.b64decode(coded, validate=True)
            if not 0 < len(token) <= MAX_TOKEN_BYTES or token in ranks:
                raise ValueError("empty, enormous or repeated token")
            ranks[token] = check_id(int(rank), token)
    except ValueError as e:  # binascii.Error and TokenizerError are ValueErrors too
        raise TokenizerError(f"{source}: {line[:60]!r} is not 'base64-token rank': {e}") from None
    return ranks


def check_ranks(ranks: dict[bytes, int], source: str) -> dict[bytes, int]:
    """`ranks` when it can serve any text: distinct ids, all 256 bytes. Raises TokenizerError."""
    if len(set(ranks.values())) != len(ranks):
        raise TokenizerError(f"{source}: an id is given to more than one token")
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise TokenizerError(f"{source}: {len(missing)} single-byte tokens are missing, the first is {missing[0]:#04x}")
    return ranks


def merge_ranks(
    tokens: Sequence[str],
    ids: Sequence[int] | NDArray[np.int64],
    merges: Sequence[str | Sequence[str]],
    source: str,
) -> Vocab:
    """Byte-level tokens with their ids, and merges in order of priority ("a b" or ["a", "b"]), as tiktoken ranks.

    Raises TokenizerError when the vocabulary is malformed or a merge makes no token of it.
    """
    return _natively(tokens, ids, merges) or _by_definition(tokens, ids, merges, source)


def _by_definition(
    tokens: Iterable[str], ids: Iterable[int], merges: Iterable[str | Sequence[str]], source: str
) -> Vocab:
    """merge_ranks()."""
    vocab: dict[str, int] = {}
    for token, token_id in zip(tokens, ids.tolist() if isinstance(ids, np.ndarray) else ids, strict=True):
        if not isinstance(token, str) or not 0 < len(token) <= MAX_TOKEN_BYTES:
            raise TokenizerError(f"{source}: vocabulary entry {str(token)[:60]!r} is empty, enormous or no string")
        if type(token_id) is not int or not 0 <= token_id < MAX_ID:
            check_id(token_id, token)
        if token in vocab:
            raise TokenizerError(f"{source}: token {token!r} is listed twice, as {vocab[token]} and {token_id}")
        vocab[token] = token_id
    raw = dict(zip(vocab.values(), _all_bytes(vocab), strict=True))
    if len(raw) != len(vocab):
        raise TokenizerError(f"{source}: an id is given to more than one token")
    bytes_first = [vocab.get(c, -1) for c in BYTE_CHARS]
    if -1 in bytes_first:
        raise TokenizerError(f"{source}: the single-byte token {bytes_first.index(-1):#04x} is missing")

    rank_ids = sorted(bytes_first) + _live_merges(vocab, bytes_first, merges, source)
    ranks = {raw.pop(token_id): rank for rank, token_id in enumerate(rank_ids)}
    return Vocab(ranks, None if rank_ids == list(range(len(rank_ids))) else rank_ids, raw)


def _all_bytes(tokens: Collection[str]) -> Iterator[bytes]:
    """token_bytes() of each, all at once: every character stands for one byte."""
    try:
        everything = token_bytes("".join(tokens))
    except TokenizerError:
        return map(token_bytes, tokens)  # says of which
    ends = list(accumulate(map(len, tokens)))
    return (everything[start:end] for start, end in zip([0, *ends], ends, strict=False))


def _line(a: str, b: str) -> str:
    return a + " " + b


def _natively(
    tokens: Sequence[str], ids: Sequence[int] | NDArray[np.int64], merges: Sequence[str | Sequence[str]]
) -> Vocab | None:
    """merge_ranks() by the native extension; None without it, or where something is at fault."""
    native = extension()
    if native is None or not (isinstance(ids, np.ndarray) or set(map(type, ids)) <= {int}):
        return None
    try:
        texts, numbers = Texts.of(tokens), np.asarray(ids, np.int64)
        try:
            lines = Texts.of(merges)  # type: ignore[arg-type]
        except TypeError:
            lines = Texts.of([m if isinstance(m, str) else _line(*m) for m in merges])
    except (TypeError, UnicodeEncodeError, OverflowError):
        return None
    found = native.merge_ranks(texts.data, texts.ends, numbers, lines.data, lines.ends, MAX_TOKEN_BYTES, MAX_ID)
    return found and Vocab(*found)


def _live_merges(
    vocab: Mapping[str, int], single: list[int], merges: Iterable[str | Sequence[str]], source: str
) -> list[int]:
    """Ids of the tokens that merging can make, in the order of their merges."""
    made = dict.fromkeys(single, -1)  # id -> rank of the merge that makes it; -1 for bytes
    left: dict[int, int] = {}
    right: dict[int, int] = {}
    pairs: dict[tuple[int, int], int] = {}
    unmade: set[int] = set()  # halves that no merge so far had made
    rank = -1
    try:
        for rank, merge in enumerate(merges):
            a, b = merge.split(" ") if isinstance(merge, str) else merge
            pair = p, q = vocab[a], vocab[b]
            token = vocab[a + b]
            if pair in pairs:
                raise ValueError("listed twice")
            pairs[pair] = limit = rank
            if p not in made or q not in made:
                unmade |= {p, q} - made.keys()
                continue
            # Undo the newest merge beside the seam, again and again: had the two tokens now at the seam been merged
            # before it (at equal rank the left one goes first), BPE would never have come to this pair.
            while True:
                made_p, made_q = made[p], made[q]
                if made_p > made_q:
                    limit, p = made_p, right[p]
                elif made_q >= 0:
                    limit, q = made_q + 1, left[q]
                else:
                    made[token], left[token], right[token] = rank, *pair
                    break
                if pairs.get((p, q), limit) < limit:
                    break
    except (KeyError, ValueError, TypeError, AttributeError) as e:
        why = f"{e} is not in the vocabulary" if isinstance(e, KeyError) else str(e)
        raise TokenizerError(f"{source}: merge {rank} cannot be used: {why[:120]}") from None
    if late := unmade & made.keys():
        raise TokenizerError(f"{source}: a merge uses token {min(late)} before the merge that makes it")
    return [token for token, made_at in made.items() if made_at >= 0]
