"""Selection: names, order, reasons, plugins, QWEN_BACKEND; the probes over made-up machines; the null backend."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qwen_rt.backends import select
from qwen_rt.backends.ascend import probe as ascend_probe
from qwen_rt.backends.ascend.soc import soc_of
from qwen_rt.backends.base import BatchMeta, DeviceInfo, KVSpec, Probe, SampleRow
from qwen_rt.backends.cuda import probe as cuda_probe
from qwen_rt.backends.dcu import probe as dcu_probe
from qwen_rt.backends.null import NullBackend
from qwen_rt.backends.probing import load_library
from qwen_rt.backends.reference import ReferenceBackend
from qwen_rt.dtypes import DType
from qwen_rt.errors import BackendError
from qwen_rt.quant.formats import LinearFormat, LinearRows, RawLinear


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QWEN_BACKEND", "ROCM_PATH", "ASCEND_HOME_PATH"):
        monkeypatch.delenv(name, raising=False)


class Two(ReferenceBackend):
    """A device with indices 0 and 2."""

    name = "two"

    def __init__(self, index: int = 0, compute_dtype: DType | None = None) -> None:
        super().__init__(0, compute_dtype)
        self.index = index

    @classmethod
    def probe(cls) -> Probe:
        return Probe((DeviceInfo(0, "first", 1), DeviceInfo(2, "third", 1)), notes=("a fact",))


class Broken(ReferenceBackend):
    @classmethod
    def probe(cls) -> Probe:
        raise RuntimeError("boom")


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def install(**targets: str) -> None:
        found = [EntryPoint(name, value, select.ENTRY_POINT_GROUP) for name, value in targets.items()]
        monkeypatch.setattr("importlib.metadata.entry_points", lambda group: found)

    return install


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make exactly these backends usable."""

    def make(*usable: str) -> None:
        def probe(name: str) -> Probe:
            return (
                Probe((DeviceInfo(0, name, 1),), rung="device") if name in usable else Probe(reason=f"no {name} here")
            )

        monkeypatch.setattr(select, "probe", probe)
        monkeypatch.setattr(select, "backend_class", lambda name: type(name, (ReferenceBackend,), {"name": name}))

    return make


def test_parse_device() -> None:
    assert select.parse_device("cuda:1") == ("cuda", 1)
    assert select.parse_device(" CPU ") == ("cpu", None)
    for bad in ("", "cuda:", "cuda:-1", "cuda:x", "auto:0", "a b", ":0", "cuda:1:2"):
        with pytest.raises(BackendError, match="bad device"):
            select.parse_device(bad)


def test_auto_order_and_notes(machine: Callable[..., None]) -> None:
    machine("ascend", "cpu", "reference")
    backend, notes = select.open_backend()
    assert backend.name == "ascend"
    assert notes == ["passed over cuda: no cuda here", "passed over dcu: no dcu here"]


def test_reference_only_without_native_cpu(machine: Callable[..., None]) -> None:
    machine("reference")
    backend, notes = select.open_backend()
    assert backend.name == "reference" and "passed over cpu: no cpu here" in notes
    machine("cpu", "reference")
    with pytest.raises(BackendError, match="no device is usable") as told:
        select.open_backend(dtype="bfloat16")  # cpu is usable but declines: never quietly the reference
    assert "cpu cannot compute in bfloat16" in str(told.value) and "reference" not in str(told.value)


def test_named_device_is_never_replaced(machine: Callable[..., None]) -> None:
    machine("cpu", "reference")
    with pytest.raises(BackendError, match="dcu is not usable: no dcu here"):
        select.open_backend("dcu")


