"""Texts: as a list of strings, and only of UTF-8."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_rt.texts import Texts

STRINGS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=8)


@given(strings=STRINGS, data=st.data())
def test_as_a_list(strings: list[str], data: st.DataObject) -> None:
    texts = Texts.of(strings)
    assert len(texts) == len(strings) and list(texts) == strings and texts == strings and texts.valid()
    assert [texts[i] for i in range(-len(strings), len(strings))] == strings * 2
    assert Texts.of(["a\n", *strings]) == ["a\n", *strings]
    assert texts[1:5:2] == strings[1:5:2] and Texts.of(texts) is texts
    assert texts.lengths.tolist() == [len(s.encode()) for s in strings]
    wanted = data.draw(st.lists(st.booleans(), min_size=len(strings), max_size=len(strings)))
    kept = texts.where(np.array(wanted, bool))
    assert kept == [s for s, keep in zip(strings, wanted, strict=True) if keep] and kept.valid()


@given(text=st.text("aä\n你", max_size=12))
def test_lines(text: str) -> None:
    lines = Texts.lines(text)
    assert lines == text.split("\n")[:-1] and lines.valid()


def test_mistakes() -> None:
    with pytest.raises(TypeError):
        Texts.of(["a", 5])  # type: ignore[list-item]
    with pytest.raises(UnicodeEncodeError):
        Texts.of(["a", "\ud800"])
    with pytest.raises(IndexError):
        Texts.of(["a"])[1]
    assert Texts.of(["a", "b"]) != ["a"] and Texts.of(["a"]) != "a"
    assert repr(Texts.of(["a"])) == "Texts(['a'])" and repr(Texts.of("abcd")) == "Texts(['a', 'b', 'c'], 4 in all)"


@pytest.mark.parametrize(
    ("data", "ends", "valid"),
    [(b"", [], True), (b"ab", [1, 2, 2], True), (b"\xc3\xa4", [0, 2], True), (b"\xc3\xa4", [1, 2], False),
     (b"a\xff", [1, 2], False), (b"\xed\xa0\x80", [3], False), (b"\xc0\x80", [2], False), (b"\xc3", [1], False)],
)  # fmt: skip
def test_each_is_utf8_for_itself(data: bytes, ends: list[int], valid: bool) -> None:
    assert Texts(data, np.array(ends, np.int64)).valid() is valid
