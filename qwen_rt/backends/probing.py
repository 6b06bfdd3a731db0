"""What the device probes share: loading a vendor's library by name, and reading versions without importing."""

from __future__ import annotations

import ctypes
from importlib.metadata import PackageNotFoundError, version


def load_library(soname: str) -> tuple[ctypes.CDLL | None, str]:
    """(library, "") or (None, why): not found, or found and broken with the linker's own words."""
    try:
        return ctypes.CDLL(soname), ""
    except OSError as e:
        missing = str(e).startswith(soname) and "cannot open shared object file" in str(e)
        return None, f"{soname} not found" if missing else f"{soname} does not load: {e}"


def package_version(package: str) -> str | None:
    """Version of an installed distribution, or None; nothing is imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def gib(num_bytes: int) -> str:
    """Bytes as "79.1 GiB"."""
    return f"{num_bytes / 2**30:.1f} GiB"