def test_environment_decides_what_auto_means(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine("cuda", "cpu", "reference")
    monkeypatch.setenv("QWEN_BACKEND", "reference")
    backend, notes = select.open_backend()
    assert backend.name == "reference" and notes == ["device reference (named by QWEN_BACKEND=reference)"]
    assert select.open_backend("cpu")[0].name == "cpu"
    monkeypatch.setenv("QWEN_BACKEND", "ascend")
    with pytest.raises(BackendError, match=r"ascend \(named by QWEN_BACKEND=ascend\) is not usable"):
        select.open_backend()
    monkeypatch.setenv("QWEN_BACKEND", "auto")
    assert select.open_backend()[0].name == "cuda"


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(BackendError, match=r"unknown device 'cdua'; known devices: auto, cuda, dcu, ascend.*reference"):
        select.open_backend("cdua")


def test_plugin(plugins: Callable[..., None]) -> None:
    plugins(two=f"{__name__}:Two", Cuda="nowhere:Hijack")
    assert select.names() == ["cuda", "dcu", "ascend", "two", "cpu", "reference"]
    backend, notes = select.open_backend("two:2")
    assert isinstance(backend, Two) and backend.index == 2 and notes[0] == "a fact"
    assert notes[1:] == [
        "no real device has been seen to run its kernels (evidence: compiled); `qwen-rt doctor two` checks"
    ]
    with pytest.raises(BackendError, match=r"two:1: no such device; found two:0 \(first\), two:2 \(third\)"):
        select.open_backend("two:1")
    with pytest.raises(BackendError, match=r"cannot compute in float16"):
        select.open_backend("two", dtype="float16")


def test_broken_plugins_are_reasons(plugins: Callable[..., None]) -> None:
    plugins(gone="no_such_module:X", odd=f"{__name__}:Missing", broken=f"{__name__}:Broken")
    probes = select.probe_all()
    assert "no_such_module:X does not import: ModuleNotFoundError" in probes["gone"].reason
    assert "AttributeError" in probes["odd"].reason
    assert "its probe() raised RuntimeError: boom" in probes["broken"].reason
    with pytest.raises(BackendError, match=r"gone is not usable: .*ModuleNotFoundError"):
        select.open_backend("gone")
    assert select.open_backend()[0].name in ("cuda", "dcu", "ascend", "cpu", "reference")


def python(code: str) -> str:
    """What a process of its own prints."""
    code = f"import sys; from qwen_rt.backends import select; {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOADED = "[m for m in sys.modules if m.split('.')[0] in ({})]"


def test_probes_are_quick_and_import_nothing_heavy() -> None:
    heavy = LOADED.format("'torch_npu', 'triton', 'cupy', 'transformers'")
    assert python(f"[select.probe(n) for n in ('cuda', 'dcu', 'ascend')]; print({heavy})") == "[]"
    if not any(Path("/dev").glob("nvidia*")):
        took = []
        for _ in range(5):
            start = time.perf_counter()
            for name in ("cuda", "dcu", "ascend"):
                select.probe(name)
            took.append(time.perf_counter() - start)
        assert min(took) < 0.05


def test_cpu_is_opened_without_torch() -> None:
    if usable := [name for name in ("cuda", "dcu", "ascend") if select.probe(name).usable]:
        pytest.skip(f"auto takes {usable[0]} here")
    loaded = LOADED.format("'torch',")
    assert python(f"print(select.open_backend('auto')[0].name, {loaded})") == "cpu []"
    assert python(f"import qwen_rt.llm; print({loaded})") == "[]"


NO_TORCH = """
sys.modules["torch"] = None  # as if it were not installed
from qwen_rt.cli.main import main
from qwen_rt.errors import BackendError
for name in ("reference", "cuda-emulated"):
    try:
        select.open_backend(name)
    except BackendError as e:
        print(e)
print(select.probe_all()["reference"].reason)
print(select.open_backend("auto")[0].name)
sys.stderr = sys.stdout
print(main(["doctor", "cpu"]))
"""


def test_torch_not_installed() -> None:
    *said, auto, doctor, status = python(NO_TORCH).splitlines()
    for line, what in zip([*said, doctor], ("reference", "cuda-emulated", "reference", "doctor"), strict=True):
        assert what in line and "needs PyTorch, which is not installed: `pip install torch`" in line
    assert auto == "cpu" and status == "1"


def test_a_package_may_probe_for_its_class(monkeypatch: pytest.MonkeyPatch, plugins: Callable[..., None]) -> None:
    asked = []
    monkeypatch.setattr(select, "backend_class", asked.append)
    monkeypatch.setattr(cuda_probe, "probe", lambda: Probe(reason="asked without the class"))
    assert select.probe("cuda").reason == "asked without the class" and not asked
    plugins(two=f"{__name__}:Two")
    for name in ("cpu", "reference", "two"):  # no module for it, or a third party's
        select.probe(name)
    assert asked == ["cpu", "reference", "two"]


# -- probes over made-up machines ----------------------------------------------------------------------------------
class Driver:
    """libcuda as ctypes would show it, with one card."""

    def __init__(self, init: int = 0, count: int = 1, fails: str = "", capability: int = 9) -> None:
        self.init, self.count, self.fails, self.capability = init, count, fails, capability

    def __getattr__(self, function: str) -> Callable[..., int]:
        def call(*args: Any) -> int:
            if function == self.fails:
                return 999
            into = getattr(args[0], "_obj", None)
            if function == "cuInit":
                return self.init
            if function == "cuGetErrorName":
                args[1]._obj.value = b"CUDA_ERROR_NO_DEVICE" if args[0] == 100 else b"CUDA_ERROR_UNKNOWN"
            elif function == "cuDeviceGetName":
                args[0].value = b"NVIDIA Test 9000"
            elif into is not None:
                into.value = {
                    "cuDriverGetVersion": 13010,
                    "cuDeviceGetCount": self.count,
                    "cuDeviceGet": 0,
                    "cuDeviceTotalMem_v2": 80 << 30,
                    "cuDeviceGetAttribute": self.capability
                    if function == "cuDeviceGetAttribute" and args[1] == 75
                    else 0,
                }[function]
            return 0

        return call


@pytest.mark.parametrize(
    ("built", "available", "says"),
    [
        ("14.0", True, "built for CUDA 14.0, and the driver serves CUDA 13.1; update the NVIDIA driver"),
        ("13.0", False, "finds no usable device"),
        ("12.8", True, ""),
    ],
)
def test_cuda_probe_of_torch(monkeypatch: pytest.MonkeyPatch, built: str, available: bool, says: str) -> None:
    monkeypatch.setattr(cuda_probe, "load_library", lambda name: (Driver(), ""))
    monkeypatch.setattr(cuda_probe, "launcher_missing", lambda: "")
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    found = select.probe("cuda")
    assert says in found.reason and found.usable == (not says)
    assert not found.usable or found.rung == "emulated"  # no card of ours has run it


def test_cuda_card_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_probe, "load_library", lambda name: (Driver(), ""))
    monkeypatch.setitem(sys.modules, "torch", None)
    reason = select.probe("cuda").reason
    assert "NVIDIA Test 9000" in reason and "PyTorch is not installed: install a build of it for CUDA" in reason


