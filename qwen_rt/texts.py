"""Texts: many strings in one piece, as files have vocabularies; a Python string for each takes far longer to make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import overload

import numpy as np
from numpy.typing import NDArray


class Texts(Sequence[str]):
    """Strings one after the other in UTF-8: `data`, and where each of them ends (`ends`, int64 [n])."""

    __slots__ = ("data", "ends")

    def __init__(self, data: bytes, ends: NDArray[np.int64]) -> None:
        """Of bytes that valid() has not seen yet."""
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, strings: Sequence[str]) -> Texts:
        """The same strings. TypeError where one is none, UnicodeEncodeError where one has half a surrogate pair."""
        if isinstance(strings, Texts):
            return strings
        found = cls.lines("\n".join([*strings, ""]))
        if len(found) == len(strings):
            return found
        encoded = [s.encode() for s in strings]  # one has a line end
        return cls(b"".join(encoded), np.cumsum([len(s) for s in encoded], dtype=np.int64))

    @classmethod
    def lines(cls, text: str) -> Texts:
        """The lines of a text, without what follows the last line end. UnicodeEncodeError as of()."""
        data = np.frombuffer(text.encode(), np.uint8)
        line_end = data == ord("\n")
        ends = np.flatnonzero(line_end)
        kept = ~line_end
        kept[ends[-1] if len(ends) else 0 :] = False
        return cls(data[kept].tobytes(), ends - np.arange(len(ends)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Bytes of each."""
        return np.diff(self.ends, prepend=0)

    def valid(self) -> bool:
        """Whether each of them is UTF-8."""
        try:
            self.data.decode()
        except UnicodeDecodeError:
            return False
        starts = self.ends[self.ends < len(self.data)]
        return not ((np.frombuffer(self.data, np.uint8)[starts] & 0xC0) == 0x80).any()  # none in a character's midst

    def where(self, wanted: NDArray[np.bool_]) -> Texts:
        """Those that a mask [n] has True for."""
        kept = np.frombuffer(self.data, np.uint8)[np.repeat(wanted, self.lengths)]
        return Texts(kept.tobytes(), np.cumsum(self.lengths[wanted]))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return list(self)[index]
        at = range(len(self))[index]
        return self.data[self.ends[at - 1] if at else 0 : self.ends[at]].decode()

    def __iter__(self) -> Iterator[str]:
        return (self.data[start:end].decode() for start, end in pairwise([0, *self.ends.tolist()]))

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, (Texts, list)) else NotImplemented

    def __repr__(self) -> str:
        return f"Texts({self[:3]}, {len(self)} in all)" if len(self) > 3 else f"Texts({list(self)})"
