"""Ascend NPUs through torch_npu, which is imported when a device is opened and never before."""

from qwen_rt.backends.ascend.backend import AscendBackend

__all__ = ["AscendBackend"]
