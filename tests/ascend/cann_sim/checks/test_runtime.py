"""The runtime: memory that is poisoned and accounted for, streams in order, graphs that replay and update."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from pathlib import Path

import acl
import pytest
from acl import LIB, Refused

NAN = b"\xff"


@pytest.fixture(autouse=True)
def device() -> None:
    LIB.aclInit(None)
    acl.ok(LIB.aclrtSetDevice(0))


def test_fresh_memory_is_poison() -> None:
    assert acl.read(acl.malloc(10000), 10000) == NAN * 10000


def test_big_allocation_costs_nothing_and_is_poison_to_its_end() -> None:
    n = 20 << 30
    big = acl.malloc(n)
    assert acl.read(ctypes.c_void_p(big.value + n - 100), 100) == NAN * 100
    acl.ok(LIB.aclrtFree(big))


def test_memory_is_accounted_for() -> None:
    def free() -> int:
        left, total = ctypes.c_size_t(), ctypes.c_size_t()
        acl.ok(LIB.aclrtGetMemInfo(0, ctypes.byref(left), ctypes.byref(total)))
        assert total.value == 64 << 30
        return left.value

    before = free()
    block = acl.malloc(1 << 30)
    assert free() == before - (1 << 30)
    with pytest.raises(Refused, match="207001"):  # ACL_ERROR_RT_MEMORY_ALLOCATION
        acl.malloc(before)
    acl.ok(LIB.aclrtFree(block))
    assert free() == before


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("freed", "use after free: aclrtMemcpy source"),
        ("overrun", "out of bounds: aclrtMemcpy source"),
        ("host", "is host memory, the copy's direction says otherwise"),
        ("device as host", "is device memory, the copy's direction says otherwise"),
        ("twice", "was freed before"),
        ("never", "is not an allocation"),
    ],
)
def test_misuse_of_memory_is_named(what: str, match: str) -> None:
    block, out = acl.malloc(4096), ctypes.create_string_buffer(8192)
    with pytest.raises(Refused, match=match):
        if what == "freed":
            acl.ok(LIB.aclrtFree(block))
            acl.read(block, 16)
        elif what == "overrun":
            acl.copy(out, block, 8192, acl.D2H)
        elif what == "host":
            acl.copy(out, out, 16, acl.D2H)
        elif what == "device as host":
            acl.copy(acl.malloc(64), block, 16, acl.H2D)
        elif what == "twice":
            acl.ok(LIB.aclrtFree(block))
            acl.ok(LIB.aclrtFree(block))
        else:
            acl.ok(LIB.aclrtFree(ctypes.c_void_p(block.value + 256)))


def test_queued_use_after_free_fails_the_stream() -> None:
    block, on, gate = acl.malloc(4096), acl.stream(), threading.Event()
    acl.call(on, lambda: gate.wait(10) and None)
    acl.fill(block, 1, 4096, on)
    acl.ok(LIB.aclrtFree(block))  # as a host would that forgot to synchronise
    gate.set()
    with pytest.raises(Refused, match="507035: use after free: aclrtMemsetAsync"):
        acl.sync(on)
    acl.sync(on)  # an error is told once


def test_host_code_that_dereferences_device_memory_is_named() -> None:
    script = "import acl, ctypes; acl.LIB.aclInit(None); acl.LIB.aclrtSetDevice(0); ctypes.string_at(acl.malloc(64), 4)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -11 and "host code dereferenced" in done.stderr and "memory of device 0" in done.stderr


def test_streams_are_asynchronous_and_in_order() -> None:
    block, on, gate, seen = acl.malloc(64), acl.stream(), threading.Event(), []
    acl.call(on, lambda: gate.wait(10) and None)
    for value in (1, 2, 3):
        acl.fill(block, value, 64, on)
        acl.call(on, lambda value=value: seen.append(value))
    status = ctypes.c_int()
    acl.ok(LIB.aclrtStreamQuery(on, ctypes.byref(status)))
    assert not seen and acl.read(block, 64) == NAN * 64 and status.value == 1  # not ready
    gate.set()
    acl.sync(on)
    assert seen == [1, 2, 3] and acl.read(block, 64) == b"\3" * 64


def test_an_event_orders_two_streams() -> None:
    first, second, done, gate, seen = acl.stream(), acl.stream(), acl.event(), threading.Event(), []
    acl.call(first, lambda: gate.wait(10) and None)
    acl.call(first, lambda: seen.append("first"))
    acl.ok(LIB.aclrtRecordEvent(done, first))
    acl.ok(LIB.aclrtStreamWaitEvent(second, done))
    acl.call(second, lambda: seen.append("second"))
    time.sleep(0.05)
    assert not seen
    gate.set()
    acl.sync(second)
    assert seen == ["first", "second"]


def test_without_an_event_streams_do_not_wait() -> None:
    first, second, gate, seen = acl.stream(), acl.stream(), threading.Event(), []
    acl.call(first, lambda: gate.wait(10) and None)
    acl.call(second, lambda: seen.append("second"))
    acl.sync(second)
    assert seen == ["second"]
    gate.set()
    acl.sync(first)


def test_a_destroyed_stream_is_named() -> None:
    on = acl.stream()
    acl.ok(LIB.aclrtDestroyStream(on))
    with pytest.raises(Refused, match="a stream was used after its destruction"):
        acl.sync(on)


def test_virtual_memory() -> None:
    unit = 2 << 20
    address = acl.made(LIB.aclrtReserveMemAddress, acl.size(4 * unit), acl.size(0), None, ctypes.c_uint64(1))
    with pytest.raises(Refused, match="unmapped"):
        acl.write(address, b"x")
    handle = acl.made(LIB.aclrtMallocPhysical, acl.size(unit), None, ctypes.c_uint64(0))
    acl.ok(LIB.aclrtMapMem(address, acl.size(unit), acl.size(0), handle, ctypes.c_uint64(0)))
    assert acl.read(address, 8) == NAN * 8
    acl.write(address, b"x")
    with pytest.raises(Refused, match="unmapped"):  # the second unit has no memory yet
        acl.read(ctypes.c_void_p(address.value + unit - 4), 8)
    with pytest.raises(Refused, match="still mapped"):
        acl.ok(LIB.aclrtFreePhysical(handle))
    acl.ok(LIB.aclrtUnmapMem(address))
    acl.ok(LIB.aclrtFreePhysical(handle))
    acl.ok(LIB.aclrtReleaseMemAddress(address))
    with pytest.raises(Refused, match="use after free"):
        acl.read(address, 1)


def captured(on: ctypes.c_void_p) -> ctypes.c_void_p:
    return acl.made(lambda out: LIB.aclmdlRICaptureEnd(on, out))


def test_a_graph_replays_on_new_contents() -> None:
    source, to, on = acl.malloc(64), acl.malloc(64), acl.stream()
    acl.ok(LIB.aclmdlRICaptureBegin(on, 0))
    acl.copy(to, source, 64, acl.D2D, on)
    graph = captured(on)
    acl.sync(on)
    assert acl.read(to, 64) == NAN * 64  # capturing runs nothing
    for data in (b"a" * 64, b"b" * 64):
        acl.write(source, data)
        acl.ok(LIB.aclmdlRIExecuteAsync(graph, on))
        acl.sync(on)
        assert acl.read(to, 64) == data


def test_synchronising_while_capturing_spoils_the_capture() -> None:
    on = acl.stream()
    acl.ok(LIB.aclmdlRICaptureBegin(on, 0))
    with pytest.raises(Refused, match="107025"):
        acl.sync(on)
    with pytest.raises(Refused, match="a stream was synchronised while capturing"):
        captured(on)


def test_a_waiting_stream_joins_the_capture() -> None:
    source, to, on, other, forked = acl.malloc(8), acl.malloc(8), acl.stream(), acl.stream(), acl.event()
    acl.write(source, b"12345678")
    acl.ok(LIB.aclmdlRICaptureBegin(on, 0))
    acl.ok(LIB.aclrtRecordEvent(forked, on))
    acl.ok(LIB.aclrtStreamWaitEvent(other, forked))
    acl.copy(to, source, 8, acl.D2D, other)
    graph = captured(on)
    acl.sync(other)
    assert acl.read(to, 8) == NAN * 8
    acl.ok(LIB.aclmdlRIExecuteAsync(graph, on))
    acl.sync(on)
    assert acl.read(to, 8) == b"12345678"


def updatable(block: ctypes.c_void_p, on: ctypes.c_void_p) -> tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]:
    """(graph, task group, event): fills block with 1, once the event has been recorded."""
    ready = acl.event(acl.EXTERNAL)
    acl.ok(LIB.aclmdlRICaptureBegin(on, 0))
    acl.ok(LIB.aclrtStreamWaitEvent(on, ready))
    acl.ok(LIB.aclrtResetEvent(ready, on))
    acl.ok(LIB.aclmdlRICaptureTaskGrpBegin(on))
    acl.fill(block, 1, 8, on)
    group = acl.made(lambda out: LIB.aclmdlRICaptureTaskGrpEnd(on, out))
    return captured(on), group, ready


def test_a_replay_sees_the_task_update_it_waits_for() -> None:
    block, on, updating = acl.malloc(8), acl.stream(), acl.stream()
    graph, group, ready = updatable(block, on)
    for value in (7, 9):
        acl.ok(LIB.aclmdlRIExecuteAsync(graph, on))  # replayed first, updated after
        acl.ok(LIB.aclmdlRICaptureTaskUpdateBegin(updating, group))
        acl.fill(block, value, 8, updating)
        acl.ok(LIB.aclmdlRICaptureTaskUpdateEnd(updating))
        acl.ok(LIB.aclrtRecordEvent(ready, updating))
        acl.sync(on)
        assert acl.read(block, 8) == bytes([value]) * 8


def test_a_task_update_must_match_its_group() -> None:
    block, on, updating = acl.malloc(8), acl.stream(), acl.stream()
    _, group, _ = updatable(block, on)
    acl.ok(LIB.aclmdlRICaptureTaskUpdateBegin(updating, group))
    with pytest.raises(Refused, match="0 tasks for a group of 1"):
        acl.ok(LIB.aclmdlRICaptureTaskUpdateEnd(updating))
    acl.ok(LIB.aclmdlRICaptureTaskUpdateBegin(updating, group))
    acl.copy(block, acl.malloc(8), 8, acl.D2D, updating)  # another operation than was captured
    acl.ok(LIB.aclmdlRICaptureTaskUpdateEnd(updating))
    with pytest.raises(Refused, match="puts aclrtMemcpyAsync where aclrtMemsetAsync was captured"):
        acl.sync(updating)


def test_a_replay_whose_event_never_comes_is_reported() -> None:
    on = acl.stream()
    graph, _, _ = updatable(acl.malloc(8), on)
    acl.ok(LIB.aclmdlRIExecuteAsync(graph, on))
    with pytest.raises(Refused, match="for an event that nobody recorded"):
        acl.sync(on)


def test_another_devices_memory_needs_its_stream() -> None:
    acl.ok(LIB.aclrtSetDevice(1))
    theirs = acl.malloc(64)
    acl.ok(LIB.aclrtSetDevice(0))
    on = acl.stream()
    acl.ok(LIB.aclrtValueWrite(theirs, ctypes.c_uint64(1), 0, on))
    with pytest.raises(Refused, match=r"wrong device: aclrtValueWrite.* of device 1, used on a stream of device 0"):
        acl.sync(on)
    mine = acl.malloc(64)
    acl.write(theirs, b"p" * 64)
    acl.copy(mine, theirs, 64, acl.D2D, on)  # a copy between devices is allowed
    acl.sync(on)
    assert acl.read(mine, 64) == b"p" * 64


def test_an_unknown_operator_is_refused_by_name() -> None:
    with pytest.raises(Refused, match="aclop 'NoSuchOp' is not simulated"):
        acl.ok(LIB.aclopCompileAndExecute(b"NoSuchOp", *([0] * 10), None))
