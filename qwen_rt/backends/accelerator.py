"""What plugins for devices with memory of their own share: checks before a launch, padding, the books of recordings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from qwen_rt.backends.base import KV, BatchMeta, Plan, Replay
from qwen_rt.backends.torch_backend import TorchBackend
from qwen_rt.config import Settings
from qwen_rt.errors import Declined


class NotRecordable(RuntimeError):
    """An operation of the step that works, but not from a recording; the message says why."""


class Accelerator(TorchBackend):
    """A device whose decode steps are recorded, up to a number of rows."""

    capture_rows: ClassVar[int] = 256
    """Largest batch that is recorded, unless QWEN_RT_GRAPH_ROWS says otherwise."""
    recordings: ClassVar[str] = "decode graphs"
    """What recordings are called, for kernels()."""

    def _open_books(self) -> None:
        rows = Settings.from_env().graph_rows
        self._capture_rows = self.capture_rows if rows is None else rows
        self._captures: dict[tuple[int, int], str] = {}  # (rows, blocks) -> "recorded", or why not

    def _capture_report(self) -> str:
        """Which steps are recorded and which are not, and why."""
        if self._capture_rows == 0:
            return "off (QWEN_RT_GRAPH_ROWS=0)"
        done = [f"{rows}x{blocks}" for (rows, blocks), why in self._captures.items() if why == "recorded"]
        eager = [f"{rows}x{blocks}: {why}" for (rows, blocks), why in self._captures.items() if why != "recorded"]
        told = f"{self.recordings} up to {self._capture_rows} rows"
        told += f", recorded (rows x blocks) {', '.join(done)}" if done else ", none recorded yet"
        return told + (f"; eager: {'; '.join(eager)}" if eager else "")

    def _recorded(self, rows: int, max_blocks: int, record: Callable[[], Replay]) -> Replay | None:
        """What record() makes, or None with the reason in the books. Declined: an operation that fails eagerly too."""
        replay, why = None, "recorded"
        if rows > self._capture_rows:
            why = f"beyond {self._capture_rows} rows (QWEN_RT_GRAPH_ROWS)"
        else:
            try:
                replay = record()
            except Declined:
                raise
            except NotRecordable as e:
                why = str(e)
            except RuntimeError as e:  # the framework's, or the driver's, when a stream cannot be captured
                why = f"could not be recorded: {e}"
        self._captures[rows, max_blocks] = why
        return replay

    def _check_dtype(self, what: str, *tensors: Tensor) -> None:
        for t in tensors:
            if t.dtype != self.dtype or t.device.type != self.device.type:
                raise TypeError(f"{what}: {t.dtype} on {t.device}; want {self.dtype} on {self.device}")

    def _check_queries(self, q: Tensor, kv: KV, plan: Plan) -> None:
        """That queries [T, Hq, D] are of the step and the cache."""
        check_blocks(kv, plan)
        spec = kv.spec
        if q.shape[0] != plan.rows or q.shape[1] % spec.num_kv_heads or q.shape[2] != spec.head_size:
            raise ValueError(
                f"queries {tuple(q.shape)} do not fit {plan.rows} rows and {spec.num_kv_heads} key heads of "
                f"{spec.head_size}"
            )
        self._check_dtype("attention", q)


def check_blocks(kv: Any, plan: Any) -> None:
    """That the step's blocks are of the cache."""
    if plan.num_blocks > kv.num_blocks:
        raise ValueError(f"the step uses block {plan.num_blocks - 1} of a cache of {kv.num_blocks} blocks")


def pad(meta: BatchMeta, seqs: int, dummy_block: int, block: int) -> BatchMeta:
    """`meta` of decode rows, padded to `seqs` sequences of one key on the page that no sequence owns."""
    more = seqs - len(meta.q_lens)
    return BatchMeta(
        [*meta.q_lens, *[1] * more],
        [*meta.kv_lens, *[1] * more],
        [*meta.block_table, *[[dummy_block]] * more],
        [*meta.slots, *[dummy_block * block] * more],
    )


def padding(seqs: int, dummy_block: int, block: int) -> BatchMeta:
    """A decode step of padding alone: what a recording is made on."""
    return pad(BatchMeta([], [], [], []), seqs, dummy_block, block)
