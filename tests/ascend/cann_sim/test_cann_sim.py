"""The software NPU's own checks, run where its libraries and torch_npu are: npu_env.py."""

from __future__ import annotations

import re
from pathlib import Path

import npu_env
import pytest

CHECKS = Path(__file__).parent / "checks"
PYTEST = ("-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-rs", "--timeout=600")


def passed(file: str, soc: str = "Ascend910B3", **env: str) -> int:
    """How many checks of a file passed; none failed."""
    output = npu_env.run(*PYTEST, str(CHECKS / file), soc=soc, CANNSIM_ON_ERROR="report", **env).stdout
    found = re.search(r"(\d+) passed", output)
    assert found, output
    return int(found[1])


@pytest.mark.timeout(900)
def test_runtime() -> None:
    assert passed("test_runtime.py", CANNSIM_DEVICES="2", CANNSIM_WAIT_TIMEOUT_S="1") >= 24


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("soc", "least"), [("Ascend910B3", 65), ("Ascend910A", 11)])
def test_operators(soc: str, least: int) -> None:
    # An error must not leave the task queue with operators to drop: every call is launched, and waited for, in order.
    assert passed("test_operators.py", soc, ASCEND_LAUNCH_BLOCKING="1", TASK_QUEUE_ENABLE="0") >= least


def test_graph() -> None:
    assert passed("test_graph.py") == 1


def test_freed_tensors_are_caught() -> None:
    """With torch_npu's caching allocator off, a queued operator that outlives its input is named."""
    script = (
        "import torch, torch_npu, ctypes\n"
        "a = torch.ones(64, device='npu:0'); b = torch.ones(64, device='npu:0'); torch.npu.synchronize()\n"
        "acl = ctypes.CDLL('libascendcl.so'); acl.aclrtFree(ctypes.c_void_p(a.data_ptr()))\n"
        "c = a + b; torch.npu.synchronize()\n"
    )
    done = npu_env.run("-c", script, check=False, PYTORCH_NO_NPU_MEMORY_CACHING="1", CANNSIM_ON_ERROR="report")
    assert done.returncode and re.search(r"ERROR 507035: aclnnAdd: use after free: tensor \(64\)", done.stderr), (
        done.stderr
    )
