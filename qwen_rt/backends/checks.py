"""What every backend checks before it works: a step's metadata, a cache's room; and how much memory the host has."""

from __future__ import annotations

import os

from qwen_rt.backends.base import Backend, BatchMeta, KVSpec
from qwen_rt.errors import BackendError, OutOfMemory


def host_memory() -> tuple[int, int]:
    """(available, total) bytes of the machine's memory."""
    try:
        with open("/proc/meminfo") as f:
            info = {key: int(rest.split()[0]) * 1024 for key, rest in (line.split(":", 1) for line in f)}
        return info["MemAvailable"], info["MemTotal"]
    except (OSError, KeyError, ValueError):
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")


def check_meta(meta: BatchMeta, block_size: int) -> None:
    """Raise ValueError unless `meta` describes a step: lengths agree, tables reach, slots are distinct and in place."""
    num = len(meta.q_lens)
    if num == 0 or len(meta.kv_lens) != num or len(meta.block_table) != num:
        raise ValueError(
            f"a step needs one q_len, kv_len and block table row per sequence: got {num}, {len(meta.kv_lens)}, "
            f"{len(meta.block_table)}"
        )
    if sum(meta.q_lens) != len(meta.slots):
        raise ValueError(f"{len(meta.slots)} slots for {sum(meta.q_lens)} rows")
    if len(set(meta.slots)) != len(meta.slots):
        raise ValueError("two rows of the step share a slot")
    row = 0
    for b, (q_len, kv_len, table) in enumerate(zip(meta.q_lens, meta.kv_lens, meta.block_table, strict=True)):
        if not 1 <= q_len <= kv_len:
            raise ValueError(f"sequence {b}: q_len {q_len} must be within 1..kv_len ({kv_len})")
        used = table[: -(-kv_len // block_size)]
        if len(used) * block_size < kv_len:
            raise ValueError(f"sequence {b}: {len(table)} blocks of {block_size} cannot hold {kv_len} keys")
        if min(used) < 0 or len(set(used)) != len(used):
            raise ValueError(f"sequence {b}: block ids must be distinct and not negative: {list(used)}")
        for pos in range(kv_len - q_len, kv_len):
            if meta.slots[row] != used[pos // block_size] * block_size + pos % block_size:
                raise ValueError(
                    f"sequence {b}: slot {meta.slots[row]} is not where its block table puts position {pos}"
                )
            row += 1


def check_cache(backend: Backend, spec: KVSpec, num_blocks: int) -> None:
    """Raise BackendError or OutOfMemory unless `backend` offers such a cache and has room for it."""
    caps = backend.caps
    if spec.dtype not in caps.kv_dtypes or spec.block_size != caps.kv_block:
        raise BackendError(
            f"{backend.name} keeps caches of {', '.join(caps.kv_dtypes)} in blocks of {caps.kv_block}; "
            f"asked for {spec.dtype} in blocks of {spec.block_size}"
        )
    need, (free, _) = spec.block_bytes() * num_blocks, backend.memory()
    if need > free:
        raise OutOfMemory(
            f"a cache of {num_blocks} blocks needs {need} bytes and {free} are free; "
            "lower max_model_len or choose kv_cache='int8'"
        )
