"""Runner: one step of the graph, from scheduled chunks to chosen tokens."""

from __future__ import annotations

import sys
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.backends.base import KV, BatchMeta, Plan, Replay, Tensor
from qwen_rt.engine.scheduler import Chunk
from qwen_rt.engine.sequence import Sequence, TokenLogprob
from qwen_rt.model import Last, QwenModel

FIRST_BLOCKS = 64  # blocks a sequence of the smallest recording may have; each next recording reaches 4 times as far


class Runner:
    """Drives the model over its paged cache; holds no state of any request.

    Where the backend can, a step that only decodes is replayed from a recording, made when its batch size and context
    (rounded up, see buckets()) first come.
    """

    def __init__(self, model: QwenModel, kv: KV) -> None:
        self.model = model
        self.backend = model.backend
        self.kv = kv
        self.replays: dict[tuple[int, int], Replay | None] = {}  # None: the backend wants this one run eagerly

    def run(self, step: SequenceOf[Chunk]) -> list[tuple[Sequence, int, TokenLogprob | None]]:
        """Compute a step; a chosen token for each sequence whose last known token was in it."""
        last = [i for i, chunk in enumerate(step) if chunk.stop == len(chunk.seq.ids)]
        sampled = [step[i].seq for i in last]
        replay = self._replay(step)
        if replay is None:
            with self.backend.computing():
                out = self.hidden(step, last)
                logits = self.model.logits(out) if last else out
        else:
            out = replay(self._inputs(step), _meta(step))
            logits = out if len(last) == len(step) else out[last]
        if not last:
            return []
        wanted = [row for row, seq in enumerate(sampled) if seq.params.logprobs is not None]
        # sample() may overwrite the logits, so the raw ones are kept first.
        raw = self.backend.array(logits[wanted]) if wanted else None
        tokens = self.backend.sample(logits, [seq.sample_row() for seq in sampled])
        found: dict[int, TokenLogprob] = {}
        if raw is not None:
            for row, score in zip(wanted, _log_softmax(raw), strict=True):
                found[row] = _logprob(score, tokens[row], sampled[row].params.logprobs or 0)
        return [(seq, token, found.get(row)) for row, (seq, token) in enumerate(zip(sampled, tokens, strict=True))]

    def hidden(self, step: SequenceOf[Chunk], last: SequenceOf[int] | None = None) -> Tensor:
        """The graph's output [T, H] for the step's rows; with `last`, [R, H] for the last rows of these chunks."""
        meta = _meta(step)
        rows = Last.of(last, meta, self.backend) if last is not None and len(last) < len(meta.slots) else None
        ids = np.array([i for chunk in step for i in chunk.seq.ids[chunk.start : chunk.stop]], dtype=np.int64)
        rope = self.model.rope_rows(meta.positions(), [chunk.seq.alpha for chunk in step for _ in chunk.slots])
        return self.model.forward(ids, self.backend.plan(meta), rope, self.kv, rows)

    # -- recordings ------------------------------------------------------------------------------------------
    def _replay(self, step: SequenceOf[Chunk]) -> Replay | None:
        """The recording that serves a step, made now if it is the first of its size; None to run eagerly."""
        if not self.backend.caps.capture or any(len(chunk.slots) != 1 for chunk in step):
            return None
        size = rows, max_blocks = buckets(len(step), max(len(chunk.table.blocks) for chunk in step))
        if size not in self.replays:
            made = (replay for (n, _), replay in self.replays.items() if n == rows and replay is not None)
            far = next((replay for replay in made if replay.max_blocks == sys.maxsize), None)
            with self.backend.computing():
                examples = [self.backend.tensor(x[:1].repeat(rows, axis=0)) for x in self._inputs(step)]
                self.replays[size] = far or self.backend.capture(self._decode, examples, self.kv, max_blocks)
        return self.replays[size]

    def _inputs(self, step: SequenceOf[Chunk]) -> list[NDArray[Any]]:
        """What a recorded step reads besides its metadata, each [B, ...]: ids, turns, and logn factors if any."""
        positions = [chunk.start for chunk in step]
        ids = np.array([chunk.seq.ids[chunk.start] for chunk in step], dtype=np.int64)
        inputs: list[NDArray[Any]] = [ids, self.model.rotary.turns(positions, [chunk.seq.alpha for chunk in step])]
        if self.model.config.logn:
            inputs.append(self.model.rotary.factors(positions))
        return inputs

    def _decode(self, inputs: SequenceOf[Tensor], plan: Plan) -> Tensor:
        """The step that is recorded: _inputs() -> float32 logits [B, V]."""
        ids, turns, *factors = inputs
        return self.model.logits(self.model.forward(ids, plan, self.model.rotary.rope(turns, *factors), self.kv))


def buckets(rows: int, blocks: int) -> tuple[int, int]:
    """(rows, blocks per sequence) of the recording that serves a step: powers of two to 16 rows, then multiples of 16;
    FIRST_BLOCKS times a power of four."""
    up = 1 << (rows - 1).bit_length() if rows <= 16 else -(-rows // 16) * 16
    reach = FIRST_BLOCKS
    while reach < blocks:
        reach *= 4
    return up, reach


def _meta(step: SequenceOf[Chunk]) -> BatchMeta:
    return BatchMeta(
        q_lens=[len(chunk.slots) for chunk in step],
        kv_lens=[chunk.stop for chunk in step],
        block_table=[chunk.table.blocks for chunk in step],
        slots=[slot for chunk in step for slot in chunk.slots],
    )


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    below = logits - logits.max(-1, keepdims=True)
    return below - np.log(np.exp(below).sum(-1, keepdims=True))


def _logprob(scores: NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    """Of one row [V]; among equals the lower id is first."""
    ids = np.argsort(-scores, kind="stable")[:top] if top else ()
    return TokenLogprob(token, float(scores[token]), tuple((int(i), float(scores[i])) for i in ids))