def test_cuda_card_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_probe, "load_library", lambda name: (Driver(capability=6), ""))
    found = select.probe("cuda")
    assert not found.usable and "need compute capability 7.5 or later" in found.reason


def test_load_library_says_why(tmp_path: Path) -> None:
    assert load_library("libno-such-thing.so.7") == (None, "libno-such-thing.so.7 not found")
    broken = tmp_path / "libbroken.so"
    broken.write_bytes(b"not an ELF file")
    library, why = load_library(str(broken))
    assert library is None and "does not load" in why and "not found" not in why


@pytest.mark.parametrize(
    ("driver", "says"),
    [
        ((None, "libcuda.so.1 not found"), ["no CUDA driver: libcuda.so.1 not found", "install the NVIDIA driver"]),
        ((Driver(init=100), ""), ["cuInit failed with error 100 (CUDA_ERROR_NO_DEVICE)", "CUDA_VISIBLE_DEVICES"]),
        ((Driver(init=999), ""), ["cuInit failed with error 999", "nvidia-smi"]),
        ((Driver(count=0), ""), ["lists no device"]),
        ((Driver(fails="cuDeviceTotalMem_v2"), ""), ["cuDeviceTotalMem_v2 failed with error 999"]),
        (
            (Driver(), ""),
            ["NVIDIA Test 9000, 80.0 GiB, compute capability 9.0, driver for CUDA 13.1", "is a CPU build", "CUDA 13.1"],
        ),
    ],
)
def test_cuda_probe(monkeypatch: pytest.MonkeyPatch, driver: Any, says: list[str]) -> None:
    monkeypatch.setattr(cuda_probe, "load_library", lambda name: driver)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = select.probe("cuda")
    assert not found.usable
    for text in says:
        assert text in found.reason


class Hip:
    """libgalaxyhip as ctypes would show it."""

    def __init__(self, count: int = 1, status: int = 0) -> None:
        self.count, self.status = count, status

    def hipGetDeviceCount(self, out: Any) -> int:
        out._obj.value = self.count
        return self.status


