"""Builds the native CPU extension `qwen_rt._cpu` (pybind11, no torch linkage). Everything else is in pyproject.toml."""
