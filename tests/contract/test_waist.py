"""Every usable backend, every operation of the waist, against the float64 reference (qwen_rt/backends/contract.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qwen_rt.backends import contract, select
from qwen_rt.backends.base import Backend
from qwen_rt.dtypes import DType


@pytest.fixture(scope="module")
def backend(backend_case: tuple[str, DType, str]) -> Iterator[Backend]:
    name, dtype, isa = backend_case
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_RT_CPU_ISA", isa)
        opened = select.open_backend(name, dtype=dtype)[0]
    assert not isa or isa in opened.kernels()["linear"]
    yield opened
    if isa:
        select.open_backend(name)  # back to the best instruction set, which is the process's, not the object's


@pytest.mark.parametrize("op", contract.OPS)
def test_op(backend: Backend, op: str) -> None:
    results = list(contract.run(backend, [op]))
    wrong = [f"{r.case}: error {r.error:.3g}, bound {r.bound:.3g}" for r in results if not r.ok]
    assert not wrong, f"{op}: {len(wrong)} of {len(results)} cases are wrong\n  " + "\n  ".join(wrong[:20])
    assert any(not r.declined for r in results), f"{op}: every case was declined: {results[0].declined}"


def test_says_what_it_is(backend: Backend) -> None:
    free, total = backend.memory()
    assert 0 < free <= total
    assert backend.compute_dtype in backend.caps.compute_dtypes
    assert backend.caps.kv_block > 0 and backend.caps.kv_dtypes and backend.caps.dense_dtypes
    assert backend.kernels(), "kernels() tells report() what serves each operation"
