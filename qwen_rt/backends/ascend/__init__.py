"""Ascend NPUs. This version probes the way from the driver to torch_npu; the backend itself comes later."""

from __future__ import annotations

from pathlib import Path

from qwen_rt import config
from qwen_rt.backends.base import Backend, Probe
from qwen_rt.backends.probing import load_library, package_version

_ROOT = Path("/")  # tests put a made-up machine here
_ACL = "libascendcl.so"
_SCRIPTS = ("usr/local/Ascend/ascend-toolkit/set_env.sh", "usr/local/Ascend/cann/set_env.sh")


class AscendBackend(Backend):
    """NPUs by torch_npu index."""

    name = "ascend"

    @classmethod
    def probe(cls) -> Probe:
        """The first thing missing on the way to a usable NPU, or what was found. torch_npu is not imported."""
        missing = _missing()
        if missing:
            return Probe(reason=missing)
        cards = ", ".join(f"/dev/{c.name}" for c in _cards())
        return Probe(
            reason=f"found {cards} with CANN and torch_npu {package_version('torch_npu')}; "
            "but the Ascend backend is not built yet in this version of qwen_rt: use device='cpu'"
        )


def _cards() -> list[Path]:
    return sorted((_ROOT / "dev").glob("davinci[0-9]*"))


def _missing() -> str:
    """What keeps this machine from using an NPU, one step after the other; "" when nothing does."""
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
    home = config.Settings.from_env().ascend_home
    if not home:
        for script in _SCRIPTS:
            if (_ROOT / script).exists():
                return f"CANN is installed, but its environment is not set: run `source /{script}` in this shell first"
        return (
            "NPU and driver found, but no CANN: ASCEND_HOME_PATH is not set and /usr/local/Ascend holds no set_env.sh; "
            "install the CANN toolkit and kernels, then source its set_env.sh"
        )
    acl, why = load_library(_ACL)
    if acl is None:
        return f"ASCEND_HOME_PATH is {home}, but {why}; source that CANN's set_env.sh again (it sets LD_LIBRARY_PATH)"
    torch, torch_npu = package_version("torch") or "", package_version("torch_npu")
    release = torch.split("+")[0]
    if torch_npu is None:
        return f"CANN found, but torch_npu is not installed: pip install torch-npu=={release}"
    if torch_npu.split(".")[:2] != release.split(".")[:2]:
        return f"torch_npu {torch_npu} does not fit torch {torch}: pip install torch-npu=={release} (same major.minor)"
    return ""
