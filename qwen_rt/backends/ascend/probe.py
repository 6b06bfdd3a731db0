"""What an NPU needs, step by step: card, driver, CANN, its environment, torch, torch_npu; and the versions that fit.

CANN's own runtime is asked first. Only when it does not answer is the machine looked at for the reason. torch and
torch_npu are not imported: their versions come from the installed packages.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from qwen_rt import config
from qwen_rt.backends.ascend.soc import soc_of
from qwen_rt.backends.base import DeviceInfo, Probe
from qwen_rt.backends.probing import load_library, package_version

_ROOT = Path("/")  # tests put a made-up machine here
_ACL = "libascendcl.so"
_SCRIPTS = ("usr/local/Ascend/ascend-toolkit/set_env.sh", "usr/local/Ascend/cann/set_env.sh")
_TOTAL_MEMORY = 301  # ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE
_PACKAGES = {"CANN": 0, "driver": 7}  # aclCANNPackageName

PAIR = "`pip install qwen-rt[ascend]` installs a pair that fits (torch 2.13.0, torch_npu 2.13.0; CANN 9.1 or newer)"

# torch_npu package -> CANN, from the version table of Ascend/pytorch (COMPATIBILITY.md, 2026-07). Newest first.
FITS = (
    ("2.12.0", "9.1.0"),
    ("2.11.0", "9.1.0"),
    ("2.10.0.post4", "9.1.0"),
    ("2.9.0.post6", "9.1.0"),
    ("2.7.1.post8", "9.1.0"),
    ("2.10.0", "9.0.0"),
    ("2.9.0.post2", "9.0.0"),
    ("2.8.0.post4", "9.0.0"),
    ("2.7.1.post4", "9.0.0"),
    ("2.9.0", "8.5.0"),
    ("2.8.0.post2", "8.5.0"),
    ("2.7.1.post2", "8.5.0"),
    ("2.6.0.post5", "8.5.0"),
    ("2.8.0", "8.3.RC1"),
    ("2.7.1", "8.3.RC1"),
    ("2.6.0.post3", "8.3.RC1"),
    ("2.6.0", "8.2.RC1"),
    ("2.5.1.post1", "8.2.RC1"),
    ("2.5.1", "8.1.RC1"),
)


def probe() -> Probe:
    """Every NPU, or the first thing that is missing or out of step. Never raises."""
    acl, why = load_library(_ACL)
    if acl is None:
        return Probe(reason=_missing(why))
    try:
        count = _count(acl)
    except (OSError, AttributeError) as e:
        return Probe(reason=_no_device(str(e)))
    if not count:
        return Probe(reason=_no_device("CANN lists no device"))
    cann, driver = (_version(acl, name) for name in ("CANN", "driver"))
    if reason := _torch_missing(cann):
        return Probe(reason=reason)
    try:
        name = acl.aclrtGetSocName
        name.restype = ctypes.c_char_p
        soc = soc_of((name() or b"unknown").decode(errors="replace"))
        detail = f"{soc.generation}, CANN {cann or 'of unknown version'}" + (f", driver {driver}" if driver else "")
        devices = tuple(DeviceInfo(i, soc.name, _memory(acl, i), detail) for i in range(count))
    except (OSError, AttributeError) as e:
        return Probe(reason=f"CANN lists {count} devices, but {e}")
    notes = [] if soc.fused else [f"{soc.name} has no fused attention or quantised products: plain operators serve"]
    if misfit := _misfit(package_version("torch_npu") or "", cann):
        notes.append(misfit)
    return Probe(devices, rung="simulated", notes=tuple(notes))


def _cards() -> list[Path]:
    return sorted((_ROOT / "dev").glob("davinci[0-9]*"))


def _card_missing() -> str:
    if not _cards():
        return (
            "no Ascend NPU: no /dev/davinci* found; with a card, install the Ascend driver and firmware "
            "(in a container: --device=/dev/davinci0, and the same for davinci_manager, devmm_svm and hisi_hdc)"
        )
    if not (_ROOT / "usr/local/Ascend/driver").exists():
        return (
            "NPU found, but its driver is not: /usr/local/Ascend/driver is missing; install the Ascend HDK driver "
            "(in a container: -v /usr/local/Ascend/driver:/usr/local/Ascend/driver)"
        )
    return ""


def _missing(why: str) -> str:
    """Why libascendcl.so did not load."""
    if reason := _card_missing():
        return reason
    home = config.Settings.from_env().ascend_home
    if home:
        return f"ASCEND_HOME_PATH is {home}, but {why}; source that CANN's set_env.sh again (it sets LD_LIBRARY_PATH)"
    for script in _SCRIPTS:
        if (_ROOT / script).exists():
            return f"CANN is installed, but its environment is not set: run `source /{script}` in this shell first"
    return (
        "NPU and driver found, but no CANN: ASCEND_HOME_PATH is not set and /usr/local/Ascend holds no set_env.sh; "
        "install the CANN toolkit and kernels, then source its set_env.sh"
    )


def _no_device(why: str) -> str:
    """Why CANN, although it loads, shows no device."""
    return _card_missing() or (
        f"CANN and {', '.join(f'/dev/{c.name}' for c in _cards())} found, but {why}; see `npu-smi info`, the rights of "
        "/dev/davinci*, ASCEND_RT_VISIBLE_DEVICES, and whether driver and CANN are of releases that go together"
    )


def _torch_missing(cann: str) -> str:
    """What of torch and torch_npu is missing or out of step; "" when nothing is."""
    torch, torch_npu = package_version("torch"), package_version("torch_npu")
    fits = fitting(cann)
    other = f"; CANN {cann} goes with torch_npu {', '.join(fits)}" if fits else ""
    if torch is None:
        return f"CANN found, but torch is not installed: {PAIR}{other}"
    release = torch.split("+")[0]
    if torch_npu is None:
        return (
            f"CANN found, but torch_npu is not installed: pip install torch-npu=={release} (for torch {torch}{other})"
        )
    if torch_npu.split(".")[:2] != release.split(".")[:2]:
        return (
            f"torch_npu {torch_npu} does not fit torch {torch}: pip install torch-npu=={release} (same major.minor); "
            f"{PAIR}"
        )
    return ""


def fitting(cann: str) -> list[str]:
    """Releases of torch_npu that go with a version of CANN, newest first; [] when none is known."""
    return [npu for npu, wants in FITS if _series(wants) == _series(cann)]


def _misfit(torch_npu: str, cann: str) -> str:
    """A word where CANN is older than what this torch_npu was released for; "" when it is not, or nobody knows."""
    wants = dict(FITS).get(torch_npu)
    if wants is None and _numbers(torch_npu) > _numbers(FITS[0][0]):
        wants = FITS[0][1]  # newer than the table: at least what its newest release wants
    if not wants or not cann or _numbers(cann) >= _numbers(wants):
        return ""
    fits = fitting(cann)
    also = f", or torch_npu {fits[0]} with torch {'.'.join(fits[0].split('.')[:3])}" if fits else ""
    return f"torch_npu {torch_npu} goes with CANN {wants} or newer, and CANN is {cann}: update CANN{also}"


def _series(version: str) -> tuple[int, ...]:
    return _numbers(version)[:2]


def _numbers(version: str) -> tuple[int, ...]:
    """ "8.3.RC1" -> (8, 3); "2.9.0.post2" -> (2, 9, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


# -- CANN's runtime ------------------------------------------------------------------------------------------------
def _count(acl: ctypes.CDLL) -> int:
    count = ctypes.c_uint32()
    if status := acl.aclrtGetDeviceCount(ctypes.byref(count)):
        raise OSError(f"aclrtGetDeviceCount failed with error {status}")
    return count.value


def _memory(acl: ctypes.CDLL, index: int) -> int:
    """Bytes of HBM; 0 when this CANN cannot say without opening the device."""
    total = ctypes.c_int64()
    ask = getattr(acl, "aclrtGetDeviceInfo", None)
    return 0 if ask is None or ask(index, _TOTAL_MEMORY, ctypes.byref(total)) else total.value


def _version(acl: ctypes.CDLL, package: str) -> str:
    """Version of "CANN" or "driver"; "" when this CANN does not say."""
    ask = getattr(acl, "aclsysGetCANNVersion", None)
    answer = ctypes.create_string_buffer(4096)  # aclCANNPackageVersion; its first field is the whole version
    return "" if ask is None or ask(_PACKAGES[package], answer) else answer.value.decode(errors="replace")
