"""The Ascend backend through the unmodified torch_npu wheel over the software NPU, in a process and an environment of
its own (npu_env.py). What these tests prove, and what they cannot, is in cann_sim/README.md."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import npu_env
import pytest

from qwen_rt.backends import contract

A, B = "Ascend910A", "Ascend910B3"
INSIDE = sorted(p.name for p in (Path(__file__).parent / "inside").glob("test_*.py"))


def pytest_inside(*args: str, soc: str = "Ascend910B3", **env: str) -> str:
    """Run pytest in there; its output."""
    flags = ("-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-rs", "--timeout=800")
    return npu_env.run(*flags, *args, soc=soc, **env).stdout


def passed(output: str) -> int:
    """How many tests passed; none may have been skipped."""
    assert "skipped" not in output, output
    found = re.search(r"(\d+) passed", output)
    assert found, output
    return int(found[1])


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("soc", "kind"), [("Ascend910B3", "bfloat16"), ("Ascend910B3", "float16"), ("Ascend910A", "float16")]
)
def test_contract(soc: str, kind: str) -> None:
    """As over the CPU: tests/contract/test_waist.py, every operation."""
    output = pytest_inside(
        "tests/contract/test_waist.py", "-k", f"ascend-{kind}", soc=soc, QWEN_RT_CONTRACT_BACKEND="ascend"
    )
    assert passed(output) == len(contract.OPS) + 1


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", INSIDE)
def test_inside(name: str) -> None:
    assert passed(pytest_inside(f"tests/ascend/inside/{name}")) > 0


def test_devices_and_probe() -> None:
    done = npu_env.run("-m", "qwen_rt.cli.main", "devices", "--json", CANNSIM_HBM_MB="32768", CANNSIM_DEVICES="2")
    told = json.loads(done.stdout)["devices"]["ascend"]
    assert told["usable"] and told["rung"] == "simulated" and len(told["devices"]) == 2
    first = told["devices"][0]
    assert first["name"] == "Ascend910B3" and first["total_memory"] == 32 << 30 and "CANN 9.1.0" in first["detail"]
    assert "npu_fused_infer_attention_score" in told["kernels"]["attention"]
    old = npu_env.run("-m", "qwen_rt.cli.main", "devices", "--json", CANNSIM_CANN_VERSION="8.3.RC1")
    notes = json.loads(old.stdout)["devices"]["ascend"]["notes"]
    assert any("CANN is 8.3.RC1" in note for note in notes)


def test_the_ordinary_environment_has_no_wheel() -> None:
    """The tests around this one load torch_npu elsewhere, and nothing of it got in here."""
    npu_env.need()
    assert "torch_npu" not in sys.modules and not list(Path(sys.prefix).glob("lib/python*/site-packages/torch_npu"))
