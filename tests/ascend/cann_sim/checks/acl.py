"""The few AscendCL calls the runtime checks make, through ctypes: no torch, no torch_npu."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

LIB = ctypes.CDLL("libascendcl.so")
H2D, D2H, D2D = 1, 2, 3
EXTERNAL = 0x20  # ACL_EVENT_EXTERNAL
LIB.aclGetRecentErrMsg.restype = ctypes.c_char_p
HOST_FUNC = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_keep: list[Any] = []


class Refused(Exception):
    """A call that did not return 0; its text is aclGetRecentErrMsg."""


def error() -> str:
    """The latest message."""
    return str(LIB.aclGetRecentErrMsg().decode())


def ok(status: int) -> None:
    """Raise Refused unless status is 0."""
    if status:
        raise Refused(f"{status}: {error()}")


def made(create: Callable[..., int], *args: Any) -> ctypes.c_void_p:
    """The handle that create writes to its first argument."""
    handle = ctypes.c_void_p()
    ok(create(ctypes.byref(handle), *args))
    return handle


def size(n: int) -> ctypes.c_size_t:
    """A size_t argument."""
    return ctypes.c_size_t(n)


def malloc(n: int) -> ctypes.c_void_p:
    """n bytes of device memory."""
    return made(LIB.aclrtMalloc, size(n), 0)


def stream() -> ctypes.c_void_p:
    """A new stream of the current device."""
    return made(LIB.aclrtCreateStreamWithConfig, 0, 0)


def event(flag: int = 0) -> ctypes.c_void_p:
    """A new event."""
    return made(LIB.aclrtCreateEventExWithFlag, flag)


def copy(to: Any, source: Any, n: int, kind: int, on: ctypes.c_void_p | None = None) -> None:
    """aclrtMemcpy, or aclrtMemcpyAsync on a stream."""
    if on is None:
        ok(LIB.aclrtMemcpy(to, size(n), source, size(n), kind))
    else:
        ok(LIB.aclrtMemcpyAsync(to, size(n), source, size(n), kind, on))


def read(source: ctypes.c_void_p, n: int) -> bytes:
    """n bytes of device memory."""
    out = ctypes.create_string_buffer(n)
    copy(out, source, n, D2H)
    return out.raw


def write(to: ctypes.c_void_p, data: bytes) -> None:
    """Bytes into device memory."""
    copy(to, ctypes.create_string_buffer(data, len(data)), len(data), H2D)


def fill(to: ctypes.c_void_p, value: int, n: int, on: ctypes.c_void_p) -> None:
    """Queue n bytes of value."""
    ok(LIB.aclrtMemsetAsync(to, size(n), value, size(n), on))


def sync(on: ctypes.c_void_p) -> None:
    """Wait for a stream; Refused if anything on it failed."""
    ok(LIB.aclrtSynchronizeStream(on))


def call(on: ctypes.c_void_p, function: Callable[[], None]) -> None:
    """Queue a host function."""
    wrapped = HOST_FUNC(lambda _: function())
    _keep.append(wrapped)
    ok(LIB.aclrtLaunchHostFunc(on, wrapped, None))