def test_dcu_probe_step_by_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def reason() -> str:
        found = select.probe("dcu")
        assert not found.usable
        return found.reason

    def hip(**kind: int) -> None:
        monkeypatch.setattr(dcu_probe, "load_library", lambda name: (Hip(**kind), ""))

    def touch(name: str) -> None:
        (tmp_path / name).mkdir(parents=True)

    monkeypatch.setattr(dcu_probe, "_ROOT", tmp_path)
    assert "/dev/kfd not found" in reason()
    touch("dev/kfd")
    assert "no DTK" in reason() and "/opt/dtk is missing" in reason()
    touch("opt/dtk")
    assert "/opt/hyhal is missing" in reason() and "-v /opt/hyhal" in reason()
    touch("opt/hyhal")
    assert "libgalaxyhip.so.5 not found; run `source /opt/dtk/env.sh`" in reason()
    monkeypatch.setattr(dcu_probe, "load_library", lambda name: (ctypes.CDLL(None), ""))
    assert "libgalaxyhip.so.5 is not its runtime" in reason() and "hipGetDeviceCount" in reason()
    hip(status=3)
    assert "hipGetDeviceCount failed with error 3" in reason() and "hy-smi" in reason()
    for none in ({"count": 0}, {"count": 0, "status": 100}):
        hip(**none)
        assert "driver and DTK are there, but no DCU is visible" in reason() and "hy-smi" in reason()
    hip()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "torch", None)
        assert "PyTorch is not installed: install the torch wheel of your DTK release" in reason()
    monkeypatch.setattr(torch.version, "hip", None)
    assert "torch.version.hip is missing" in reason() and torch.__version__ in reason()
    monkeypatch.setattr(torch.version, "hip", "6.3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "no DCU is visible" in reason() and "hy-smi" in reason()
    card = SimpleNamespace(name="DCU", gcnArchName="gfx928:sramecc+:xnack-", total_memory=64 << 30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    monkeypatch.setattr(dcu_probe, "launcher_missing", lambda: "the launcher was not built")
    assert "DCU (K100_AI), 64.0 GiB, gfx928" in reason() and "launcher was not built" in reason()
    monkeypatch.setattr(dcu_probe, "launcher_missing", lambda: "")
    found = select.probe("dcu")
    assert found.usable and found.rung == "emulated" and found.devices[0].detail.startswith("gfx928, torch ")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: (_ for _ in ()).throw(RuntimeError("hipErrorX")))
    assert "device query failed: hipErrorX" in reason()


def test_dtk_named_by_rocm_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dcu_probe, "_ROOT", tmp_path)
    (tmp_path / "dev/kfd").mkdir(parents=True)
    (tmp_path / "home/dtk-26.04").mkdir(parents=True)
    monkeypatch.setenv("ROCM_PATH", str(tmp_path / "home/dtk-26.04"))
    assert "/opt/hyhal is missing" in select.probe("dcu").reason
    monkeypatch.setenv("ROCM_PATH", "/opt/rocm")
    assert "no DTK" in select.probe("dcu").reason


class Acl:
    """libascendcl as ctypes would show it."""

    def __init__(self, count: int = 2, fails: str = "", cann: str = "9.1.0") -> None:
        self.count, self.fails, self.cann = count, fails, cann
        self.aclrtGetSocName = lambda: b"Ascend910B3"  # an object that takes a restype, as a ctypes function does

    def aclrtGetDeviceCount(self, out: Any) -> int:
        out._obj.value = self.count
        return 507033 if self.fails == "aclrtGetDeviceCount" else 0

    def aclrtGetDeviceInfo(self, index: int, what: int, out: Any) -> int:
        out._obj.value = 64 << 30
        return 0 if what == 301 else 107000

    def aclsysGetCANNVersion(self, package: int, out: Any) -> int:
        out.value = (self.cann if package == 0 else "25.5.0").encode()
        return 0


