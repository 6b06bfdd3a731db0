"""Ascend NPUs through torch_npu. Probing imports neither that nor torch; opening a device imports both."""
