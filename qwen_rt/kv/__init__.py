"""Block manager and prefix cache: integers only."""

from qwen_rt.kv.block_manager import BlockManager, BlockTable

__all__ = ["BlockManager", "BlockTable"]