def test_ascend_probe_step_by_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def reason() -> str:
        found = select.probe("ascend")
        assert not found.usable
        return found.reason

    def acl(**kind: Any) -> None:
        monkeypatch.setattr(ascend_probe, "load_library", lambda name: (Acl(**kind), ""))

    versions: dict[str, str] = {}
    monkeypatch.setattr(ascend_probe, "_ROOT", tmp_path)
    monkeypatch.setattr(ascend_probe, "package_version", versions.get)
    assert "no /dev/davinci* found" in reason()
    (tmp_path / "dev/davinci_manager").mkdir(parents=True)
    assert "no /dev/davinci* found" in reason()
    (tmp_path / "dev/davinci3").mkdir()
    assert "/usr/local/Ascend/driver is missing" in reason()
    (tmp_path / "usr/local/Ascend/driver").mkdir(parents=True)
    assert "no CANN: ASCEND_HOME_PATH is not set" in reason()
    script = tmp_path / "usr/local/Ascend/ascend-toolkit/set_env.sh"
    script.parent.mkdir()
    script.touch()
    assert "run `source /usr/local/Ascend/ascend-toolkit/set_env.sh`" in reason()
    monkeypatch.setenv("ASCEND_HOME_PATH", "/usr/local/Ascend/ascend-toolkit/latest")
    assert "libascendcl.so not found" in reason() and "source that CANN's set_env.sh again" in reason()
    monkeypatch.setattr(ascend_probe, "load_library", lambda name: (ctypes.CDLL(None), ""))
    assert "aclrtGetDeviceCount" in reason() and "CANN and /dev/davinci3 found" in reason()
    acl(fails="aclrtGetDeviceCount")
    assert "aclrtGetDeviceCount failed with error 507033" in reason() and "npu-smi info" in reason()
    acl(count=0)
    assert "CANN lists no device" in reason()
    acl(cann="8.3.RC1")
    assert "torch is not installed" in reason() and "pip install qwen-rt[ascend]" in reason()
    versions["torch"] = "2.13.0+cpu"
    assert "torch_npu is not installed: pip install torch-npu==2.13.0" in reason()
    assert "CANN 8.3.RC1 goes with torch_npu 2.8.0, 2.7.1, 2.6.0.post3" in reason()
    versions["torch_npu"] = "2.1.0.post6"
    assert "torch_npu 2.1.0.post6 does not fit torch 2.13.0+cpu" in reason()
    versions["torch_npu"] = "2.13.0"
    found = select.probe("ascend")
    assert [d.index for d in found.devices] == [0, 1] and found.rung == "simulated"
    assert found.devices[0].name == "Ascend910B3" and found.devices[0].total_memory == 64 << 30
    assert found.devices[0].detail == "910B or newer, CANN 8.3.RC1, driver 25.5.0"
    assert found.notes == (
        "torch_npu 2.13.0 goes with CANN 9.1.0 or newer, and CANN is 8.3.RC1: update CANN, "
        "or torch_npu 2.8.0 with torch 2.8.0",
    )
    acl()
    assert select.probe("ascend").usable and not select.probe("ascend").notes


def test_ascend_generations() -> None:
    assert all(soc_of(f"Ascend{name}").fused for name in ("910B1", "910B2C", "910B4-1", "910_9391"))
    assert not any(soc_of(f"Ascend{name}").fused for name in ("910A", "910B", "910ProA", "910PremiumA", "310P3"))
    assert soc_of("Ascend910B").known and not soc_of("Ascend310P3").known


# -- the null backend ----------------------------------------------------------------------------------------------
def test_null_backend_records_and_shapes() -> None:
    backend, _ = select.open_backend("null")
    assert isinstance(backend, NullBackend)
    fmt = LinearFormat(16, dtype="bfloat16")

    def unread(start: int, stop: int) -> LinearRows:
        raise AssertionError("the null backend reads no weights")

    w = backend.pack_linear(RawLinear("w", (6, 4), fmt, unread))
    kv = backend.alloc_kv(KVSpec(1, 2, 8, 16, "int8"), 10)
    plan = backend.plan(BatchMeta([2], [2], [[3]], [48, 49]))
    assert backend.linear(np.zeros((2, 4)), w).shape == (2, 6)
    assert backend.embedding(np.array([1, 2, 3]), w).shape == (3, 4)
    assert backend.attention(np.zeros((2, 4, 8)), kv, 0, plan, 1.0).shape == (2, 4, 8)
    assert backend.silu_mul(np.zeros((2, 10))).shape == (2, 5)
    x, r = np.ones((2, 4)), np.ones((2, 4))
    normed, summed = backend.rms_norm(x, np.ones(4), 1e-6, r)
    assert normed.shape == x.shape and summed is r
    assert backend.ops() == [
        "pack_linear",
        "alloc_kv",
        "plan",
        "linear",
        "embedding",
        "attention",
        "silu_mul",
        "rms_norm",
    ]
    assert backend.calls[3].args == ((2, 4), (6, 4))
    with pytest.raises(ValueError, match="the weight takes"):
        backend.linear(np.zeros((2, 5)), w)
    with pytest.raises(ValueError, match="slot"):
        backend.plan(BatchMeta([1], [1], [[3]], [0]))


def test_null_backend_samples_its_script() -> None:
    backend = NullBackend(tokens=(5, 6, 7))
    assert backend.sample(np.zeros((2, 9)), [SampleRow(), SampleRow()]) == [5, 6]
    assert backend.sample(np.zeros((2, 9)), [SampleRow(), SampleRow()]) == [7, 5]
    assert NullBackend().sample(np.zeros((1, 9)), [SampleRow()]) == [0]
    assert not {"null", "cuda-emulated", "dcu-emulated"} & set(select.names())
