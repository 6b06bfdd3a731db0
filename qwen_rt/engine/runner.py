"""Runner: one step of the graph, from scheduled chunks to chosen tokens."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
from torch import Tensor

from qwen_rt.backends.base import KV, BatchMeta
from qwen_rt.engine.scheduler import Chunk
from qwen_rt.engine.sequence import Sequence, TokenLogprob
from qwen_rt.model import QwenModel


class Runner:
    """Drives the model over its paged cache; holds no state of any request."""

    def __init__(self, model: QwenModel, kv: KV) -> None:
        self.model = model
        self.backend = model.backend
        self.kv = kv

    @torch.inference_mode()
    def run(self, step: SequenceOf[Chunk]) -> list[tuple[Sequence, int, TokenLogprob | None]]:
        """Compute a step; a chosen token for each sequence whose last known token was in it."""
        hidden = self.hidden(step)
        sampled: list[Sequence] = []
        rows: list[int] = []
        end = 0
        for chunk in step:
            end += len(chunk.slots)
            if chunk.stop == len(chunk.seq.ids):
                sampled.append(chunk.seq)
                rows.append(end - 1)
        if not rows:
            return []
        if len(rows) < end:
            hidden = hidden[torch.tensor(rows, device=hidden.device)]
        logits = self.model.logits(hidden)
        wanted = [row for row, seq in enumerate(sampled) if seq.params.logprobs is not None]
        # sample() may overwrite the logits, so the raw ones are kept first.
        raw = logits[torch.tensor(wanted, device=logits.device)].clone() if wanted else None
        tokens = self.backend.sample(logits, [seq.sample_row() for seq in sampled])
        found: dict[int, TokenLogprob] = {}
        if raw is not None:
            scores = raw.log_softmax(-1)
            for row, score in zip(wanted, scores, strict=True):
                found[row] = _logprob(score, tokens[row], sampled[row].params.logprobs or 0)
        return [(seq, token, found.get(row)) for row, (seq, token) in enumerate(zip(sampled, tokens, strict=True))]

    def hidden(self, step: SequenceOf[Chunk]) -> Tensor:
        """The graph's output [T, H] for the step's rows."""
        ids: list[int] = []
        positions: list[int] = []
        alphas: list[float] = []
        slots: list[int] = []
        for chunk in step:
            seq, size = chunk.seq, len(chunk.slots)
            ids += seq.ids[chunk.start : chunk.stop]
            positions += range(chunk.start, chunk.stop)
            alphas += [seq.alpha] * size
            slots += chunk.slots
        plan: Any = self.backend.plan(
            BatchMeta(
                q_lens=[len(chunk.slots) for chunk in step],
                kv_lens=[chunk.stop for chunk in step],
                block_table=[chunk.table.blocks for chunk in step],
                slots=slots,
            )
        )
        rope = self.model.rope_rows(positions, alphas)
        return self.model.forward(torch.tensor(ids, device=self.backend.device), plan, rope, self.kv)


def _logprob(scores: Tensor, token: int, top: int) -> TokenLogprob:
    best: tuple[tuple[int, float], ...] = ()
    if top:
        values, indices = scores.topk(min(top, scores.numel()))
        best = tuple(zip(indices.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(scores[token]), best)
