"""Stop strings across token borders: emit text only once it can no longer become part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Scans text as it grows; the result does not depend on how the text was cut into pieces.

    The stop string whose end comes first wins; of several that end there, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are non-empty strings; with none, text passes through."""
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """Add text: (what may be emitted now, the stop string that was met or None). Nothing follows a stop."""
        if not self._stops:
            return piece, None
        text = self._held + piece
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, stop = min(found)
            self._held = ""
            return text[:start], stop
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """The text still held back, when generation ended for another reason."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - size :]):
            return size
    return 0
